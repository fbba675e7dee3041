"""Write and read a measurement as JSON with its raw samples. A file that is read is untrusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from qdeploy.base.documents import Natural, Positive, Share, parse_json, read_bytes
from qdeploy.base.errors import UsageError
from qdeploy.base.files import stage_file
from qdeploy.bench.results import BenchRun, ContenderResult, FreshStart, StageSamples
from qdeploy.bench.settings import BenchSettings
from qdeploy.reporting.fidelity import Fidelity

SCHEMA = "qdeploy bench"
SCHEMA_VERSION = 1
MAX_SAMPLES, MAX_CONTENDERS, MAX_BYTES = 100_000, 100, 64 * 2**20
WHAT = "is not a measurement of `qdeploy bench --json`"


def write_bench_run(path: Path, run: BenchRun) -> None:
    """Everything, raw samples included. Infinite SQNR and PSNR, of equal outputs, are stored as null, NaN as text."""
    document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(run)}
    for entry in document["contenders"]:
        if entry["fidelity"] is not None:
            entry["fidelity"] = _replace_nonfinite(entry["fidelity"])
    with stage_file(path) as scratch:
        scratch.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_bench_run(path: Path) -> BenchRun:
    """The measurement in ``path``; UsageError saying what is wrong with another file."""
    remedy = "measure again"
    data = read_bytes(path, error=UsageError, remedy=remedy, max_bytes=MAX_BYTES)
    document = parse_json(data, f"{path} {WHAT}", RunDocument, error=UsageError, remedy=remedy, max_bytes=MAX_BYTES)
    try:
        return document.run
    except ValueError as exc:
        raise UsageError(f"{path} {WHAT}: {exc}; {remedy}") from exc


Text = Annotated[str, Meta(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Milliseconds = Annotated[list[Positive], Meta(max_length=MAX_SAMPLES)]
StoredDb = float | Literal["nan"] | None
Level = Annotated[str, Meta(pattern="^[1-9][0-9]{0,4}$")]  # of concurrency


@dataclass(frozen=True)
class StageDocument:
    """One stage's samples."""

    warmup_ms: Milliseconds
    steady_ms: Milliseconds


@dataclass(frozen=True)
class FreshStartDocument:
    """One new process."""

    dropped: bool
    load_ms: Positive
    read_bytes: Natural | None
    peak_bytes: Natural
    device_peak_bytes: Natural | None = None


@dataclass(frozen=True)
class FidelityDocument:
    """A comparison; null is infinite."""

    step_sqnr_db: Annotated[list[StoredDb], Meta(max_length=MAX_SAMPLES)]
    timesteps: Annotated[list[Natural], Meta(max_length=MAX_SAMPLES)]
    image_psnr_db: StoredDb
    latent_psnr_db: StoredDb

    @property
    def fidelity(self) -> Fidelity:
        """With infinity where the file has null: JSON knows no infinite dB."""
        image, latent, *steps = (
            math.inf if db is None else float(db)
            for db in (self.image_psnr_db, self.latent_psnr_db, *self.step_sqnr_db)
        )
        return Fidelity(tuple(steps), tuple(self.timesteps), image, latent)


@dataclass(frozen=True)
class ContenderDocument:
    """One contender."""

    name: Text
    bundle: Text
    engine: Text
    precision: Text
    size_bytes: Natural
    integer_mac_share: Share
    bundle_sha256: Text
    model_sha256: Text
    samples: Mapping[Literal["text encoder", "unet step", "vae decode", "picture"], StageDocument]
    pictures_per_s: Mapping[Level, Milliseconds]
    fresh_starts: Annotated[list[FreshStartDocument], Meta(max_length=MAX_SAMPLES)]
    fidelity: FidelityDocument | None

    @property
    def result(self) -> ContenderResult:
        """Checked; ValueError where its parts do not fit one another."""
        own = {name: getattr(self, name) for name in (
            "name", "bundle", "engine", "precision", "size_bytes", "integer_mac_share", "bundle_sha256", "model_sha256"
        )}  # fmt: skip
        return ContenderResult(
            **own,
            samples={name: StageSamples(stage.warmup_ms, stage.steady_ms) for name, stage in self.samples.items()},
            pictures_per_s={int(level): rates for level, rates in self.pictures_per_s.items()},
            fresh_starts=[FreshStart(**asdict(start)) for start in self.fresh_starts],
            fidelity=None if self.fidelity is None else self.fidelity.fidelity,
        )


@dataclass(frozen=True)
class RunDocument:
    """The whole file."""

    schema: Literal["qdeploy bench"]
    schema_version: Literal[1]
    settings: BenchSettings
    environment: Annotated[Mapping[Text, Text], Meta(max_length=1000)]
    started: Text
    contenders: Annotated[list[ContenderDocument], Meta(min_length=1, max_length=MAX_CONTENDERS)]
    complete: bool

    @property
    def run(self) -> BenchRun:
        """Checked; ValueError where a contender comes twice."""
        contenders = [contender.result for contender in self.contenders]
        if len({contender.key for contender in contenders}) < len(contenders):
            raise ValueError("two of its contenders are one bundle on one engine")
        return BenchRun(self.settings, dict(self.environment), self.started, contenders, self.complete)


def _replace_nonfinite(value: Any) -> Any:
    """``value`` with null in the place of infinite numbers and "nan" for NaN, wherever in lists and mappings."""
    if isinstance(value, Mapping):
        return {name: _replace_nonfinite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(part) for part in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else None
