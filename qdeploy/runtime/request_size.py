"""The size of a request's pictures: what the bundle's graphs take, and what memory it would need."""

from __future__ import annotations

from dataclasses import replace

from qdeploy.artifacts.manifest import LatentInfo
from qdeploy.base.errors import RequestError, UsageError
from qdeploy.base.memory import read_available_bytes
from qdeploy.runtime.request_numbers import check_integer

MAX_SIDE = 8192  # pixels; more would not fit a machine's memory, and is a mistake or an attack
MAX_STATED_SIDE = 2**16  # of a size that only describes a picture
MAX_PIXELS = 2048 * 2048  # of one picture, without allow_large
MAX_REQUEST_PIXELS = 2**28  # of all pictures of one request, without allow_large: 1,024 of 512 x 512
DECODER_BYTES_PER_PIXEL = 4096  # Stable Diffusion's decoder: four maps of 256 channels in float32 at full size
PICTURE_BYTES_PER_PIXEL = 36  # of each picture in a result: three float32[3, H, W] at the peak


def resolve_size(
    width: int | None, height: int | None, latents: LatentInfo, count: int = 1, allow_large: bool = False
) -> LatentInfo:
    """``latents`` of the bundle at the requested size; RequestError for one that its graphs do not take.

    ``count`` pictures of it must stay within the limits, unless ``allow_large``.
    """
    factor = latents.factor
    sizes = {}
    for name, value, default in (("width", width, latents.image_width), ("height", height, latents.image_height)):
        sizes[name] = default if value is None else check_integer(name, value, 1)
        step = factor * max(latents.side_multiple, 1)
        if sizes[name] == default:
            continue
        if sizes[name] % step:
            raise RequestError(f"{name}: got {value}, expected a multiple of {step}")
        if not latents.side_multiple:
            raise RequestError(
                f"{name}: got {value}, expected {default}: the bundle's graphs are made for one size; export it again "
                "with --dynamic size, or scale the picture afterwards"
            )
        if sizes[name] > MAX_SIDE:
            raise RequestError(f"{name}: got {value}, expected at most {MAX_SIDE} pixels")
    size = replace(
        latents,
        height=sizes["height"] // factor,
        width=sizes["width"] // factor,
        image_height=sizes["height"],
        image_width=sizes["width"],
    )
    if not allow_large:
        check_pixels(size, latents, count)
    return size


def check_pixels(size: LatentInfo, own: LatentInfo, count: int) -> None:
    """RequestError for more pixels than are made by default; it says about how much memory they would take."""
    pixels, limit = size.image_height * size.image_width, max(MAX_PIXELS, own.image_height * own.image_width)
    if pixels > limit:
        raise RequestError(
            f"width, height: got {size.image_width}x{size.image_height}, expected at most {limit / 1e6:.1f} million "
            f"pixels; {describe_memory(DECODER_BYTES_PER_PIXEL * pixels)}; ask for a smaller picture, or "
            "lift the limit with allow_large=True, --allow-large on the command line"
        )
    if pixels * count > max(MAX_REQUEST_PIXELS, limit):
        raise RequestError(
            f"count: got {count} pictures of {size.image_width}x{size.image_height}, expected at most "
            f"{max(MAX_REQUEST_PIXELS, limit) // pixels} in one request; "
            f"{describe_memory(PICTURE_BYTES_PER_PIXEL * pixels * count)}; ask for them in parts (first=, count=), as "
            "`qdeploy generate` does, or lift the limit with allow_large=True"
        )


def describe_memory(needed_bytes: int) -> str:
    """About how much memory would be taken, and what is available."""
    available = read_available_bytes()
    text = f"that would take about {needed_bytes / 1e9:,.1f} GB of memory and more"
    return text if available is None else f"{text}, {available / 1e9:,.1f} GB are available"


def build_sizes(
    original_size: tuple[int, int] | None,
    crop: tuple[int, int] | None,
    target_size: tuple[int, int] | None,
    size: LatentInfo,
    reads_sizes: bool,
) -> tuple[float, ...]:
    """The six numbers, by default those of an uncut picture of the request's size, as diffusers has them."""
    given = {"original_size": original_size, "crop": crop, "target_size": target_size}
    if not reads_sizes and any(pair is not None for pair in given.values()):
        named = ", ".join(name for name, pair in given.items() if pair is not None)
        raise UsageError(f"got {named}, expected none: only a bundle of Stable Diffusion XL reads sizes")
    pairs = [size.default_sizes[start : start + 2] for start in (0, 2, 4)]
    for number, (name, pair) in enumerate(given.items()):
        if pair is not None:
            pairs[number] = _check_pair(name, pair)
    return tuple(value for pair in pairs for value in pair)


def _check_pair(name: str, pair: tuple[int, int]) -> tuple[float, ...]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise RequestError(f"{name}: got {pair!r:.40}, expected two whole numbers, vertical first")
    values = [check_integer(name, value, 0 if name == "crop" else 1) for value in pair]
    if max(values) > MAX_STATED_SIDE:
        raise RequestError(f"{name}: got {max(values)}, expected at most {MAX_STATED_SIDE} pixels")
    return tuple(map(float, values))
