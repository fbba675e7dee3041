"""The YAML that the CompVis code trains and samples from, read as plain data: settings that tensors do not show.

Its layout: ``model.params`` holds the schedule, ``scale_factor`` and ``image_size``, and below it ``unet_config``,
``first_stage_config`` and ``cond_stage_config``, each with ``target`` and ``params``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.base.errors import ModelError

MAX_YAML_BYTES = 2**20
REMEDY = "give the YAML that the checkpoint was published with"


@dataclass(frozen=True)
class OriginalConfig:
    """One YAML file; ``model`` is its ``model.params``."""

    path: Path
    model: Mapping[str, Any]

    def params(self, stage: str) -> Mapping[str, Any]:
        """``params`` of ``unet_config``, ``first_stage_config`` or ``cond_stage_config``; empty where it has none."""
        section = self.model.get(stage)
        params = section.get("params") if isinstance(section, Mapping) else None
        return params if isinstance(params, Mapping) else {}

    @property
    def ddconfig(self) -> Mapping[str, Any]:
        """Sizes of the first stage's encoder and decoder."""
        config = self.params("first_stage_config").get("ddconfig")
        return config if isinstance(config, Mapping) else {}

    def number(self, name: str, section: Mapping[str, Any] | None = None) -> float | None:
        """A number of ``model.params`` (or of ``section``); None where it is not given."""
        value = (self.model if section is None else section).get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ModelError(f"{self.path}: `{name}` is {value!r}, expected a number; {REMEDY}")
        return value

    def check(self, section: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
        """ModelError where ``section`` states something else than ``actual``, which was read off the tensors."""
        for name, value in actual.items():
            stated = section.get(name, value)
            stated = tuple(stated) if isinstance(stated, list) else stated
            if stated != value:
                raise ModelError(f"{self.path}: `{name}` is {stated}, the checkpoint's weights say {value}; {REMEDY}")


def read_config(path: Path) -> OriginalConfig:
    """Parse a YAML without objects; ModelError when it is not an original model's."""
    import yaml

    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ModelError(f"{path} is larger than {MAX_YAML_BYTES >> 10} KiB; {REMEDY}")
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        raise ModelError(f"{path} is not a readable YAML file ({str(exc).splitlines()[0]}); {REMEDY}") from exc
    try:
        model = loaded["model"]["params"]
    except (KeyError, TypeError) as exc:
        raise ModelError(f"{path} has no `model.params`; {REMEDY}") from exc
    if not isinstance(model, Mapping) or not isinstance(model.get("unet_config"), Mapping):
        raise ModelError(f"{path} has no `model.params.unet_config`; {REMEDY}")
    return OriginalConfig(path, model)
