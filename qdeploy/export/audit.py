"""Which products of a graph run in integers, which do not and why, and their time: read from the engine's own graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qdeploy.artifacts.products import BY_CHOICE, Product
from qdeploy.artifacts.table import ComponentQuant
from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import AuditError, join_names
from qdeploy.engines.base import EngineOptions, Kernel, load_engine
from qdeploy.passes.name_by_layer import PRODUCTS
from qdeploy.passes.split_gate import GATE
from qdeploy.passes.unfold_convolution import PIECE
from qdeploy.targets.base import ONNX_FILES, GraphFiles

PART = re.compile(rf"(\.rest)?({re.escape(GATE)}|{re.escape(PIECE)}\d+)?$")  # of a layer's product: one of several
QUANTIZE_OPS = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Quantize", "Convert")
LAYOUT_OPS = ("Transpose", "Reorder", "ReorderInput", "ReorderOutput")


@dataclass(frozen=True)
class Finding:
    """How the engine runs one product of the graph."""

    layer: str
    op_type: str  # of the engine's kernel; "" when none was found
    macs: int
    quantized: bool
    integer: bool
    float_reason: str = BY_CHOICE

    @property
    def reason(self) -> str:
        """Why it does not run in integers; "" when it does."""
        if self.integer:
            return ""
        if not self.quantized:
            return self.float_reason
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
        parts = [name for name in by_layer if PART.sub("", name) in quant.layers]
        failed = {name: by_layer.get(name) for name in (*quant.layers, *parts, *second_passes, *products)}
        failed = {name: finding for name, finding in failed.items() if finding is None or not finding.integer}
        if failed:
            names = [f"{name} ({'is not in the graph' if f is None else f.reason})" for name, f in failed.items()]
            raise AuditError(
                f"{component}: {len(failed)} of {len(quant.layers) + len(products)} layers that the table quantizes do "
                f"not run as integer kernels: {join_names(names)}. Keep them in float, or report the graph pattern"
            )


def audit_graph(
    path: Path,
    engine: str,
    options: EngineOptions | None = None,
    feeds: Feeds | None = None,
    files: GraphFiles = ONNX_FILES,
) -> Audit:
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
    for product in files.find_products(path):
        ran = by_name.get(product.name) or by_name.get(product.output) or find_kernels(product, by_constant)
        slowest = next((kernel for kernel in ran if not kernel.integer), ran[0] if ran else None)
        op_type = "" if slowest is None else slowest.op_type
        integer = slowest is not None and slowest.integer
        findings.append(Finding(product.name, op_type, product.macs, product.quantized, integer, product.float_reason))
    return Audit(tuple(findings), tuple(kernels))


def audit_file(path: Path, files: GraphFiles = ONNX_FILES) -> Audit:
    """The audit of the file at ``path`` without an engine: a product of codes counts as integer."""
    products = files.find_products(path)
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
