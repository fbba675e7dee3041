"""Optimization profiles: the smallest, likeliest and largest shape of each input of a graph with open shapes.

``--profile batch=1:2:2,height=512:512:768,width=512:512:768`` gives them for all components, in rows of a UNet call
and pixels of the picture; ``shapes_from_sizes`` computes each input's shapes. A profile is stored next to its graph as
``profile.json``. A graph of static shapes needs none: its shapes are all three.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

from msgspec import Meta

from qdeploy.artifacts.components import UNET, VAE_ENCODER
from qdeploy.base.documents import read_json_as
from qdeploy.base.errors import EngineError, UsageError
from qdeploy.engines.base import OPEN_DIM, Port
from qdeploy.engines.nvidia.graph_inputs import read_inputs

PROFILE_FILE = "profile.json"
KEYS = ("batch", "height", "width")
HEIGHT_AXIS, WIDTH_AXIS = 2, 3  # of NCHW
UNET_INPUT = UNET.inputs[1]  # that no other component reads
PIXELS = VAE_ENCODER.input  # the one input that is in pixels, the VAE encoder's; all others of rank 4 are latents
EXAMPLE = "batch=1:2:2,height=512:512:768,width=512:512:768"


class Range(NamedTuple):
    """Smallest, likeliest and largest value."""

    min: int
    opt: int
    max: int


class Shapes(NamedTuple):
    """Smallest, likeliest and largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile = Mapping[str, Shapes]


@dataclass(frozen=True)
class ProfileSizes:
    """The ranges of `--profile`; None keeps the graph's own side."""

    batch: Range | None = None
    height: Range | None = None
    width: Range | None = None


@dataclass(frozen=True)
class LatentGrid:
    """The relation of pixels and latents.

    factor: pixels a latent has on each side, 8 for Stable Diffusion.
    multiple: of latents, that a UNet with 2**k smaller levels can halve k times.
    """

    factor: int
    multiple: int

    def latents_from_pixels(self, key: str, pixels: int) -> int:
        """A side in latents; UsageError when it does not divide."""
        step = self.factor * self.multiple
        if pixels % step:
            raise UsageError(f"--profile {key}: got {pixels}, expected a multiple of {step} for this model")
        return pixels // self.factor


def sizes_from_text(text: str) -> ProfileSizes:
    """`--profile`'s text; a single value is all three of its range. UsageError when it is malformed."""
    ranges: dict[str, Range] = {}
    for part in text.split(","):
        key, equals, values = (piece.strip() for piece in part.partition("="))
        if key not in KEYS or not equals:
            raise UsageError(f"--profile: got {part!r}, expected {', '.join(KEYS)} with MIN:OPT:MAX, such as {EXAMPLE}")
        if key in ranges:
            raise UsageError(f"--profile: {key} comes twice")
        ranges[key] = _range_from_text(key, values)
    return ProfileSizes(**ranges)


def shapes_from_sizes(sizes: ProfileSizes, ports: Sequence[Port], grid: LatentGrid) -> dict[str, Shapes]:
    """Each input's shapes; UsageError when a side is open and not asked for.

    The rows asked for are those of a UNet call; the other components are called with one row as well.
    """
    if sizes.batch is not None and UNET_INPUT not in {port.name for port in ports}:
        sizes = replace(sizes, batch=Range(1, 1, sizes.batch.max))
    return {port.name: _build_shapes(sizes, port, grid) for port in ports}


def build_static_profile(ports: Sequence[Port]) -> dict[str, Shapes]:
    """The profile of a graph that leaves nothing open."""
    return {port.name: Shapes(port.dims, port.dims, port.dims) for port in ports}


def format_provider_shapes(profile: Profile, ports: Sequence[Port], prefix: str) -> dict[str, str]:
    """ONNX Runtime's options ``PREFIX_{min,opt,max}_shapes``: ``name:1x4x64x64,name:…`` of the inputs that are open."""
    is_open = [port.name for port in ports if not port.is_static]
    return {
        f"{prefix}_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, getattr(profile[name], which)))}" for name in is_open
        )
        for which in Shapes._fields
    }


Side = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Sides = Annotated[tuple[Side, ...], Meta(max_length=8)]


@dataclass(frozen=True)
class ShapesEntry:
    """One input's shapes in the file."""

    min: Sides
    opt: Sides
    max: Sides


def write_profile(folder: Path, profile: Profile) -> None:
    """Write ``PROFILE_FILE`` into ``folder``, next to the graph, where :func:`read_profile` looks for it."""
    document = {name: shapes._asdict() for name, shapes in profile.items()}
    (folder / PROFILE_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_profile(path: Path) -> dict[str, Shapes]:
    """The profile of the graph at ``path``: its own shapes, or the file next to it; EngineError without one."""
    ports = read_inputs(path)
    if all(port.is_static for port in ports):
        return build_static_profile(ports)
    file = path.with_name(PROFILE_FILE)
    if not file.is_file():
        raise EngineError(
            f"{path} has open shapes and no {PROFILE_FILE} next to it, which TensorRT needs to build; export it "
            f"again with --profile, such as --profile {EXAMPLE}"
        )
    document = read_json_as(file, dict[str, ShapesEntry], error=EngineError, remedy="export the bundle again")
    profile = {name: Shapes(entry.min, entry.opt, entry.max) for name, entry in document.items()}
    ranks = {port.name: {len(port.dims)} for port in ports}
    has_ranks = all({len(sides) for sides in profile.get(name, ())} == rank for name, rank in ranks.items())
    if not has_ranks or not all(_fits_port(port, profile[port.name]) for port in ports):
        raise EngineError(f"{file} is not the profile of {path}: its shapes do not fit; export the bundle again")
    return profile


def _range_from_text(key: str, text: str) -> Range:
    try:
        values = [int(value) for value in text.split(":")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or not 0 < values[0] <= values[1] <= values[2]:
        raise UsageError(f"--profile {key}: got {text!r}, expected MIN:OPT:MAX in rising order, or one number")
    return Range(*values)


def _build_shapes(sizes: ProfileSizes, port: Port, grid: LatentGrid) -> Shapes:
    ranges: list[Range | None] = [None] * len(port.dims)
    if port.dims:
        ranges[0] = sizes.batch
    if len(port.dims) == 4:
        for axis, key in ((HEIGHT_AXIS, "height"), (WIDTH_AXIS, "width")):
            requested: Range | None = getattr(sizes, key)
            if requested is not None:
                latents = Range(*(grid.latents_from_pixels(key, pixels) for pixels in requested))
                ranges[axis] = requested if port.name == PIXELS else latents
    columns = [
        _choose_range(port, axis, dim, requested)
        for axis, (dim, requested) in enumerate(zip(port.dims, ranges, strict=True))
    ]
    return Shapes(*(tuple(column[which] for column in columns) for which in range(3)))


def _choose_range(port: Port, axis: int, dim: int, requested: Range | None) -> Range:
    if dim == OPEN_DIM:
        if requested is None:
            raise UsageError(f"--profile: dimension {axis} of {port.name!r} is open; give its range, such as {EXAMPLE}")
        return requested
    return Range(dim, dim, dim)


def _fits_port(port: Port, shapes: Shapes) -> bool:
    """Whether the shapes are the port's, in rising order."""
    columns = list(zip(port.dims, *shapes, strict=True))
    return all(0 < low <= likely <= high and dim in (OPEN_DIM, low) for dim, low, likely, high in columns) and all(
        dim == OPEN_DIM or low == high for dim, low, _, high in columns
    )
