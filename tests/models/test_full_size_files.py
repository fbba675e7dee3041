"""Files of the published sizes of Stable Diffusion 2.1 and XL (random float16 weights): loaded, run, and how large."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.full_size import build_header, list_shapes, write_model

ROOT = Path(__file__).parents[2]
PEAK_BYTES = 16e9  # what a machine of 24 GB leaves next to its system
# By the published models' cards, in millions of weights; the VAE's encoder is among the decoder's.
PARAMETERS = {
    "sd21": {"text_encoder": 340, "unet": 866, "vae_decoder": 84},  # OpenCLIP's without its last layer
    "sdxl": {"text_encoder": 123, "text_encoder_2": 695, "unet": 2567, "vae_decoder": 84},
}
# Of the widened model: all of it, or what of it is not kept in half precision.
LOADED_BYTES = {"sd21": 8e9, "sdxl": 12e9}
LOAD = """
import json, resource, sys
import torch
from qdeploy.models.half_weights import HalfStored
from qdeploy.models.source import load_model

model = load_model(sys.argv[1])
loaded = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = {name: sum(p.numel() for p in model.component(name).parameters()) for name in model.components}
kept = {name: any(isinstance(m, HalfStored) for m in model.component(name).modules()) for name in model.components}
feeds = model.make_example("unet", 1)
feeds["sample"] = feeds["sample"][:, :, :16, :16]
with torch.no_grad():
    noise_pred = model.unet(**feeds)
    hidden = [model.component(name)(ids)[0] for name, ids in model.tokenize(["a cat"]).items()]
assert torch.isfinite(noise_pred).all() and noise_pred.std() > 0.01
assert all(torch.isfinite(states).all() for states in hidden)
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"loaded": loaded, "peak": peak, "parameters": counts, "kept": kept}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_file_of_full_size(name: str, tmp_path: Path) -> None:
    """Every weight has its place; the large modules' stay mapped in half precision."""
    path = write_model(name, tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    size = path.stat().st_size
    path.unlink()
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    counts = {part: round(count / 1e6) for part, count in figures["parameters"].items()}
    assert counts == PARAMETERS[name]
    assert size < 2.05e6 * sum(PARAMETERS[name].values()) + 0.1e9
    assert figures["kept"]["unet"]
    assert figures["loaded"] <= LOADED_BYTES[name]
    assert figures["peak"] <= PEAK_BYTES
    loaded, peak = figures["loaded"] / 1e9, figures["peak"] / 1e9
    print(f"\n{name}: file {size / 1e9:.2f} GB; loaded {loaded:.2f} GB, run {peak:.2f} GB")


def test_names_and_shapes_of_stable_diffusion_xl() -> None:
    """Some of the published file's, as its header lists them."""
    shapes = list_shapes("sdxl")
    unet = "model.diffusion_model."
    expected = {
        f"{unet}input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        f"{unet}middle_block.1.proj_in.weight": (1280, 1280),
        f"{unet}label_emb.0.0.weight": (1280, 2816),
        f"{unet}out.2.weight": (4, 320, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    }
    assert {name: shapes.get(name) for name in expected} == expected


def test_a_header_is_read(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    values = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.arange(3, dtype=np.int64)}
    header = build_header(
        {name: value.shape for name, value in values.items()}, {n: v.dtype for n, v in values.items()}
    )
    (tmp_path / "x.safetensors").write_bytes(header + b"".join(value.tobytes() for value in values.values()))
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(loaded[name], value) for name, value in values.items())
