"""Hints on a request whose settings are allowed, and are hardly what the bundle's model was made for."""

from __future__ import annotations

from qdeploy.artifacts.bundle import SCHEDULER, Bundle
from qdeploy.artifacts.components import GUIDANCE_INPUT
from qdeploy.base.errors import BundleError
from qdeploy.sampling import replace_scheduler
from qdeploy.sampling.config_file import read_scheduler_file
from qdeploy.sampling.few_steps import advise_few_steps


def advise_request(
    bundle: Bundle, scheduler: str | None, steps: int | None, guidance_scale: float | None
) -> str | None:
    """Where a few-step model is asked with a default, None for settings that were chosen; None without a hint."""
    config = read_scheduler_file(bundle.path(SCHEDULER), error=BundleError, remedy="export the bundle again")
    config = config if scheduler is None else replace_scheduler(config, scheduler)
    is_guided = bundle.manifest.reads_text and GUIDANCE_INPUT not in bundle.manifest.unet.inputs
    return advise_few_steps(config, steps, guidance_scale if is_guided else None)
