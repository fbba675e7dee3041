"""Forms of one float attention on ONNX Runtime's CPU provider, timed in turns: ``python -m benchmarks.attention``.

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

from benchmarks.ptq_quality import environment_of
from qdeploy.numerics import sqnr_db

HERE = Path(__file__).parent
SIZES = {"4096x40": (4096, 40), "1024x80": (1024, 80), "256x160": (256, 160)}
BATCH, HEADS = 2, 8
BLOCK = 256  # queries whose scores are held at once
REACH = 5.0  # of normal q, k and v, in standard deviations
CONTRIB = "com.microsoft"
HEADS_FIRST, KEYS_LAST = (0, 2, 1, 3), (0, 2, 3, 1)
Parts = tuple[list[NodeProto], dict[str, NDArray]]


def unfused(length: int, depth: int) -> Parts:
    """Softmax between two batched products, as torch exports it."""
    nodes, constants = heads_of(length, depth)
    last, shapes = joined(length, depth)
    return [*nodes, *products("q_heads", "k_heads", "v_heads", "joined"), *last], constants | shapes


def contrib(length: int, depth: int) -> Parts:
    """``com.microsoft.MultiHeadAttention``."""
    return [node("MultiHeadAttention", ["q_scaled", "k", "v"], ["y"], domain=CONTRIB, num_heads=HEADS, scale=1.0)], {}


def standard(length: int, depth: int) -> Parts:
    """ONNX's own Attention of opset 23."""
    return [node("Attention", ["q_scaled", "k", "v"], ["y"], q_num_heads=HEADS, kv_num_heads=HEADS, scale=1.0)], {}


def integer(length: int, depth: int) -> Parts:
    """Both products in integers, all scores at once."""
    nodes, constants = heads_of(length, depth)
    codes, scales = quantized(depth)
    last, shapes = joined(length, depth)
    return [*nodes, *codes, *integer_products("q_codes", "k_codes", "v_codes", "joined"), *last], (
        constants | scales | shapes
    )


def blocks(length: int, depth: int) -> Parts:
    """One head after another, and in it one block of queries after another: two nested Scans."""
    return scanned(length, depth, products, ("q_heads", "k_heads", "v_heads"), {})


def integer_blocks(length: int, depth: int) -> Parts:
    """The same in integers."""
    codes, scales = quantized(depth)
    return scanned(length, depth, integer_products, ("q_codes", "k_codes", "v_codes"), scales, codes)


FORMS = {
    "unfused": unfused,
    "MultiHeadAttention": contrib,
    "Attention-23": standard,
    "integer products": integer,
    "blocks of queries": blocks,
    "blocks of queries, integer": integer_blocks,
}


def node(op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, outputs, **attributes)


def heads_of(length: int, depth: int) -> Parts:
    """``[B, N, heads * D]`` to ``q_heads`` and ``v_heads [B * heads, N, D]`` and ``k_heads [B * heads, D, N]``."""
    split, flat = [BATCH, length, HEADS, depth], [BATCH * HEADS, length, depth]
    nodes = []
    for name, source in (("q", "q_scaled"), ("k", "k"), ("v", "v")):
        nodes += [
            node("Reshape", [source, "split"], [f"{name}_split"]),
            node("Transpose", [f"{name}_split"], [f"{name}_turned"], perm=KEYS_LAST if name == "k" else HEADS_FIRST),
            node("Reshape", [f"{name}_turned", f"flat_{name}"], [f"{name}_heads"]),
        ]
    turned = [flat[0], depth, length]
    return nodes, {"split": shape(split), "flat_q": shape(flat), "flat_k": shape(turned), "flat_v": shape(flat)}


def joined(length: int, depth: int) -> Parts:
    """``joined [B * heads, N, D]`` to ``y [B, N, heads * D]``."""
    nodes = [
        node("Reshape", ["joined", "apart"], ["joined_apart"]),
        node("Transpose", ["joined_apart"], ["joined_turned"], perm=HEADS_FIRST),
        node("Reshape", ["joined_turned", "whole"], ["y"]),
    ]
    return nodes, {"apart": shape([BATCH, HEADS, length, depth]), "whole": shape([BATCH, length, HEADS * depth])}


