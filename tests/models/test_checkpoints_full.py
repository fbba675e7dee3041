"""Checkpoints of the published sizes (random weights): the same outputs, and how long and how large it gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.original_files import original_state, write_ckpt
from tests.models.original_ldm import FULL, LatentDiffusion
from tests.models.test_checkpoints import assert_close, inputs_for, run_original

ROUND_OFF = 3e-5  # float32 through the published depths: 1.0e-5 after text2img256's 32 text layers and UNet
ALLOWANCE_BYTES = 1.5 * 2**30  # Python, torch, diffusers and transformers
ROOT = Path(__file__).parents[2]
CONVERT = """
import json, re, sys, time
from pathlib import Path
import torch
from qdeploy.models.checkpoints import convert_checkpoint
from tests.models.test_checkpoints import run_converted

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, before, start = Path(sys.argv[1]), peak_bytes(), time.perf_counter()
model = convert_checkpoint(folder / "model.ckpt")
figures = {"seconds": time.perf_counter() - start, "imports": before, "converted": peak_bytes()}
torch.save(run_converted(model, torch.load(folder / "inputs.pt")), folder / "found.pt")
print(json.dumps({**figures, "used": peak_bytes()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsun_beds256", "lsun_churches256", "text2img256", "sd-v1-4"])
def test_full_size(tmp_path: Path, name: str) -> None:
    """LSUN's files carry averaged weights too, Stable Diffusion's small ones do not. Peaks are VmHWM."""
    source = LatentDiffusion(FULL[name])
    path = write_ckpt(original_state(source, ema=name.startswith("lsun")), tmp_path / "model.ckpt")
    inputs = inputs_for(source.sizes)
    torch.save(inputs, tmp_path / "inputs.pt")
    expected = run_original(source, inputs)
    del source
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures, size = json.loads(done.stdout.splitlines()[-1]), path.stat().st_size
    path.unlink()
    peaks = ", ".join(f"{step} {figures[step] / 1e9:.2f} GB" for step in ("imports", "converted", "used"))
    print(f"\n{name}: file {size / 1e9:.2f} GB, converted in {figures['seconds']:.1f} s; peak memory: {peaks}")
    actual = torch.load(tmp_path / "found.pt")
    for part in expected:
        assert_close(actual[part], expected[part], ROUND_OFF)
    assert figures["used"] <= 2 * size + ALLOWANCE_BYTES
