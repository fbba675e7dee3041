"""Check one call of a pipeline: everything that can be refused before any component runs is refused here."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.manifest import LatentInfo, Manifest
from qdeploy.base.errors import RequestError, UsageError
from qdeploy.base.memory import read_available_bytes
from qdeploy.base.schemas import format_value
from qdeploy.runtime.image import PictureInput, mask_from_picture, pixels_from_picture
from qdeploy.sampling.loop import needs_guidance

Array = NDArray[np.float32]
MAX_PROMPT_CHARACTERS = 10_000  # the tokenizer keeps at most 77 tokens; more is a mistake or an attack
MAX_SIDE = 8192  # pixels; more would not fit a machine's memory, and is a mistake or an attack
MAX_STATED_SIDE = 2**16  # of a size that only describes a picture
MAX_PIXELS = 2048 * 2048  # of one picture, without allow_large
MAX_REQUEST_PIXELS = 2**28  # of all pictures of one request, without allow_large: 1,024 of 512 x 512
DECODER_BYTES_PER_PIXEL = 4096  # Stable Diffusion's decoder: four maps of 256 channels in float32 at full size
PICTURE_BYTES_PER_PIXEL = 36  # of each picture in a result: three float32[3, H, W] at the peak
MAX_INTEGER = 10**100  # no seed is longer, and Python refuses to print numbers of thousands of digits
MAX_GUIDANCE = 1000.0  # far above any use; beyond float32's range latents would not be finite
DEFAULT_STRENGTH = 0.8  # of image-to-image where none is given, as in diffusers; inpainting has 1


@dataclass(frozen=True)
class GenerationRequest:
    """The arguments of ``Pipeline.__call__`` that say which pictures to make, as it documents them.

    prompts, negative_prompts: None for an unconditional bundle; as many of the second as of the first.
    size: the bundle's latents at the height and width that the pictures are to have.
    reads_guidance: whether the bundle's UNet reads the guidance scale.
    sizes: six numbers that a UNet of Stable Diffusion XL reads: (height, width) of the original, (top, left) of its
        crop and (height, width) wanted.
    """

    prompts: tuple[str, ...] | None
    negative_prompts: tuple[str, ...] | None
    steps: int
    guidance_scale: float
    guidance_rescale: float
    weighting: bool
    seeds: tuple[tuple[int, int], ...]
    scheduler: str | None
    eta: float
    latents: Array | None
    size: LatentInfo
    source: SourcePicture | None
    reads_guidance: bool = False
    sizes: tuple[float, ...] = ()

    @property
    def is_guided(self) -> bool:
        """Whether the UNet runs twice a picture and step, which one that reads the guidance scale never does."""
        return self.prompts is not None and needs_guidance(self.guidance_scale) and not self.reads_guidance

    @property
    def per_prompt(self) -> int:
        """Pictures of each prompt."""
        return len(self.seeds) // len(self.prompts or [""])


@dataclass(frozen=True)
class SourcePicture:
    """An input picture, or one for each prompt.

    pixels: ``uint8[1 or prompts, H, W, 3]``.
    mask: ``bool[1 or prompts, H, W]``, True where it is to be made anew; None makes all anew, from it.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    strength: float


def check_text(manifest: Manifest, prompt: str | Sequence[str] | None, options: Collection[str]) -> None:
    """UsageError unless there is a prompt exactly where the bundle reads text; ``options``: others about text."""
    if manifest.reads_text and prompt is None:
        raise UsageError("no prompt: this bundle makes pictures from text; give one")
    if not manifest.reads_text and (prompt is not None or options):
        given = ", ".join([*(["a prompt"] if prompt is not None else []), *sorted(options)])
        raise UsageError(f"got {given}, expected none: this bundle is unconditional, it makes pictures without text")


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


