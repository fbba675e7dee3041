"""One checkpoint file as the modules of a pipeline, or as facts about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.artifacts.components import TEXT_ENCODER, name_component
from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints import first_stage, text, unet
from qdeploy.models.checkpoints.config_keys import check_keys
from qdeploy.models.checkpoints.file import read_checkpoint
from qdeploy.models.checkpoints.heads import Heads, read_heads
from qdeploy.models.checkpoints.kinds import (
    COND_STAGE,
    FIRST_STAGE,
    SD1,
    SD2,
    SDXL,
    TEXT2IMG,
    UNCONDITIONAL,
    UNET,
    detect_kind,
    has_ema,
    select_part,
    swap_in_ema,
)
from qdeploy.models.checkpoints.original_config import MAX_SIDE, OriginalConfig, find_config, read_config
from qdeploy.models.checkpoints.schedule import (
    V_PREDICTION,
    ZERO_SNR,
    check_sigmas,
    guesses_v,
    read_prediction,
    read_scaling_factor,
    read_scheduler_config,
)

IMAGE_SIDE = {SD1: 512, SD2: 512, SDXL: 1024, UNCONDITIONAL: 256, TEXT2IMG: 256}  # of the published models
SD2_V_SIDE, SD2_YAML_SIDE = 768, 64  # the published v-prediction YAML states the base's latents of 64
GUESSED_V = (
    "`prediction_type` v_prediction and pictures of 768 pixels: taken, as diffusers does, because nothing in the file "
    "says otherwise; for a 512-pixel base model give its YAML (--config v2-inference.yaml)"
)
MARKS = {
    V_PREDICTION: "prediction_type v_prediction",
    ZERO_SNR: "DDIM with rescale_betas_zero_snr, since no signal is left at the first timestep",
}
MISSING = {
    SD1: ("tokenizer: vocab.json and merges.txt of openai/clip-vit-large-patch14, in a folder `tokenizer`",),
    SDXL: (
        "tokenizer: vocab.json and merges.txt of openai/clip-vit-large-patch14, in a folder `tokenizer`; the second "
        "text encoder's is the same, with another padding token, and may be in a folder `tokenizer_2`",
    ),
    SD2: ("tokenizer: vocab.json and merges.txt of openai/clip-vit-large-patch14, in a folder `tokenizer`",),
    TEXT2IMG: ("tokenizer: vocab.txt of bert-base-uncased, in a folder `tokenizer`",),
    UNCONDITIONAL: (),
}


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint as float32 modules in eval mode, their weights mapped from the file where it holds float32.

    The file must stay as it is while they are in use.
    """

    kind: str  # sd1, sd2, sdxl, ldm-uncond or ldm-text2img
    unet: nn.Module  # diffusers UNet2DConditionModel, or UNet2DModel when unconditional
    vae: nn.Module  # diffusers AutoencoderKL or VQModel
    text_encoders: Mapping[str, nn.Module]  # by component: transformers' CLIP or diffusers' LDMBertModel
    scheduler_config: Mapping[str, Any]
    scaling_factor: float
    sample_size: int  # latents' side
    missing: tuple[str, ...]  # what no checkpoint holds, and where to get it
    corrections: tuple[str, ...]  # what is used otherwise than the file has it


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint holds, only by names and shapes."""

    kind: str
    parameters: Mapping[str, int]  # by component
    latents: tuple[int, int, int]  # channels, height, width
    image_side: int
    ema: bool  # averaged weights of the UNet besides the last ones
    missing: tuple[str, ...]
    corrections: tuple[str, ...]


@dataclass(frozen=True)
class _OpenCheckpoint:
    """A file's tensors by part, and the sizes that all steps need."""

    kind: str
    tensors: Mapping[str, Tensor]
    config: OriginalConfig | None
    unet: unet.UNetLayout
    first_stage: first_stage.FirstStageLayout
    corrections: tuple[str, ...] = ()

    def part(self, prefix: str) -> dict[str, Tensor]:
        return select_part(self.tensors, prefix)

    @property
    def text_encoders(self) -> dict[str, tuple[str, text.Convert]]:
        """Where the weights of each are, and how they are converted, by component name."""
        return {name_component(TEXT_ENCODER, i): found for i, found in enumerate(text.ENCODERS[self.kind])}

    @property
    def sample_size(self) -> int:
        size = None if self.config is None else self.config.integer("image_size", high=MAX_SIDE)
        if self.kind == SD2 and size in (None, SD2_YAML_SIDE) and self.prediction == "v_prediction":
            return SD2_V_SIDE // self.first_stage.factor
        return IMAGE_SIDE[self.kind] // self.first_stage.factor if size is None else size

    @property
    def prediction(self) -> str:
        return read_prediction(self.kind, self.tensors, self.config)

    @property
    def image_side(self) -> int:
        return self.sample_size * self.first_stage.factor


