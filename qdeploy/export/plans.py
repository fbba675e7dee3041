"""What `export` writes for TensorRT besides the graph: profiles of open shapes, and engines built ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdeploy.base.errors import UsageError
from qdeploy.base.progress import OnProgress
from qdeploy.engines.base import load_engine
from qdeploy.engines.nvidia.caches import make_cache_folder
from qdeploy.engines.nvidia.graph_inputs import read_inputs
from qdeploy.engines.nvidia.plans import PLAN_SUFFIX, record_built, write_plan
from qdeploy.engines.nvidia.profiles import (
    EXAMPLE,
    LatentGrid,
    ProfileSizes,
    read_profile,
    shapes_from_sizes,
    write_profile,
)
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import LatentDiffusion
from qdeploy.targets.spec import TargetSpec

BUILDS = "tensorrt"  # the target, and the engine of the same name


def check_buildable(target: TargetSpec) -> None:
    """Before minutes are spent on the export: UsageError for a target without engines, EngineUnavailableError here."""
    if target.name != BUILDS:
        raise UsageError(f"--build: only --target {BUILDS} has engines that are built ahead of time, got {target.name}")
    load_engine(BUILDS).versions()


def check_profile(target: TargetSpec, open_dims: OpenDims, sizes: ProfileSizes | None) -> None:
    """UsageError unless there is a profile just where TensorRT is to build graphs with open dimensions."""
    if sizes is not None and not open_dims:
        raise UsageError("--profile: the graphs are static; leave dimensions open with --dynamic batch,size")
    if sizes is not None and target.name != BUILDS:
        raise UsageError(f"--profile: only --target {BUILDS} has profiles, got {target.name}")
    if open_dims and sizes is None and target.name == BUILDS:
        raise UsageError(f"--dynamic: {BUILDS} builds for a range of sizes; give it, such as --profile {EXAMPLE}")


def write_component_profile(path: Path, sizes: ProfileSizes, model: LatentDiffusion) -> None:
    """``profile.json`` next to the graph at ``path``, where shapes are open; UsageError when ``sizes`` do not fit."""
    ports = read_inputs(path)
    if all(port.is_static for port in ports):
        return
    write_profile(path.parent, shapes_from_sizes(sizes, ports, grid_from_model(model)))


def grid_from_model(model: LatentDiffusion) -> LatentGrid:
    """Pixels a latent, and the number of latents that sizes must be a multiple of."""
    return LatentGrid(model.latents.image_height // model.latents.height, model.size_multiple("unet"))


def build_plans(graphs: Sequence[Path], on_progress: OnProgress) -> None:
    """Build each graph's engine for this machine's GPU and store it next to the graph, with its key."""
    from qdeploy.engines import tensorrt

    for path in graphs:
        key, plan = tensorrt.build_plan(path, read_profile(path), on_progress)
        write_plan(path.with_suffix(PLAN_SUFFIX), key, plan)
        record_built(make_cache_folder(tensorrt.CACHE), plan)
