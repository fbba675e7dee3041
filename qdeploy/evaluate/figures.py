"""The figures of one set of pictures beside the reference, and what must be said about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qdeploy.errors import UsageError
from qdeploy.evaluate.extractors import ExtractorInfo
from qdeploy.evaluate.features import Features, Source
from qdeploy.evaluate.metrics.classifier import Classifier, fitted_classifier, labels_of
from qdeploy.evaluate.metrics.clip_score import ClipScore
from qdeploy.evaluate.metrics.fid import fid_of
from qdeploy.evaluate.metrics.inception_score import inception_score_of
from qdeploy.evaluate.metrics.kid import kid_of
from qdeploy.evaluate.metrics.precision_recall import precision_recall_of
from qdeploy.evaluate.settings import Settings
from qdeploy.picture_files import decode
from qdeploy.progress import OnProgress

Figures = dict[str, float | None]
CAPTIONED = 16  # pictures that CLIP reads at once


@dataclass(frozen=True)
class Measures:
    """held: the reference's features. classifier: for IS where the extractor has none."""

    settings: Settings
    info: ExtractorInfo
    held: Features | None
    classifier: Classifier | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What must stand under every table."""
        return (self.info.note, *(() if self.classifier is None else (self.classifier.note,)))

    def of(self, found: Features) -> tuple[Figures, list[str]]:
        """Figures by name, and warnings."""
        figures: Figures = {}
        warnings: list[str] = []
        settings, values = self.settings, np.asarray(found.values)
        if settings.asked("is"):
            logits = found.logits if self.classifier is None else self.classifier.logits(values)
            score = inception_score_of(np.asarray(logits), settings.seed)
            figures |= {"is": score.score, "is_std_error": score.std_error, "is_splits": score.splits}
        if self.held is None or self.held is found:  # a set is no reference for itself
            return figures, warnings
        held = np.asarray(self.held.values)
        if settings.asked("fid"):
            fid = fid_of(values, held, settings.seed)
            low, high = fid.interval
            figures |= {"fid": fid.fid, "fid_low": low, "fid_high": high, "fid_infinity": fid.infinity}
            if fid.rank_deficient:
                count = min(len(values), len(held))
                warnings.append(
                    f"{count} pictures for {self.info.dim} features: the covariance is rank-deficient and FID mostly "
                    "bias; read KID, or make more pictures"
                )
            if fid.infinity is None:
                warnings.append(
                    f"no FID_infinity: it needs more than {2 * (self.info.dim + 1)} pictures, got {len(values)}"
                )
        if settings.asked("kid"):
            kid = kid_of(values, held, settings.seed)
            figures |= {"kid": kid.kid, "kid_std": kid.std, "kid_subset": kid.subset_size}
        if settings.asked("pr"):
            both = precision_recall_of(values, held)
            figures |= {"precision": both.precision, "recall": both.recall}
        return figures, warnings


def measures_of(settings: Settings, info: ExtractorInfo, held: Features | None) -> Measures:
    """Ready to measure; UsageError where IS has no classifier and nothing to fit one to."""
    classifier = None
    if settings.asked("is") and info.classes == 0:
        labels = None if held is None else labels_of(held.names)
        if held is None or labels is None:
            raise UsageError(
                f"the metric is needs a classifier and {info.name} has none: give --inception FILE, or a --reference "
                "with a folder for each class, to which one is fitted"
            )
        classifier = fitted_classifier(np.asarray(held.values), labels)
    return Measures(settings, info, held, classifier)


def clip_figure(clip: ClipScore, source: Source, prompts: Sequence[str], on_progress: OnProgress) -> float:
    """Mean CLIPScore of the pictures and the prompts that they were made of."""
    scores: list[float] = []
    positions = list(source.positions)
    for start in range(0, len(positions), CAPTIONED):
        piece = positions[start : start + CAPTIONED]
        pictures = [decode(encoded, name) for name, encoded in source.pictures.encoded(piece)]
        scores += clip(pictures, [prompts[number % len(prompts)] for number in piece])
        on_progress(f"CLIPScore of {source.name}", len(scores), len(positions))
    return float(np.mean(scores))
