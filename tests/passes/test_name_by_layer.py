"""Names of layers on a traced graph, float and quantized alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

from qdeploy.passes.split_gate import GATE
from qdeploy.targets.onnx_files.products import PRODUCT_OPS


def names(bundle: Path, component: str) -> Counter[str]:
    graph = onnx.load(bundle / component / "model.onnx", load_external_data=False).graph
    return Counter(node.name for node in graph.node if node.op_type in PRODUCT_OPS)


def test_float_and_quantized_layers_carry_the_same_names(float_bundle: Path, int8_bundle: Path) -> None:
    for component in ("text_encoder", "unet", "vae_decoder"):
        plain = set(names(float_bundle, component))
        quantized = {name.removesuffix(".rest").removesuffix(GATE) for name in names(int8_bundle, component)}
        assert quantized == plain


def test_every_product_has_a_name_of_its_own(float_bundle: Path, int8_bundle: Path) -> None:
    for bundle in (float_bundle, int8_bundle):
        assert set(names(bundle, "unet").values()) == {1}


def test_an_attention_is_named_after_its_module(float_bundle: Path) -> None:
    actual = [name for name in names(float_bundle, "unet") if ".mid_block." in f".{name}" and "attn1" in name]
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert actual == [f"{block}.to_q", f"{block}.to_k", f"{block}.to_v", block, f"{block}.to_out.0"]


def test_the_products_of_an_attention_are_named_in_order(float_bundle: Path) -> None:
    actual = [name for name in names(float_bundle, "text_encoder") if "layers.0.self_attn" in name]
    block = "encoder.layers.0.self_attn"
    parts = ("q_proj", "k_proj", "v_proj", "scores", "values", "out_proj")
    assert sorted(actual) == sorted(f"{block}.{part}" for part in parts)
    assert actual.index(f"{block}.scores") < actual.index(f"{block}.values")
