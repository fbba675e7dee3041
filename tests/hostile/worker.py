"""Run seeded cases in a process of its own and print each result as a line: a native abort must end only this process.

``python -m tests.hostile.worker BUNDLE TABLE CALIBRATION WORK FIRST COUNT``
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
from tests.hostile.kinds import Case, build_kinds


def run_case(case: Case) -> str:
    """ "refused", "accepted", or the end of the traceback."""
    try:
        case.read()
    except QdeployError as exc:
        return "refused" if "\n" not in str(exc) and len(str(exc)) < 2000 else f"no paragraph: {str(exc)[:300]!r}"
    except BaseException:
        return traceback.format_exc(limit=-3)
    return "accepted"


def main(bundle: str, table: str, calibration: str, work: str, first: str, count: str) -> None:
    kinds = build_kinds(Path(bundle), Path(table), Path(calibration), Path(work) / "good")
    names = sorted(kinds)
    for seed in range(int(first), int(first) + int(count)):
        name, folder = names[seed % len(names)], Path(work) / "case"
        folder.mkdir()
        case = kinds[name](random.Random(seed), folder)
        print(json.dumps({"seed": seed, "kind": name, "what": case.what, "must_refuse": case.must_refuse}), flush=True)
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        result = run_case(case)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        done = {"result": result, "seconds": time.monotonic() - started, "grown_bytes": grown * 1024}
        print(json.dumps(done), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
