"""TensorRT-RTX takes the UNet of Stable Diffusion 1.5's architecture: batch 2, 64 x 64 latents, random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdeploy.base.errors import EngineUnavailableError
from qdeploy.export.graph import graph_from_component
from qdeploy.models.components import UNet
from qdeploy.targets.base import load_target
from qdeploy.targets.nvidia.rules import check_rules
from qdeploy.targets.nvidia.trial_build import build_on_trial, find_library_folder
from qdeploy.targets.onnx_files.graph import save_graph

SD15 = dict(sample_size=64, cross_attention_dim=768)  # the rest are diffusers' defaults
FP16_BYTES = 1.72e9  # 860 M parameters


@pytest.mark.slow  # 5 minutes, 8 GB
def test_the_library_builds_stable_diffusions_unet_in_fp16(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    try:
        find_library_folder()
    except EngineUnavailableError as exc:
        pytest.skip(str(exc))
    path = tmp_path / "unet.onnx"
    write_unet(UNet2DConditionModel(**SD15), path)
    import onnx_ir as ir

    check_rules(ir.load(path), "unet")
    built = build_on_trial(path)
    print(f"parsed in {built.parse_s:.0f} s, built in {built.build_s:.0f} s, {built.engine_bytes / 1e9:.2f} GB")
    assert built.engine_bytes > FP16_BYTES


def write_unet(module: torch.nn.Module, path: Path) -> None:
    """Trace, lower and save; its memory is freed afterwards, since the builder needs it."""
    example = {
        "sample": torch.zeros(2, 4, 64, 64),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.zeros(2, 77, 768),
    }
    graph = graph_from_component(UNet(module).eval(), example, load_target("tensorrt").opset)
    load_target("tensorrt").lower(graph)
    save_graph(graph, path)
