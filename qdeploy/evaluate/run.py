"""An evaluation: pictures of every bundle, features of every set, then the measures; stopped, it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdeploy.bench.environment import environment
from qdeploy.engines.base import engine_for
from qdeploy.errors import UsageError
from qdeploy.evaluate.beside_twin import beside_twin, figures_of_twin
from qdeploy.evaluate.contenders import PICTURES, RECEIPTS, Made, draw_pictures, opened_bundles
from qdeploy.evaluate.extractors import Extractor, open_extractor
from qdeploy.evaluate.features import Features, features_of
from qdeploy.evaluate.figures import Measures, clip_figure, measures_of
from qdeploy.evaluate.metrics.clip_score import ClipScore
from qdeploy.evaluate.metrics.given import check_torchmetrics
from qdeploy.evaluate.metrics.lpips import Lpips
from qdeploy.evaluate.references import described, is_bundle, reference_source
from qdeploy.evaluate.result import Contender, Result, bits_of, calibration_of, write_result
from qdeploy.evaluate.settings import NEED_REFERENCE, OF_PAIRS, OF_SETS, OF_STEPS, Settings
from qdeploy.evaluate.timing import seconds_per_picture
from qdeploy.progress import OnProgress, silent

FEATURES, RESULT = "features", "result.json"


def evaluate(
    bundles: Sequence[Path], reference: Path | None, settings: Settings, out: Path, on_progress: OnProgress = silent
) -> Result:
    """Evaluate ``bundles`` beside ``reference`` (pictures or a bundle); ``out`` gets all that is made.

    That is pictures/NAME/, features/, receipts/ and result.json. A second call makes only what is missing.
    """
    check_torchmetrics()
    also = [reference] if reference is not None and is_bundle(reference) and reference not in bundles else []
    opened = opened_bundles([*bundles, *also], settings, out)
    twin = twin_of(opened, reference)
    check(settings, opened[: len(bundles)], reference, twin)
    clip = ClipScore(settings.clip) if settings.asked("clip") else None
    lpips = Lpips(settings.lpips, settings.weights.allow_download) if settings.asked("lpips") else None
    extractor = open_extractor(settings.extractor_name, settings.weights) if settings.asked(*OF_SETS) else None

    for made in opened:
        draw_pictures(made, settings, out, on_progress)
    rows, held = all_features(opened, reference, extractor, settings, out, on_progress)
    measures = None if extractor is None else measures_of(settings, extractor.info, held)
    contenders = []
    for made in opened[: len(bundles)]:
        figures, warnings = ({}, []) if measures is None else measures.of(rows[made.name])
        if clip is not None and settings.prompts is not None:
            figures["clip"] = clip_figure(clip, made.source(), settings.prompts, on_progress)
        beside = None
        if twin is not None and twin is not made and settings.asked(*OF_PAIRS, *OF_STEPS):
            beside = beside_twin(twin, made, settings, lpips, on_progress)
            figures |= figures_of_twin(beside)
        contenders.append(
            Contender(
                name=made.name,
                bundle=str(made.path),
                bundle_sha256=made.sha256,
                bits=bits_of(made.manifest),
                calibration=calibration_of(made.manifest),
                pictures=f"{PICTURES}/{made.name}",
                count=len(rows[made.name]) if rows else made.count,
                broken=rows[made.name].broken if rows else (),
                figures=figures,
                provenance=made.manifest.provenance,
                twin=beside,
                warnings=tuple(warnings),
                size_bytes=made.size_bytes,
                seconds_per_picture=seconds_per_picture(out / RECEIPTS / made.name),
            )
        )
    engines = {engine_for(made.path, made.manifest.engine, settings.engine) for made in opened}
    result = Result(
        settings=told(settings),
        environment=environment(engines, settings.threads),
        reference=None if reference is None or held is None else described(reference, held, settings.fit),
        extractor=None if extractor is None else extractor.info,
        contenders=tuple(contenders),
        notes=notes_of(settings, measures, clip, reference),
    )
    write_result(out / RESULT, result)
    return result


def twin_of(opened: Sequence[Made], reference: Path | None) -> Made | None:
    """The float bundle that others are held against: the reference where it is one, else the first."""
    floats = [made for made in opened if made.is_float]
    return next((made for made in floats if made.path == reference), floats[0] if floats else None)


def check(settings: Settings, bundles: Sequence[Made], reference: Path | None, twin: Made | None) -> None:
    """UsageError for a measure that has nothing to be made of, before any picture is."""
    for name in settings.metrics:
        if name in NEED_REFERENCE and reference is None:
            raise UsageError(f"the metric {name} needs --reference: a folder of pictures, an LSUN lmdb or a bundle")
        if name in (*OF_PAIRS, *OF_STEPS) and twin is None:
            raise UsageError(f"the metric {name} needs the float twin: give an fp32 bundle too, or as --reference")
        if name == "clip" and settings.prompts is None:
            raise UsageError("the metric clip needs captions: it goes with text-to-image bundles and --prompts FILE")
        if name in NEED_REFERENCE and len(bundles) == 1 and bundles[0].path == reference:
            raise UsageError(f"the metric {name}: the only bundle is the reference itself; give another of the two")


def all_features(
    opened: Sequence[Made],
    reference: Path | None,
    extractor: Extractor | None,
    settings: Settings,
    out: Path,
    on_progress: OnProgress,
) -> tuple[dict[str, Features], Features | None]:
    """Features of each bundle's pictures by its name, and the reference's; nothing without an extractor."""
    if extractor is None:
        return {}, None

    sources = [made.source() for made in opened]
    if reference is not None and not is_bundle(reference):
        sources = [reference_source(reference, settings, opened[0].manifest.latents), *sources]
    found = [features_of(one, extractor, out / FEATURES, settings.skip_broken, on_progress) for one in sources]
    rows = {made.name: features for made, features in zip(opened, found[-len(opened) :], strict=True)}
    if len(found) > len(opened):
        return rows, found[0]
    return rows, next((rows[made.name] for made in opened if made.path == reference), None)


def told(settings: Settings) -> dict[str, Any]:
    """The options as JSON values."""
    options = asdict(settings)
    options["extractor"] = settings.extractor_name if settings.asked(*OF_SETS) else None
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def notes_of(
    settings: Settings, measures: Measures | None, clip: ClipScore | None, reference: Path | None
) -> tuple[str, ...]:
    """What must stand under every table."""
    sampler = settings.scheduler or "each bundle's own sampler"
    text = f", guidance {settings.guidance:g}, {len(settings.prompts)} prompts" if settings.prompts else ""
    notes = [f"n = {settings.count} pictures a bundle, seed {settings.seed}, {settings.steps} steps of {sampler}{text}"]
    notes += [] if measures is None else measures.notes
    if measures is not None and measures.held is not None and is_bundle(reference):
        notes.append(
            "the reference is a bundle and its pictures have the same seeds: distances to it are smaller than to "
            "pictures of its own kind with others"
        )
    notes += [] if clip is None else [f"CLIPScore of {settings.clip}, weights {clip.sha256[:8]}"]
    return tuple(notes)
