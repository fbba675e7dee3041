"""Work in a process of its own, for limits and kills; a new interpreter would need seconds to load torch."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, NoReturn


class Done(NamedTuple):
    """As ``subprocess.CompletedProcess`` has it; the negative number of the signal for a killed process."""

    returncode: int
    stdout: str
    stderr: str


def run_forked(work: Callable[[], object]) -> Done:
    """Do ``work`` in a copy of this process, one thread."""
    (read_out, write_out), (read_err, write_err) = pipes = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        become(work, write_out, write_err)
    for _, end in pipes:
        os.close(end)
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(read_all, (read_out, read_err)))
    _, status = os.waitpid(child, 0)
    return Done(os.waitstatus_to_exitcode(status), *said)


def become(work: Callable[[], object], out: int, err: int) -> NoReturn:
    """Do ``work`` and end, whatever comes; nothing of pytest's is left to run."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # without pytest's capture
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # the parent's threads are not here
        work()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def read_all(end: int) -> str:
    with open(end, encoding="utf-8") as file:
        return file.read()


def limit_files(size: int) -> None:
    """No file of this process can grow beyond ``size`` bytes, as on a disk without room."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # make the write fail instead of the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
