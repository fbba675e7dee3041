"""Forms of one float attention on ONNX Runtime's CPU provider, timed in turn: ``python -m benchmarks.attention``.

Sizes are Stable Diffusion 1.5's self-attentions at both guidance halves. A form in integers multiplies u8 by s8 in
both products; it quantizes exp(s - max), whose largest value in each row is 1, and divides by the sum: a softmax
output over 4,096 keys at a step of 1/255 would be almost all zeros.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from benchmarks.ptq_quality import describe_setup
from qdeploy.base.arrays import AnyArray
from qdeploy.base.numerics import sqnr_db

HERE = Path(__file__).parent
SIZES = {"4096x40": (4096, 40), "1024x80": (1024, 80), "256x160": (256, 160)}
BATCH, HEADS = 2, 8
BLOCK = 256  # queries whose scores are held at once
REACH = 5.0  # of normal q, k and v, in standard deviations
CONTRIB = "com.microsoft"
HEADS_FIRST, KEYS_LAST = (0, 2, 1, 3), (0, 2, 3, 1)
Parts = tuple[list[NodeProto], dict[str, AnyArray]]


def build_unfused(length: int, depth: int) -> Parts:
    """Softmax between two batched products, as torch exports it."""
    nodes, constants = split_heads(length, depth)
    last, shapes = join_heads(length, depth)
    return [*nodes, *make_products("q_heads", "k_heads", "v_heads", "joined"), *last], constants | shapes


def build_multi_head(length: int, depth: int) -> Parts:
    """``com.microsoft.MultiHeadAttention``."""
    return [
        make_node("MultiHeadAttention", ["q_scaled", "k", "v"], ["y"], domain=CONTRIB, num_heads=HEADS, scale=1.0)
    ], {}


def build_attention_23(length: int, depth: int) -> Parts:
    """ONNX's own Attention of opset 23."""
    return [make_node("Attention", ["q_scaled", "k", "v"], ["y"], q_num_heads=HEADS, kv_num_heads=HEADS, scale=1.0)], {}


def build_integer(length: int, depth: int) -> Parts:
    """Both products in integers, all scores at once."""
    nodes, constants = split_heads(length, depth)
    codes, scales = quantize_operands(depth)
    last, shapes = join_heads(length, depth)
    return [*nodes, *codes, *make_integer_products("q_codes", "k_codes", "v_codes", "joined"), *last], (
        constants | scales | shapes
    )


def build_blocks(length: int, depth: int) -> Parts:
    """One head after another, and in it one block of queries after another: two nested Scans."""
    return build_scan(length, depth, make_products, ("q_heads", "k_heads", "v_heads"), {})


def build_integer_blocks(length: int, depth: int) -> Parts:
    """The same in integers."""
    codes, scales = quantize_operands(depth)
    return build_scan(length, depth, make_integer_products, ("q_codes", "k_codes", "v_codes"), scales, codes)


FORMS = {
    "unfused": build_unfused,
    "MultiHeadAttention": build_multi_head,
    "Attention-23": build_attention_23,
    "integer products": build_integer,
    "blocks of queries": build_blocks,
    "blocks of queries, integer": build_integer_blocks,
}


