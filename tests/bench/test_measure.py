"""Which calls run, in which order, and what an interrupt keeps; the command's exit codes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result

import qdeploy.base.progress
from qdeploy.base.errors import EngineError, UsageError
from qdeploy.base.progress import ignore_progress
from qdeploy.bench.fresh_start import measure_fresh_start
from qdeploy.bench.idle import POLL_S, TIMEOUT_S, wait_until_idle
from qdeploy.bench.measure import make_names_unique, run_bench, shuffle_rounds, time_interleaved
from qdeploy.bench.memory import read_peak_bytes
from qdeploy.bench.results import STAGES, StageSamples
from qdeploy.bench.settings import BenchContender, BenchSettings, choose_names, levels_from_text, list_contenders
from qdeploy.bench.store import read_bench_run
from qdeploy.cli import main
from qdeploy.reporting.environment import describe_environment
from tests.bench.factories import figures

SETTINGS = BenchSettings(steps=2, rounds=6, pictures=2, concurrency=(1, 2), throughput_rounds=2, fresh_starts=1)
QUICK = ("--rounds", 5, "--pictures", 1, "--steps", 1, "--fresh-starts", 0, "--concurrency", "none")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--quiet", "bench", *map(str, arguments)])


def test_bundles_of_one_name_get_different_names() -> None:
    assert choose_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert choose_names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]


def test_every_bundle_runs_on_every_engine() -> None:
    result = list_contenders([Path("a"), Path("b")], ["ort-cpu", "openvino"])
    assert [(c.bundle, c.engine) for c in result] == [
        ("a", "ort-cpu"), ("a", "openvino"), ("b", "ort-cpu"), ("b", "openvino"),
    ]  # fmt: skip
    assert list_contenders([Path("a")]) == [BenchContender("a", Path("a"), None)]
    results = [figures("a", "fp32", [1.0]), figures("a", "fp32", [1.0])]
    results[1].engine = "openvino"
    make_names_unique(results)
    assert [result.name for result in results] == ["a on ort-cpu", "a on openvino"]


def test_nobody_always_comes_first() -> None:
    rounds = list(shuffle_rounds(300, 3, seed=0))
    assert rounds == list(shuffle_rounds(300, 3, seed=0))
    assert all(sorted(order) == [0, 1, 2] for _, order in rounds)
    assert min(Counter(order[0] for _, order in rounds).values()) > 70
    assert min(Counter((order[0], order[1]) for _, order in rounds).values()) > 25


def test_warm_up_is_kept_apart() -> None:
    called: list[str] = []
    samples = {0: StageSamples(), 1: StageSamples()}
    calls: dict[int, Callable[[], object]] = {0: lambda: called.append("a"), 1: lambda: called.append("b")}
    time_interleaved(calls, samples, 2, 5, 0, ignore_progress, "x")
    assert Counter(called) == {"a": 7, "b": 7}
    assert all((len(s.warmup_ms), len(s.steady_ms)) == (2, 5) for s in samples.values())


@pytest.mark.parametrize(("busy_s", "waited_s"), [(0.1, 0.1), (0.0, 0.0), (9.0, TIMEOUT_S)])
def test_a_call_waits_until_the_last_ones_threads_rest(
    monkeypatch: pytest.MonkeyPatch, busy_s: float, waited_s: float
) -> None:
    """On a clock of its own, by which the process uses a whole core for ``busy_s``."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: min(now[0], busy_s), sleep=sleep)
    monkeypatch.setattr("qdeploy.bench.idle.time", clock)
    wait_until_idle()
    assert waited_s <= now[0] <= waited_s + 2.5 * POLL_S


def test_a_measurement_has_every_figure(float_bundle: Path, int8_bundle: Path) -> None:
    result = run_bench(list_contenders([int8_bundle, float_bundle]), SETTINGS)
    assert result.complete
    assert result.reference.bundle == "fp32"
    w8a8, fp32 = result.contenders
    for contender in result.contenders:
        assert list(contender.samples) == list(STAGES)
        assert [len(contender.steady_ms(stage)) for stage in STAGES] == [6, 6, 6, 2]
        assert {level: len(rates) for level, rates in contender.pictures_per_s.items()} == {1: 2, 2: 2}
        assert len(contender.load_ms(cold=False)) == 1
        assert 20e6 < max(contender.peak_bytes) < 1e9
    assert fp32.fidelity is None
    assert w8a8.fidelity is not None
    assert w8a8.fidelity.worst_sqnr_db > 15
    assert w8a8.model_sha256 == fp32.model_sha256 != ""
    assert w8a8.bundle_sha256 != fp32.bundle_sha256


