"""The noise schedule and the latents' scale, from a checkpoint's buffers or its YAML, in diffusers' terms."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints.kinds import SD1, TEXT2IMG
from qdeploy.models.checkpoints.original_config import MAX_SCALE, MAX_TIMESTEPS, OriginalConfig

# The original's names for two ramps; its "linear" is linear in the square root.
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors that trainers leave in a file as marks (A1111 issue 16567)
SD1_BETAS = (0.00085, 0.012, 1000)
LEAST_SCALE = 1e-6
SD1_SCALE = TEXT2IMG_SCALE = 0.18215  # v1-inference.yaml, txt2img-1p4B-eval.yaml
LEAST_BETA = 1e-8
FLOAT32_ROUND_OFF = 1e-5  # relative; the buffer is float32, its ramp was computed in float64
ASK = "give the original YAML (--config FILE.yaml)"


def read_scheduler_config(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None) -> dict[str, Any]:
    """A ``read_scheduler_config.json``: PNDM (the original's PLMS) for Stable Diffusion, else DDIM, steps from 1 on."""
    prediction = _read_prediction(tensors, config)
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
    if kind == SD1 and prediction != "sample":
        return dict(_class_name="PNDMScheduler", skip_prk_steps=True, **common)
    return dict(_class_name="DDIMScheduler", clip_sample=False, **common)


def read_scaling_factor(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None, vq: bool) -> float:
    """What the first stage's latents are multiplied by: the file's buffer, the YAML's number, or the published one."""
    if "scale_factor" in tensors:
        return _read_scale(tensors["scale_factor"])
    stated = None if config is None else config.number("scale_factor", low=LEAST_SCALE)
    if stated is not None:
        return float(stated)
    measured = config is not None and config.model.get("scale_by_std") is True
    if not measured and (vq or config is not None):
        return 1.0  # the original's default
    if not measured and kind in (SD1, TEXT2IMG):
        return SD1_SCALE
    raise ModelError(f"the file has no `scale_factor`; {ASK}")


def _read_scale(scale: Tensor) -> float:
    if scale.numel() != 1 or not LEAST_SCALE <= float(scale) <= MAX_SCALE:
        got = reprlib.repr(scale.flatten()[:3].tolist())
        raise ModelError(f"`scale_factor` is {got}, expected one number from {LEAST_SCALE:g} to {MAX_SCALE:g}; {ASK}")
    return float(scale)


def _read_prediction(tensors: Mapping[str, Tensor], config: OriginalConfig | None) -> str:
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
    return PREDICTIONS["eps" if stated is None else stated]


def _read_betas(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None) -> dict[str, Any]:
    stated = None if config is None else _read_ramp(config)
    if "betas" in tensors:
        return _read_buffer(tensors["betas"].double(), stated, config)
    if stated is not None:
        return stated
    if kind == SD1:
        return _build_ramp("scaled_linear", *SD1_BETAS)
    raise ModelError(f"the file has no `betas`; {ASK}")


def _read_buffer(betas: Tensor, stated: dict[str, Any] | None, config: OriginalConfig | None) -> dict[str, Any]:
    """The file's own schedule, as a ramp where it is one; the YAML must say the same."""
    if betas.dim() != 1 or not 1 <= len(betas) <= MAX_TIMESTEPS or not ((betas > 0) & (betas < 1)).all():
        raise ModelError(f"`betas` has shape {list(betas.shape)} or numbers beyond 0 to 1, expected a schedule; {ASK}")
    steps = None if config is None else config.integer("timesteps", high=MAX_TIMESTEPS)
    if (stated is not None and not _matches_ramp(betas, stated)) or steps not in (None, len(betas)):
        raise ModelError("the YAML's `linear_start`, `linear_end` or `timesteps` are not those of the file's `betas`")
    ramp = stated or _guess_ramp(betas)
    return ramp if _matches_ramp(betas, ramp) else ramp | {"trained_betas": betas.tolist()}


def _read_ramp(config: OriginalConfig) -> dict[str, Any] | None:
    """None where the YAML leaves it to the file."""
    start, end = (config.number(name, low=LEAST_BETA, high=1) for name in ("linear_start", "linear_end"))
    schedule = config.model.get("beta_schedule", "linear")
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ModelError(f"{config.path}: `beta_schedule` is {reprlib.repr(schedule)}, supported: {known}")
    steps = config.integer("timesteps", high=MAX_TIMESTEPS) or 1000
    if start is None and end is None:
        return None
    if start is None or end is None:
        raise ModelError(f"{config.path}: `linear_start` or `linear_end` is missing; {ASK}")
    return _build_ramp(SCHEDULES[schedule], start, end, steps)


def _guess_ramp(betas: Tensor) -> dict[str, Any]:
    """The round numbers that float32 ends stand for."""
    return _build_ramp("scaled_linear", float(f"{betas[0]:.6g}"), float(f"{betas[-1]:.6g}"), len(betas))


def _build_ramp(schedule: str, start: float, end: float, steps: int) -> dict[str, Any]:
    return dict(beta_schedule=schedule, beta_start=start, beta_end=end, num_train_timesteps=steps)


def _matches_ramp(betas: Tensor, ramp: Mapping[str, Any]) -> bool:
    """Whether ``float[steps]`` is the ramp."""
    power = 0.5 if ramp["beta_schedule"] == "scaled_linear" else 1.0
    start, end, steps = ramp["beta_start"] ** power, ramp["beta_end"] ** power, ramp["num_train_timesteps"]
    expected = torch.linspace(start, end, steps, dtype=torch.float64) ** (1 / power)
    return betas.shape == expected.shape and torch.allclose(betas, expected, rtol=FLOAT32_ROUND_OFF, atol=0)
