"""Run seeded cases in a process of its own and print each result as a line: a native abort must end only this process.

``python -m tests.hostile.worker BUNDLE TABLE CALIBRATION MODEL WORK FIRST COUNT``
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path

from qdeploy.base.errors import QdeployError
from tests.hostile.cases import Case
from tests.hostile.kinds import build_kinds
from tests.hostile.outside import build_outside_kinds

ROOM_BYTES = 16 * 2**30  # of addresses, most of them never touched: what would fill the machine is stopped before
RESET_PEAK = "5"  # man 5 proc, clear_refs


def run_case(case: Case) -> str:
    """ "refused", "accepted", or the end of the traceback."""
    try:
        case.read()
    except QdeployError as exc:
        return "refused" if "\n" not in str(exc) and len(str(exc)) < 2000 else f"no paragraph: {str(exc)[:300]!r}"
    except BaseException:
        return traceback.format_exc(limit=-3)
    return "accepted"


def reset_peak() -> int:
    """Begin a new peak of memory and return what is in use."""
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    return read_status("VmRSS")


def read_status(name: str) -> int:
    """Bytes, from the kernel's own account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(bundle: str, table: str, calibration: str, model: str, work: str, first: str, count: str) -> None:
    good = Path(work) / "good"
    kinds = {
        **build_kinds(Path(bundle), Path(table), Path(calibration), good),
        **build_outside_kinds(Path(model), good),
    }
    names = sorted(kinds)
    resource.setrlimit(resource.RLIMIT_AS, (read_status("VmSize") + ROOM_BYTES, resource.RLIM_INFINITY))
    for seed in range(int(first), int(first) + int(count)):
        name, folder = names[seed % len(names)], Path(work) / "case"
        folder.mkdir()
        case = kinds[name](random.Random(seed), folder)
        print(json.dumps({"seed": seed, "kind": name, "what": case.what, "must_refuse": case.must_refuse}), flush=True)
        before, started = reset_peak(), time.process_time()
        result = run_case(case)
        seconds, grown = time.process_time() - started, read_status("VmHWM") - before
        print(json.dumps({"result": result, "seconds": seconds, "grown_bytes": grown}), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