@pytest.mark.parametrize(
    "at", ["bench: unet step", "bench: 2 pictures at once", "bench: fidelity", "bench: fresh starts"]
)
def test_an_interrupt_keeps_what_is_measured(at: str, float_bundle: Path) -> None:
    def interrupt(what: str, done: int, total: int, note: str = "") -> None:
        if what == at:
            raise KeyboardInterrupt

    result = run_bench(list_contenders([float_bundle]), SETTINGS, interrupt)
    assert not result.complete
    assert len(result.contenders[0].steady_ms("text encoder")) == 6


def test_a_fresh_process_reports_its_own_peak(float_bundle: Path) -> None:
    ballast = np.ones(400_000_000, np.uint8)  # must not show in the child's figure
    sample = measure_fresh_start(BenchContender("a", float_bundle), SETTINGS, cold=False)
    assert sample is not None
    assert 20e6 < sample.peak_bytes < 400e6 < read_peak_bytes()
    assert sample.load_ms > 0
    del ballast


def test_a_bundle_that_fails_in_a_fresh_process_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not a qdeploy bundle"):
        measure_fresh_start(BenchContender("a", tmp_path), SETTINGS, cold=False)


def test_the_environment_names_processor_and_versions() -> None:
    about = describe_environment(["ort-cpu"], None)
    assert {"cpu", "threads", "integer instructions", "load average at the start", "onnxruntime"} <= set(about)


def test_the_command_exits_1_when_something_got_worse(float_bundle: Path, int8_bundle: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    first = run(float_bundle, int8_bundle, *QUICK, "--json", old, "--html", tmp_path / "page.html")
    assert first.exit_code == 0, first.output
    assert "<svg" in (tmp_path / "page.html").read_text()
    again = run(float_bundle, int8_bundle, *QUICK, "--compare", old, "--tolerance", 1e6)
    assert again.exit_code == 0, again.output
    document = json.loads(old.read_text())
    samples = document["contenders"][1]["samples"]["unet step"]
    samples["steady_ms"] = [ms / 1000 for ms in document["contenders"][0]["samples"]["unet step"]["steady_ms"]]
    old.write_text(json.dumps(document))
    worse = run(float_bundle, int8_bundle, *QUICK, "--compare", old)
    assert worse.exit_code == 1
    assert "worse than before by more than noise: w8a8 unet step" in worse.output


def test_the_command_exits_130_when_interrupted(
    float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def interrupting(_: bool) -> Iterator[qdeploy.base.progress.OnProgress]:
        def interrupt(what: str, done: int, total: int, note: str = "") -> None:
            if what == "bench: vae decode" and done == 3:
                raise KeyboardInterrupt

        yield interrupt

    monkeypatch.setattr(qdeploy.base.progress, "show_progress", interrupting)
    result = run(float_bundle, *QUICK, "--json", tmp_path / "cut.json", "--html", tmp_path / "cut.html")
    assert result.exit_code == 130, result.output
    assert "unet step" in result.output
    assert "interrupted" in (tmp_path / "cut.html").read_text()
    kept = read_bench_run(tmp_path / "cut.json")
    assert not kept.complete
    assert len(kept.contenders[0].steady_ms("unet step")) == 5


def test_levels_of_concurrency() -> None:
    assert levels_from_text("1,2,2,4") == (1, 2, 4)
    assert levels_from_text("none") == ()
    for text in ("", "a", "1,"):
        with pytest.raises(UsageError, match="--concurrency"):
            levels_from_text(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rounds", 0), "0 is not in the range"),
        (("--concurrency", "0"), "--concurrency"),
        (("--compare", "nowhere.json"), "nowhere.json cannot be read"),
        (("--engine", "nonsense"), "unknown --engine"),
        (("--forecast", "magic"), "got method 'magic', expected one of reuse"),
        (("--guidance-interval", 0.8, 0.2), "guidance_interval: got (0.8, 0.2), which is reversed"),
    ],
)
def test_misuse_is_one_paragraph(options: tuple[object, ...], words: str, float_bundle: Path) -> None:
    result = run(float_bundle, *options)
    assert result.exit_code == 2
    assert words in result.output
