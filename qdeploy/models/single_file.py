"""One original checkpoint file as the parts of a model; its tokenizer is in a folder next to it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qdeploy.artifacts.components import TEXT_ENCODER, name_tokenizer
from qdeploy.artifacts.file_kind import CALIBRATION, TABLE, read_file_kind
from qdeploy.base.errors import ModelError
from qdeploy.base.files import hash_file
from qdeploy.models.checkpoints import convert_checkpoint
from qdeploy.models.checkpoints.kinds import SDXL
from qdeploy.models.checkpoints.original_config import find_config
from qdeploy.models.latent_diffusion import ModelParts, TextParts
from qdeploy.models.options import ModelOptions
from qdeploy.models.pipeline_specs import BERT, CLIP, OPEN_CLIP, XL_FILE, TextEncoderSpec
from qdeploy.models.pipelines import load_tokenizer

TEXT = {
    "sd1": (CLIP,),
    "sd2": (OPEN_CLIP,),
    "sdxl": XL_FILE,
    "ldm-text2img": (BERT,),
}  # kind of checkpoint -> its text encoders


def is_single_file(source: str) -> bool:
    """Whether ``source`` is a file; what it holds is read off its content."""
    return Path(source).is_file()


def parts_from_file(path: Path, options: ModelOptions) -> ModelParts:
    """Every part of the checkpoint at ``path``; ModelError says what is wrong, or which tokenizer file to put where."""
    refuse_own_files(path)
    checkpoint = convert_checkpoint(path, options.config, options.ema)
    specs = dict(zip(checkpoint.text_encoders, TEXT.get(checkpoint.kind, ()), strict=True))
    text = {
        name: TextParts(encoder, find_tokenizer(path.parent, name, specs[name], options), specs[name].penultimate)
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
        zero_negative=checkpoint.kind == SDXL,  # no file says so; the folders of the published models do
        float32_vae=checkpoint.kind == SDXL,
    )


def find_tokenizer(folder: Path, text_encoder: str, spec: TextEncoderSpec, options: ModelOptions) -> Any:
    """The tokenizer in ``folder`` or below; a second text encoder's may be the first one's with its own padding."""
    own = folder / name_tokenizer(text_encoder)
    shared = folder / name_tokenizer(TEXT_ENCODER.name)
    return load_tokenizer(own if own.is_dir() else shared, spec, options.allow_download)


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
