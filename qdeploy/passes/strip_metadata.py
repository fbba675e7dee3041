"""Drop the exporter's metadata: stack traces with the paths of this machine, module scopes, signatures.

1. Metadata of the model, its graph, its nodes and their values: removed, except our own, whose names begin with
   ``qdeploy.``. Nothing reads the rest after lowering, and in Stable Diffusion's UNet it is 4 MB of a 5 MB graph.
"""

from __future__ import annotations

import onnx_ir as ir

OWN_PREFIX = "qdeploy."


def strip_metadata(model: ir.Model) -> int:
    """Remove in place; the number of entries."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs)]
    removed = 0
    for holder in (model, graph, *graph, *values):
        foreign = [name for name in holder.metadata_props if not name.startswith(OWN_PREFIX)]
        for name in foreign:
            del holder.metadata_props[name]
        removed += len(foreign)
    return removed
