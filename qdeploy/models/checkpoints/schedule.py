"""The noise schedule and the latents' scale, from a checkpoint's buffers or its YAML, in diffusers' terms."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints.kinds import SD1, SD2, SDXL, TEXT2IMG, UNET
from qdeploy.models.checkpoints.original_config import MAX_SCALE, MAX_TIMESTEPS, OriginalConfig

# The original's names for two ramps; its "linear" is linear in the square root.
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
GLOBAL_STEP, SD2_BASE_STEP = "global_step", 875_000  # of 512-base-ema.ckpt
SD_CHANNELS = 4
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors that trainers leave in a file as marks (A1111 issue 16567)
RAMP = ("linear_start", "linear_end", "beta_schedule", "timesteps")
SD_BETAS = (0.00085, 0.012, 1000)
ORIGINAL_BETAS = (1e-4, 2e-2, 1000)  # of a YAML that does not say: `DDPM.__init__`
LEAST_SCALE = 1e-6
# v1-inference.yaml, v2-inference.yaml, txt2img-1p4B-eval.yaml, sd_xl_base.yaml
SCALES = {SD1: 0.18215, SD2: 0.18215, TEXT2IMG: 0.18215, SDXL: 0.13025}
SIGMAS = "denoiser.sigmas"
HALF_ROUND_OFF = 2e-3  # relative; some files hold the buffer in float16
LEAST_BETA = 1e-8
FLOAT32_ROUND_OFF = 1e-5  # relative; a buffer is float32 at best, its ramp was computed in float64
ASK = "give the original YAML (--config FILE.yaml)"


def read_scheduler_config(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None) -> dict[str, Any]:
    """A ``scheduler_config.json``: Euler for Stable Diffusion XL, PLMS (PNDM) for 1 and 2, else DDIM; steps from 1."""
    prediction = read_prediction(kind, tensors, config)
    common = dict(
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type=prediction,
        **_read_betas(kind, tensors, config),
    )
    if ZERO_SNR in tensors:  # A1111's marker; the model has learned to begin with pure noise
        spacing = "trailing" if prediction != "epsilon" else "leading"
        zero_snr = dict(rescale_betas_zero_snr=True, timestep_spacing=spacing)
        return dict(_class_name="DDIMScheduler", clip_sample=False, **zero_snr, **common)
    if kind == SDXL:
        return dict(_class_name="EulerDiscreteScheduler", timestep_spacing="leading", **common)
    if kind in (SD1, SD2) and prediction != "sample":
        return dict(_class_name="PNDMScheduler", skip_prk_steps=True, **common)
    return dict(_class_name="DDIMScheduler", clip_sample=False, **common)


def read_scaling_factor(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None, vq: bool) -> float:
    """What the first stage's latents are multiplied by: the file's buffer, the YAML's number, or the published one."""
    stated = None if config is None else config.number("scale_factor", low=LEAST_SCALE)
    measured = config is not None and config.model.get("scale_by_std") is True
    if "scale_factor" in tensors:
        known = None if measured else stated
        return _read_scale(tensors["scale_factor"], known, SCALES.get(kind))
    if stated is not None:
        return float(stated)
    if not measured and (vq or config is not None):
        return 1.0  # the original's default
    if not measured and kind in SCALES:
        return SCALES[kind]
    raise ModelError(f"the file has no `scale_factor`; {ASK}")


def check_sigmas(kind: str, tensors: Mapping[str, Tensor]) -> None:
    """ModelError unless the noise levels of sgm's denoiser are those of Stable Diffusion's schedule."""
    sigmas = tensors.get(SIGMAS)
    if sigmas is None:
        return
    start, end, steps = SD_BETAS
    alpha = (1 - torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2).cumprod(0)
    expected, actual = (1 / alpha - 1).sqrt(), sigmas.double().flatten().sort().values
    if kind != SDXL or actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=HALF_ROUND_OFF):
        raise ModelError(
            f"`{SIGMAS}` are noise levels of another schedule than Stable Diffusion XL's; save it without `{SIGMAS}` "
            "if it has that one, other kinds are not supported"
        )


def _read_scale(scale: Tensor, stated: float | None, published: float | None) -> float:
    """The buffer's number, or the stated or published one that it is in its precision; ModelError where both differ."""
    if scale.numel() != 1 or not LEAST_SCALE <= float(scale) <= MAX_SCALE:
        got = reprlib.repr(scale.flatten()[:3].tolist())
        raise ModelError(f"`scale_factor` is {got}, expected one number from {LEAST_SCALE:g} to {MAX_SCALE:g}; {ASK}")
    tolerance = max(FLOAT32_ROUND_OFF, torch.finfo(scale.dtype).eps if scale.is_floating_point() else 0.0)
    known = published if stated is None else stated
    if known is not None and abs(float(scale) - known) <= tolerance * known:
        return float(known)
    if stated is not None:
        raise ModelError(
            f"the YAML's `scale_factor` is {stated:g} and the file's {float(scale):g}; correct the YAML, or leave it "
            "out there"
        )
    return float(scale)