def products(q: str, k: str, v: str, out: str) -> list[NodeProto]:
    return [
        node("MatMul", [q, k], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", v], [out]),
    ]


def integer_products(q: str, k: str, v: str, out: str) -> list[NodeProto]:
    """The products in integers, the softmax around them unnormalised until the end."""
    return [
        node("MatMulIntegerToFloat", [q, k, "q_scale", "k_scale", "q_zero", "k_zero"], ["scores"], domain=CONTRIB),
        node("ReduceMax", ["scores", "last"], ["highest"]),
        node("Sub", ["scores", "highest"], ["below"]),
        node("Exp", ["below"], ["weights"]),
        node("ReduceSum", ["weights", "last"], ["total"]),
        node("QuantizeLinear", ["weights", "w_scale", "w_zero"], ["w_codes"]),
        node("MatMulIntegerToFloat", ["w_codes", v, "w_scale", "v_scale", "w_zero", "v_zero"], ["sum"], domain=CONTRIB),
        node("Div", ["sum", "total"], [out]),
    ]


def quantized(depth: int) -> Parts:
    """q to u8, k and v to s8, per tensor."""
    kinds: dict[str, tuple[float, Any]] = {
        "q": (REACH / depth**0.5 / 127, np.uint8(128)),
        "k": (REACH / 127, np.int8(0)),
        "v": (REACH / 127, np.int8(0)),
    }
    nodes, constants = [], {"w_scale": np.float32(1 / 255), "w_zero": np.uint8(0), "last": shape([-1])}
    for name, (scale, zero) in kinds.items():
        nodes.append(node("QuantizeLinear", [f"{name}_heads", f"{name}_scale", f"{name}_zero"], [f"{name}_codes"]))
        constants |= {f"{name}_scale": np.float32(scale), f"{name}_zero": zero}
    return nodes, constants  # type: ignore[return-value]


def scanned(
    length: int, depth: int, body: Any, sources: tuple[str, str, str], more: dict[str, NDArray],
    before: list[NodeProto] | None = None,
) -> Parts:  # fmt: skip
    """``body`` on one head and one block of queries at a time."""
    count, whole = length // BLOCK, BATCH * HEADS
    kinds = [TensorProto.FLOAT] * 3 if not more else [TensorProto.UINT8, TensorProto.INT8, TensorProto.INT8]
    inner = helper.make_graph(
        body("q_block", "k_head", "v_head", "block"),
        "queries",
        [tensor("q_block", kinds[0], [BLOCK, depth])],
        [tensor("block", TensorProto.FLOAT, [BLOCK, depth])],
    )
    outer = helper.make_graph(
        [node("Scan", ["q_head"], ["head"], body=inner, num_scan_inputs=1)],
        "heads",
        [
            tensor("q_head", kinds[0], [count, BLOCK, depth]),
            tensor("k_head", kinds[1], [depth, length]),
            tensor("v_head", kinds[2], [length, depth]),
        ],
        [tensor("head", TensorProto.FLOAT, [count, BLOCK, depth])],
    )
    nodes, constants = heads_of(length, depth)
    last, shapes = joined(length, depth)
    nodes += [
        *(before or []),
        node("Reshape", [sources[0], "in_blocks"], ["q_blocks"]),
        node("Scan", ["q_blocks", *sources[1:]], ["joined"], body=outer, num_scan_inputs=3),
        *last,
    ]
    return nodes, constants | shapes | more | {"in_blocks": shape([whole, count, BLOCK, depth])}


def shape(sides: list[int]) -> NDArray[np.int64]:
    return np.array(sides, np.int64)


def tensor(name: str, kind: int, sides: list[int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, sides)


def session_of(form: str, length: int, depth: int, threads: int | None) -> onnxruntime.InferenceSession:
    """The form as a whole graph from ``q, k, v [B, N, heads * D]`` to ``y``."""
    nodes, constants = FORMS[form](length, depth)
    constants |= {"scale": np.array(depth**-0.5, np.float32)}
    sides = [BATCH, length, HEADS * depth]
    graph = helper.make_graph(
        [node("Mul", ["q", "scale"], ["q_scaled"]), *nodes],
        form,
        [tensor(name, TensorProto.FLOAT, sides) for name in ("q", "k", "v")],
        [tensor("y", TensorProto.FLOAT, sides)],
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
    """Time all forms in turns at each size and print the table."""
    noise = np.random.default_rng(0)
    lines = ["| form | size | ms | of unfused | SQNR, dB |", "|---|---|--:|--:|--:|"]
    rows = []
    for size, (length, depth) in SIZES.items():
        feeds = {
            name: noise.standard_normal((BATCH, length, HEADS * depth)).astype(np.float32) for name in ("q", "k", "v")
        }
        sessions = {form: session_of(form, length, depth, threads) for form in FORMS}
        outputs = {form: session.run(None, feeds)[0] for form, session in sessions.items()}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(rounds):
            for form, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feeds)
                times[form].append(time.perf_counter() - start)
        plain = statistics.median(times["unfused"])
        for form in FORMS:
            ms, share = statistics.median(times[form]) * 1e3, statistics.median(times[form]) / plain
            db = sqnr_db(outputs["unfused"], outputs[form])
            rows.append({"form": form, "size": size, "ms": ms, "of_unfused": share, "sqnr_db": db})
            lines.append(f"| {form} | {size} | {ms:.0f} | {share:.2f} | {db:.0f} |")
    content = {"environment": environment_of(), "threads": threads, "rows": rows}
    (HERE / "attention.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