def make_node(op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    """A node without a name, of ONNX's own domain unless ``domain`` is among the attributes."""
    return helper.make_node(op_type, inputs, outputs, **attributes)


def split_heads(length: int, depth: int) -> Parts:
    """``[B, N, heads * D]`` to ``q_heads`` and ``v_heads [B * heads, N, D]`` and ``k_heads [B * heads, D, N]``."""
    split, flat = [BATCH, length, HEADS, depth], [BATCH * HEADS, length, depth]
    nodes = []
    for name, source in (("q", "q_scaled"), ("k", "k"), ("v", "v")):
        nodes += [
            make_node("Reshape", [source, "split"], [f"{name}_split"]),
            make_node(
                "Transpose", [f"{name}_split"], [f"{name}_turned"], perm=KEYS_LAST if name == "k" else HEADS_FIRST
            ),
            make_node("Reshape", [f"{name}_turned", f"flat_{name}"], [f"{name}_heads"]),
        ]
    transposed = [flat[0], depth, length]
    return nodes, {
        "split": make_shape(split),
        "flat_q": make_shape(flat),
        "flat_k": make_shape(transposed),
        "flat_v": make_shape(flat),
    }


def join_heads(length: int, depth: int) -> Parts:
    """``join_heads [B * heads, N, D]`` to ``y [B, N, heads * D]``."""
    nodes = [
        make_node("Reshape", ["joined", "apart"], ["joined_apart"]),
        make_node("Transpose", ["joined_apart"], ["joined_turned"], perm=HEADS_FIRST),
        make_node("Reshape", ["joined_turned", "whole"], ["y"]),
    ]
    return nodes, {
        "apart": make_shape([BATCH, HEADS, length, depth]),
        "whole": make_shape([BATCH, length, HEADS * depth]),
    }


def make_products(q: str, k: str, v: str, out: str) -> list[NodeProto]:
    """``softmax(q k) v`` of float32 values by these names; k is transposed already."""
    return [
        make_node("MatMul", [q, k], ["scores"]),
        make_node("Softmax", ["scores"], ["weights"], axis=-1),
        make_node("MatMul", ["weights", v], [out]),
    ]


def make_integer_products(q: str, k: str, v: str, out: str) -> list[NodeProto]:
    """The products in integers, the softmax around them unnormalised until the end."""
    return [
        make_node("MatMulIntegerToFloat", [q, k, "q_scale", "k_scale", "q_zero", "k_zero"], ["scores"], domain=CONTRIB),
        make_node("ReduceMax", ["scores", "last"], ["highest"]),
        make_node("Sub", ["scores", "highest"], ["below"]),
        make_node("Exp", ["below"], ["weights"]),
        make_node("ReduceSum", ["weights", "last"], ["total"]),
        make_node("QuantizeLinear", ["weights", "w_scale", "w_zero"], ["w_codes"]),
        make_node(
            "MatMulIntegerToFloat", ["w_codes", v, "w_scale", "v_scale", "w_zero", "v_zero"], ["sum"], domain=CONTRIB
        ),
        make_node("Div", ["sum", "total"], [out]),
    ]


def quantize_operands(depth: int) -> Parts:
    """Quantize q to u8, k and v to s8, per tensor."""
    operands: dict[str, tuple[float, Any]] = {
        "q": (REACH / depth**0.5 / 127, np.uint8(128)),
        "k": (REACH / 127, np.int8(0)),
        "v": (REACH / 127, np.int8(0)),
    }
    nodes, constants = [], {"w_scale": np.float32(1 / 255), "w_zero": np.uint8(0), "last": make_shape([-1])}
    for name, (scale, zero) in operands.items():
        nodes.append(make_node("QuantizeLinear", [f"{name}_heads", f"{name}_scale", f"{name}_zero"], [f"{name}_codes"]))
        constants |= {f"{name}_scale": np.float32(scale), f"{name}_zero": zero}
    return nodes, constants  # type: ignore[return-value]


def build_scan(
    length: int, depth: int, body: Any, sources: tuple[str, str, str], more: dict[str, AnyArray],
    before: list[NodeProto] | None = None,
) -> Parts:  # fmt: skip
    """``body`` on one head and one block of queries at a time."""
    count, whole = length // BLOCK, BATCH * HEADS
    types = [TensorProto.FLOAT] * 3 if not more else [TensorProto.UINT8, TensorProto.INT8, TensorProto.INT8]
    inner = helper.make_graph(
        body("q_block", "k_head", "v_head", "block"),
        "queries",
        [make_tensor_info("q_block", types[0], [BLOCK, depth])],
        [make_tensor_info("block", TensorProto.FLOAT, [BLOCK, depth])],
    )
    outer = helper.make_graph(
        [make_node("Scan", ["q_head"], ["head"], body=inner, num_scan_inputs=1)],
        "heads",
        [
            make_tensor_info("q_head", types[0], [count, BLOCK, depth]),
            make_tensor_info("k_head", types[1], [depth, length]),
            make_tensor_info("v_head", types[2], [length, depth]),
        ],
        [make_tensor_info("head", TensorProto.FLOAT, [count, BLOCK, depth])],
    )
    nodes, constants = split_heads(length, depth)
    last, shapes = join_heads(length, depth)
    nodes += [
        *(before or []),
        make_node("Reshape", [sources[0], "in_blocks"], ["q_blocks"]),
        make_node("Scan", ["q_blocks", *sources[1:]], ["joined"], body=outer, num_scan_inputs=3),
        *last,
    ]
    return nodes, constants | shapes | more | {"in_blocks": make_shape([whole, count, BLOCK, depth])}


def make_shape(sides: list[int]) -> NDArray[np.int64]:
    """The shape input of a Reshape."""
    return np.array(sides, np.int64)


def make_tensor_info(name: str, data_type: int, sides: list[int]) -> ValueInfoProto:
    """An input or output of the graph; ``data_type`` is one of TensorProto's."""
    return helper.make_tensor_value_info(name, data_type, sides)


def open_session(form: str, length: int, depth: int, threads: int | None) -> onnxruntime.InferenceSession:
    """The form as a whole graph from ``q, k, v [B, N, heads * D]`` to ``y``."""
    nodes, constants = FORMS[form](length, depth)
    constants |= {"scale": np.array(depth**-0.5, np.float32)}
    sides = [BATCH, length, HEADS * depth]
    graph = helper.make_graph(
        [make_node("Mul", ["q", "scale"], ["q_scaled"]), *nodes],
        form,
        [make_tensor_info(name, TensorProto.FLOAT, sides) for name in ("q", "k", "v")],
        [make_tensor_info("y", TensorProto.FLOAT, sides)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opset = 23 if form == "Attention-23" else 20
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=7, show_default=True, help="Timed runs of each form.")
@click.option("--threads", type=int, help="Threads; all cores if not given.")
def main(rounds: int, threads: int | None) -> None:
    """Time all forms in turn at each size and print the table."""
    noise = np.random.default_rng(0)
    lines = ["| form | size | ms | of unfused | SQNR, dB |", "|---|---|--:|--:|--:|"]
    rows = []
    for size, (length, depth) in SIZES.items():
        feeds = {
            name: noise.standard_normal((BATCH, length, HEADS * depth)).astype(np.float32) for name in ("q", "k", "v")
        }
        sessions = {form: open_session(form, length, depth, threads) for form in FORMS}
        outputs = {form: session.run(None, feeds)[0] for form, session in sessions.items()}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(rounds):
            for form, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feeds)
                times[form].append(time.perf_counter() - start)
        unfused_s = statistics.median(times["unfused"])
        for form in FORMS:
            ms, share = statistics.median(times[form]) * 1e3, statistics.median(times[form]) / unfused_s
            db = sqnr_db(outputs["unfused"], outputs[form])
            rows.append({"form": form, "size": size, "ms": ms, "of_unfused": share, "sqnr_db": db})
            lines.append(f"| {form} | {size} | {ms:.0f} | {share:.2f} | {db:.0f} |")
    content = {"environment": describe_setup(), "threads": threads, "rows": rows}
    (HERE / "attention.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
