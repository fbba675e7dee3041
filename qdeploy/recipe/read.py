"""A recipe file: the options of `calibrate`, `quantize`, `export` and sampling, checked before any work starts.

It is data from elsewhere: of bounded size, nothing in it is executed, and what it does not say has the commands'
own defaults. Paths are taken from the folder that the command runs in, as on the command line.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from qdeploy.calibrate.modes import Request, check_request
from qdeploy.errors import UsageError
from qdeploy.models.architectures import architecture_named
from qdeploy.models.options import ModelOptions
from qdeploy.sample.job import Job
from qdeploy.sampling import with_scheduler
from qdeploy.spec import QuantSpec, TargetSpec, spec_from_options, target_named

MAX_BYTES = 2**16
MOST_PICTURES = 10**6  # their names have six digits
CALIBRATION = "calibration.safetensors"


@dataclass(frozen=True)
class Model:
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
class Sample:
    """The pictures to make: numbers 0 to ``count`` - 1 of ``seed``.

    batch: pictures of one pass of the sampler, what an interruption can lose; it changes none of them.
    """

    prompt: str | None = None
    negative_prompt: str = ""
    steps: int = 25
    sampler: str | None = None
    eta: float = 0.0
    guidance: float = 7.5
    seed: int = 0
    count: int = 1
    batch: int = 8

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("count", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"[sample] {name}: got {getattr(self, name)}, expected at least {least}")
        if self.count > MOST_PICTURES:
            raise UsageError(f"[sample] count: got {self.count}, expected at most {MOST_PICTURES}")
        if not 0 <= self.eta <= 1 or (self.eta != 0 and self.sampler not in (None, "ddim")):
            raise UsageError(f"[sample] eta: got {self.eta}, expected 0, or with the sampler ddim up to 1")

    def job(self, bundle: Path, bundle_sha256: str) -> Job:
        """The same, of this bundle."""
        return Job(
            bundle,
            bundle_sha256,
            None if self.prompt is None else (self.prompt,),
            self.negative_prompt,
            self.steps,
            self.sampler,
            self.eta,
            self.guidance,
            self.seed,
        )


@dataclass(frozen=True)
class Recipe:
    """One experiment, checked.

    given: the options that the recipe sets for `calibrate`; those that its mode would ignore are refused.
    """

    name: str
    model: Model
    calibrate: Request
    given: frozenset[str]
    quantize: QuantSpec
    target: TargetSpec
    sample: Sample
    with_encoder: bool = False

    def __post_init__(self) -> None:
        if self.model.architecture is not None:
            architecture_named(self.model.architecture)
        for sampler in (self.calibrate.sampler, self.sample.sampler):
            if sampler is not None:
                with_scheduler({}, sampler)
        check_request(self.calibrate, self.given, Path(CALIBRATION))
        if self.quantize.attention_bits == 16:
            raise UsageError("[quantize] attention_bits: got 16, expected 0 or 8: no engine runs 16-bit attention")

    def with_files(
        self,
        model: str | None = None,
        data: Path | None = None,
        from_qdiffusion: Path | None = None,
        pictures: int | None = None,
    ) -> Recipe:
        """The recipe with other places for its files and another number of pictures; None keeps its own."""
        files = {"data": data, "from_qdiffusion": from_qdiffusion}
        moved: dict[str, Any] = {name: path for name, path in files.items() if path is not None}
        return replace(
            self,
            model=self.model if model is None else replace(self.model, file=model),
            calibrate=replace(self.calibrate, **moved),
            given=self.given | set(moved),
            sample=self.sample if pictures is None else replace(self.sample, count=pictures),
        )


SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "model": get_type_hints(Model, include_extras=True),
    "calibrate": {field.name: get_type_hints(Request)[field.name] for field in fields(Request)},
    "quantize": {name: hint for name, hint in get_type_hints(spec_from_options).items() if name != "return"},
    "export": {"target": str, "with_encoder": bool},
    "sample": get_type_hints(Sample),
}  # section -> its keys and their types, which are the options of the command of that name


def read_recipe(path: Path) -> Recipe:
    """The recipe in the TOML file at ``path``; UsageError names it, the section and key, and what is known there."""
    try:
        return recipe_from_document(str(path), _document(path))
    except UsageError as exc:
        raise UsageError(f"{path}: {exc}") from exc


def recipe_from_document(name: str, document: Mapping[str, Any]) -> Recipe:
    """The recipe that the parsed TOML says."""
    for section in document:
        if section not in SECTIONS:
            raise UsageError(f"unknown section [{section}]; known: {', '.join(f'[{known}]' for known in SECTIONS)}")
    options = {section: _options(section, document.get(section, {})) for section in SECTIONS}
    if "file" not in options["model"]:
        raise UsageError("[model] names no `file`; give the model's file, or the place where it will be put")
    return Recipe(
        name=name,
        model=Model(**options["model"]),
        calibrate=Request(**options["calibrate"]),
        given=frozenset(options["calibrate"]),
        quantize=spec_from_options(**options["quantize"]),
        target=target_named(options["export"].get("target", "ort-cpu")),
        sample=Sample(**options["sample"]),
        with_encoder=options["export"].get("with_encoder", False),
    )


def _document(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"cannot be read ({exc.strerror}); give a recipe, such as the files in recipes/") from exc
    if len(raw) > MAX_BYTES:
        raise UsageError(f"is larger than {MAX_BYTES >> 10} KiB, which no recipe is")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"is not a readable TOML file: {exc}") from exc


def _options(section: str, found: Any) -> dict[str, Any]:
    """The section's keys with values of their types."""
    hints = SECTIONS[section]
    if not isinstance(found, dict):
        raise UsageError(f"[{section}]: got {found!r:.40}, expected a section of keys")
    for key in found:
        if key not in hints:
            raise UsageError(f"unknown key `{key:.40}` in [{section}]; known: {', '.join(hints)}")
    return {key: _value(value, hints[key], f"[{section}] {key}") for key, value in found.items()}


def _value(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the option's type has it: paths from text, numbers with a fraction from whole ones too."""
    kind = next((one for one in get_args(hint) if NoneType in get_args(hint) and one is not NoneType), hint)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value):
        return kind(value)
    if kind in (str, Path) and isinstance(value, str) and value.isprintable():
        return kind(value)
    if kind not in WORDS and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise UsageError(f"{where}: got {value!r:.60}, expected {WORDS.get(kind, 'a list of texts')}")


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "one line of text", Path: "a path"}
