"""What `--build` and `--profile` may ask of a target, checked before the export's minutes are spent."""

from __future__ import annotations

from qdeploy.artifacts.components import UNET
from qdeploy.base.errors import UsageError
from qdeploy.engines.base import load_engine
from qdeploy.engines.nvidia.profiles import EXAMPLE, LatentGrid, ProfileSizes
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import LatentDiffusion
from qdeploy.targets.base import Target, list_targets, load_target


def check_buildable(target: Target) -> None:
    """UsageError for a target whose engine has no plans, EngineUnavailableError where they cannot be built here."""
    if target.plans is None:
        raise UsageError(
            f"--build: only --target {list_planned()} has engines that are built ahead of time, got {target.name}"
        )
    load_engine(target.engine).versions()


def check_profile(target: Target, open_dims: OpenDims, sizes: ProfileSizes | None) -> None:
    """UsageError unless there is a profile just where plans are built for graphs with open dimensions."""
    if sizes is not None and not open_dims:
        raise UsageError("--profile: the graphs are static; leave dimensions open with --dynamic batch,size")
    if sizes is not None and target.plans is None:
        raise UsageError(f"--profile: only --target {list_planned()} has profiles, got {target.name}")
    if open_dims and sizes is None and target.plans is not None:
        raise UsageError(f"--dynamic: {target.name} builds for a range of sizes; give it, such as --profile {EXAMPLE}")


def list_planned() -> str:
    """Names of the targets whose engines are built ahead of time."""
    return " or ".join(name for name in list_targets() if load_target(name).plans is not None)


def grid_from_model(model: LatentDiffusion) -> LatentGrid:
    """Pixels a latent, and the number of latents that sizes must be a multiple of."""
    return LatentGrid(model.latents.factor, model.size_multiple(UNET.name))
