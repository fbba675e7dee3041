"""Which products of a graph run in integers, which do not and why, and their time: read from the engine's own graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qdeploy.artifacts.graph_file import read_graph_file
from qdeploy.artifacts.table import ComponentQuant
from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import AuditError, ExportError, join_names
from qdeploy.engines.base import EngineOptions, Kernel, load_engine
from qdeploy.export.open_dims import close_dims
from qdeploy.passes.fuse_linear import INTEGER_MATMUL
from qdeploy.passes.name_by_layer import FUSED_ATTENTION, PRODUCTS
from qdeploy.passes.split_gate import GATE

PRODUCT_OPS = ("Conv", "MatMul", "Gemm", INTEGER_MATMUL, FUSED_ATTENTION)
TRANSPARENT_OPS = ("Transpose", "Reshape", "Cast")  # between a constant in the file and the product that reads it
QUANTIZE_OPS = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Quantize", "Convert")
LAYOUT_OPS = ("Transpose", "Reorder", "ReorderInput", "ReorderOutput")


@dataclass(frozen=True)
class Product:
    """One Conv, MatMul, Gemm or fused attention of an ONNX graph."""

    name: str
    output: str  # names that engines may give a node that computes a graph's output
    macs: int
    quantized: bool  # both factors come by DequantizeLinear, or are codes
    constants: tuple[str, ...]  # that it reads through DequantizeLinear and the like


@dataclass(frozen=True)
class Finding:
    """How the engine runs one product of the graph."""

    layer: str
    op_type: str  # of the engine's kernel; "" when none was found
    macs: int
    quantized: bool
    integer: bool

    @property
    def reason(self) -> str:
        """Why it does not run in integers; "" when it does."""
        if self.integer:
            return ""
        if not self.quantized:
            return "float in the graph, by choice"
        return f"quantized in the graph, but runs as {self.op_type or 'no node that was found'}"


@dataclass(frozen=True)
class Audit:
    """All products of one graph, and its kernels."""

    findings: tuple[Finding, ...]
    kernels: tuple[Kernel, ...]

    @property
    def integer_mac_share(self) -> float:
        """Share of all products' multiply-accumulates that run in integers, 0..1; attention's own count too."""
        total = sum(finding.macs for finding in self.findings)
        return sum(finding.macs for finding in self.findings if finding.integer) / total if total else 0.0

    def mac_share(self, finding: Finding) -> float:
        """Of one product in all multiply-accumulates of the graph, 0..1."""
        return finding.macs / sum(other.macs for other in self.findings)

    def seconds_by_op(self) -> dict[str, tuple[int, float]]:
        """Op type -> nodes and seconds a run, the longest first; empty when the kernels were not timed."""
        totals: dict[str, tuple[int, float]] = {}
        for kernel in self.kernels:
            if kernel.seconds is not None:
                nodes, seconds = totals.get(kernel.op_type, (0, 0.0))
                totals[kernel.op_type] = nodes + 1, seconds + kernel.seconds
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))

    def time_share(self, op_types: Iterable[str]) -> float:
        """Share of the time that nodes of ``op_types`` take, 0..1."""
        selected = set(op_types)
        seconds = {op: spent for op, (_, spent) in self.seconds_by_op().items()}
        total = sum(seconds.values())
        return sum(spent for op, spent in seconds.items() if op.split(" ")[0] in selected) / total if total else 0.0

    def check(self, component: str, quant: ComponentQuant) -> None:
        """AuditError naming every layer and attention of the table that is not an integer kernel."""
        products = [f"{attention}.{product}" for attention in quant.attention for product in PRODUCTS]
        by_layer = {finding.layer: finding for finding in self.findings}
        second_passes = [f"{name}.rest" for name, layer in quant.layers.items() if layer.passes == 2]
        gates = [name for name in by_layer if name.removesuffix(GATE) in quant.layers]
        failed = {name: by_layer.get(name) for name in (*quant.layers, *gates, *second_passes, *products)}
        failed = {name: finding for name, finding in failed.items() if finding is None or not finding.integer}
        if failed:
            names = [f"{name} ({'is not in the graph' if f is None else f.reason})" for name, f in failed.items()]
            raise AuditError(
                f"{component}: {len(failed)} of {len(quant.layers) + len(products)} layers that the table quantizes do "
                f"not run as integer kernels: {join_names(names)}. Keep them in float, or report the graph pattern"
            )


def audit_graph(path: Path, engine: str, options: EngineOptions | None = None, feeds: Feeds | None = None) -> Audit:
    """Load ``path`` in ``engine``, take its optimized graph, and look up each product.

    With ``feeds`` the kernels are timed on them. Raises EngineError and ExportError.
    """
    kernels = load_engine(engine).kernels(path, options or EngineOptions(), feeds)
    by_name: dict[str, list[Kernel]] = {}
    by_constant: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in kernel.names:
            by_name.setdefault(name, []).append(kernel)
        for name in kernel.constants:
            by_constant.setdefault(name, []).append(kernel)
    findings = []
    for product in find_products(load_graph(path)):
        ran = by_name.get(product.name) or by_name.get(product.output) or find_kernels(product, by_constant)
        slowest = next((kernel for kernel in ran if not kernel.integer), ran[0] if ran else None)
        op_type = "" if slowest is None else slowest.op_type
        integer = slowest is not None and slowest.integer
        findings.append(Finding(product.name, op_type, product.macs, product.quantized, integer))
    return Audit(tuple(findings), tuple(kernels))


def load_graph(path: Path) -> ir.Model:
    """The graph in the file at ``path``; ExportError where there is none."""
    try:
        read_graph_file(path)
        return ir.load(path)
    except Exception as exc:  # a garbage file may fail anywhere in protobuf or onnx-ir
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        raise ExportError(f"{path} is not a readable ONNX graph ({reason[:200]}); get the file again") from exc


def audit_file(path: Path) -> Audit:
    """The audit of the file at ``path`` without an engine: a product of two DequantizeLinear counts as integer."""
    products = find_products(load_graph(path))
    return Audit(
        tuple(Finding(product.name, "QDQ", product.macs, product.quantized, product.quantized) for product in products),
        (),
    )


def find_kernels(product: Product, by_constant: Mapping[str, list[Kernel]]) -> list[Kernel]:
    """Kernels that read a constant of ``product``.

    ONNX Runtime may have changed codes to unsigned (``..._s8_2_u8``) or reordered them, but it keeps
    the beginning of their name.
    """
    return [
        kernel
        for constant in product.constants
        for name, kernels in by_constant.items()
        if name == constant or name.startswith((constant + "_", constant + "."))
        for kernel in kernels
    ]


def find_products(model: ir.Model) -> list[Product]:
    """Every Conv, matrix product and fused attention with its multiply-accumulates; ExportError on unknown shapes.

    ``model`` is changed: open dimensions get the sizes that it was traced with.
    """
    close_dims(model)
    nodes = [node for node in model.graph if node.op_type in PRODUCT_OPS]
    if any(
        value is None or value.shape is None or not value.shape.is_static()
        for node in nodes
        for value in (*node.inputs[:2], node.outputs[0])
    ):
        model = ShapeInferencePass()(model).model
        nodes = [node for node in model.graph if node.op_type in PRODUCT_OPS]
    return [
        Product(
            node.name or str(node.outputs[0].name),
            str(node.outputs[0].name),
            count_macs(node),
            node.op_type == INTEGER_MATMUL or all(trace_factor(value)[0] for value in node.inputs[:2]),
            tuple(name for value in node.inputs[:2] for name in trace_factor(value)[1]),
        )
        for node in nodes
    ]


def count_macs(node: ir.Node) -> int:
    """Multiply-accumulates of a Conv, a product over the first's rows, or both products of an attention.

    The Conv's weight is ``[out, in / groups, ...]``; queries are ``[B, N, C]`` and keys ``[B, T, C]``.
    """
    first, second = (get_static_shape(value, node) for value in node.inputs[:2])
    if node.op_type == FUSED_ATTENTION:
        return 2 * prod(first) * second[1]
    terms = prod(second[1:]) if node.op_type == "Conv" else first[-1]
    if node.op_type == "Gemm" and node.attributes.get_int("transA"):
        terms = first[0]
    return prod(get_static_shape(node.outputs[0], node)) * terms


def get_static_shape(value: ir.Value | None, node: ir.Node) -> tuple[int, ...]:
    """ExportError where a side is open: the share of a product of unknown size is unknown."""
    if value is None or value.shape is None or not value.shape.is_static():
        raise ExportError(f"{node.name} ({node.op_type}) has no static shape, so its multiply-accumulates are unknown")
    return tuple(value.shape.numpy())


def trace_factor(value: ir.Value | None) -> tuple[bool, list[str]]:
    """Whether a factor comes by DequantizeLinear; if it is constant, the names that it has on its way from the file."""
    quantized, names = False, []
    while value is not None and (node := value.producer()) is not None:
        names.append(str(value.name))
        if node.op_type == "DequantizeLinear":
            quantized = True
        elif node.op_type not in TRANSPARENT_OPS:
            break
        value = node.inputs[0]
    constant = value is not None and value.is_initializer()
    return quantized, [*names, str(value.name)] if constant and value is not None else []
