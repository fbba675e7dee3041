"""Model files that unfold to gigabytes or hours are refused within seconds, and 500 MB above the process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.test_hostile import MAX_MODEL_BYTES, MAX_SECONDS


@pytest.mark.slow  # a minute: some files have 60 MB
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from Linux's /proc")
def test_model_files_take_neither_memory_nor_time(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hostile.bombs", str(tiny_folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, (cases[-1:], done.stderr[-2000:])
    wrong = [case for case in cases if case["result"] != "refused"]
    large = [case for case in cases if case["seconds"] > MAX_SECONDS or case["grown_bytes"] > MAX_MODEL_BYTES]
    assert not [*wrong, *large], "\n".join(map(str, [*wrong, *large]))
    assert len(cases) > 40
