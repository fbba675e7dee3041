"""What `export` does for TensorRT besides the graph: profiles of open shapes, and engines built ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdeploy.engines.base import engine_named
from qdeploy.engines.nvidia.caches import cache_folder
from qdeploy.engines.nvidia.graph_inputs import inputs_of
from qdeploy.engines.nvidia.plans import PLAN_SUFFIX, vouch, write_plan
from qdeploy.engines.nvidia.profiles import EXAMPLE, Grid, Sizes, profile_for, shapes_of, write_profile
from qdeploy.errors import UsageError
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import LatentDiffusion
from qdeploy.progress import OnProgress
from qdeploy.spec import TargetSpec

BUILDS = "tensorrt"  # the target, and the engine of the same name


def check_buildable(target: TargetSpec) -> None:
    """Before minutes are spent on the export: UsageError for a target without engines, EngineUnavailableError here."""
    if target.name != BUILDS:
        raise UsageError(f"--build: only --target {BUILDS} has engines that are built ahead of time, got {target.name}")
    engine_named(BUILDS).versions()


def check_profile(target: TargetSpec, open_dims: OpenDims, sizes: Sizes | None) -> None:
    """UsageError unless there is a profile just where TensorRT is to build graphs with open dimensions."""
    if sizes is not None and not open_dims:
        raise UsageError("--profile: the graphs are static; leave dimensions open with --dynamic batch,size")
    if sizes is not None and target.name != BUILDS:
        raise UsageError(f"--profile: only --target {BUILDS} has profiles, got {target.name}")
    if open_dims and sizes is None and target.name == BUILDS:
        raise UsageError(f"--dynamic: {BUILDS} builds for a range of sizes; give it, such as --profile {EXAMPLE}")


def write_component_profile(path: Path, sizes: Sizes, model: LatentDiffusion) -> None:
    """``profile.json`` beside the graph at ``path``, where shapes are open; UsageError when ``sizes`` do not fit."""
    ports = inputs_of(path)
    if all(port.is_static for port in ports):
        return
    write_profile(path.parent, shapes_of(sizes, ports, grid_of(model)))


def grid_of(model: LatentDiffusion) -> Grid:
    """Pixels a latent, and of how many latents the UNet takes multiples."""
    return Grid(model.latents.image_height // model.latents.height, model.multiple("unet"))


def build_plans(graphs: Sequence[Path], on_progress: OnProgress) -> None:
    """Build each graph's engine for this machine's GPU and put it beside it, with its key."""
    from qdeploy.engines import tensorrt

    for path in graphs:
        key, plan = tensorrt.build(path, profile_for(path), on_progress)
        write_plan(path.with_suffix(PLAN_SUFFIX), key, plan)
        vouch(cache_folder(tensorrt.CACHE), plan)
