"""Makes one quantized UNet, a peer's or ours, in a process of its own, so that its peak memory is its own.

Run by itself (``python -m benchmarks.peers NAME WORK``) it is that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.inputs import WorkFolder, load_peer_feeds
from benchmarks.ours import OURS, QualityRow, quantize_ours
from benchmarks.peer_nncf import NncfSettings, quantize_with_nncf
from benchmarks.peer_ort import OrtSettings, quantize_with_ort
from qdeploy.base.errors import QdeployError, UsageError
from qdeploy.bench.memory import read_peak_bytes

FULL_BIAS_CORRECTION_FEEDS = 320  # it runs parts of the model once per layer and feed: minutes, not hours

PEERS: dict[str, OrtSettings | NncfSettings] = {
    "ort-minmax": OrtSettings("MinMax"),
    "ort-percentile": OrtSettings("Percentile"),
    "ort-entropy": OrtSettings("Entropy"),
    "ort-minmax-keep": OrtSettings("MinMax", keep_list=True),
    "ort-percentile-keep": OrtSettings("Percentile", keep_list=True),
    "ort-entropy-keep": OrtSettings("Entropy", keep_list=True),
    "ort-minmax-keep-inputs": OrtSettings("MinMax", keep_list=True, outputs=False),
    "ort-percentile-keep-inputs": OrtSettings("Percentile", keep_list=True, outputs=False),
    "nncf-mixed": NncfSettings(),
    "nncf-transformer": NncfSettings(transformer=True),
    "nncf-mixed-keep": NncfSettings(keep_list=True),
    "nncf-transformer-keep": NncfSettings(transformer=True, keep_list=True),
    "nncf-mixed-full": NncfSettings(full_bias_correction=True, subset=FULL_BIAS_CORRECTION_FEEDS),
    "nncf-mixed-keep-full": NncfSettings(full_bias_correction=True, keep_list=True, subset=FULL_BIAS_CORRECTION_FEEDS),
    "nncf-transformer-keep-full": NncfSettings(
        transformer=True, full_bias_correction=True, keep_list=True, subset=FULL_BIAS_CORRECTION_FEEDS
    ),
}


@dataclass(frozen=True)
class PeerModel:
    """A quantized UNet, and the time and memory of making it.

    path: ``model.onnx`` or OpenVINO's ``model.xml``, beneath the work folder.
    cpu_seconds: of all threads together, which other work on the machine changes little.
    peak_rss_bytes: of the whole process, of which ``idle_rss_bytes`` were there before it began
    (Python, torch and the calibration data).
    """

    name: str
    path: str
    engine: str
    cpu_seconds: float
    peak_rss_bytes: int
    idle_rss_bytes: int
    note: str


def make_in_subprocess(name: str, work: WorkFolder) -> PeerModel:
    """Make the model called ``name`` in a fresh process, unless it is there already."""
    receipt = work.model_folder(name) / "made.json"
    if not receipt.exists():
        log = work.root / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            command = [sys.executable, "-m", "benchmarks.peers", name, str(work.root)]
            completed = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
        if completed.returncode != 0:
            raise QdeployError(f"making {name} failed with exit status {completed.returncode}; its output is in {log}")
    return PeerModel(**json.loads(receipt.read_text()))


def make_in_process(name: str, work: WorkFolder) -> PeerModel:
    """Make the model called ``name`` in this process and write ``made.json`` next to it."""
    make, engine, note = choose_maker(name, work)
    folder = work.model_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    idle = read_peak_bytes()
    start = time.process_time()
    path = make()
    seconds = time.process_time() - start
    made = PeerModel(name, str(path.relative_to(work.root)), engine, seconds, read_peak_bytes(), idle, note)
    (folder / "made.json").write_text(json.dumps(asdict(made), indent=1) + "\n")
    return made


def choose_maker(name: str, work: WorkFolder) -> tuple[Callable[[], Path], str, str]:
    """How to make ``name``, the engine that runs it, and a note on its settings."""
    settings = PEERS.get(name) or next((row for row in OURS if row.name == name), None)
    folder = work.model_folder(name)
    if isinstance(settings, QualityRow):
        return lambda: quantize_ours(settings, work), settings.engine, settings.note
    if settings is None:
        known = ", ".join([*PEERS, *(row.name for row in OURS)])
        raise UsageError(f"no row {name!r}; there are: {known}")
    feeds = load_peer_feeds(work)
    if isinstance(settings, OrtSettings):
        return lambda: quantize_with_ort(work.float_unet, feeds, settings, folder), "ort-cpu", settings.note
    return lambda: quantize_with_nncf(work.float_unet, feeds, settings, folder), "openvino", settings.note


if __name__ == "__main__":
    make_in_process(sys.argv[1], WorkFolder(Path(sys.argv[2])))
