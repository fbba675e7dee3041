"""Names of layers on a traced graph, float and quantized alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx


def names(bundle: Path, component: str) -> Counter[str]:
    graph = onnx.load(bundle / component / "model.onnx", load_external_data=False).graph
    return Counter(node.name for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm"))


def test_float_and_quantized_layers_carry_the_same_names(float_bundle: Path, int8_bundle: Path) -> None:
    for component in ("text_encoder", "unet", "vae_decoder"):
        plain = set(names(float_bundle, component))
        quantized = {name.removesuffix(".rest") for name in names(int8_bundle, component)}
        assert quantized == plain


def test_every_product_has_a_name_of_its_own(float_bundle: Path, int8_bundle: Path) -> None:
    for bundle in (float_bundle, int8_bundle):
        assert set(names(bundle, "unet").values()) == {1}


def test_the_products_of_an_attention_are_named_in_order(float_bundle: Path) -> None:
    found = [name for name in names(float_bundle, "unet") if ".mid_block." in f".{name}" and "attn1" in name]
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert found == [f"{block}.{part}" for part in ("to_q", "to_k", "to_v", "scores", "values", "to_out.0")]
