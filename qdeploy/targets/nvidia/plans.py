"""What an export writes for TensorRT besides the graph: profiles of open shapes, and plans built ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdeploy.base.progress import OnProgress
from qdeploy.engines.nvidia.caches import make_cache_folder
from qdeploy.engines.nvidia.graph_inputs import read_inputs
from qdeploy.engines.nvidia.plans import PLAN_SUFFIX, record_built, write_plan
from qdeploy.engines.nvidia.profiles import LatentGrid, ProfileSizes, read_profile, shapes_from_sizes, write_profile


def write_graph_profile(path: Path, sizes: ProfileSizes, grid: LatentGrid) -> None:
    """``profile.json`` next to the graph at ``path``, where shapes are open; UsageError when ``sizes`` do not fit."""
    ports = read_inputs(path)
    if all(port.is_static for port in ports):
        return
    write_profile(path.parent, shapes_from_sizes(sizes, ports, grid))


def build_plans(graphs: Sequence[Path], on_progress: OnProgress) -> None:
    """Build each graph's engine for this machine's GPU and store it next to the graph, with its key."""
    from qdeploy.engines import tensorrt

    for path in graphs:
        key, plan = tensorrt.build_plan(path, read_profile(path), on_progress)
        write_plan(path.with_suffix(PLAN_SUFFIX), key, plan)
        record_built(make_cache_folder(tensorrt.CACHE), plan)
