"""What an evaluation found, with all that must stand beside a figure; one JSON file, read back the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qdeploy.bundle import Manifest
from qdeploy.errors import PictureError
from qdeploy.evaluate.extractors import ExtractorInfo
from qdeploy.files import read_json, staged_file

SCHEMA_VERSION = 1
BASELINE, WITHOUT, WITH = "baseline", "W/O", "W"  # the experiments' words for how a bundle was calibrated
FLOAT = "W32A32"


@dataclass(frozen=True)
class Reference:
    """The set that others are held against; ``size`` is (width, height) of its pictures behind ``fit``."""

    name: str
    kind: str
    count: int
    size: tuple[int, int]
    fitted: bool
    broken: tuple[str, ...]


@dataclass(frozen=True)
class Twin:
    """Beside the float twin, picture by picture at equal numbers, and step by step on the twin's own trajectory.

    psnr_db, ssim, lpips: of each picture that both have, in order of ``numbers``; () where not asked.
    mean_psnr_db: of the squared errors of all pixels, so that one equal picture does not make it infinite.
    """

    name: str
    numbers: tuple[int, ...] = ()
    psnr_db: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    lpips: tuple[float, ...] = ()
    mean_psnr_db: float | None = None
    latent_psnr_db: float | None = None
    step_sqnr_db: tuple[float, ...] = ()
    timesteps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contender:
    """One bundle's figures, by their names in ``report.FIGURES``.

    bits: "W4A8" and the like, of the UNet. calibration: "baseline" for a float bundle, "W/O" or "W".
    pictures: folder of 000000.png and so on, from the result's own.
    size_bytes: of the bundle's files. seconds_per_picture: mean while they were made, loading included: no benchmark;
    None where this process made none or a cluster did.
    """

    name: str
    bundle: str
    bundle_sha256: str
    bits: str
    calibration: str
    pictures: str
    count: int
    broken: tuple[str, ...]
    figures: Mapping[str, float | None]
    provenance: Mapping[str, Any]
    twin: Twin | None = None
    warnings: tuple[str, ...] = ()
    size_bytes: int | None = None
    seconds_per_picture: float | None = None


@dataclass(frozen=True)
class Result:
    """All of it. settings: the options; notes: what a reader of any table must know."""

    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    reference: Reference | None
    extractor: ExtractorInfo | None
    contenders: tuple[Contender, ...]
    notes: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)


def bits_of(manifest: Manifest) -> str:
    """Weight and activation bits of the UNet, the narrowest weights of a mixed one."""
    unet = manifest.components["unet"]
    return f"W{min(unet.weight_bits)}A{unet.act_bits}"


def calibration_of(manifest: Manifest) -> str:
    """How the bundle was calibrated, as the experiments name it.

    "W/O" is without a calibration set: extremes of a batch of noise, nothing learned (``recipes/*_uncalibrated``).
    """
    quantization = manifest.provenance.get("quantization")
    if not isinstance(quantization, Mapping):
        return BASELINE
    spec, calibration = (quantization.get(part) or {} for part in ("spec", "calibration"))
    nearest = spec.get("reconstruction") is None and not spec.get("equalize", True)
    return WITHOUT if calibration.get("mode") == "noise_data" and spec.get("observer") == "minmax" and nearest else WITH


def write_result(path: Path, result: Result) -> None:
    """Write ``result`` as JSON; infinite decibels as the text "inf"."""
    with staged_file(path) as scratch:
        scratch.write_text(json.dumps(_finite(asdict(result)), indent=1, allow_nan=False, default=str) + "\n", "utf-8")


def read_result(path: Path) -> Result:
    """The result in the file at ``path``; PictureError for another file."""
    try:
        found = _numbers(read_json(path))
        if found["schema_version"] != SCHEMA_VERSION:
            raise PictureError(f"{path} has schema {found['schema_version']!r}, this qdeploy reads {SCHEMA_VERSION}")
        reference, extractor = found.pop("reference"), found.pop("extractor")
        contenders = tuple(
            Contender(**{**entry, "twin": None if entry["twin"] is None else Twin(**entry["twin"])})
            for entry in found.pop("contenders")
        )
        return Result(
            reference=None if reference is None else Reference(**reference),
            extractor=None if extractor is None else ExtractorInfo(**extractor),
            contenders=contenders,
            **found,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise PictureError(f"{path} is no result of `qdeploy evaluate` ({exc!r}); make it again") from exc


def _finite(value: Any) -> Any:
    """``value`` without numbers that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _numbers(value: Any) -> Any:
    """The way back, lists as tuples."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _numbers(one) for key, one in value.items()}
    return tuple(_numbers(one) for one in value) if isinstance(value, list) else value
