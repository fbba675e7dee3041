"""Does each layer that the table says is int8 really run as an integer kernel? Read off the engine's own graph."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from qdeploy.engines.base import EngineOptions, engine_named
from qdeploy.errors import AuditError, some_of
from qdeploy.export.passes.name_by_layer import CODES, PRODUCTS
from qdeploy.table import ComponentQuant

INTEGER_OPS = {"QLinearConv", "ConvInteger", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm"}


@dataclass(frozen=True)
class Finding:
    """How one layer that should run in integers really runs."""

    layer: str
    op_type: str  # of the node that computes it in the engine's graph; "" when none was found
    macs: int

    @property
    def integer(self) -> bool:
        return self.op_type in INTEGER_OPS


@dataclass(frozen=True)
class Audit:
    """All findings of one component."""

    findings: tuple[Finding, ...]
    float_macs: int  # of layers that the table keeps in float

    @property
    def integer_mac_share(self) -> float:
        """Share of Conv and Linear multiply-accumulates that run in integers, 0..1."""
        integer = sum(finding.macs for finding in self.findings if finding.integer)
        total = self.float_macs + sum(finding.macs for finding in self.findings)
        return integer / total if total else 0.0

    def check(self, component: str) -> None:
        """AuditError naming every layer that fell back to float."""
        failed = [finding for finding in self.findings if not finding.integer]
        if failed:
            names = some_of([f"{f.layer} (runs as {f.op_type or 'no node that was found'})" for f in failed])
            raise AuditError(
                f"{component}: {len(failed)} of {len(self.findings)} layers that the table quantizes do not run as "
                f"integer kernels: {names}. Keep them in float, or report the graph pattern"
            )


def audit_graph(path: Path, engine: str, quant: ComponentQuant) -> Audit:
    """Load ``path`` in ``engine``, take the graph it optimized for itself, and look each layer and attention up.

    An attention's products have no MACs in the table: the share is that of Conv and Linear alone.
    """
    with tempfile.TemporaryDirectory(prefix="qdeploy-audit-") as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        engine_named(engine).open_session(path, EngineOptions(optimized_path=optimized)).close()
        graph = onnx.load(optimized, load_external_data=False).graph
    users = consumers_of(graph)
    findings = tuple(Finding(name, op_of_layer(name, users), quant.macs[name]) for name in quant.layers)
    op_types = {node.name: node.op_type for node in graph.node}
    products = [f"{attention}.{product}" for attention in quant.attention for product in PRODUCTS]
    findings += tuple(Finding(name, op_types.get(name, ""), 0) for name in products)
    return Audit(findings, sum(layer.macs for layer in quant.float_layers.values()))


def consumers_of(graph: onnx.GraphProto) -> Mapping[str, list[onnx.NodeProto]]:
    """Tensor name -> nodes that read it."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def op_of_layer(layer: str, users: Mapping[str, list[onnx.NodeProto]]) -> str:
    """Op type that consumes the layer's integer codes; where several do, one that is not integer if there is one.

    ONNX Runtime may have changed the codes to unsigned (``..._s8_2_u8``) or laid them out anew, but
    it keeps the beginning of their name.
    """
    codes = layer + CODES
    tensors = [name for name in users if name == codes or name.startswith((codes + "_", codes + "."))]
    ops = [op_type for name in tensors for node in users[name] for op_type in consuming_ops(node, users)]
    return next((op_type for op_type in ops if op_type not in INTEGER_OPS), ops[0] if ops else "")


def consuming_ops(node: onnx.NodeProto, users: Mapping[str, list[onnx.NodeProto]]) -> list[str]:
    """Op types that in the end read what ``node`` reads, looking through live DequantizeLinear and the like."""
    if node.op_type in ("DequantizeLinear", "Transpose", "Cast") and node.output[0] in users:
        return [op_type for reader in users[node.output[0]] for op_type in consuming_ops(reader, users)]
    return [node.op_type]
