"""Recognise a few-step model by its scheduler's settings, and say what it wants; no other file of a model tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAILING = "trailing"
# Classes whose published settings of few-step models say `trailing`: SD-Turbo, SDXL-Turbo, Lightning; Hyper-SD.
TRAILING_CLASSES = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler")
LCM_CLASS = "LCMScheduler"
MOST_STEPS = 8  # that such models are distilled for


def recognise_few_steps(config: Mapping[str, Any]) -> str | None:
    """What in a scheduler's settings is a few-step model's; None where they are another's.

    Models whose first timestep leaves no signal take `trailing` too, and all steps: they predict v or say
    `rescale_betas_zero_snr`.
    """
    name = config.get("_class_name")
    if name == LCM_CLASS:
        return str(name)
    predicts_v = config.get("prediction_type") == "v_prediction"
    if predicts_v or config.get("rescale_betas_zero_snr") or config.get("timestep_spacing") != TRAILING:
        return None
    return f"{name} with {TRAILING} spacing" if name in TRAILING_CLASSES else None


def advise_few_steps(config: Mapping[str, Any], steps: int | None, guidance_scale: float | None) -> str | None:
    """A hint where a few-step model gets defaults that are not its own; None for an option that was chosen."""
    reason = recognise_few_steps(config)
    options = []
    if steps is not None and steps > MOST_STEPS:
        options.append((f"--steps {steps}", "--steps 4"))
    if guidance_scale is not None and guidance_scale not in (0, 1):
        options.append((f"--guidance {guidance_scale:g}", "--guidance 1"))
    if reason is None or not options:
        return None
    defaults, usual = (" ".join(pair) for pair in zip(*options, strict=True))
    return (
        f"note: the scheduler is that of a few-step model ({reason}), and {defaults} is the default for all models; "
        f"give what its authors name, such as {usual}"
    )
