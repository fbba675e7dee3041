"""Folders with one part of a model in the place of a model: what each is, and where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.base.errors import ModelError
from qdeploy.models.config_files import read_config

CONTROL = (
    "a ControlNet, whose picture of control is not fed and which is not supported; give the model that it controls"
)
ADAPTER = "a T2I-Adapter, whose picture of control is not fed and which is not supported; give the model that it is for"
# By the class in config.json, or the start of its name.
CLASSES = {
    "ControlNet": CONTROL,
    "MultiControlNet": CONTROL,
    "T2IAdapter": ADAPTER,
    "UNet2D": "a UNet; give the pipeline's folder, which it is a part of",
    "Autoencoder": "a VAE; give the pipeline's folder, and this one to --vae to take its place",
    "VQModel": "a VQ first stage; give the pipeline's folder, which it is a part of",
    "SD3": "the transformer of Stable Diffusion 3, which has no UNet and is not supported",
    "Flux": "the transformer of FLUX, which has no UNet and is not supported",
    "CLIP": "a text encoder; give the pipeline's folder, which it is a part of",
}
FILES = {
    "adapter_config.json": "a LoRA; give it to --lora, and the model that it is for",
    "pytorch_lora_weights*": "a LoRA; give it to --lora, and the model that it is for",
    "ip-adapter*": "an IP-Adapter, whose picture is not fed and which is not supported; give the model that it is for",
}


def refuse_part(folder: Path) -> None:
    """ModelError where ``folder``, which has no index of a pipeline, holds one part of a model."""
    config = folder / "config.json"
    name = read_class(read_config(config)) if config.is_file() else ""
    for start, what in CLASSES.items():
        if name.startswith(start):
            raise ModelError(f"{folder} is no model: its config.json is that of {what}")
    for pattern, what in FILES.items():
        if any(folder.glob(pattern)):
            raise ModelError(f"{folder} is no model: it holds {what}")


def read_class(settings: Mapping[str, Any]) -> str:
    """The class that diffusers or transformers saved; empty where the settings name none."""
    architectures = settings.get("architectures")
    name = settings.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else ""
    )
    return name if isinstance(name, str) else ""
