"""One checkpoint file as the modules of a pipeline, or as facts about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qdeploy.artifacts.components import TEXT_ENCODER
from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints import first_stage, text, unet
from qdeploy.models.checkpoints.file import read_checkpoint
from qdeploy.models.checkpoints.heads import read_heads
from qdeploy.models.checkpoints.kinds import (
    COND_STAGE,
    FIRST_STAGE,
    SD1,
    TEXT2IMG,
    UNCONDITIONAL,
    UNET,
    detect_kind,
    has_ema,
    select_part,
    swap_in_ema,
)
from qdeploy.models.checkpoints.original_config import OriginalConfig, read_config
from qdeploy.models.checkpoints.schedule import read_scaling_factor, read_scheduler_config

IMAGE_SIDE = {SD1: 512, UNCONDITIONAL: 256, TEXT2IMG: 256}  # of the published models
MISSING = {
    SD1: ("tokenizer: vocab.json and merges.txt of openai/clip-vit-large-patch14, in a folder `tokenizer`",),
    TEXT2IMG: ("tokenizer: vocab.txt of bert-base-uncased, in a folder `tokenizer`",),
    UNCONDITIONAL: (),
}


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint as float32 modules in eval mode, their weights mapped from the file where it holds float32.

    The file must stay as it is while they are in use.
    """

    kind: str  # sd1, ldm-uncond or ldm-text2img
    unet: nn.Module  # diffusers UNet2DConditionModel, or UNet2DModel when unconditional
    vae: nn.Module  # diffusers AutoencoderKL or VQModel
    text_encoders: Mapping[str, nn.Module]  # by component: transformers CLIPTextModel or diffusers LDMBertModel
    scheduler_config: Mapping[str, Any]
    scaling_factor: float
    sample_size: int  # latents' side
    missing: tuple[str, ...]  # what no checkpoint holds, and where to get it


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint holds, only by names and shapes."""

    kind: str
    parameters: Mapping[str, int]  # by component
    latents: tuple[int, int, int]  # channels, height, width
    image_side: int
    ema: bool  # averaged weights of the UNet besides the last ones
    missing: tuple[str, ...]


@dataclass(frozen=True)
class _OpenCheckpoint:
    """A file's tensors by part, and the sizes that all steps need."""

    kind: str
    tensors: Mapping[str, Tensor]
    config: OriginalConfig | None
    unet: unet.UNetLayout
    first_stage: first_stage.FirstStageLayout

    def part(self, prefix: str) -> dict[str, Tensor]:
        return select_part(self.tensors, prefix)

    @property
    def sample_size(self) -> int:
        size = None if self.config is None else self.config.number("image_size")
        return IMAGE_SIDE[self.kind] // self.first_stage.factor if size is None else int(size)

    @property
    def image_side(self) -> int:
        return self.sample_size * self.first_stage.factor


def convert_checkpoint(path: Path, config: Path | None = None, ema: bool = False) -> ConvertedCheckpoint:
    """The modules of an original CompVis checkpoint, exactly; nothing is fetched, nothing in the file is executed.

    ``config``: the original YAML, needed only where heads, betas or scale are not those of a published model.
    ``ema``: take the averaged UNet, which the original LDM sampling scripts use. ModelError says what is wrong.
    """
    with _name_file_in_errors(path):
        checkpoint = _open(path, config, ema)
        vq = checkpoint.first_stage.n_embed is not None
        scale = read_scaling_factor(checkpoint.kind, checkpoint.tensors, checkpoint.config, vq)
        heads = read_heads(checkpoint.kind, checkpoint.unet.channel_mult, checkpoint.config)
        return ConvertedCheckpoint(
            kind=checkpoint.kind,
            scheduler_config=read_scheduler_config(checkpoint.kind, checkpoint.tensors, checkpoint.config),
            unet=unet.convert_unet(checkpoint.part(UNET), checkpoint.unet, heads, checkpoint.sample_size),
            vae=first_stage.convert_first_stage(
                checkpoint.part(FIRST_STAGE), checkpoint.first_stage, checkpoint.image_side, scale
            ),
            text_encoders=_convert_text_encoders(checkpoint),
            scaling_factor=scale,
            sample_size=checkpoint.sample_size,
            missing=MISSING[checkpoint.kind],
        )


def describe_checkpoint(path: Path, config: Path | None = None) -> CheckpointFacts:
    """Kind, sizes and gaps of a checkpoint; no module is built and no weight read."""
    with _name_file_in_errors(path):
        checkpoint = _open(path, config, ema=False)
    parts = {TEXT_ENCODER.name: COND_STAGE, "unet": UNET, "vae": FIRST_STAGE}
    counts = {name: sum(t.numel() for t in checkpoint.part(prefix).values()) for name, prefix in parts.items()}
    return CheckpointFacts(
        kind=checkpoint.kind,
        parameters={name: count for name, count in counts.items() if count},
        latents=(checkpoint.first_stage.embed_dim, checkpoint.sample_size, checkpoint.sample_size),
        image_side=checkpoint.image_side,
        ema=has_ema(checkpoint.tensors),
        missing=MISSING[checkpoint.kind],
    )


def _open(path: Path, config: Path | None, ema: bool) -> _OpenCheckpoint:
    tensors = read_checkpoint(path)
    original = None if config is None else read_config(config)
    kind = detect_kind(tensors, original)
    tensors = swap_in_ema(tensors) if ema else tensors
    checkpoint = _OpenCheckpoint(
        kind,
        tensors,
        original,
        unet.read_layout(select_part(tensors, UNET)),
        first_stage.read_layout(select_part(tensors, FIRST_STAGE)),
    )
    if original is not None:
        unet.check_config(checkpoint.unet, original)
        first_stage.check_config(checkpoint.first_stage, original)
        if kind == TEXT2IMG:
            text.check_bert_config(checkpoint.part(COND_STAGE), original)
    return checkpoint


def _convert_text_encoders(checkpoint: _OpenCheckpoint) -> dict[str, nn.Module]:
    if checkpoint.kind == UNCONDITIONAL:
        return {}
    convert = text.convert_clip if checkpoint.kind == SD1 else text.convert_bert
    return {TEXT_ENCODER.name: convert(checkpoint.part(COND_STAGE))}


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
