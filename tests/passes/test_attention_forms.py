"""The neutral attention written out, or as ONNX Runtime's own operator."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from qdeploy.base.errors import ExportError
from qdeploy.export.graph import graph_from_component
from qdeploy.models.components import TorchComponent
from qdeploy.passes.expand_attention import expand_attention
from qdeploy.passes.fuse_attention import fuse_attention
from tests.passes.rewriting import run

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class OneAttention(TorchComponent):
    """Two heads over the tokens ``x``, masked where ``mask`` says."""

    outputs = ("y",)

    def __init__(self, mask: torch.Tensor | None = None, causal: bool = False) -> None:
        super().__init__(nn.Identity())
        self.mask, self.causal = mask, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (tokens.unflatten(-1, (2, -1)).transpose(1, 2) for tokens in (x, 2 * x))
        y = nn.functional.scaled_dot_product_attention(q, k, q, self.mask, is_causal=self.causal)
        return y.transpose(1, 2).flatten(2)


def operators(component: OneAttention, *passes: object) -> Counter[str]:
    """What the passes leave of the traced component, which must compute what torch does."""
    model = graph_from_component(component, {"x": X}, 20)
    for one in passes:
        one(model)  # type: ignore[operator]
    with torch.no_grad():
        np.testing.assert_allclose(run(ir.to_proto(model), X.numpy()), component(X).numpy(), rtol=1e-5, atol=1e-6)
    return Counter(node.op_type for node in model.graph)


@pytest.mark.exports
def test_written_out() -> None:
    counts = operators(OneAttention(), expand_attention)
    assert (counts["MatMul"], counts["Softmax"], counts["Add"]) == (2, 1, 0)


@pytest.mark.exports
@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_a_mask_is_added(kind: torch.dtype) -> None:
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    if kind == torch.float32:
        mask = torch.zeros(6, 6).masked_fill(~mask, float("-inf"))
    counts = operators(OneAttention(mask), fuse_attention, expand_attention)
    assert (counts["MatMul"], counts["Add"], counts["MultiHeadAttention"]) == (2, 1, 0)


@pytest.mark.exports
def test_fused_without_the_heads_transposes() -> None:
    counts = operators(OneAttention(), fuse_attention, expand_attention)
    assert (counts["MultiHeadAttention"], counts["MatMul"], counts["Transpose"]) == (1, 0, 0)


@pytest.mark.exports
def test_what_the_graph_does_not_provide_for_is_refused() -> None:
    with pytest.raises(ExportError, match="is_causal"):
        graph_from_component(OneAttention(causal=True), {"x": X}, 20)
