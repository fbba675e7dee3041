"""The audit of a bundle or an ONNX file, as label-value rows: what runs in integers, what does not, and the time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.bundle import MANIFEST, open_bundle
from qdeploy.describe_table import Facts
from qdeploy.engines.base import EngineOptions, engine_for
from qdeploy.errors import ExportError, UsageError
from qdeploy.export.audit import QUANTIZING, REARRANGING, Audit, audit_graph
from qdeploy.export.open_dims import close_dims

SHOWN = 12  # layers and op types listed unless all are wanted
DEFAULT_ENGINE = "ort-cpu"  # for a file that says nothing of its own


def describe_audit(path: Path, engine: str | None = None, threads: int | None = None, every: bool = False) -> Facts:
    """Audit and time each component of the bundle, or the one graph, at ``path``.

    ``engine`` None takes the bundle's own. Raises UsageError when ``path`` is neither.
    """
    if (path / MANIFEST).is_file():
        bundle = open_bundle(path)
        chosen = engine_for(path, bundle.manifest.engine, engine)
        components = bundle.manifest.components
        graphs = {name: bundle.path(info.file) for name, info in components.items()}
        codes = {name: info.largest_weight_code for name, info in components.items()}
    elif path.suffix == ".onnx" and path.is_file():
        chosen, graphs, codes = engine or DEFAULT_ENGINE, {path.stem: path}, {}
    else:
        raise UsageError(f"--audit reads a bundle or an .onnx file, and {path} is neither")
    facts: Facts = [("audit", f"{path}, as {chosen} runs it")]
    for name, graph in graphs.items():
        options = EngineOptions(threads=threads, largest_weight_code=codes.get(name))
        audit = audit_graph(graph, chosen, options, example_feeds(graph))
        facts += [(name, f"{audit.integer_mac_share:.1%} of MACs in integers")]
        facts += float_facts(audit, None if every else SHOWN) + time_facts(audit, None if every else SHOWN)
    return facts


def float_facts(audit: Audit, most: int | None) -> Facts:
    """Products that do not run in integers, those with the most MACs first."""
    found = sorted((one for one in audit.findings if not one.integer), key=lambda one: -one.macs)
    facts = [(f"  {audit.mac_share(one):6.2%}", f"{one.layer}: {one.reason}") for one in found[:most]]
    left = found[len(facts) :]
    if left:
        facts.append((f"  {sum(map(audit.mac_share, left)):6.2%}", f"{len(left)} more; --all lists them"))
    return facts


def time_facts(audit: Audit, most: int | None) -> Facts:
    """Time a run by the engine's own kinds of node."""
    spent = audit.seconds_by_op()
    total = sum(seconds for _, seconds in spent.values())
    quantizing, rearranging = audit.time_share(QUANTIZING), audit.time_share(REARRANGING)
    facts = [
        (
            "  time",
            f"{total * 1e3:.1f} ms a run; Q/DQ alone {quantizing:.1%}, transposes and reorders {rearranging:.1%}",
        )
    ]
    for op_type, (nodes, seconds) in list(spent.items())[:most]:
        facts.append((f"  {seconds * 1e3:7.2f} ms", f"{op_type}, {nodes} nodes"))
    return facts


def example_feeds(path: Path) -> dict[str, NDArray]:
    """Something to run the graph on: normal noise for floats, zeros for integers; ExportError on unknown shapes."""
    noise = np.random.default_rng(0)
    feeds = {}
    model = ir.load(path)
    close_dims(model)
    for value in model.graph.inputs:
        if value.name is None or value.dtype is None or value.shape is None or not value.shape.is_static():
            raise ExportError(f"{path}: input {value.name} has no static shape; export one to audit it")
        dtype, shape = value.dtype.numpy(), tuple(value.shape.numpy())
        floats = np.issubdtype(dtype, np.floating)
        feeds[value.name] = (noise.standard_normal(shape) if floats else np.zeros(shape)).astype(dtype)
    return feeds
