"""Does each layer that the table says is int8 really run as an integer kernel? Read off the engine's own graph."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from qdeploy.engines.base import EngineOptions, engine_named
from qdeploy.errors import AuditError
from qdeploy.export.passes.name_by_layer import CODES
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
            names = ", ".join(f"{f.layer} (runs as {f.op_type or 'no node that was found'})" for f in failed[:8])
            more = f" and {len(failed) - 8} more" if len(failed) > 8 else ""
            raise AuditError(
                f"{component}: {len(failed)} of {len(self.findings)} layers that the table quantizes do not run as "
                f"integer kernels: {names}{more}. Keep them in float, or report the graph pattern"
            )


def audit_graph(path: Path, engine: str, quant: ComponentQuant) -> Audit:
    """Load ``path`` in ``engine``, take the graph it optimized for itself, and look each layer up."""
    with tempfile.TemporaryDirectory(prefix="qdeploy-audit-") as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        engine_named(engine).open_session(path, EngineOptions(optimized_path=optimized)).close()
        graph = onnx.load(optimized, load_external_data=False).graph
    users = consumers_of(graph)
    findings = tuple(Finding(name, op_of_layer(name, users), quant.macs[name]) for name in quant.layers)
    return Audit(findings, sum(layer.macs for layer in quant.float_layers.values()))


def consumers_of(graph: onnx.GraphProto) -> Mapping[str, list[onnx.NodeProto]]:
    """Tensor name -> nodes that read it."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def op_of_layer(layer: str, users: Mapping[str, list[onnx.NodeProto]]) -> str:
    """Op type that consumes the layer's integer codes, looking through a live DequantizeLinear.

    ONNX Runtime may have changed the codes to unsigned (``..._s8_2_u8``) or laid them out anew, but
    it keeps the beginning of their name.
    """
    codes = layer + CODES
    for name, nodes in users.items():
        if name == codes or name.startswith((codes + "_", codes + ".")):
            node = nodes[0]
            while node.op_type in ("DequantizeLinear", "Transpose", "Cast") and node.output[0] in users:
                node = users[node.output[0]][0]
            return node.op_type
    return ""
