"""The settings of `evaluate`: metrics, number of pictures, how they are made, and the reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qdeploy.base.errors import UsageError
from qdeploy.evaluate.extractors import ExtractorOptions
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule

SET_METRICS = ("fid", "kid", "is", "pr")  # of all pictures, by their features
CAPTION_METRICS = ("clip",)
PAIR_METRICS = ("psnr", "ssim", "lpips")  # of each picture and the float reference's
STEP_METRICS = ("sqnr",)
METRICS = (*SET_METRICS, *CAPTION_METRICS, *PAIR_METRICS, *STEP_METRICS)
REFERENCE_METRICS = ("fid", "kid", "pr")
MAX_PICTURES = 10**6  # their names have six digits


@dataclass(frozen=True)
class EvaluationSettings:
    """The options of the command.

    reference_count: number of the reference's pictures, chosen by the seed; None takes all.
    fit: cut and scale the reference's pictures to the bundle's size.
    extractor: None is Inception where its weights are available, else open-nsfw.
    ray: the address of a Ray cluster; None makes pictures in this process.
    """

    metrics: tuple[str, ...] = ("fid", "kid", "pr", "psnr", "ssim", "sqnr")
    count: int = 256
    prompts: tuple[str, ...] | None = None
    steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0
    scheduler: str | None = None
    batch: int = 8
    reference_count: int | None = None
    fit: bool = False
    skip_broken: bool = False
    extractor: str | None = None
    weights: ExtractorOptions = field(default_factory=ExtractorOptions)
    clip: Path | None = None
    lpips: Path | None = None
    engine: str | None = None
    threads: int | None = None
    ray: str | None = None
    calls: CallSchedule = EVERY_CALL

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(f"--metrics: got {name!r}, expected some of {','.join(METRICS)}")
        for name, minimum in (("count", 2), ("batch", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise UsageError(f"--{name}: got {getattr(self, name)}, expected at least {minimum}")
        if self.count > MAX_PICTURES:
            raise UsageError(f"--count: got {self.count}, expected at most {MAX_PICTURES}")

    @property
    def extractor_name(self) -> str:
        """The extractor to take."""
        if self.extractor is not None:
            return self.extractor
        is_available = self.weights.inception is not None or self.weights.allow_download
        return "inception" if is_available else "open-nsfw"

    def has_any(self, *metrics: str) -> bool:
        """Whether any of them is."""
        return any(name in self.metrics for name in metrics)
