"""Write constraints.txt, the exact versions that `make` installs: `python -m scripts.constraints [--upgrade]`.

uv resolves the extras that `make demo` and `make test` use. Versions that are pinned already stay where they still
fit; `--upgrade` takes the newest. Left out is what a CPU machine does not install: NVIDIA's libraries of torch's
CUDA build, and this repository's own package.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "constraints.txt"
EXTRAS = ("all", "dev", "tensorrt-rtx", "serve-ray", "torch-cuda", "ncnn", "litert")
OLDEST_PYTHON = "3.11"
LEFT_OUT = re.compile(r"-e |nvidia-|cuda-toolkit|setuptools==")
HEADER = "# Exact versions of everything that `make` installs, written by `make constraints` (uv).\n"


def resolve(upgrade: bool) -> list[str]:
    """``name==version`` of every package, by name; versions in the present file are preferred unless upgraded."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--quiet", "--no-annotate", "--no-header"]
    command += ["--python-version", OLDEST_PYTHON, "--output-file", OUT.name]
    command += [part for extra in EXTRAS for part in ("--extra", extra)]
    done = subprocess.run([*command, *(["--upgrade"] if upgrade else [])], cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return [line for line in OUT.read_text(encoding="utf-8").splitlines() if not LEFT_OUT.match(line)]


if __name__ == "__main__":
    lines = resolve("--upgrade" in sys.argv[1:])
    OUT.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{OUT.name}: {len(lines)} packages")
