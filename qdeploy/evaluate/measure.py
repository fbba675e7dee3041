"""Measure one set of pictures against the reference, with the notes that the figures need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qdeploy.base.decode import decode_picture
from qdeploy.base.errors import UsageError
from qdeploy.base.progress import OnProgress
from qdeploy.evaluate.extractors import ExtractorInfo
from qdeploy.evaluate.features import Features, PictureSource
from qdeploy.evaluate.metrics.classifier import Classifier, fit_classifier, labels_from_names
from qdeploy.evaluate.metrics.clip_score import ClipScore
from qdeploy.evaluate.metrics.fid import compute_fid
from qdeploy.evaluate.metrics.inception_score import compute_inception_score
from qdeploy.evaluate.metrics.kid import compute_kid
from qdeploy.evaluate.metrics.precision_recall import compute_precision_recall
from qdeploy.evaluate.settings import EvaluationSettings

Figures = dict[str, float | None]
CLIP_BATCH = 16  # pictures that CLIP reads at once


@dataclass(frozen=True)
class FigureMeasurer:
    """reference: its features. classifier: for IS where the extractor has none."""

    settings: EvaluationSettings
    info: ExtractorInfo
    reference: Features | None
    classifier: Classifier | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes under every table."""
        return (self.info.note, *(() if self.classifier is None else (self.classifier.note,)))

    def measure(self, features: Features) -> tuple[Figures, list[str]]:
        """Figures by name, and warnings."""
        figures: Figures = {}
        warnings: list[str] = []
        settings, values = self.settings, np.asarray(features.values)
        if settings.has_any("is"):
            logits = features.logits if self.classifier is None else self.classifier.logits(values)
            score = compute_inception_score(np.asarray(logits), settings.seed)
            figures |= {"is": score.score, "is_std_error": score.std_error, "is_splits": score.splits}
        if self.reference is None or self.reference is features:  # a set is not compared with itself
            return figures, warnings
        reference = np.asarray(self.reference.values)
        if settings.has_any("fid"):
            fid = compute_fid(values, reference, settings.seed)
            low, high = fid.interval
            figures |= {"fid": fid.fid, "fid_low": low, "fid_high": high, "fid_infinity": fid.infinity}
            if fid.rank_deficient:
                count = min(len(values), len(reference))
                warnings.append(
                    f"{count} pictures for {self.info.dim} features: the covariance is rank-deficient and FID mostly "
                    "bias; read KID, or make more pictures"
                )
            if fid.infinity is None:
                warnings.append(
                    f"no FID_infinity: it needs more than {2 * (self.info.dim + 1)} pictures, got {len(values)}"
                )
        if settings.has_any("kid"):
            kid = compute_kid(values, reference, settings.seed)
            figures |= {"kid": kid.kid, "kid_std": kid.std, "kid_subset": kid.subset_size}
        if settings.has_any("pr"):
            result = compute_precision_recall(values, reference)
            figures |= {"precision": result.precision, "recall": result.recall}
        return figures, warnings


def build_measurer(settings: EvaluationSettings, info: ExtractorInfo, reference: Features | None) -> FigureMeasurer:
    """Ready to measure; UsageError where IS has no classifier and no folders to fit one to."""
    classifier = None
    if settings.has_any("is") and info.classes == 0:
        labels = None if reference is None else labels_from_names(reference.names)
        if reference is None or labels is None:
            raise UsageError(
                f"the metric is needs a classifier and {info.name} has none: give --inception FILE, or a --reference "
                "with a folder for each class, to which one is fitted"
            )
        classifier = fit_classifier(np.asarray(reference.values), labels)
    return FigureMeasurer(settings, info, reference, classifier)


def measure_clip_score(
    clip: ClipScore, source: PictureSource, prompts: Sequence[str], on_progress: OnProgress
) -> float:
    """Mean CLIPScore of the pictures and the prompts that they were made of."""
    scores: list[float] = []
    positions = list(source.positions)
    for start in range(0, len(positions), CLIP_BATCH):
        piece = positions[start : start + CLIP_BATCH]
        pictures = [decode_picture(encoded, name) for name, encoded in source.pictures.read_encoded(piece)]
        scores += clip(pictures, [prompts[number % len(prompts)] for number in piece])
        on_progress(f"CLIPScore of {source.name}", len(scores), len(positions))
    return float(np.mean(scores))