def check_prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts and as many negative prompts."""
    prompts, negatives = _list_texts("prompt", prompt), _list_texts("negative_prompt", negative)
    if not prompts:
        raise RequestError("no prompt given; pass a string or a non-empty list of strings")
    if isinstance(negative, str):
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise RequestError(f"negative_prompt: got {len(negatives)}, expected one or {len(prompts)}, one a prompt")
    return prompts, negatives


def build_seeds(seed: int, first: int, count: int, prompts: int) -> tuple[tuple[int, int], ...]:
    """(seed, number) of each picture, prompt by prompt."""
    seed, first = check_integer("seed", seed, 0), check_integer("first", first, 0)
    numbers = range(first, first + check_integer("count", count, 1))
    return tuple((seed, number) for _ in range(prompts) for number in numbers)


def check_latents(latents: Array | None, count: int, shape: tuple[int, int, int]) -> Array | None:
    """``latents`` if they are finite ``float32[count, *shape]``."""
    if latents is None:
        return None
    array = np.asarray(latents)
    expected = (count, *shape)
    if array.dtype != np.float32 or array.shape != expected:
        raise RequestError(f"latents: got {array.dtype}{list(array.shape)}, expected float32{list(expected)}")
    if not np.isfinite(array).all():
        raise RequestError("latents hold NaN or infinity")
    return array


def build_source(
    image: PictureInput | Sequence[PictureInput] | None,
    mask: PictureInput | Sequence[PictureInput] | None,
    strength: float | None,
    prompts: int,
    latents: LatentInfo,
    reads_mask: bool,
) -> SourcePicture | None:
    """The input picture and mask, both of the bundle's size; None where there is none.

    ``reads_mask``: whether the bundle's UNet reads a mask, and so can only inpaint.
    """
    if image is None:
        if mask is not None or strength is not None:
            raise UsageError(f"{'strength' if mask is None else 'mask'} without image: give the picture to start from")
        if reads_mask:
            raise UsageError("this bundle's UNet inpaints: give image and mask")
        return None
    if mask is None and reads_mask:
        raise UsageError("this bundle's UNet inpaints: give a mask with the image, white where it is to be repainted")
    if strength is None:
        strength = DEFAULT_STRENGTH if mask is None else 1.0
    number = check_number("strength", strength, 0, 1)
    if number == 0:
        raise RequestError("strength: got 0, expected more: 0 would give the picture back as it is")
    pixels = _stack_pictures(
        [pixels_from_picture(picture, "image") for picture in _list_pictures(image, 3)], "image", prompts, latents
    )
    masks = None
    if mask is not None:
        masks = _stack_pictures(
            [mask_from_picture(picture) for picture in _list_pictures(mask, 2)], "mask", prompts, latents
        )
    return SourcePicture(pixels, masks, number)


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


def check_integer(name: str, value: int, minimum: int) -> int:
    """``value`` as an integer of at least ``minimum``; True and 2.0 are refused."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise RequestError(f"{name}: got {format_value(value)}, expected a whole number")
    if number >= MAX_INTEGER:
        raise RequestError(f"{name}: got {format_value(number)}, expected at most 100 digits")
    if number < minimum:
        raise RequestError(f"{name}: got {format_value(number)}, expected {minimum} or more")
    return number


def check_number(name: str, value: float, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """``value`` as a finite number from ``minimum`` to ``maximum``."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and minimum <= number <= maximum):
        bounds = "a finite number" if math.isinf(minimum) else f"a number from {minimum:g} to {maximum:g}"
        raise RequestError(f"{name}: got {format_value(value)}, expected {bounds}")
    return number


def _list_texts(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    texts: tuple[Any, ...]
    try:
        texts = (given,) if isinstance(given, str) else tuple(given)
    except TypeError:
        texts = (given,)
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"{name}: got {type(text).__name__}, expected a string or a list of strings")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise RequestError(f"a {name} of {len(text)} characters is too long; at most {MAX_PROMPT_CHARACTERS}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise RequestError(f"{name}: {exc.reason} at character {exc.start}; pass valid Unicode text") from exc
    return texts


def _list_pictures(given: PictureInput | Sequence[PictureInput], dimensions: int) -> list[PictureInput]:
    """One picture as a list of one; an array of one dimension more, or a list, as its pictures."""
    if isinstance(given, np.ndarray):
        return [given] if given.ndim <= dimensions else list(given)
    return list(given) if isinstance(given, list | tuple) else [given]


def _stack_pictures(arrays: list[NDArray[Any]], name: str, prompts: int, latents: LatentInfo) -> NDArray[Any]:
    """One array of pictures, checked to be one or one a prompt, and of the bundle's size."""
    if len(arrays) not in (1, prompts):
        expected = "one" if prompts == 1 else f"one, or {prompts}, one a prompt"
        raise RequestError(f"{name}: got {len(arrays)}, expected {expected}")
    for array in arrays:
        height, width = array.shape[:2]
        if (width, height) != (latents.image_width, latents.image_height):
            raise RequestError(
                f"{name}: got {width}x{height} pixels, expected {latents.image_width}x{latents.image_height}, the "
                "bundle's size; cut and scale it with qdeploy.runtime.image.fit_image"
            )
    return np.stack(arrays)
