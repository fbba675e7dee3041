"""The calibration modes by name: which options each one reads, and one call that runs any of them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from qdeploy.calibrate.checkpoint import checkpoint_beside
from qdeploy.calibrate.dataset import CalibrationSet, check_fits, save_calibration
from qdeploy.calibrate.noise_data import NoiseData, calibration_from_noise
from qdeploy.calibrate.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.qdiffusion import calibration_from_qdiffusion, save_qdiffusion
from qdeploy.calibrate.raw_data import RawData, calibration_from_pictures
from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories
from qdeploy.errors import ModelError, UsageError
from qdeploy.models.source import LatentDiffusion
from qdeploy.progress import OnProgress, silent

QDIFFUSION_SUFFIX = ".pt"
COMMON = frozenset(["mode", "prompts", "samples", "steps", "sampler", "seed"])
OPTIONS: Mapping[str, frozenset[str]] = {
    "timestep_aware": COMMON | {"record", "guidance", "batch", "eta"},
    "noise_data": COMMON,
    "raw_data": COMMON | {"data", "batch"},
    "from_qdiffusion": frozenset(["from_qdiffusion", "cali_st", "cali_n"]),
}
MODES = tuple(OPTIONS)[:3]
TEXT_OPTIONS = frozenset(["prompts", "guidance"])


@dataclass(frozen=True)
class Request:
    """What the user asked for; an option that the mode does not read has its default."""

    mode: str = "timestep_aware"
    data: Path | None = None
    prompts: Path | None = None
    samples: int = 32
    steps: int = 25
    record: int = 25
    guidance: float = 7.5
    sampler: str | None = None
    eta: float = 0.0
    seed: int = 0
    batch: int = 8
    from_qdiffusion: Path | None = None
    cali_st: int | None = None
    cali_n: int | None = None


def check_request(request: Request, given: Set[str], out: Path) -> None:
    """UsageError when an option in ``given`` (names of those typed) would be ignored, or one is missing."""
    if request.mode not in MODES:
        raise UsageError(f"--mode: got {request.mode!r}, expected one of {', '.join(MODES)}")
    way = request.mode if request.from_qdiffusion is None else "from_qdiffusion"
    for name in sorted(given - OPTIONS[way]):
        readers = [option(other) for other, names in OPTIONS.items() if name in names]
        raise UsageError(f"{option(name)} does not go with {option(way)}; only with {' or '.join(readers)}")
    settings_of(request)
    if way == "raw_data" and out.suffix == QDIFFUSION_SUFFIX:
        raise UsageError(
            f"-o {out}: Q-Diffusion's layout holds a sampler's run, and raw_data draws a timestep for each picture; "
            "write a .safetensors file"
        )
    if request.seed < 0:
        raise UsageError(f"--seed: got {request.seed}, expected 0 or more")
    if request.eta != 0 and request.sampler not in (None, "ddim"):
        raise UsageError(f"--eta: only ddim takes noise this way, not --sampler {request.sampler}")


def check_text(model: LatentDiffusion, given: Set[str]) -> None:
    """UsageError when an option in ``given`` is about text and ``model`` reads none."""
    for name in sorted(given & TEXT_OPTIONS):
        if not model.reads_text:
            raise UsageError(f"{option(name)}: {model.source} is unconditional and takes none")


def option(name: str) -> str:
    """A mode or option as it is typed."""
    return f"--mode {name}" if name in MODES else "--" + name.replace("_", "-")


def calibrate_to_file(
    model: LatentDiffusion, request: Request, out: Path, on_progress: OnProgress = silent
) -> CalibrationSet:
    """Make the set and write it: Q-Diffusion's layout for ``.pt``, else safetensors.

    An interrupted timestep_aware run leaves its finished batches beside ``out``, where the next one goes on.
    """
    with checkpoint_beside(out) as checkpoint:
        calibration = calibration_of(model, request, on_progress, checkpoint)
        check_fits(calibration, model.latents.shape, model.context_shape)
        save = save_qdiffusion if out.suffix == QDIFFUSION_SUFFIX else save_calibration
        save(calibration, out)
    return calibration


def calibration_of(
    model: LatentDiffusion, request: Request, on_progress: OnProgress = silent, checkpoint: Path | None = None
) -> CalibrationSet:
    """Run the mode that ``request`` names; ModelError for a UNet that reads a mask, which no mode makes."""
    if model.unet_channels != model.latents.channels:
        raise ModelError(
            f"{model.source}: its UNet inpaints, it reads a mask beside the latents, which calibration does not record "
            "yet; export it in fp32"
        )
    if request.from_qdiffusion is not None:
        return calibration_from_qdiffusion(request.from_qdiffusion, request.cali_st, request.cali_n)
    settings = settings_of(request)
    prompts = _prompts(model, request)
    if isinstance(settings, NoiseData):
        return calibration_from_noise(model, prompts, settings)
    if isinstance(settings, RawData):
        return calibration_from_pictures(model, prompts, settings, on_progress)
    return record_trajectories(model, prompts, settings, on_progress, checkpoint)


def settings_of(request: Request) -> TimestepAware | NoiseData | RawData:
    """The mode's own settings, checked."""
    samples, steps, sampler, seed = request.samples, request.steps, request.sampler, request.seed
    if request.mode == "timestep_aware":
        return TimestepAware(
            samples, steps, request.record, request.guidance, sampler, seed, request.batch, request.eta
        )
    if request.mode == "noise_data":
        return NoiseData(samples, steps, sampler, seed)
    if request.data is None:
        raise UsageError("--mode raw_data needs --data: a folder of pictures or an LSUN lmdb")
    return RawData(request.data, samples, steps, sampler, seed, request.batch)


def _prompts(model: LatentDiffusion, request: Request) -> list[str]:
    """One prompt a sample, drawn; none for an unconditional model."""
    if model.text_encoder is not None:
        return draw_prompts(read_prompts(request.prompts, model.folder), request.samples, request.seed)
    if request.prompts is not None:
        raise UsageError(f"--prompts: {model.source} is unconditional and takes none")
    return []
