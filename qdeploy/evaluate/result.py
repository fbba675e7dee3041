"""The result of an evaluation, with everything that its figures depend on; one JSON file, read back the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qdeploy.artifacts.bundle import Manifest
from qdeploy.base.errors import PictureError
from qdeploy.base.files import read_json, stage_file
from qdeploy.evaluate.extractors import ExtractorInfo

SCHEMA_VERSION = 2
BASELINE, WITHOUT, WITH = "baseline", "W/O", "W"  # names of the experiments for how a bundle was calibrated
FLOAT = "W32A32"


@dataclass(frozen=True)
class Reference:
    """The set that bundles are compared with; ``size`` is (width, height) of its pictures after ``fit``."""

    name: str
    kind: str
    count: int
    size: tuple[int, int]
    fitted: bool
    broken: tuple[str, ...]


@dataclass(frozen=True)
class ReferenceComparison:
    """A bundle compared with its float reference: picture by picture, and step by step on the reference's trajectory.

    psnr_db, ssim, lpips: of each picture that both have, in order of ``numbers``; () where not measured.
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
class BundleResult:
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
    comparison: ReferenceComparison | None = None
    warnings: tuple[str, ...] = ()
    size_bytes: int | None = None
    seconds_per_picture: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """The whole result. settings: the options; notes: for readers of any table."""

    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    reference: Reference | None
    extractor: ExtractorInfo | None
    contenders: tuple[BundleResult, ...]
    notes: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)


def format_bits(manifest: Manifest) -> str:
    """Weight and activation bits of the UNet, the narrowest weights of a mixed one."""
    unet = manifest.unet
    return f"W{min(unet.weight_bits)}A{unet.act_bits}"


def classify_calibration(manifest: Manifest) -> str:
    """How the bundle was calibrated, as the experiments name it.

    "W/O" is without a calibration set: extremes of a batch of noise, nothing learned (``recipes/*_uncalibrated``).
    """
    quantization = manifest.provenance.get("quantization")
    if not isinstance(quantization, Mapping):
        return BASELINE
    spec, calibration = (quantization.get(part) or {} for part in ("spec", "calibration"))
    is_nearest = spec.get("reconstruction") is None and not spec.get("equalize", True)
    return (
        WITHOUT if calibration.get("mode") == "noise_data" and spec.get("observer") == "minmax" and is_nearest else WITH
    )


def write_result(path: Path, result: EvaluationResult) -> None:
    """Write ``result`` as JSON; infinite decibels as the text "inf"."""
    with stage_file(path) as scratch:
        scratch.write_text(
            json.dumps(_replace_nonfinite(asdict(result)), indent=1, allow_nan=False, default=str) + "\n", "utf-8"
        )


def read_result(path: Path) -> EvaluationResult:
    """The result in the file at ``path``; PictureError for another file."""
    try:
        document = _restore_numbers(read_json(path))
        if document["schema_version"] != SCHEMA_VERSION:
            raise PictureError(f"{path} has schema {document['schema_version']!r}, this qdeploy reads {SCHEMA_VERSION}")
        reference, extractor = document.pop("reference"), document.pop("extractor")
        contenders = tuple(
            BundleResult(
                **{
                    **entry,
                    "comparison": None if entry["comparison"] is None else ReferenceComparison(**entry["comparison"]),
                }
            )
            for entry in document.pop("contenders")
        )
        return EvaluationResult(
            reference=None if reference is None else Reference(**reference),
            extractor=None if extractor is None else ExtractorInfo(**extractor),
            contenders=contenders,
            **document,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise PictureError(f"{path} is no result of `qdeploy evaluate` ({exc!r}); make it again") from exc


def _replace_nonfinite(value: Any) -> Any:
    """``value`` without numbers that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    return [_replace_nonfinite(item) for item in value] if isinstance(value, list | tuple) else value


def _restore_numbers(value: Any) -> Any:
    """The way back, lists as tuples."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _restore_numbers(item) for key, item in value.items()}
    return tuple(_restore_numbers(item) for item in value) if isinstance(value, list) else value
