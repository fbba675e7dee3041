"""The calibration modes by name: the options that each one reads, and one function that runs any of them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qdeploy.base.errors import ModelError, UsageError
from qdeploy.base.outputs import check_room
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.checkpoint import checkpoint_folder
from qdeploy.calibrate.dataset import CalibrationSet, check_shapes
from qdeploy.calibrate.dataset_file import save_calibration
from qdeploy.calibrate.record.noise_data import NoiseDataSettings, calibration_from_noise
from qdeploy.calibrate.record.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.record.qdiffusion import calibration_from_qdiffusion, save_qdiffusion
from qdeploy.calibrate.record.raw_data import RawDataSettings, calibration_from_pictures
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.models.few_step_loras import advise_loras
from qdeploy.models.options import ModelOptions
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling import split_scheduler
from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.sampling.choose_settings import choose_scheduler_settings
from qdeploy.sampling.few_steps import advise_few_steps
from qdeploy.sampling.speed import EXACT

QDIFFUSION_SUFFIX = ".pt"
COMMON = frozenset(["mode", "prompts", "samples", "steps", "scheduler", "seed"])
OPTIONS: Mapping[str, frozenset[str]] = {
    "timestep_aware": COMMON | {"record", "guidance", "guidance_interval", "forecast", "speed", "batch", "eta"},
    "noise_data": COMMON,
    "raw_data": COMMON | {"data", "batch"},
    "from_qdiffusion": frozenset(["from_qdiffusion", "cali_st", "cali_n"]),
}
MAX_CONTEXTS = 1000  # different prompts that are counted; more of them are rare
MODES = tuple(OPTIONS)[:3]
TEXT_OPTIONS = frozenset(["prompts", "guidance", "guidance_interval"])


@dataclass(frozen=True)
class CalibrationRequest:
    """The user's options; one that the mode does not read has its default."""

    mode: str = "timestep_aware"
    data: Path | None = None
    prompts: Path | None = None
    samples: int = 32
    steps: int = 25
    record: int = 25
    guidance: float = 7.5
    scheduler: str | None = None
    eta: float = 0.0
    seed: int = 0
    batch: int = 8
    from_qdiffusion: Path | None = None
    cali_st: int | None = None
    cali_n: int | None = None
    guidance_interval: tuple[float, float] | None = None
    forecast: str | None = None
    speed: str = EXACT

    @property
    def calls(self) -> CallSchedule:
        """Which model calls a trajectory makes."""
        return CallSchedule.from_options(self.guidance_interval, self.forecast, self.speed)


def check_request(request: CalibrationRequest, typed: Set[str], out: Path) -> None:
    """UsageError when an option in ``typed`` (names of those typed) would be ignored, or one is missing."""
    if request.mode not in MODES:
        raise UsageError(f"--mode: got {request.mode!r}, expected one of {', '.join(MODES)}")
    mode = request.mode if request.from_qdiffusion is None else "from_qdiffusion"
    for name in sorted(typed - OPTIONS[mode]):
        readers = [format_option(other) for other, names in OPTIONS.items() if name in names]
        raise UsageError(
            f"{format_option(name)} does not go with {format_option(mode)}; only with {' or '.join(readers)}"
        )
    settings_from_request(request)
    if mode == "raw_data" and out.suffix == QDIFFUSION_SUFFIX:
        raise UsageError(
            f"-o {out}: Q-Diffusion's layout holds whole trajectories, and raw_data draws a timestep for each picture; "
            "write a .safetensors file"
        )
    if request.guidance_interval is not None and out.suffix == QDIFFUSION_SUFFIX:
        raise UsageError(
            f"-o {out}: Q-Diffusion's layout has both guidance halves of every sample, and --guidance-interval records "
            "only one outside the interval; write a .safetensors file"
        )
    if request.seed < 0:
        raise UsageError(f"--seed: got {request.seed}, expected 0 or more")
    if request.eta != 0 and request.scheduler is not None and split_scheduler(request.scheduler)[0] != "ddim":
        raise UsageError(f"--eta: only ddim takes noise this way, not --scheduler {request.scheduler}")


def check_text_options(model: LatentDiffusion, typed: Set[str]) -> None:
    """UsageError when an option in ``typed`` is about text and ``model`` reads none."""
    for name in sorted(typed & TEXT_OPTIONS):
        if not model.reads_text:
            raise UsageError(f"{format_option(name)}: {model.source} is unconditional and takes none")


def list_notes(
    model: LatentDiffusion, request: CalibrationRequest, typed: Set[str], options: ModelOptions
) -> tuple[str, ...]:
    """Hints where a few-step model or LoRA is recorded with settings that it was not made for."""
    if request.mode != MODES[0] or request.from_qdiffusion is not None:
        return ()
    config = choose_scheduler_settings(model.scheduler_config, request.scheduler, request.calls)
    guidance = request.guidance if model.is_guided and "guidance" not in typed else None
    hint = advise_few_steps(config, None if "steps" in typed else request.steps, guidance)
    return (*advise_loras(options.loras, config), *([hint] if hint else []))


