"""The YAML that the CompVis code trains and samples from, read as plain data: settings that tensors do not show.

Its layout: ``model.params`` holds the schedule, ``scale_factor`` and ``image_size``, and below it ``unet_config``,
``first_stage_config`` and ``cond_stage_config``, each with ``target`` and ``params``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.base.documents import parse_yaml, read_bytes
from qdeploy.base.errors import ModelError
from qdeploy.models.config_files import check_regular

MAX_YAML_BYTES = 2**17  # the published ones have 2 kB
MAX_SIDE = 4096  # of latents
MAX_TIMESTEPS = 10_000
MAX_SCALE = 1e6
REMEDY = "give the YAML that the checkpoint was published with"


@dataclass(frozen=True)
class OriginalConfig:
    """One YAML file; ``model`` is its ``model.params``, ``target`` the class that they are for."""

    path: Path
    model: Mapping[str, Any]
    target: object = None

    def params(self, stage: str) -> Mapping[str, Any]:
        """``params`` of ``unet_config``, ``first_stage_config`` or ``cond_stage_config``; empty where it has none."""
        section = self.model.get(stage)
        return self._get_section(section, "params", stage) if isinstance(section, Mapping) else {}

    @property
    def ddconfig(self) -> Mapping[str, Any]:
        """Sizes of the first stage's encoder and decoder."""
        return self._get_section(self.params("first_stage_config"), "ddconfig", "first_stage_config")

    def _get_section(self, parent: Mapping[str, Any], name: str, stage: str) -> Mapping[str, Any]:
        """The section called ``name``; empty where it is not given, ModelError where it is something else."""
        section = parent.get(name)
        if section is not None and not isinstance(section, Mapping):
            got = reprlib.repr(section)
            raise ModelError(f"{self.path}: `{stage}` `{name}` is {got}, expected settings by name; {REMEDY}")
        return {} if section is None else section

    def number(
        self,
        name: str,
        section: Mapping[str, Any] | None = None,
        low: float = -MAX_SCALE,
        high: float = MAX_SCALE,
    ) -> float | None:
        """A number of ``model.params`` (or of ``section``) in range; None where it is not given."""
        value = (self.model if section is None else section).get(name)
        if value is not None and (type(value) not in (int, float) or not low <= value <= high):
            expected = f"a number from {low:g} to {high:g}"
            raise ModelError(f"{self.path}: `{name}` is {reprlib.repr(value)}, expected {expected}; {REMEDY}")
        return value

    def integer(
        self, name: str, section: Mapping[str, Any] | None = None, low: int = 1, high: int = 2**20
    ) -> int | None:
        """A whole number in range; None where it is not given."""
        value = self.number(name, section, low, high)
        if value is not None and type(value) is not int:
            raise ModelError(f"{self.path}: `{name}` is {value!r}, expected a whole number; {REMEDY}")
        return None if value is None else int(value)

    def flag(self, name: str, section: Mapping[str, Any]) -> bool:
        """True or false; false where it is not given."""
        value = section.get(name)
        if value not in (None, True, False) or type(value) is int:
            raise ModelError(f"{self.path}: `{name}` is {reprlib.repr(value)}, expected true or false; {REMEDY}")
        return value is True

    def check(self, section: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
        """ModelError where ``section`` states something else than ``actual``, which was read off the tensors."""
        for name, value in actual.items():
            stated = section.get(name, value)
            stated = tuple(stated) if isinstance(stated, list) else stated
            if stated != value:
                raise ModelError(
                    f"{self.path}: `{name}` is {reprlib.repr(stated)}, the checkpoint's weights say {value}; {REMEDY}"
                )


def find_config(checkpoint: Path) -> Path | None:
    """The YAML next to ``checkpoint`` that has its name, as web UIs look for it; None where there is none."""
    path = checkpoint.with_suffix(".yaml")
    return path if path.exists() else None


def read_config(path: Path) -> OriginalConfig:
    """Read the YAML as an outside document; ModelError when it is not an original model's."""
    check_regular(path)
    data = read_bytes(path, error=ModelError, remedy=REMEDY, max_bytes=MAX_YAML_BYTES)
    loaded = parse_yaml(data, str(path), dict[str, Any], error=ModelError, remedy=REMEDY, max_bytes=MAX_YAML_BYTES)
    try:
        model, target = loaded["model"]["params"], loaded["model"].get("target")
    except (KeyError, TypeError, AttributeError) as exc:
        raise ModelError(f"{path} has no `model.params`; {REMEDY}") from exc
    if isinstance(model, Mapping) and "network_config" in model:
        raise ModelError(
            f"{path} is in the layout of sgm, as Stable Diffusion XL's YAML is, which is not read; such a file needs "
            "none: rename the YAML, or leave --config out"
        )
    if not isinstance(model, Mapping) or not isinstance(model.get("unet_config"), Mapping):
        raise ModelError(f"{path} has no `model.params.unet_config`; {REMEDY}")
    return OriginalConfig(path, model, target)
