"""A lowered ONNX graph, node by node, as one .tflite file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from qdeploy.base.errors import ExportError
from qdeploy.targets.tflite_files import elementwise, lookups, norms, products, shapes
from qdeploy.targets.tflite_files.conversion import Conversion, Rule, describe, get_dims, get_dtype

# What a rule converts when it is read: codes of weights and activations
AT_THEIR_READERS = ("QuantizeLinear", "DequantizeLinear")
RULES: Mapping[str, Rule] = {**elementwise.RULES, **products.RULES, **norms.RULES, **shapes.RULES, **lookups.RULES}


def write_tflite(model: ir.Model, path: Path) -> None:
    """Write ``model`` to ``path``; ExportError names a node that has no form in LiteRT, with its layer and module."""
    c = Conversion()
    inputs = {str(value.name): _add_input(c, value) for value in model.graph.inputs}
    for node in model.graph:
        if node in c.done or node.op_type in AT_THEIR_READERS:
            continue
        if node.op_type not in RULES:
            raise ExportError(
                f"{path.parent.name}: {describe(node)} is an operator that the target litert has no form for (it has "
                f"{', '.join(sorted(RULES))}); export for another --target, or report the model"
            )
        RULES[node.op_type](c, node)
    outputs = {str(value.name): c.fetch(value) for value in model.graph.outputs}
    c.flat.save(path, inputs, outputs)


def _add_input(c: Conversion, value: ir.Value) -> int:
    tensor = c.flat.add_tensor(get_dims(value), get_dtype(value), str(value.name))
    c.keep(value, tensor)
    return tensor
