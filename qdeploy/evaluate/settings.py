"""What `evaluate` is asked: which measures, of how many pictures, made how, beside what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qdeploy.errors import UsageError
from qdeploy.evaluate.extractors import ExtractorOptions

OF_SETS = ("fid", "kid", "is", "pr")  # of all pictures, by their features
OF_CAPTIONS = ("clip",)
OF_PAIRS = ("psnr", "ssim", "lpips")  # of each picture and its float twin's
OF_STEPS = ("sqnr",)
METRICS = (*OF_SETS, *OF_CAPTIONS, *OF_PAIRS, *OF_STEPS)
NEED_REFERENCE = ("fid", "kid", "pr")
MOST_PICTURES = 10**6  # their names have six digits


@dataclass(frozen=True)
class Settings:
    """The options of the command.

    reference_count: of the reference's pictures, drawn by the seed; None takes all.
    fit: cut and scale the reference's pictures to the bundle's size.
    extractor: None is Inception where its weights are to be had, else open-nsfw.
    ray: the address of a Ray cluster; None makes pictures in this process.
    """

    metrics: tuple[str, ...] = ("fid", "kid", "pr", "psnr", "ssim", "sqnr")
    count: int = 256
    prompts: tuple[str, ...] | None = None
    steps: int = 25
    guidance: float = 7.5
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

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(f"--metrics: got {name!r}, expected some of {','.join(METRICS)}")
        for name, least in (("count", 2), ("batch", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name}: got {getattr(self, name)}, expected at least {least}")
        if self.count > MOST_PICTURES:
            raise UsageError(f"--count: got {self.count}, expected at most {MOST_PICTURES}")

    @property
    def extractor_name(self) -> str:
        """The extractor to take."""
        if self.extractor is not None:
            return self.extractor
        is_there = self.weights.inception is not None or self.weights.allow_download
        return "inception" if is_there else "open-nsfw"

    def asked(self, *metrics: str) -> bool:
        """Whether any of them is."""
        return any(name in self.metrics for name in metrics)
