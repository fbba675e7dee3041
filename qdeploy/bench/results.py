"""Results of a bench, as raw samples in the order in which they were taken."""

from __future__ import annotations

from dataclasses import dataclass, field

from qdeploy.bench.settings import BenchSettings
from qdeploy.reporting.fidelity import Fidelity

TEXT_ENCODER, STEP, DECODE, PICTURE = "text encoder", "unet step", "vae decode", "picture"
STAGES = (TEXT_ENCODER, STEP, DECODE, PICTURE)
COLD_READ_SHARE = 0.5  # of a bundle's bytes, for a load to count as cold


@dataclass
class StageSamples:
    """Milliseconds of each call; sample i of every contender was taken in round i."""

    warmup_ms: list[float] = field(default_factory=list)
    steady_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class FreshStart:
    """One new process that loaded a bundle and made one short picture.

    dropped: whether the bundle's files were evicted from the page cache first.
    read_bytes: that the load fetched from storage; None where the system does not report it.
    device_peak_bytes: None where the engine knows none.
    """

    dropped: bool
    load_ms: float
    read_bytes: int | None
    peak_bytes: int
    device_peak_bytes: int | None = None


@dataclass
class ContenderResult:
    """One contender's. ``name`` is the bundle's, with the engine where one bundle runs on several.

    bundle_sha256: of the manifest, which holds those of all files. model_sha256: of the float model it came from.
    pictures_per_s: concurrency -> one value a round.
    """

    name: str
    bundle: str
    engine: str
    precision: str
    size_bytes: int
    integer_mac_share: float
    bundle_sha256: str = ""
    model_sha256: str = ""
    samples: dict[str, StageSamples] = field(default_factory=dict)
    pictures_per_s: dict[int, list[float]] = field(default_factory=dict)
    fresh_starts: list[FreshStart] = field(default_factory=list)
    fidelity: Fidelity | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What identifies one contender in several runs."""
        return self.bundle, self.engine

    def steady_ms(self, stage: str) -> list[float]:
        """Samples of a stage after its first call; empty for a stage that was not measured."""
        return self.samples[stage].steady_ms if stage in self.samples else []

    def rates(self, level: int) -> list[float]:
        """Pictures a second with ``level`` at once."""
        return self.pictures_per_s.get(level, [])

    def load_ms(self, cold: bool) -> list[float]:
        """Of fresh processes: from storage, or with the bundle's files still in memory.

        A load counts as cold only when at least half of the bundle was seen to come from storage.
        """
        min_bytes = COLD_READ_SHARE * self.size_bytes
        if cold:
            return [s.load_ms for s in self.fresh_starts if s.dropped and (s.read_bytes or 0) >= min_bytes]
        return [start.load_ms for start in self.fresh_starts if not start.dropped]

    @property
    def peak_bytes(self) -> list[int]:
        """Peak resident memory of each fresh process."""
        return [start.peak_bytes for start in self.fresh_starts]

    @property
    def device_peak_bytes(self) -> list[int]:
        """Peak memory on the GPU of each fresh process that used one."""
        return [start.device_peak_bytes for start in self.fresh_starts if start.device_peak_bytes is not None]


@dataclass
class BenchRun:
    """One run over all contenders; not ``complete`` when it was interrupted.

    started: local date and time, ISO 8601.
    """

    settings: BenchSettings
    environment: dict[str, str]
    started: str
    contenders: list[ContenderResult]
    complete: bool = False

    @property
    def reference(self) -> ContenderResult:
        """What the others are compared with: the first fp32 contender, or else the first of all."""
        return next((contender for contender in self.contenders if contender.precision == "fp32"), self.contenders[0])
