"""A recipe file: the options of `calibrate`, `quantize`, `export` and sampling, checked before any work starts.

It is untrusted data: its size is bounded, nothing in it is executed, and omitted options have the commands'
own defaults. Paths are relative to the folder that the command runs in, as on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from qdeploy.base.documents import parse_toml, read_bytes
from qdeploy.base.errors import UsageError
from qdeploy.calibrate.record.modes import CalibrationRequest, check_request
from qdeploy.calibrate.spec import QuantSpec, spec_from_options
from qdeploy.models.architectures import get_architecture
from qdeploy.models.options import ModelOptions
from qdeploy.sample.job import SampleJob
from qdeploy.sampling import split_scheduler
from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.sampling.speed import EXACT
from qdeploy.targets.base import DEFAULT_TARGET, Target, load_target

MAX_BYTES = 2**16
MAX_NUMBER = 2**63 - 1  # TOML's own limit for whole numbers; NaN and infinity are beyond it too
MAX_PICTURES = 10**6  # their names have six digits
CALIBRATION = "calibration.safetensors"


@dataclass(frozen=True)
class RecipeModel:
    """The float model.

    file: whatever the commands take for MODEL.
    architecture: name in ``models.architectures``; the file must be one, and --scale tiny makes a small one.
    """

    file: str
    architecture: str | None = None
    ema: bool = False
    config: Path | None = None

    @property
    def options(self) -> ModelOptions:
        """How it is loaded; nothing is ever fetched."""
        return ModelOptions(config=self.config, ema=self.ema)


@dataclass(frozen=True)
class SampleSettings:
    """The pictures to make: numbers 0 to ``count`` - 1 of ``seed``.

    batch: pictures that are denoised together, which an interruption can lose; it changes none of them.
    """

    prompt: str | None = None
    negative_prompt: str = ""
    steps: int = 25
    scheduler: str | None = None
    eta: float = 0.0
    guidance: float = 7.5
    seed: int = 0
    count: int = 1
    batch: int = 8
    guidance_interval: tuple[float, float] | None = None
    forecast: str | None = None
    speed: str = EXACT

    def __post_init__(self) -> None:
        for name, minimum in (("steps", 1), ("count", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise UsageError(f"[sample] {name}: got {getattr(self, name)}, expected at least {minimum}")
        if self.count > MAX_PICTURES:
            raise UsageError(f"[sample] count: got {self.count}, expected at most {MAX_PICTURES}")
        _ = self.calls
        takes_eta = self.scheduler is None or split_scheduler(self.scheduler)[0] == "ddim"
        if not 0 <= self.eta <= 1 or (self.eta != 0 and not takes_eta):
            raise UsageError(f"[sample] eta: got {self.eta}, expected 0, or with the scheduler ddim up to 1")

    @property
    def calls(self) -> CallSchedule:
        """Which model calls a picture takes; UsageError for settings that say none."""
        return CallSchedule.from_options(self.guidance_interval, self.forecast, self.speed)

    def job(self, bundle: Path, bundle_sha256: str) -> SampleJob:
        """The same, of this bundle."""
        return SampleJob(
            bundle,
            bundle_sha256,
            None if self.prompt is None else (self.prompt,),
            self.negative_prompt,
            self.steps,
            self.scheduler,
            self.eta,
            self.guidance,
            self.seed,
            calls=self.calls,
        )


@dataclass(frozen=True)
class Recipe:
    """One experiment, checked.

    typed: the options that the recipe sets for `calibrate`; those that its mode would ignore are refused.
    min_sqnr_db: least SQNR that a component is exported with; None for the gate's own.
    """

    name: str
    model: RecipeModel
    calibrate: CalibrationRequest
    typed: frozenset[str]
    quantize: QuantSpec
    target: Target
    sample: SampleSettings
    with_encoder: bool = False
    min_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        if self.model.architecture is not None:
            get_architecture(self.model.architecture)
        for scheduler in (self.calibrate.scheduler, self.sample.scheduler):
            if scheduler is not None:
                split_scheduler(scheduler)
        check_request(self.calibrate, self.typed, Path(CALIBRATION))
        if self.quantize.attention_bits == 16:
            raise UsageError("[quantize] attention_bits: got 16, expected 0 or 8: no engine runs 16-bit attention")

    def replace_files(
        self,
        model: str | None = None,
        data: Path | None = None,
        from_qdiffusion: Path | None = None,
        pictures: int | None = None,
    ) -> Recipe:
        """The recipe with other paths for its files and another number of pictures; None keeps its own."""
        files = {"data": data, "from_qdiffusion": from_qdiffusion}
        replaced: dict[str, Any] = {name: path for name, path in files.items() if path is not None}
        return replace(
            self,
            model=self.model if model is None else replace(self.model, file=model),
            calibrate=replace(self.calibrate, **replaced),
            typed=self.typed | set(replaced),
            sample=self.sample if pictures is None else replace(self.sample, count=pictures),
        )


SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "model": get_type_hints(RecipeModel, include_extras=True),
    "calibrate": {field.name: get_type_hints(CalibrationRequest)[field.name] for field in fields(CalibrationRequest)},
    "quantize": {name: hint for name, hint in get_type_hints(spec_from_options).items() if name != "return"},
    "export": {"target": str, "with_encoder": bool, "min_sqnr": float | None},
    "sample": get_type_hints(SampleSettings),
}  # section -> its keys and their types, which are the options of the command of that name


def read_recipe(path: Path) -> Recipe:
    """The recipe in the TOML file at ``path``; UsageError names it, the section and key, and what is known there."""
    remedy = "give a recipe, such as the files in recipes/"
    data = read_bytes(path, error=UsageError, remedy=remedy, max_bytes=MAX_BYTES)
    document = parse_toml(data, str(path), dict[str, Any], error=UsageError, remedy=remedy, max_bytes=MAX_BYTES)
    try:
        return recipe_from_document(str(path), document)
    except UsageError as exc:
        raise UsageError(f"{path}: {exc}") from exc


def recipe_from_document(name: str, document: Mapping[str, Any]) -> Recipe:
    """The recipe in the parsed TOML."""
    for section in document:
        if section not in SECTIONS:
            raise UsageError(f"unknown section [{section}]; known: {', '.join(f'[{known}]' for known in SECTIONS)}")
    options = {section: _check_options(section, document.get(section, {})) for section in SECTIONS}
    if "file" not in options["model"]:
        raise UsageError("[model] names no `file`; give the path of the model's file, even if it is not there yet")
    return Recipe(
        name=name,
        model=RecipeModel(**options["model"]),
        calibrate=CalibrationRequest(**options["calibrate"]),
        typed=frozenset(options["calibrate"]),
        quantize=spec_from_options(**options["quantize"]),
        target=load_target(options["export"].get("target", DEFAULT_TARGET)),
        sample=SampleSettings(**options["sample"]),
        with_encoder=options["export"].get("with_encoder", False),
        min_sqnr_db=options["export"].get("min_sqnr"),
    )


def _check_options(section: str, values: Any) -> dict[str, Any]:
    """The section's keys with values of their types."""
    hints = SECTIONS[section]
    if not isinstance(values, dict):
        raise UsageError(f"[{section}]: got {values!r:.40}, expected a section of keys")
    for key in values:
        if key not in hints:
            raise UsageError(f"unknown key `{key:.40}` in [{section}]; known: {', '.join(hints)}")
    return {key: _check_value(value, hints[key], f"[{section}] {key}") for key, value in values.items()}


def _check_value(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the option's type has it: paths from text, numbers with a fraction from whole ones too."""
    value_type = next((item for item in get_args(hint) if NoneType in get_args(hint) and item is not NoneType), hint)
    if value_type is bool and isinstance(value, bool):
        return value
    if (
        value_type in (int, float)
        and isinstance(value, (int, value_type))
        and not isinstance(value, bool)
        and abs(value) <= MAX_NUMBER
    ):
        return value_type(value)
    if value_type in (str, Path) and isinstance(value, str) and value.isprintable():
        return value_type(value)
    if value_type == INTERVAL and isinstance(value, list) and all(type(item) in (int, float) for item in value):
        return tuple(value)
    if value_type not in TYPE_TEXTS and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UsageError(f"{key}: got {value!r:.60}, expected {TYPE_TEXTS.get(value_type, 'a list of texts')}")


INTERVAL = tuple[float, float]
TYPE_TEXTS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "one line of text", Path: "a path",
    INTERVAL: "two numbers in brackets, from and to",
}  # fmt: skip
