"""A measurement as JSON with its raw samples, written and read. What is read may come from anyone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdeploy.bench.fidelity import Fidelity
from qdeploy.bench.figures import STAGES, Figures, FreshStart, Measurement, StageSamples
from qdeploy.bench.plan import BenchSettings
from qdeploy.errors import UsageError
from qdeploy.files import read_json, staged_file

SCHEMA = "qdeploy bench"
SCHEMA_VERSION = 1
MOST_SAMPLES, MOST_CONTENDERS, MOST_TEXT = 100_000, 100, 1000


def write_measurement(path: Path, run: Measurement) -> None:
    """Everything, raw samples included. SQNR and PSNR of what does not differ at all, infinite, are null."""
    document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(run)}
    for entry in document["contenders"]:
        if entry["fidelity"] is not None:
            entry["fidelity"] = _without_infinity(entry["fidelity"])
    with staged_file(path) as scratch:
        scratch.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_measurement(path: Path) -> Measurement:
    """The measurement in ``path``; UsageError saying what is wrong with a file that is none."""
    try:
        return _measurement(read_json(path))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError) as exc:
        what = f"no {exc}" if isinstance(exc, KeyError) else str(exc)
        raise UsageError(f"{path} is not a measurement of `qdeploy bench --json`: {what}; measure again") from exc


def _measurement(document: Mapping[str, Any]) -> Measurement:
    if document["schema"] != SCHEMA or document["schema_version"] != SCHEMA_VERSION:
        found = f"{str(document['schema'])[:40]!r} {str(document['schema_version'])[:10]}"
        raise ValueError(f"its schema is {found}, this qdeploy reads {SCHEMA!r} {SCHEMA_VERSION}")
    settings = dict(document["settings"])
    settings |= {name: tuple(settings[name]) for name in ("concurrency", "compared")}
    contenders = _listed(document["contenders"], _contender, MOST_CONTENDERS)
    if not contenders:
        raise ValueError("it holds no contenders")
    if len({found.key for found in contenders}) < len(contenders):
        raise ValueError("two of its contenders are one bundle on one engine")
    return Measurement(
        settings=BenchSettings(**settings),
        environment={_text(name): _text(value) for name, value in document["environment"].items()},
        started=_text(document["started"]),
        contenders=contenders,
        complete=document["complete"] is True,
    )


def _contender(entry: Mapping[str, Any]) -> Figures:
    stages = {name: found for name, found in entry["samples"].items() if name in STAGES}
    fidelity = entry["fidelity"]
    return Figures(
        **{name: _text(entry[name]) for name in ("name", "bundle", "engine", "precision")},
        size_bytes=_whole(entry["size_bytes"]),
        integer_mac_share=_number(entry["integer_mac_share"]),
        bundle_sha256=_text(entry["bundle_sha256"]),
        model_sha256=_text(entry["model_sha256"]),
        samples={
            name: StageSamples(_listed(found["warmup_ms"], _positive), _listed(found["steady_ms"], _positive))
            for name, found in stages.items()
        },
        pictures_per_s={int(level): _listed(found, _positive) for level, found in entry["pictures_per_s"].items()},
        fresh_starts=_listed(entry["fresh_starts"], _fresh_start),
        fidelity=None if fidelity is None else _fidelity(fidelity),
    )


def _fresh_start(entry: Mapping[str, Any]) -> FreshStart:
    read, device = entry["read_bytes"], entry["device_peak_bytes"]
    return FreshStart(
        dropped=entry["dropped"] is True,
        load_ms=_positive(entry["load_ms"]),
        read_bytes=None if read is None else _whole(read),
        peak_bytes=_whole(entry["peak_bytes"]),
        device_peak_bytes=None if device is None else _whole(device),
    )


def _fidelity(entry: Mapping[str, Any]) -> Fidelity:
    return Fidelity(
        step_sqnr_db=tuple(_listed(entry["step_sqnr_db"], _decibels)),
        timesteps=tuple(_listed(entry["timesteps"], _whole)),
        image_psnr_db=_decibels(entry["image_psnr_db"]),
        latent_psnr_db=_decibels(entry["latent_psnr_db"]),
    )


def _without_infinity(value: Any) -> Any:
    """``value`` with null in the place of infinite numbers, wherever in lists and mappings they are."""
    if isinstance(value, Mapping):
        return {name: _without_infinity(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _listed(values: Any, read: Callable[[Any], Any], most: int = MOST_SAMPLES) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) > most:
        raise ValueError(f"expected a list of at most {most}, got {str(values)[:40]}")
    return [read(value) for value in values]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {str(value)[:40]!r}")
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError(f"expected a number above 0, got {value}")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"expected a whole number, got {str(value)[:40]!r}")
    return value


def _decibels(value: Any) -> float:
    return math.inf if value is None else _number(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MOST_TEXT or not value.isprintable():
        raise ValueError(f"expected a printable text of at most {MOST_TEXT} characters, got {str(value)[:40]!r}")
    return value
