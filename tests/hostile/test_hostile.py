"""Mutated files of ours are refused in one paragraph: no traceback, no abort, no wait, no gigabyte, nothing silent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MAX_SECONDS, MAX_BYTES = 10, 10**9
MAX_MODEL_BYTES = 500 * 10**6  # that a model's files may take before they are refused
MODEL_KINDS = ("checkpoint", "checkpoint pickle", "original yaml", "lora", "lora folder")
KINDS = 31
SAMPLE, SLOW_COUNT, CHUNK = 310, 6200, 620
Artifacts = tuple[Path, Path, Path, Path]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from Linux's /proc")


def run_cases(artifacts: Artifacts, work: Path, first: int, count: int) -> list[dict]:
    """The cases with their results; the one that ended the process has the result None."""
    command = [sys.executable, "-m", "tests.hostile.worker", *map(str, (*artifacts, work, first, count))]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=120 + MAX_SECONDS * count, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # ONNX Runtime prints
    cases = [case | done for case, done in zip(lines[0::2], [*lines[1::2], {}], strict=False)]
    if done.returncode != 0 or len(cases) < count:
        pytest.fail(f"the process ended with {done.returncode} in {cases[-1:]}: {done.stderr[-2000:]}")
    return cases


def check_cases(cases: list[dict]) -> None:
    wrong = [case for case in cases if case["result"] not in ("refused", "accepted")]
    silent = [case for case in cases if case["must_refuse"] and case["result"] == "accepted"]
    slow = [case for case in cases if case["seconds"] > MAX_SECONDS or case["grown_bytes"] > get_limit(case["kind"])]
    shown = [json.dumps(case) for case in (*wrong, *silent, *slow)]
    assert not shown, f"{len(wrong)} wrong, {len(silent)} silent, {len(slow)} slow or large:\n" + "\n".join(shown[:20])
    refused = sum(case["result"] == "refused" for case in cases)
    assert refused > len(cases) / 2  # otherwise the mutations hit nothing


def get_limit(kind: str) -> int:
    """Bytes that reading one file of this kind may take."""
    return MAX_MODEL_BYTES if kind in MODEL_KINDS else MAX_BYTES


@pytest.fixture
def good_files(float_bundle: Path, table_file: Path, calibration_file: Path, tiny_folder: Path) -> Artifacts:
    return float_bundle, table_file, calibration_file, tiny_folder


def test_a_sample(good_files: Artifacts, tmp_path: Path) -> None:
    cases = run_cases(good_files, tmp_path, 0, SAMPLE)
    check_cases(cases)
    assert len({case["kind"] for case in cases}) == KINDS


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SAMPLE, SAMPLE + SLOW_COUNT, CHUNK))
def test_thousands(good_files: Artifacts, tmp_path: Path, first: int) -> None:
    check_cases(run_cases(good_files, tmp_path, first, CHUNK))
