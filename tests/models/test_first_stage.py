"""The VQ first stage: diffusers' own pictures, by ops that every engine has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qdeploy.export.graph import graph_from_component
from qdeploy.models.components import VaeEncoder, VqDecoder, find_nearest_codes
from qdeploy.targets.base import load_target
from qdeploy.targets.onnx_files.graph import save_graph
from tests.tiny import tiny_vq

ROUND_OFF = 1e-5  # of values around 1 through a few convolutions in float32
CODES, SIDE = 8192, 64  # of CompVis' vq-f4 at 256 x 256


@pytest.fixture(scope="module")
def decoder() -> VqDecoder:
    torch.manual_seed(4)
    return VqDecoder(tiny_vq()).eval().requires_grad_(False)


def test_decodes_as_diffusers_does(decoder: VqDecoder) -> None:
    latents = torch.randn(3, 3, 8, 8, generator=torch.manual_seed(0))
    expected = decoder.inner.decode(latents).sample
    assert (decoder(latents) - expected).abs().max() < ROUND_OFF
    unquantized = decoder.inner.decode(latents, force_not_quantize=True).sample
    assert (expected - unquantized).abs().max() > 100 * ROUND_OFF


def test_the_encoder_is_before_the_codebook(decoder: VqDecoder) -> None:
    image = torch.rand(2, 3, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    latents = VaeEncoder(decoder.inner).eval()(image)
    assert torch.equal(latents, decoder.inner.encode(image).latents)
    assert not torch.equal(latents, find_nearest_codes(latents, decoder.inner.quantize.embedding.weight))


def test_nearest_at_full_size() -> None:
    generator = torch.manual_seed(0)
    codebook = torch.randn(CODES, 3, generator=generator)
    latents = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    pixels = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    actual = find_nearest_codes(latents, codebook).permute(0, 2, 3, 1).reshape(-1, 3)
    least = torch.cat([torch.cdist(part.double(), codebook.double()).amin(dim=1) for part in pixels.split(512)])
    distance = (pixels - actual).double().norm(dim=1)
    assert (distance**2 - least**2).abs().max() < ROUND_OFF  # ties apart, that very code


@pytest.mark.exports
def test_the_graph_has_standard_ops_and_the_same_pictures(decoder: VqDecoder, tmp_path: Path) -> None:
    latents = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(1))
    path = tmp_path / "decoder.onnx"
    graph = graph_from_component(decoder, {"latents": latents}, 20)
    load_target("openvino").lower(graph)
    save_graph(graph, path)
    nodes = onnx.load(path).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert {"MatMul", "ArgMin", "Gather"} <= {node.op_type for node in nodes}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"latents": latents.numpy()})
    assert np.abs(actual - decoder(latents).numpy()).max() < ROUND_OFF
