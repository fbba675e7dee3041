"""A calibration set: the inputs that each component receives in sampling; `dataset_file.py` reads and writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qdeploy.artifacts.components import (
    GUIDANCE_INPUT,
    POOLED_INPUT,
    SIZES_INPUT,
    TEXT_ENCODER,
    UNET,
    VAE_DECODER,
    get_kind,
)
from qdeploy.base.errors import CalibrationError

# Of a batch; half of it for the decoder, whose maps are largest: one Stable Diffusion picture.
BATCH_LATENT_PIXELS = 2**13
MAX_ROWS = 16

Feeds = Mapping[str, Tensor]  # a component's inputs by name


@dataclass(frozen=True)
class CalibrationSet:
    """Recorded inputs of a latent-diffusion model.

    sample: ``float16[N, C, h, w]``, the UNet's x_t.
    timestep: ``int64[N]``, the t that belongs to each x_t.
    prompt: ``int64[N]``, row of ``contexts`` for the conditional half.
    contexts: ``float16[P, T, D]``, text embeddings; row 0 is the empty prompt, the unconditional half.
    pooled: ``float16[P, E]``, pooled text embeddings of the same prompts, for a UNet that reads them.
    sizes: ``float32[N, 6]``, the sizes (`time_ids`) that such a UNet was given with each sample.
    guidance: ``float16[N, G]``, the embedded guidance scale of each sample, for a UNet that reads it.
    is_guided: the UNet ran with and without the text; if not, only with it.
    guided: ``bool[N]``, False for samples of calls outside the guidance interval, which ran only with the text; None
        where all are alike.
    input_ids: ``int64[P, T]`` for each text encoder, by its name: the tokens of ``contexts``.
    latents: ``float16[M, C, h, w]``, final latents, divided by the scaling factor: the decoder's input.

    A set of an unconditional model has neither ``prompt`` nor ``contexts`` nor ``input_ids``. One read from
    Q-Diffusion's layout has no ``input_ids`` and no ``latents``: it has no inputs for text encoder and decoder,
    so :meth:`batches` yields none for them.
    """

    sample: Tensor
    timestep: Tensor
    prompt: Tensor | None = None
    contexts: Tensor | None = None
    input_ids: Mapping[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    guidance: Tensor | None = None
    is_guided: bool = True
    guided: Tensor | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def batches(self, component: str, size: int) -> Iterator[dict[str, Tensor]]:
        """Float32 inputs of ``component``, about ``size`` at a time; the UNet's hold both guidance halves.

        The UNet takes one t a call, so its samples are grouped by timestep.
        """
        kind = get_kind(component)
        if not kind.in_loop:
            yield from ({kind.input: _widen(chunk)} for chunk in _split(self._get_rows(component), size))
            return
        for t in self.timestep.unique():
            for halves, alike in self._split_by_halves(torch.nonzero(self.timestep == t)[:, 0]):
                for rows in alike.split(max(1, size // halves)):
                    yield self._unet_feeds(rows, t, halves)

    def count(self, component: str) -> int:
        """How many inputs :meth:`batches` will yield for ``component``, guidance halves counted twice."""
        if get_kind(component).in_loop:
            unguided = 0 if self.guided is None else int((~self.guided).sum())
            return self.halves * len(self.sample) - unguided
        rows = self._get_rows(component)
        return 0 if rows is None else len(rows)

    def _get_rows(self, component: str) -> Tensor | None:
        """Inputs of a component that runs once a picture or prompt; None where the set holds none."""
        recorded: Mapping[str, Tensor | None] = {**self.input_ids, VAE_DECODER.name: self.latents}
        return recorded.get(component)

    @property
    def halves(self) -> int:
        """Rows of the UNet for one sample: 2 with both halves of classifier-free guidance."""
        return 1 if self.contexts is None or not self.is_guided else 2

    def _split_by_halves(self, rows: Tensor) -> list[tuple[int, Tensor]]:
        """``rows int64[B]`` with the number of halves that they ran with; no more than one kind a call."""
        if self.guided is None:
            return [(self.halves, rows)]
        kinds = [(2, rows[self.guided[rows]]), (1, rows[~self.guided[rows]])]
        return [(halves, alike) for halves, alike in kinds if len(alike)]

    def _unet_feeds(self, rows: Tensor, t: Tensor, halves: int) -> dict[str, Tensor]:
        """One UNet call for ``rows int64[B]``: B inputs, or 2 B with both guidance halves, unconditional first."""
        x = self.sample[rows].float()
        if self.contexts is None or self.prompt is None:
            return dict(zip(UNET.inputs, (x, t), strict=False))
        texts = self.prompt[rows]
        own = (torch.cat([x] * halves), t, self._select_texts(self.contexts, texts, halves))
        feeds = dict(zip(UNET.inputs, own, strict=True))
        if self.guidance is not None:
            feeds[GUIDANCE_INPUT] = torch.cat([self.guidance[rows].float()] * halves)
        if self.pooled is not None and self.sizes is not None:
            feeds[POOLED_INPUT] = self._select_texts(self.pooled, texts, halves)
            feeds[SIZES_INPUT] = torch.cat([self.sizes[rows]] * halves)
        return feeds

    def _select_texts(self, table: Tensor, texts: Tensor, halves: int) -> Tensor:
        """The rows ``int64[B]`` of ``table``, after as many of row 0 where both halves ran."""
        chosen = table[texts].float()
        return chosen if halves == 1 else torch.cat([table[:1].float().expand_as(chosen), chosen])


def choose_batch_size(calibration: CalibrationSet, component: str) -> int:
    """Inputs to run at once: 16 for small latents; for Stable Diffusion's 64x64 2, of the decoder 1."""
    height, width = calibration.sample.shape[-2:]
    rows = BATCH_LATENT_PIXELS // (height * width)
    return max(1, min(MAX_ROWS, rows // get_kind(component).row_cost))


def count_rows(feeds: Feeds) -> int:
    """B, the inputs that ``feeds`` holds; the scalar timestep has none."""
    return len(next(value for value in feeds.values() if value.dim() > 0))


def sample_feeds(calibration: CalibrationSet, component: str, samples: int) -> Iterator[Feeds]:
    """About ``samples`` inputs of ``component``, evenly over the set and so over the timesteps."""
    stride = max(1, calibration.count(component) // samples)
    if not get_kind(component).in_loop:
        yield from list(calibration.batches(component, choose_batch_size(calibration, component)))[::stride]
        return
    chosen = thin_out(len(calibration.sample), stride)
    thinned_set = replace(
        calibration,
        sample=calibration.sample[chosen],
        timestep=calibration.timestep[chosen],
        prompt=None if calibration.prompt is None else calibration.prompt[chosen],
        sizes=None if calibration.sizes is None else calibration.sizes[chosen],
        guidance=None if calibration.guidance is None else calibration.guidance[chosen],
        guided=None if calibration.guided is None else calibration.guided[chosen],
    )
    yield from thinned_set.batches(component, choose_batch_size(calibration, component))


def thin_out(count: int, stride: int) -> Tensor:
    """One in ``stride`` of ``count`` samples, ``int64[about count / stride]``.

    The set holds them by timestep, which a call of the UNet has one of; the place within a stride goes round, so that
    all trajectories are drawn from.
    """
    firsts = torch.arange(0, count, stride)
    chosen = firsts + torch.arange(len(firsts)) % stride
    return chosen[chosen < count]


def check_shapes(
    calibration: CalibrationSet,
    latent_shape: tuple[int, int, int],
    context_shape: tuple[int, int] | None,
    pooled_width: int | None = None,
    guidance_channels: int | None = None,
) -> None:
    """CalibrationError unless the set has the model's shapes and is finite.

    ``latent_shape`` is (C, h, w); ``context_shape`` (T, D) of the text embeddings, None without text; ``pooled_width``
    and ``guidance_channels`` of what else the UNet may read, None where it does not.
    """
    shapes = (tuple(calibration.sample.shape[1:]), _get_context_shape(calibration))
    if shapes != (latent_shape, context_shape):
        raise CalibrationError(
            f"calibration set was recorded for latents {list(shapes[0])} and {_format_text_shape(shapes[1])}, the "
            f"model has {list(latent_shape)} and {_format_text_shape(context_shape)}; calibrate this model"
        )
    if calibration.latents is not None and tuple(calibration.latents.shape[1:]) != latent_shape:
        raise CalibrationError(
            f"calibration set holds decoder latents {list(calibration.latents.shape[1:])}, the model has "
            f"{list(latent_shape)}; calibrate this model"
        )
    read = {
        "pooled text": (calibration.pooled, pooled_width),
        "guidance scale": (calibration.guidance, guidance_channels),
    }
    for what, (tensor, expected) in read.items():
        width = None if tensor is None else tensor.shape[1]
        if width != expected:
            raise CalibrationError(
                f"calibration set holds a {what} of {width or 'no'} channels, the model reads {expected or 'none'}; "
                "calibrate this model"
            )
    broken = find_not_finite(calibration)
    if broken is not None:
        raise CalibrationError(f"calibration set holds NaN or infinity in {broken!r}; calibrate again")


def find_not_finite(calibration: CalibrationSet) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    names = ("sample", "contexts", "latents", "pooled", "sizes", "guidance")
    tensors = {name: getattr(calibration, name) for name in names}
    return next((name for name, x in tensors.items() if x is not None and not torch.isfinite(x).all()), None)


def check_numbers(calibration: CalibrationSet, train_steps: int, vocabularies: Mapping[str, int]) -> None:
    """CalibrationError for timesteps that the model was not trained on, or tokens that it has no row for.

    vocabularies: rows of each text encoder's embedding, by its name.
    """
    numbers_by_name = {"timestep": (calibration.timestep, train_steps)}
    numbers_by_name |= {
        name_ids(encoder): (ids, vocabularies.get(encoder, 0)) for encoder, ids in calibration.input_ids.items()
    }
    for name, (numbers, end) in numbers_by_name.items():
        if not numbers.numel():
            continue
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= end:
            raise CalibrationError(
                f"calibration set holds `{name}` {low if low < 0 else high}, expected 0 to {end - 1} of this model; "
                "calibrate this model"
            )


def check_model(calibration: CalibrationSet, model_sha256: str) -> None:
    """CalibrationError when the set says that it was made with other weights; a converted set does not say which."""
    made_with = calibration.provenance.get("model_sha256")
    if made_with is not None and made_with != model_sha256:
        raise CalibrationError(
            f"calibration set was made with another model (weights {str(made_with)[:12]}, these are "
            f"{model_sha256[:12]}); calibrate this model"
        )


def name_ids(text_encoder: str) -> str:
    """The tensor in the file that holds a text encoder's tokens."""
    return TEXT_ENCODER.input + text_encoder.removeprefix(TEXT_ENCODER.name)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _split(tensor: Tensor | None, size: int) -> tuple[Tensor, ...]:
    return () if tensor is None else tensor.split(size)


def _get_context_shape(calibration: CalibrationSet) -> tuple[int, ...] | None:
    return None if calibration.contexts is None else tuple(calibration.contexts.shape[1:])


def _format_text_shape(shape: tuple[int, ...] | None) -> str:
    return "no text" if shape is None else f"text {list(shape)}"