def convert_checkpoint(path: Path, config: Path | None = None, ema: bool = False) -> ConvertedCheckpoint:
    """The modules of an original CompVis checkpoint, exactly; nothing is fetched, nothing in the file is executed.

    ``config``: the original YAML, needed only where heads, betas or scale are not those of a published model;
    without it the one next to the file that has its name is read. ``ema``: take the averaged UNet, which the original
    LDM sampling scripts use. ModelError says what is wrong.
    """
    with _name_file_in_errors(path), _explain_neighbour(path, config):
        return _convert(_open(path, config, ema))


def describe_checkpoint(path: Path, config: Path | None = None) -> CheckpointFacts:
    """Kind, sizes and gaps of a checkpoint; its names and shapes are checked, and no weight is read."""
    with _name_file_in_errors(path), _explain_neighbour(path, config):
        checkpoint = _open(path, config, ema=False)
        missing = [*MISSING[checkpoint.kind], *_check_convertible(checkpoint)]
    text_parts = {name: prefix for name, (prefix, _) in checkpoint.text_encoders.items()}
    parts = {**text_parts, "unet": UNET, "vae": FIRST_STAGE}
    counts = {name: sum(t.numel() for t in checkpoint.part(prefix).values()) for name, prefix in parts.items()}
    return CheckpointFacts(
        kind=checkpoint.kind,
        parameters={name: count for name, count in counts.items() if count},
        latents=(checkpoint.first_stage.embed_dim, checkpoint.sample_size, checkpoint.sample_size),
        image_side=checkpoint.image_side,
        ema=has_ema(checkpoint.tensors),
        missing=tuple(missing),
        corrections=checkpoint.corrections,
    )


def _convert(checkpoint: _OpenCheckpoint) -> ConvertedCheckpoint:
    vq = checkpoint.first_stage.n_embed is not None
    scale = read_scaling_factor(checkpoint.kind, checkpoint.tensors, checkpoint.config, vq)
    layout = checkpoint.unet
    heads = read_heads(checkpoint.kind, layout.model_channels, layout.channel_mult, checkpoint.config)
    text_encoders = _convert_text_encoders(checkpoint)
    pooled_width = _find_pooled_width(text_encoders)
    return ConvertedCheckpoint(
        kind=checkpoint.kind,
        scheduler_config=read_scheduler_config(checkpoint.kind, checkpoint.tensors, checkpoint.config),
        unet=unet.convert_unet(checkpoint.part(UNET), layout, heads, checkpoint.sample_size, pooled_width),
        vae=first_stage.convert_first_stage(
            checkpoint.part(FIRST_STAGE), checkpoint.first_stage, checkpoint.image_side, scale
        ),
        text_encoders=text_encoders,
        scaling_factor=scale,
        sample_size=checkpoint.sample_size,
        missing=MISSING[checkpoint.kind],
        corrections=checkpoint.corrections,
    )


def _check_convertible(checkpoint: _OpenCheckpoint) -> list[str]:
    """ModelError where a tensor finds no place; else what only the original YAML can say."""
    gaps = []
    layout, vq = checkpoint.unet, checkpoint.first_stage.n_embed is not None
    heads = Heads(number=1)
    for read in (
        lambda: read_heads(checkpoint.kind, layout.model_channels, layout.channel_mult, checkpoint.config),
        lambda: read_scaling_factor(checkpoint.kind, checkpoint.tensors, checkpoint.config, vq),
        lambda: read_scheduler_config(checkpoint.kind, checkpoint.tensors, checkpoint.config),
    ):
        try:
            value = read()
            heads = value if isinstance(value, Heads) else heads
        except ModelError as exc:
            if checkpoint.config is not None:
                raise
            gaps.append(str(exc))
    hollow = replace(checkpoint, tensors={name: _empty(tensor) for name, tensor in checkpoint.tensors.items()})
    pooled_width = _find_pooled_width(_convert_text_encoders(hollow))
    unet.convert_unet(hollow.part(UNET), layout, heads, hollow.sample_size, pooled_width)
    first_stage.convert_first_stage(hollow.part(FIRST_STAGE), hollow.first_stage, hollow.image_side, 1.0)
    return gaps


