"""Published LoRA files that turn a model into a few-step one: what they want, by their names; no tensor says it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qdeploy.models.options import LoraFile
from qdeploy.sampling import replace_scheduler


@dataclass(frozen=True)
class FewStepLora:
    """A family of files.

    mark: in the file's name, or in its folder's where the file has the name that diffusers gives every one.
    scheduler: as `--scheduler` takes it.
    steps: where the file's name says none.
    """

    mark: re.Pattern[str]
    name: str
    scheduler: str
    steps: int = 4


FAMILIES = (
    FewStepLora(re.compile(r"lightning"), "SDXL-Lightning", "euler:trailing"),
    FewStepLora(re.compile(r"hyper[-_]?sd"), "Hyper-SD", "ddim:trailing", 8),
    FewStepLora(re.compile(r"(?<![a-z])lcm(?![a-z])"), "LCM-LoRA", "lcm"),
    FewStepLora(re.compile(r"turbo"), "Turbo", "euler-a:trailing"),
    FewStepLora(re.compile(r"dmd2"), "DMD2", "lcm"),
)
STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?")
DIFFUSERS_NAME = "pytorch_lora_weights"
WITH_GUIDANCE = re.compile(r"(?<![a-z])cfg(?![a-z])")  # Hyper-SD's that keep classifier-free guidance


def advise_loras(loras: Iterable[LoraFile], config: Mapping[str, Any]) -> tuple[str, ...]:
    """A hint for each LoRA whose family wants another scheduler than the settings ``config``; for one step too."""
    return tuple(text for lora in loras for text in _advise(lora, config))


def _advise(lora: LoraFile, config: Mapping[str, Any]) -> Iterable[str]:
    name = lora.path.name.lower()
    if name.startswith(DIFFUSERS_NAME):
        name = f"{lora.path.absolute().parent.name.lower()}/{name}"
    family = next((one for one in FAMILIES if one.mark.search(name)), None)
    if family is None:
        return
    match = STEPS.search(name)
    steps = family.steps if match is None else int(match[1])
    start = f"note: {lora.path.name} is by its name a LoRA of {family.name}"
    if steps < 2:
        yield f"{start} for one step, whose timestep is one of its own and not offered here; take one for 2 or more"
    elif replace_scheduler(config, family.scheduler) != config:
        guidance = 5 if WITH_GUIDANCE.search(name) else 1
        yield (
            f"{start}: calibrate and export with --scheduler {family.scheduler}, and run {steps} steps at --guidance "
            f"{guidance}, for which it was trained"
        )
