"""The noise schedule and the latents' scale, from a checkpoint's buffers or its YAML, in diffusers' terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints.kinds import SD1, TEXT2IMG
from qdeploy.models.checkpoints.original_config import OriginalConfig

# The original's names for two ramps; its "linear" is linear in the square root.
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SD1_BETAS = (0.00085, 0.012, 1000)
SD1_SCALE = TEXT2IMG_SCALE = 0.18215  # v1-inference.yaml, txt2img-1p4B-eval.yaml
FLOAT32_ROUND_OFF = 1e-5  # relative; the buffer is float32, its ramp was computed in float64
ASK = "give the original YAML (--config FILE.yaml)"


def read_scheduler_config(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None) -> dict[str, Any]:
    """A ``read_scheduler_config.json``: PNDM (the original's PLMS) for Stable Diffusion, else DDIM, steps from 1 on."""
    common = dict(
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type=_read_prediction(config),
        **_read_betas(kind, tensors, config),
    )
    if kind == SD1:
        return dict(_class_name="PNDMScheduler", skip_prk_steps=True, **common)
    return dict(_class_name="DDIMScheduler", clip_sample=False, **common)


def read_scaling_factor(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None, vq: bool) -> float:
    """What the first stage's latents are multiplied by: the file's buffer, the YAML's number, or the published one."""
    if "scale_factor" in tensors:
        return float(tensors["scale_factor"])
    stated = None if config is None else config.number("scale_factor")
    if stated is not None:
        return float(stated)
    measured = config is not None and config.model.get("scale_by_std") is True
    if not measured and (vq or config is not None):
        return 1.0  # the original's default
    if not measured and kind in (SD1, TEXT2IMG):
        return SD1_SCALE
    raise ModelError(f"the file has no `scale_factor`; {ASK}")


def _read_prediction(config: OriginalConfig | None) -> str:
    stated = "eps" if config is None else config.model.get("parameterization", "eps")
    if stated not in PREDICTIONS:
        raise ModelError(f"`parameterization` is {stated!r}, supported: {', '.join(PREDICTIONS)}")
    return PREDICTIONS[stated]


def _read_betas(kind: str, tensors: Mapping[str, Tensor], config: OriginalConfig | None) -> dict[str, Any]:
    stated = None if config is None else _read_ramp(config)
    if "betas" in tensors:
        betas = tensors["betas"].double()
        ramp = stated or _guess_ramp(betas)
        if stated is not None and not _matches_ramp(betas, stated):
            raise ModelError(
                "the YAML's `linear_start`, `linear_end` or `timesteps` are not those of the file's `betas`"
            )
        return ramp if _matches_ramp(betas, ramp) else ramp | {"trained_betas": betas.tolist()}
    if stated is not None:
        return stated
    if kind == SD1:
        return _build_ramp("scaled_linear", *SD1_BETAS)
    raise ModelError(f"the file has no `betas`; {ASK}")


def _read_ramp(config: OriginalConfig) -> dict[str, Any] | None:
    """None where the YAML leaves it to the file."""
    start, end = config.number("linear_start"), config.number("linear_end")
    schedule = config.model.get("beta_schedule", "linear")
    if start is None or end is None:
        return None
    if schedule not in SCHEDULES:
        raise ModelError(f"{config.path}: `beta_schedule` is {schedule!r}, supported: {', '.join(SCHEDULES)}")
    return _build_ramp(SCHEDULES[schedule], start, end, int(config.number("timesteps") or 1000))


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