def _empty(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that takes no memory; of float32, which is not widened, unless it holds codes."""
    return torch.zeros((), dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype).expand(tensor.shape)


def _open(path: Path, config: Path | None, ema: bool) -> _OpenCheckpoint:
    tensors, corrections = _correct(read_checkpoint(path))
    neighbour = find_config(path) if config is None else None
    config = neighbour if config is None else config
    original = None if config is None else read_config(config)
    if neighbour is not None:
        corrections.append(f"{neighbour.name} next to the file: read as its original configuration (--config)")
    kind = detect_kind(tensors, original)
    check_sigmas(kind, tensors)
    corrections += [GUESSED_V] if guesses_v(kind, tensors, original) else []
    tensors = swap_in_ema(tensors) if ema else tensors
    checkpoint = _OpenCheckpoint(
        kind,
        tensors,
        original,
        unet.read_layout(select_part(tensors, UNET)),
        first_stage.read_layout(select_part(tensors, FIRST_STAGE)),
        tuple(corrections),
    )
    if kind == SD1:
        text.drop_level(checkpoint.part(COND_STAGE))  # a layer under two namings is refused before any work
    if original is not None:
        _check_config(checkpoint, original)
        if kind == SD1:
            layers = text.describe_layers(checkpoint.part(COND_STAGE), original)
            checkpoint = replace(checkpoint, corrections=(*checkpoint.corrections, *layers))
    return checkpoint


def _check_config(checkpoint: _OpenCheckpoint, original: OriginalConfig) -> None:
    check_keys(original, inpaints=checkpoint.unet.in_channels == 2 * checkpoint.first_stage.embed_dim + 1)
    unet.check_config(checkpoint.unet, original)
    first_stage.check_config(checkpoint.first_stage, original)
    if checkpoint.kind == TEXT2IMG:
        text.check_bert_config(checkpoint.part(COND_STAGE), original)


def _correct(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The first stage's attention under the original's names, and a line where it had others."""
    stage = select_part(tensors, FIRST_STAGE)
    renamed = first_stage.rename_attention(stage)
    marks = [f"tensor `{name}`: {what}" for name, what in MARKS.items() if name in tensors]
    if renamed.keys() == stage.keys() and all(renamed[name].dim() == stage[name].dim() for name in stage):
        return tensors, marks
    others = {name: value for name, value in tensors.items() if name.removeprefix(FIRST_STAGE) not in stage}
    corrected = others | {FIRST_STAGE + name: value for name, value in renamed.items()}
    return corrected, [*marks, "first stage's attention: diffusers' names -> the original's, which map one to one"]


def _convert_text_encoders(checkpoint: _OpenCheckpoint) -> dict[str, nn.Module]:
    return {
        name: convert(checkpoint.part(prefix), checkpoint.config)
        for name, (prefix, convert) in checkpoint.text_encoders.items()
    }


def _find_pooled_width(encoders: Mapping[str, nn.Module]) -> int | None:
    """Channels of the pooled text that one of them gives."""
    projections = [encoder.text_projection for encoder in encoders.values() if hasattr(encoder, "text_projection")]
    return next((int(projection.out_features) for projection in projections), None)  # type: ignore[arg-type, union-attr]


@contextmanager
def _explain_neighbour(path: Path, config: Path | None) -> Iterator[None]:
    """An error of a YAML that nobody gave says why it was read."""
    neighbour = find_config(path) if config is None else None
    try:
        yield
    except ModelError as exc:
        if neighbour is None or str(neighbour) not in str(exc):
            raise
        raise ModelError(
            f"{exc}. It was read because it lies next to the checkpoint and has its name; rename it if it is another "
            "file's, or give the right one with --config"
        ) from exc


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Errors name the file; a tensor that is not there, or not of the right dimensions, becomes a ModelError."""
    try:
        yield
    except ModelError as exc:
        if str(path) in str(exc):
            raise
        raise ModelError(f"{path}: {exc}") from exc
    except KeyError as exc:
        raise ModelError(f"{path}: the tensor {exc} is missing; it is truncated or of another layout") from exc
    except (IndexError, RuntimeError, TypeError, ZeroDivisionError) as exc:
        raise ModelError(f"{path}: its tensors do not have the shapes of an original checkpoint: {exc}") from exc
