"""One original checkpoint file as the parts of a model; its tokenizer is in a folder next to it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qdeploy.artifacts.components import name_tokenizer
from qdeploy.base.errors import ModelError
from qdeploy.base.files import hash_file
from qdeploy.models.checkpoints import SUFFIXES, convert_checkpoint
from qdeploy.models.latent_diffusion import ModelParts, TextParts
from qdeploy.models.options import ModelOptions
from qdeploy.models.pipelines import BERT, CLIP, load_tokenizer

TEXT = {"sd1": (CLIP,), "ldm-text2img": (BERT,)}  # kind of checkpoint -> its text encoders


def is_single_file(source: str) -> bool:
    """Whether ``source`` names a file with a checkpoint's suffix."""
    return Path(source).suffix in SUFFIXES and Path(source).is_file()


def parts_from_file(path: Path, options: ModelOptions) -> ModelParts:
    """Every part of the checkpoint at ``path``; ModelError says what is wrong, or which tokenizer file to put where."""
    checkpoint = convert_checkpoint(path, options.config, options.ema)
    specs = dict(zip(checkpoint.text_encoders, TEXT.get(checkpoint.kind, ()), strict=True))
    text = {
        name: TextParts(
            encoder, load_tokenizer(path.parent / name_tokenizer(name), specs[name], options.allow_download)
        )
        for name, encoder in checkpoint.text_encoders.items()
    }
    return ModelParts(
        checkpoint.unet,
        checkpoint.vae,
        text,
        checkpoint.scheduler_config,
        checkpoint.scaling_factor,
        checkpoint.sample_size,
    )


def hash_source(path: Path, options: ModelOptions) -> str:
    """Hash of the file and of the options that change its weights: averaged or last ones, and the YAML."""
    if options.config is not None and not options.config.is_file():
        raise ModelError(f"--config: {options.config} is not a file; give the checkpoint's original YAML")
    config = "" if options.config is None else hash_file(options.config)
    return hashlib.sha256(f"{hash_file(path)} {options.ema} {config}".encode()).hexdigest()
