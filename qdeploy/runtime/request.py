"""Check one call of a pipeline: everything that can be refused before any component runs is refused here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.manifest import LatentInfo, Manifest
from qdeploy.base.errors import RequestError, UsageError
from qdeploy.runtime.image import PictureInput, mask_from_picture, pixels_from_picture
from qdeploy.runtime.request_numbers import check_integer, check_number
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule
from qdeploy.sampling.guidance import needs_guidance

Array = NDArray[np.float32]
MAX_PROMPT_CHARACTERS = 10_000  # the tokenizer keeps at most 77 tokens; more is a mistake or an attack
MAX_GUIDANCE = 1000.0  # far above any use; beyond float32's range latents would not be finite
DEFAULT_STRENGTH = 0.8  # of image-to-image where none is given, as in diffusers; inpainting has 1


@dataclass(frozen=True)
class GenerationRequest:
    """The arguments of ``Pipeline.__call__`` that say which pictures to make, as it documents them.

    prompts, negative_prompts: None for an unconditional bundle; as many of the second as of the first.
    size: the bundle's latents at the height and width that the pictures are to have.
    per_prompt: pictures of each prompt; of an unconditional bundle, of each seed.
    reads_guidance: whether the bundle's UNet reads the guidance scale.
    sizes: six numbers that a UNet of Stable Diffusion XL reads: (height, width) of the original, (top, left) of its
        crop and (height, width) wanted.
    pictures_at_once: in one UNet call where the graph's batch is open.
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
    per_prompt: int = 1
    reads_guidance: bool = False
    sizes: tuple[float, ...] = ()
    calls: CallSchedule = EVERY_CALL
    pictures_at_once: int = 1

    @property
    def is_guided(self) -> bool:
        """Whether the UNet runs twice a picture and step, which one that reads the guidance scale never does."""
        return self.prompts is not None and needs_guidance(self.guidance_scale) and not self.reads_guidance


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


def check_seeds(seed: int | Sequence[int], prompts: int | None) -> tuple[int, ...]:
    """One seed a prompt, of one for all or as many as prompts; without prompts as many as are given."""
    seeds = tuple(seed) if isinstance(seed, list | tuple) else (seed,)
    if len(seeds) != prompts and (len(seeds) != 1 if prompts is not None else not seeds):
        raise RequestError(f"seed: got {len(seeds)}, expected one, or {prompts or 'more'}, one a prompt")
    checked = tuple(check_integer("seed", one, 0) for one in seeds)
    return checked if len(checked) > 1 else checked * (prompts or 1)


def build_seeds(seeds: Sequence[int], first: int, count: int) -> tuple[tuple[int, int], ...]:
    """(seed, number) of each picture, prompt by prompt."""
    first = check_integer("first", first, 0)
    numbers = range(first, first + check_integer("count", count, 1))
    return tuple((seed, number) for seed in seeds for number in numbers)


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