def format_option(name: str) -> str:
    """A mode or option as it is typed."""
    return f"--mode {name}" if name in MODES else "--" + name.replace("_", "-")


def calibrate_to_file(
    model: LatentDiffusion, request: CalibrationRequest, out: Path, on_progress: OnProgress = ignore_progress
) -> CalibrationSet:
    """Make the set and write it: Q-Diffusion's layout for ``.pt``, else safetensors.

    An interrupted timestep_aware run leaves its finished batches next to ``out``, where the next run resumes.
    """
    reads_more = model.pooled_width is not None or model.guidance_channels is not None
    if reads_more and (request.from_qdiffusion is not None or out.suffix == QDIFFUSION_SUFFIX):
        raise UsageError(
            f"{model.source}: its UNet reads more than x, t and text, which Q-Diffusion's layout cannot hold; "
            "calibrate this model to a .safetensors file"
        )
    check_room(out, estimate_bytes(model, request, out))
    with checkpoint_folder(out) as checkpoint:
        calibration = run_calibration(model, request, on_progress, checkpoint)
        check_shapes(calibration, model.latents.shape, model.context_shape, model.pooled_width, model.guidance_channels)
        save = save_qdiffusion if out.suffix == QDIFFUSION_SUFFIX else save_calibration
        save(calibration, out)
    return calibration


def estimate_bytes(model: LatentDiffusion, request: CalibrationRequest, out: Path) -> int:
    """About what the set takes on disk; nothing for a conversion, whose file says it only when it is read."""
    if request.from_qdiffusion is not None:
        return 0
    kept = request.samples * (min(request.record, request.steps) if request.mode == "timestep_aware" else 1)
    latents, context = prod(model.latents.shape), prod(model.context_shape or (0,))
    if out.suffix == QDIFFUSION_SUFFIX:  # float32, and a text embedding with each sample
        return 4 * kept * (latents + context)
    return 2 * ((kept + request.samples) * latents + min(request.samples, MAX_CONTEXTS) * context)


def run_calibration(
    model: LatentDiffusion,
    request: CalibrationRequest,
    on_progress: OnProgress = ignore_progress,
    checkpoint: Path | None = None,
) -> CalibrationSet:
    """Run the mode that ``request`` names; ModelError for a UNet that reads what no mode provides."""
    if model.guidance_channels is not None and (request.mode != MODES[0] or request.from_qdiffusion is not None):
        raise UsageError(
            f"{model.source}: its UNet reads the guidance scale (`time_cond_proj_dim`), which only --mode {MODES[0]} "
            "records"
        )
    if model.unet.in_channels != model.latents.channels:
        raise ModelError(
            f"{model.source}: its UNet inpaints: it reads a mask besides latents, which calibration does not record "
            "yet; export it in fp32"
        )
    if request.from_qdiffusion is not None:
        return calibration_from_qdiffusion(request.from_qdiffusion, request.cali_st, request.cali_n)
    settings = settings_from_request(request)
    prompts = _draw_prompts(model, request)
    if isinstance(settings, NoiseDataSettings):
        return calibration_from_noise(model, prompts, settings)
    if isinstance(settings, RawDataSettings):
        return calibration_from_pictures(model, prompts, settings, on_progress)
    return record_trajectories(model, prompts, settings, on_progress, checkpoint)


def settings_from_request(request: CalibrationRequest) -> TimestepAwareSettings | NoiseDataSettings | RawDataSettings:
    """The mode's own settings, checked."""
    samples, steps, scheduler, seed = request.samples, request.steps, request.scheduler, request.seed
    if request.mode == "timestep_aware":
        return TimestepAwareSettings(
            samples, steps, request.record, request.guidance, scheduler, seed, request.batch, request.eta,
            request.calls,
        )  # fmt: skip
    if request.mode == "noise_data":
        return NoiseDataSettings(samples, steps, scheduler, seed)
    if request.data is None:
        raise UsageError("--mode raw_data needs --data: a folder of pictures or an LSUN lmdb")
    return RawDataSettings(request.data, samples, steps, scheduler, seed, request.batch)


def _draw_prompts(model: LatentDiffusion, request: CalibrationRequest) -> list[str]:
    """One random prompt a sample; none for an unconditional model."""
    if model.reads_text:
        return draw_prompts(read_prompts(request.prompts, model.folder), request.samples, request.seed)
    if request.prompts is not None:
        raise UsageError(f"--prompts: {model.source} is unconditional and takes none")
    return []
