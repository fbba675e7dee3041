"""An evaluation: pictures of every bundle, features of every set, then the metrics; resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdeploy.artifacts.outputs import EVALUATION, EVALUATION_TABLE
from qdeploy.artifacts.outputs import FEATURES as FEATURES_FILE
from qdeploy.base.errors import UsageError
from qdeploy.base.outputs import Output, check_room
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.engines.base import choose_engine
from qdeploy.evaluate.bundles import PICTURES, RECEIPTS, BundlePictures, make_pictures, open_bundles
from qdeploy.evaluate.comparison import compare_with_reference, summarize_comparison
from qdeploy.evaluate.extractors import Extractor, open_extractor
from qdeploy.evaluate.features import Features, extract_features
from qdeploy.evaluate.measure import FigureMeasurer, build_measurer, measure_clip_score
from qdeploy.evaluate.metrics.adapters import check_torchmetrics
from qdeploy.evaluate.metrics.clip_score import ClipScore
from qdeploy.evaluate.metrics.lpips import Lpips
from qdeploy.evaluate.references import describe_reference, is_bundle, open_reference
from qdeploy.evaluate.result import BundleResult, EvaluationResult, classify_calibration, format_bits, write_result
from qdeploy.evaluate.settings import PAIR_METRICS, REFERENCE_METRICS, SET_METRICS, STEP_METRICS, EvaluationSettings
from qdeploy.evaluate.timing import read_seconds_per_picture
from qdeploy.reporting.environment import describe_environment
from qdeploy.sample.folder import check_pictures

FEATURES, RESULT = "features", "result.json"


def list_outputs(folder: Path) -> list[Output]:
    """What an evaluation overwrites in ``folder``; pictures have a check of their own."""
    tables = [Output(folder / name, EVALUATION_TABLE) for name in ("table.md", "table.csv", "calibration.csv")]
    features = [Output(path, FEATURES_FILE) for path in sorted((folder / FEATURES).glob("*.npy"))]
    return [Output(folder / RESULT, EVALUATION), *tables, *features]


def run_evaluation(
    bundles: Sequence[Path],
    reference: Path | None,
    settings: EvaluationSettings,
    out: Path,
    on_progress: OnProgress = ignore_progress,
) -> EvaluationResult:
    """Evaluate ``bundles`` against ``reference`` (pictures or a bundle); all output is written to ``out``.

    That is pictures/NAME/, features/, receipts/ and result.json. A second call makes only what is still missing.
    """
    check_torchmetrics()
    extra = [reference] if reference is not None and is_bundle(reference) and reference not in bundles else []
    bundle_pictures = open_bundles([*bundles, *extra], settings, out)
    reference_bundle = choose_reference_bundle(bundle_pictures, reference)
    check_metrics(settings, bundle_pictures[: len(bundles)], reference, reference_bundle)
    clip = ClipScore(settings.clip) if settings.has_any("clip") else None
    lpips = Lpips(settings.lpips, settings.weights.allow_download) if settings.has_any("lpips") else None
    extractor = open_extractor(settings.extractor_name, settings.weights) if settings.has_any(*SET_METRICS) else None

    check_room(out / PICTURES, sum(pictures.missing_bytes for pictures in bundle_pictures))
    for pictures in bundle_pictures:
        check_pictures(pictures.folder, out / RECEIPTS / pictures.name)
    for pictures in bundle_pictures:
        make_pictures(pictures, settings, out, on_progress)
    rows, reference_features = extract_all_features(bundle_pictures, reference, extractor, settings, out, on_progress)
    measurer = None if extractor is None else build_measurer(settings, extractor.info, reference_features)
    contenders = []
    for pictures in bundle_pictures[: len(bundles)]:
        figures, warnings = ({}, []) if measurer is None else measurer.measure(rows[pictures.name])
        if clip is not None and settings.prompts is not None:
            figures["clip"] = measure_clip_score(clip, pictures.to_source(), settings.prompts, on_progress)
        comparison = None
        if (
            reference_bundle is not None
            and reference_bundle is not pictures
            and settings.has_any(*PAIR_METRICS, *STEP_METRICS)
        ):
            comparison = compare_with_reference(reference_bundle, pictures, settings, lpips, on_progress)
            figures |= summarize_comparison(comparison)
        contenders.append(
            BundleResult(
                name=pictures.name,
                bundle=str(pictures.path),
                bundle_sha256=pictures.sha256,
                bits=format_bits(pictures.manifest),
                calibration=classify_calibration(pictures.manifest),
                pictures=f"{PICTURES}/{pictures.name}",
                count=len(rows[pictures.name]) if rows else pictures.count,
                broken=rows[pictures.name].broken if rows else (),
                figures=figures,
                provenance=pictures.manifest.provenance,
                comparison=comparison,
                warnings=tuple(warnings),
                size_bytes=pictures.size_bytes,
                seconds_per_picture=read_seconds_per_picture(out / RECEIPTS / pictures.name),
            )
        )
    engines = {choose_engine(pictures.path, pictures.manifest.engine, settings.engine) for pictures in bundle_pictures}
    result = EvaluationResult(
        settings=options_to_json(settings),
        environment=describe_environment(engines, settings.threads),
        reference=None
        if reference is None or reference_features is None
        else describe_reference(reference, reference_features, settings.fit),
        extractor=None if extractor is None else extractor.info,
        contenders=tuple(contenders),
        notes=write_notes(settings, measurer, clip, reference),
    )
    write_result(out / RESULT, result)
    return result


def choose_reference_bundle(bundles: Sequence[BundlePictures], reference: Path | None) -> BundlePictures | None:
    """The float bundle that others are compared with: the reference where it is one, else the first."""
    float_bundles = [bundle for bundle in bundles if bundle.is_float]
    return next(
        (bundle for bundle in float_bundles if bundle.path == reference), float_bundles[0] if float_bundles else None
    )


def check_metrics(
    settings: EvaluationSettings,
    bundles: Sequence[BundlePictures],
    reference: Path | None,
    reference_bundle: BundlePictures | None,
) -> None:
    """UsageError for a metric whose inputs are missing, before any picture is made."""
    for name in settings.metrics:
        if name in REFERENCE_METRICS and reference is None:
            raise UsageError(f"the metric {name} needs --reference: a folder of pictures, an LSUN lmdb or a bundle")
        if name in (*PAIR_METRICS, *STEP_METRICS) and reference_bundle is None:
            raise UsageError(
                f"the metric {name} needs a float bundle to compare with: give an fp32 bundle too, or as --reference"
            )
        if name == "clip" and settings.prompts is None:
            raise UsageError("the metric clip needs captions: it is for text-to-image bundles with --prompts FILE")
        if name in REFERENCE_METRICS and len(bundles) == 1 and bundles[0].path == reference:
            raise UsageError(f"the metric {name}: the only bundle is the reference itself; give another of the two")


def extract_all_features(
    bundle_pictures: Sequence[BundlePictures],
    reference: Path | None,
    extractor: Extractor | None,
    settings: EvaluationSettings,
    out: Path,
    on_progress: OnProgress,
) -> tuple[dict[str, Features], Features | None]:
    """Features of each bundle's pictures by its name, and the reference's; nothing without an extractor."""
    if extractor is None:
        return {}, None

    sources = [pictures.to_source() for pictures in bundle_pictures]
    if reference is not None and not is_bundle(reference):
        sources = [open_reference(reference, settings, bundle_pictures[0].manifest.latents), *sources]
    extracted = [
        extract_features(source, extractor, out / FEATURES, settings.skip_broken, on_progress) for source in sources
    ]
    rows = {
        pictures.name: features
        for pictures, features in zip(bundle_pictures, extracted[-len(bundle_pictures) :], strict=True)
    }
    if len(extracted) > len(bundle_pictures):
        return rows, extracted[0]
    return rows, next((rows[pictures.name] for pictures in bundle_pictures if pictures.path == reference), None)


def options_to_json(settings: EvaluationSettings) -> dict[str, Any]:
    """The options as JSON values."""
    options = {name: value for name, value in asdict(settings).items() if name != "calls"}
    options |= {"calls": settings.calls.text, **settings.calls.to_json()}
    options["extractor"] = settings.extractor_name if settings.has_any(*SET_METRICS) else None
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def write_notes(
    settings: EvaluationSettings, measurer: FigureMeasurer | None, clip: ClipScore | None, reference: Path | None
) -> tuple[str, ...]:
    """Notes under every table."""
    scheduler = settings.scheduler or "each bundle's own scheduler"
    text = f", guidance {settings.guidance_scale:g}, {len(settings.prompts)} prompts" if settings.prompts else ""
    text += f" ({settings.calls.text})" if settings.calls.text else ""
    notes = [
        f"n = {settings.count} pictures a bundle, seed {settings.seed}, {settings.steps} steps of {scheduler}{text}"
    ]
    notes += [] if measurer is None else measurer.notes
    if measurer is not None and measurer.reference is not None and is_bundle(reference):
        notes.append(
            "the reference is a bundle and its pictures have the same seeds: distances to it are smaller than to "
            "pictures of its own kind with others"
        )
    notes += [] if clip is None else [f"CLIPScore of {settings.clip}, weights {clip.sha256[:8]}"]
    return tuple(notes)
