"""The audit of a bundle or an ONNX file, as label-value rows: what runs in integers, what does not, and the time."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.graph_format import OPEN
from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.base.arrays import AnyArray
from qdeploy.base.errors import ExportError, UsageError
from qdeploy.engines.base import EngineOptions, choose_engine
from qdeploy.export.audit import LAYOUT_OPS, QUANTIZE_OPS, Audit, audit_graph
from qdeploy.inspection.table import FactRows
from qdeploy.targets.base import ONNX_FILES, GraphFiles, load_graph_files

DEFAULT_SHOWN = 12  # layers and op types listed unless all are wanted
MAX_INPUT_VALUES = 2**28
DEFAULT_ENGINE = "ort-cpu"  # for a file that says nothing of its own


def describe_audit(
    path: Path, engine: str | None = None, threads: int | None = None, show_all: bool = False
) -> FactRows:
    """Audit and time each component of the bundle, or the one graph, at ``path``.

    ``engine`` None takes the bundle's own. Raises UsageError when ``path`` is neither.
    """
    if (path / MANIFEST).is_file():
        bundle = open_bundle(path)
        engine_name = choose_engine(path, bundle.manifest.engine, engine)
        components = bundle.manifest.components
        graphs = {name: bundle.path(info.file) for name, info in components.items()}
        codes = {name: info.largest_weight_code for name, info in components.items()}
        files = load_graph_files(bundle.manifest.format)
    elif path.suffix == ".onnx" and path.is_file():
        engine_name, graphs, codes, files = engine or DEFAULT_ENGINE, {path.stem: path}, {}, ONNX_FILES
    else:
        raise UsageError(f"--audit reads a bundle or an .onnx file, and {path} is neither")
    facts: FactRows = [("audit", f"{path}, as {engine_name} runs it")]
    for name, graph in graphs.items():
        options = EngineOptions(threads=threads, largest_weight_code=codes.get(name))
        audit = audit_graph(graph, engine_name, options, make_example_feeds(graph, files), files)
        facts += [(name, f"{audit.integer_mac_share:.1%} of MACs in integers")]
        facts += list_float_products(audit, None if show_all else DEFAULT_SHOWN) + list_times(
            audit, None if show_all else DEFAULT_SHOWN
        )
    return facts


def list_float_products(audit: Audit, limit: int | None) -> FactRows:
    """Products that do not run in integers, those with the most MACs first."""
    products = sorted((product for product in audit.findings if not product.integer), key=lambda product: -product.macs)
    facts = [
        (f"  {audit.mac_share(product):6.2%}", f"{product.layer}: {product.reason}") for product in products[:limit]
    ]
    left = products[len(facts) :]
    if left:
        facts.append((f"  {sum(map(audit.mac_share, left)):6.2%}", f"{len(left)} more; --all lists them"))
    return facts


def list_times(audit: Audit, limit: int | None) -> FactRows:
    """Time a run by the engine's own kinds of node."""
    spent = audit.seconds_by_op()
    total = sum(seconds for _, seconds in spent.values())
    shares = f"Q/DQ {audit.time_share(QUANTIZE_OPS):.1%}, transposes and reorders {audit.time_share(LAYOUT_OPS):.1%}"
    if len(spent) == 1:  # of the whole graph
        shares = "the engine does not say of what"
    facts = [("  time", f"{total * 1e3:.1f} ms a run; {shares}")]
    for op_type, (nodes, seconds) in list(spent.items())[:limit]:
        facts.append((f"  {seconds * 1e3:7.2f} ms", f"{op_type}, {nodes} nodes"))
    return facts


def make_example_feeds(path: Path, files: GraphFiles = ONNX_FILES) -> dict[str, AnyArray]:
    """Something to run the graph on: normal noise for floats, zeros for integers; ExportError on unknown shapes."""
    noise = np.random.default_rng(0)
    feeds = {}
    for name, (dtype_name, shape) in files.read_example(path).items():
        if OPEN in shape:
            raise ExportError(f"{path}: input {name} has no static shape; export one to audit it")
        dtype = np.dtype(dtype_name)
        if not (np.issubdtype(dtype, np.number) or dtype == np.bool_) or prod(shape) > MAX_INPUT_VALUES:
            raise ExportError(f"{path}: input {name} is {dtype}{list(shape)}, which no audit runs")
        is_float = np.issubdtype(dtype, np.floating)
        feeds[name] = (noise.standard_normal(shape) if is_float else np.zeros(shape)).astype(dtype)
    return feeds
