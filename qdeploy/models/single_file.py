"""One original checkpoint file as the parts of a model; its tokenizer lies in a folder beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qdeploy.errors import ModelError
from qdeploy.files import sha256_of
from qdeploy.models.checkpoints import SUFFIXES, convert_checkpoint
from qdeploy.models.latent_diffusion import Parts
from qdeploy.models.options import ModelOptions
from qdeploy.models.pipelines import BERT, CLIP, TOKENIZER, load_tokenizer

TEXT = {"sd1": CLIP, "ldm-text2img": BERT}


def is_single_file(source: str) -> bool:
    """Whether ``source`` names a file with a checkpoint's suffix."""
    return Path(source).suffix in SUFFIXES and Path(source).is_file()


def parts_from_file(path: Path, options: ModelOptions) -> Parts:
    """Every part of the checkpoint at ``path``; ModelError says what is wrong, or which tokenizer file to put where."""
    found = convert_checkpoint(path, options.config, options.ema)
    text = TEXT.get(found.kind)
    return Parts(
        found.unet,
        found.vae,
        found.text_encoder,
        None if text is None else load_tokenizer(path.parent / TOKENIZER, text, options.allow_download),
        found.scheduler_config,
        found.scaling_factor,
        found.sample_size,
    )


def file_sha256(path: Path, options: ModelOptions) -> str:
    """Of the file, and of what else decides its weights' meaning: averaged or last ones, and the YAML."""
    if options.config is not None and not options.config.is_file():
        raise ModelError(f"--config: {options.config} is not a file; give the checkpoint's original YAML")
    config = "" if options.config is None else sha256_of(options.config)
    return hashlib.sha256(f"{sha256_of(path)} {options.ema} {config}".encode()).hexdigest()