def read_prediction(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None) -> str:
    """What the UNet predicts, in diffusers' words: by the YAML, a mark in the file, or as :func:`guesses_v` says."""
    stated = None if config is None else config.model.get("parameterization")
    if stated is not None and (not isinstance(stated, str) or stated not in PREDICTIONS):
        raise ModelError(f"`parameterization` is {reprlib.repr(stated)}, supported: {', '.join(PREDICTIONS)}")
    if V_PREDICTION in tensors:
        if stated not in (None, "v"):
            raise ModelError(
                f"the file has the mark `{V_PREDICTION}` of v-prediction and its YAML says `parameterization` "
                f"{stated!r}; correct the YAML, or write `parameterization: v` there"
            )
        return PREDICTIONS["v"]
    if stated is None and guesses_v(kind, tensors, config):
        return PREDICTIONS["v"]
    return PREDICTIONS["eps" if stated is None else stated]


def guesses_v(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None) -> bool:
    """Whether diffusers takes the file for one of v-prediction only because nothing in it says otherwise.

    No tensor tells Stable Diffusion 2's 768-pixel model from its 512-pixel base, which predicts noise; diffusers
    (``_legacy_load_scheduler``) knows the base by its last training step. Inpainting models predict noise.
    """
    if kind != SD2 or config is not None or tensors[f"{UNET}input_blocks.0.0.weight"].shape[1] != SD_CHANNELS:
        return False
    return V_PREDICTION not in tensors and int(tensors.get(GLOBAL_STEP, torch.tensor(0))) != SD2_BASE_STEP


def _read_betas(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None) -> dict[str, Any]:
    if "betas" in tensors:
        betas = tensors["betas"]
        return _read_buffer(betas.double(), torch.finfo(betas.dtype) if betas.is_floating_point() else None, config)
    if config is not None:
        return _read_ramp(config)
    if kind in (SD1, SD2, SDXL):
        return _build_ramp("scaled_linear", *SD_BETAS)
    raise ModelError(f"the file has no `betas`; {ASK}")


def _read_buffer(betas: Tensor, limits: torch.finfo | None, config: OriginalConfig | None) -> dict[str, Any]:
    """The file's own schedule, as a ramp where it is one; what the YAML states must say the same.

    limits: of the type that the file has them in; tools save this buffer in half precision too.
    """
    fits = betas.dim() == 1 and 1 <= len(betas) <= MAX_TIMESTEPS and bool(((betas > 0) & (betas < 1)).all())
    if limits is None or not fits:
        raise ModelError(f"`betas` has shape {list(betas.shape)} or numbers beyond 0 to 1, expected a schedule; {ASK}")
    stated = [] if config is None else [name for name in RAMP if config.model.get(name) is not None]
    if config is not None and {*stated} & {"linear_start", "linear_end"}:
        candidates = [_read_ramp(config)]
    else:
        schedules = SCHEDULES.values() if config is None or "beta_schedule" not in stated else [_read_schedule(config)]
        candidates = [ramp for schedule in schedules for ramp in _guess_ramps(betas, schedule)]
    steps = None if config is None else config.integer("timesteps", high=MAX_TIMESTEPS)
    ramp = next((ramp for ramp in candidates if _matches_ramp(betas, limits, ramp)), None)
    if steps not in (None, len(betas)) or (ramp is None and {*stated} - {"timesteps"}):
        names = ", ".join(f"`{name}`" for name in stated)
        raise ModelError(f"the YAML's {names} are not those of the file's `betas`; correct the YAML, or leave them out")
    return candidates[-1] | {"trained_betas": betas.tolist()} if ramp is None else ramp


def _read_ramp(config: OriginalConfig) -> dict[str, Any]:
    """What the YAML states, and the original's defaults for the rest."""
    first, last, count = ORIGINAL_BETAS
    start, end = (config.number(name, low=LEAST_BETA, high=1) for name in ("linear_start", "linear_end"))
    steps = config.integer("timesteps", high=MAX_TIMESTEPS)
    return _build_ramp(
        _read_schedule(config),
        first if start is None else start,
        last if end is None else end,
        count if steps is None else steps,
    )


def _read_schedule(config: OriginalConfig) -> str:
    """Diffusers' name for the YAML's `beta_schedule`."""
    schedule = config.model.get("beta_schedule")
    schedule = "linear" if schedule is None else schedule
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ModelError(f"{config.path}: `beta_schedule` is {reprlib.repr(schedule)}, supported: {known}")
    return SCHEDULES[schedule]


def _guess_ramps(betas: Tensor, schedule: str) -> list[dict[str, Any]]:
    """Ramps between the round numbers that the first and last of ``betas`` may stand for, the roundest first."""
    start, end = float(betas[0]), float(betas[-1])
    return [
        _build_ramp(schedule, float(f"{start:.{digits}g}"), float(f"{end:.{digits}g}"), len(betas))
        for digits in range(2, 7)
    ]


def _build_ramp(schedule: str, start: float, end: float, steps: int) -> dict[str, Any]:
    return dict(beta_schedule=schedule, beta_start=start, beta_end=end, num_train_timesteps=steps)


def _matches_ramp(betas: Tensor, limits: torch.finfo, ramp: Mapping[str, Any]) -> bool:
    """Whether ``float64[steps]`` is the ramp, as exactly as numbers with these ``limits`` hold it."""
    power = 0.5 if ramp["beta_schedule"] == "scaled_linear" else 1.0
    start, end, steps = ramp["beta_start"] ** power, ramp["beta_end"] ** power, ramp["num_train_timesteps"]
    expected = torch.linspace(start, end, steps, dtype=torch.float64) ** (1 / power)
    relative, absolute = max(FLOAT32_ROUND_OFF, limits.eps), limits.eps * limits.tiny
    return betas.shape == expected.shape and torch.allclose(betas, expected, rtol=relative, atol=absolute)
