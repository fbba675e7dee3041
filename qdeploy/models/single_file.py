"""One original checkpoint file as the parts of a model; its tokenizer is in a folder next to it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qdeploy.artifacts.components import name_tokenizer
from qdeploy.artifacts.file_kind import CALIBRATION, TABLE, read_file_kind
from qdeploy.base.errors import ModelError
from qdeploy.base.files import hash_file
from qdeploy.models.checkpoints import convert_checkpoint
from qdeploy.models.checkpoints.original_config import find_config
from qdeploy.models.latent_diffusion import ModelParts, TextParts
from qdeploy.models.options import ModelOptions
from qdeploy.models.pipelines import BERT, CLIP, load_tokenizer

TEXT = {"sd1": (CLIP,), "ldm-text2img": (BERT,)}  # kind of checkpoint -> its text encoders


def is_single_file(source: str) -> bool:
    """Whether ``source`` is a file; what it holds is read off its content."""
    return Path(source).is_file()


def parts_from_file(path: Path, options: ModelOptions) -> ModelParts:
    """Every part of the checkpoint at ``path``; ModelError says what is wrong, or which tokenizer file to put where."""
    refuse_own_files(path)
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
        checkpoint.corrections,
    )


def refuse_own_files(path: Path) -> None:
    """ModelError for what another command of qdeploy wrote."""
    uses = {TABLE: "a table of `qdeploy quantize`; export it", CALIBRATION: "a calibration set; quantize with --calib"}
    kind = read_file_kind(path)
    if kind in uses:
        raise ModelError(f"{path} is no model, it is {uses[kind]}, and give the model that it was made with here")


def hash_source(path: Path, options: ModelOptions) -> str:
    """Hash of the file and of what changes its weights: averaged or last ones, and the YAML, given or next to it."""
    if options.config is not None and not options.config.is_file():
        raise ModelError(f"--config: {options.config} is not a file; give the checkpoint's original YAML")
    config_file = find_config(path) if options.config is None else options.config
    config = "" if config_file is None else hash_file(config_file)
    return hashlib.sha256(f"{hash_file(path)} {options.ema} {config}".encode()).hexdigest()
