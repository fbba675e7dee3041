"""What diffusers' pipelines correct in a model's settings when they load it, made here alike.

diffusers 0.42: ``StableDiffusionPipeline.__init__`` and ``StableDiffusionInpaintPipeline.__init__``. Files of 2022 were
written before a setting existed, and its default is another one than Stable Diffusion was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdeploy.base.errors import ModelError
from qdeploy.sampling import CLASS_NAMES
from qdeploy.sampling.settings import check_settings

TEXT_TO_IMAGE, INPAINTING = "StableDiffusionPipeline", "StableDiffusionInpaintPipeline"
FIRST_WITH_SAMPLE_SIZE = (0, 9, 0)  # of diffusers, whose older files have the class's default of 32 for 64
SAMPLE_SIZE = 64
MISSING = object()


@dataclass(frozen=True)
class Correction:
    """One setting that is used otherwise than the file has it."""

    setting: str  # with its file
    before: str
    after: str
    reason: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.before} -> {self.after}, {self.reason}"


def correct_scheduler(
    config: Mapping[str, Any], pipeline: str, class_name: str | None = None
) -> tuple[dict[str, Any], tuple[Correction, ...]]:
    """``scheduler_config.json`` as the ``pipeline`` uses it; ModelError or UsageError for a setting that is refused.

    class_name: of ``model_index.json``, which diffusers builds from these settings whatever class they are of.
    """
    chosen, of_class = _set_class(config, class_name)
    corrected, of_prediction = _drop_predict_epsilon(chosen)
    corrections = [*of_class, *of_prediction]
    check_settings(corrected)
    for name, value in _list_scheduler_settings(corrected, pipeline).items():
        before = "missing" if name not in corrected else repr(corrected[name])
        corrected[name] = value
        reason = f"as diffusers' {pipeline} sets it"
        corrections.append(Correction(f"scheduler_config.json `{name}`", before, repr(value), reason))
    return corrected, tuple(corrections)


def correct_sample_size(config: Mapping[str, Any], pipeline: str) -> tuple[Any, tuple[Correction, ...]]:
    """The latents' side of ``unet/config.json``, and what was corrected in it."""
    size = config.get("sample_size")
    if pipeline not in (TEXT_TO_IMAGE, INPAINTING) or type(size) is not int or not 0 < size < SAMPLE_SIZE:
        return size, ()
    version = _read_version(config.get("_diffusers_version"))
    if version is None or version >= FIRST_WITH_SAMPLE_SIZE:
        return size, ()
    reason = f"as diffusers' {pipeline} does for files of diffusers before 0.9.0"
    return SAMPLE_SIZE, (Correction("unet/config.json `sample_size`", str(size), str(SAMPLE_SIZE), reason),)


def _list_scheduler_settings(config: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    """The settings that the pipeline overrides; one that the file leaves out has its class's default."""
    class_name = config.get("_class_name")
    if pipeline not in (TEXT_TO_IMAGE, INPAINTING):
        return {}
    overrides: dict[str, Any] = {}
    if config.get("steps_offset", 0) != 1:
        overrides["steps_offset"] = 1
    clips = config.get("clip_sample", class_name == CLASS_NAMES["ddim"])
    if pipeline == TEXT_TO_IMAGE and clips is True:
        overrides["clip_sample"] = False
    if pipeline == INPAINTING and config.get("skip_prk_steps", class_name != CLASS_NAMES["pndm"]) is False:
        overrides["skip_prk_steps"] = True
    return overrides


def _set_class(config: Mapping[str, Any], class_name: str | None) -> tuple[dict[str, Any], list[Correction]]:
    """With the class of ``model_index.json``, and without settings that the file marks as mere defaults."""
    defaults = config.get("_use_default_values")
    dropped = {"_use_default_values", *(map(str, defaults) if isinstance(defaults, list) else ())}
    kept = {name: value for name, value in config.items() if name not in dropped}
    reason = "`_use_default_values` has it for its class's default"
    corrections = [
        Correction(f"scheduler_config.json `{name}`", repr(config[name]), "left out", reason)
        for name in config
        if name in dropped and not name.startswith("_")
    ]
    if class_name is None or kept.get("_class_name") == class_name:
        return kept, corrections
    before = repr(kept["_class_name"])[:60] if "_class_name" in kept else "missing"
    reason = "as diffusers takes the class of model_index.json"
    renamed = Correction("scheduler_config.json `_class_name`", before, repr(class_name), reason)
    return kept | {"_class_name": class_name}, [renamed, *corrections]


def _drop_predict_epsilon(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Correction]]:
    """Without what diffusers called `prediction_type` before 0.8, and ignores now."""
    predicts = config.get("predict_epsilon", MISSING)
    if predicts is MISSING:
        return dict(config), []
    stated = config.get("prediction_type", "epsilon")
    if predicts not in (True, None) and not (predicts is False and stated == "sample"):
        raise ModelError(
            f"scheduler_config.json `predict_epsilon`: got {predicts!r:.40} with `prediction_type` {stated!r:.40}; "
            "diffusers ignores the first today. Write `prediction_type` 'sample' where the model predicts the picture "
            "or 'epsilon' where it predicts the noise, and remove `predict_epsilon`"
        )
    reason = "a name that `prediction_type` replaced in diffusers 0.8"
    kept = {name: value for name, value in config.items() if name != "predict_epsilon"}
    return kept, [Correction("scheduler_config.json `predict_epsilon`", repr(predicts), "left out", reason)]


def _read_version(text: object) -> tuple[int, ...] | None:
    """The three numbers of ``0.8.0.dev0``; None where there is no version."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", text) if isinstance(text, str) else None
    return None if match is None else tuple(int(part or 0) for part in match.groups())
