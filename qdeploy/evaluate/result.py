"""The result of an evaluation, with everything that its figures depend on; one JSON file, read back the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from qdeploy.artifacts.manifest import Manifest
from qdeploy.base.documents import Count, Natural, convert, parse_json, read_bytes
from qdeploy.base.errors import PictureError
from qdeploy.base.files import stage_file
from qdeploy.evaluate.extractors import ExtractorInfo

SCHEMA_VERSION = 2
MAX_BYTES = 64 * 2**20  # figures of each of 50,000 pictures take a few
BASELINE, WITHOUT, WITH = "baseline", "W/O", "W"  # names of the experiments for how a bundle was calibrated
FLOAT = "W32A32"


@dataclass(frozen=True)
class Reference:
    """The set that bundles are compared with; ``size`` is (width, height) of its pictures after ``fit``."""

    name: str
    kind: str
    count: Natural
    size: tuple[Count, Count]
    fitted: bool
    broken: tuple[str, ...]


@dataclass(frozen=True)
class ReferenceComparison:
    """A bundle compared with its float reference: picture by picture, and step by step on the reference's trajectory.

    psnr_db, ssim, lpips: of each picture that both have, in order of ``numbers``; () where not measured.
    mean_psnr_db: of the squared errors of all pixels, so that one equal picture does not make it infinite.
    """

    name: str
    numbers: tuple[Natural, ...] = ()
    psnr_db: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    lpips: tuple[float, ...] = ()
    mean_psnr_db: float | None = None
    latent_psnr_db: float | None = None
    step_sqnr_db: tuple[float, ...] = ()
    timesteps: tuple[Natural, ...] = ()


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
    count: Natural
    broken: tuple[str, ...]
    figures: Mapping[str, float | None]
    provenance: Mapping[str, Any]
    comparison: ReferenceComparison | None = None
    warnings: tuple[str, ...] = ()
    size_bytes: Natural | None = None
    seconds_per_picture: Annotated[float, Meta(ge=0)] | None = None


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
    remedy, what = "make it again", f"{path} is no result of `qdeploy evaluate`"
    data = read_bytes(path, error=PictureError, remedy=remedy, max_bytes=MAX_BYTES)
    document = parse_json(data, what, dict[str, Any], error=PictureError, remedy=remedy, max_bytes=MAX_BYTES)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise PictureError(f"{path} has schema {document.get('schema_version')!r}, this qdeploy reads {SCHEMA_VERSION}")
    try:
        result = convert(_restore_figures(document), EvaluationResult)
    except ValueError as exc:
        raise PictureError(f"{what}: {exc}; {remedy}") from exc
    return replace(result, settings=_freeze_lists(result.settings), contenders=tuple(
        replace(entry, provenance=_freeze_lists(entry.provenance)) for entry in result.contenders
    ))  # fmt: skip


def _replace_nonfinite(value: Any) -> Any:
    """``value`` without numbers that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    return [_replace_nonfinite(item) for item in value] if isinstance(value, list | tuple) else value


def _restore_figures(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The way back, of what was measured: a bundle may be called "inf"."""
    contenders = document.get("contenders")
    if not isinstance(contenders, list):
        return document
    return {**document, "contenders": [_restore_contender(entry) for entry in contenders]}


def _restore_contender(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    restored = {**entry, **{key: _restore_numbers(entry[key]) for key in ("figures", "comparison") if key in entry}}
    if isinstance(restored.get("comparison"), Mapping) and "name" in entry["comparison"]:
        restored["comparison"]["name"] = entry["comparison"]["name"]
    return restored


def _restore_numbers(value: Any) -> Any:
    """Numbers in the place of the texts for those that JSON lacks."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _restore_numbers(item) for key, item in value.items()}
    return [_restore_numbers(item) for item in value] if isinstance(value, list) else value


def _freeze_lists(value: Any) -> Any:
    """Lists as the tuples that were written, where the schema leaves the type open."""
    if isinstance(value, Mapping):
        return {key: _freeze_lists(item) for key, item in value.items()}
    return tuple(_freeze_lists(item) for item in value) if isinstance(value, list) else value
