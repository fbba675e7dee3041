"""Write and read a measurement as JSON with its raw samples. A file that is read is untrusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdeploy.base.errors import UsageError
from qdeploy.base.files import read_json, stage_file
from qdeploy.bench.results import STAGES, BenchRun, ContenderResult, FreshStart, StageSamples
from qdeploy.bench.settings import BenchSettings
from qdeploy.reporting.fidelity import Fidelity

SCHEMA = "qdeploy bench"
SCHEMA_VERSION = 1
MAX_SAMPLES, MAX_CONTENDERS, MAX_TEXT = 100_000, 100, 1000


def write_bench_run(path: Path, run: BenchRun) -> None:
    """Everything, raw samples included. Infinite SQNR and PSNR, of equal outputs, are stored as null."""
    document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(run)}
    for entry in document["contenders"]:
        if entry["fidelity"] is not None:
            entry["fidelity"] = _replace_infinity(entry["fidelity"])
    with stage_file(path) as scratch:
        scratch.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_bench_run(path: Path) -> BenchRun:
    """The measurement in ``path``; UsageError saying what is wrong with another file."""
    try:
        return _run_from_document(read_json(path))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError) as exc:
        problem = f"no {exc}" if isinstance(exc, KeyError) else str(exc)
        raise UsageError(f"{path} is not a measurement of `qdeploy bench --json`: {problem}; measure again") from exc


def _run_from_document(document: Mapping[str, Any]) -> BenchRun:
    if document["schema"] != SCHEMA or document["schema_version"] != SCHEMA_VERSION:
        schema = f"{str(document['schema'])[:40]!r} {str(document['schema_version'])[:10]}"
        raise ValueError(f"its schema is {schema}, this qdeploy reads {SCHEMA!r} {SCHEMA_VERSION}")
    settings = dict(document["settings"])
    settings |= {name: tuple(settings[name]) for name in ("concurrency", "compared")}
    contenders = _check_list(document["contenders"], _contender_from_document, MAX_CONTENDERS)
    if not contenders:
        raise ValueError("it holds no contenders")
    if len({contender.key for contender in contenders}) < len(contenders):
        raise ValueError("two of its contenders are one bundle on one engine")
    return BenchRun(
        settings=BenchSettings(**settings),
        environment={_check_text(name): _check_text(value) for name, value in document["environment"].items()},
        started=_check_text(document["started"]),
        contenders=contenders,
        complete=document["complete"] is True,
    )


def _contender_from_document(entry: Mapping[str, Any]) -> ContenderResult:
    stages = {name: values for name, values in entry["samples"].items() if name in STAGES}
    fidelity = entry["fidelity"]
    return ContenderResult(
        **{name: _check_text(entry[name]) for name in ("name", "bundle", "engine", "precision")},
        size_bytes=_check_count(entry["size_bytes"]),
        integer_mac_share=_check_number(entry["integer_mac_share"]),
        bundle_sha256=_check_text(entry["bundle_sha256"]),
        model_sha256=_check_text(entry["model_sha256"]),
        samples={
            name: StageSamples(
                _check_list(values["warmup_ms"], _check_positive), _check_list(values["steady_ms"], _check_positive)
            )
            for name, values in stages.items()
        },
        pictures_per_s={
            int(level): _check_list(values, _check_positive) for level, values in entry["pictures_per_s"].items()
        },
        fresh_starts=_check_list(entry["fresh_starts"], _fresh_start_from_document),
        fidelity=None if fidelity is None else _fidelity_from_document(fidelity),
    )


def _fresh_start_from_document(entry: Mapping[str, Any]) -> FreshStart:
    read, device = entry["read_bytes"], entry["device_peak_bytes"]
    return FreshStart(
        dropped=entry["dropped"] is True,
        load_ms=_check_positive(entry["load_ms"]),
        read_bytes=None if read is None else _check_count(read),
        peak_bytes=_check_count(entry["peak_bytes"]),
        device_peak_bytes=None if device is None else _check_count(device),
    )


def _fidelity_from_document(entry: Mapping[str, Any]) -> Fidelity:
    return Fidelity(
        step_sqnr_db=tuple(_check_list(entry["step_sqnr_db"], _decibels_from_json)),
        timesteps=tuple(_check_list(entry["timesteps"], _check_count)),
        image_psnr_db=_decibels_from_json(entry["image_psnr_db"]),
        latent_psnr_db=_decibels_from_json(entry["latent_psnr_db"]),
    )


def _replace_infinity(value: Any) -> Any:
    """``value`` with null in the place of infinite numbers, wherever in lists and mappings they are."""
    if isinstance(value, Mapping):
        return {name: _replace_infinity(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_infinity(part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _check_list(values: Any, read: Callable[[Any], Any], limit: int = MAX_SAMPLES) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) > limit:
        raise ValueError(f"expected a list of at most {limit}, got {str(values)[:40]}")
    return [read(value) for value in values]


def _check_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {str(value)[:40]!r}")
    return float(value)


def _check_positive(value: Any) -> float:
    if _check_number(value) <= 0:
        raise ValueError(f"expected a number above 0, got {value}")
    return float(value)


def _check_count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"expected a whole number, got {str(value)[:40]!r}")
    return value


def _decibels_from_json(value: Any) -> float:
    return math.inf if value is None else _check_number(value)


def _check_text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(f"expected a printable text of at most {MAX_TEXT} characters, got {str(value)[:40]!r}")
    return value
