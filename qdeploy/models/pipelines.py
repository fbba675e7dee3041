"""Folders of diffusers pipelines: the known classes, the names of their parts, and reading them.

Weights are read from safetensors only, never from pickles, and never from the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdeploy.artifacts.components import TEXT_ENCODER, name_component, name_tokenizer
from qdeploy.base.errors import ModelError, join_names
from qdeploy.base.files import read_json
from qdeploy.models.latent_diffusion import ModelParts, TextParts, is_vq

SCHEDULER = "scheduler"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class TextEncoderSpec:
    """A text encoder's folder and class; its tokenizer's class, files (or a tokenizer.json) and place on the hub."""

    folder: str
    encoder: str
    tokenizer: str
    vocabulary: tuple[str, ...]
    hub: str


@dataclass(frozen=True)
class PipelineSpec:
    """What a pipeline class is made of: folders and classes."""

    vae_folder: str
    vae: tuple[str, ...]
    unet: str
    text: tuple[TextEncoderSpec, ...] = ()

    @property
    def text_encoders(self) -> dict[str, TextEncoderSpec]:
        """By component name."""
        return {name_component(TEXT_ENCODER, number): text for number, text in enumerate(self.text)}

    @property
    def folders(self) -> tuple[str, ...]:
        """Every folder that the pipeline needs."""
        text = [folder for name, spec in self.text_encoders.items() for folder in (spec.folder, name_tokenizer(name))]
        return (*text, "unet", self.vae_folder, SCHEDULER)


CLIP = TextEncoderSpec(
    "text_encoder", "CLIPTextModel", "CLIPTokenizer", ("vocab.json", "merges.txt"), "openai/clip-vit-large-patch14"
)
BERT = TextEncoderSpec("bert", "LDMBertModel", "BertTokenizer", ("vocab.txt",), "google-bert/bert-base-uncased")
PIPELINES: Mapping[str, PipelineSpec] = {
    "StableDiffusionPipeline": PipelineSpec("vae", ("AutoencoderKL",), "UNet2DConditionModel", (CLIP,)),
    "StableDiffusionInpaintPipeline": PipelineSpec("vae", ("AutoencoderKL",), "UNet2DConditionModel", (CLIP,)),
    "LDMTextToImagePipeline": PipelineSpec("vqvae", ("AutoencoderKL", "VQModel"), "UNet2DConditionModel", (BERT,)),
    "LDMPipeline": PipelineSpec("vqvae", ("AutoencoderKL", "VQModel"), "UNet2DModel"),
}


def read_pipeline_spec(folder: Path) -> PipelineSpec:
    """The pipeline class of ``model_index.json``; ModelError for an unknown one or when a part's folder is missing."""
    name = read_json(folder / "model_index.json")["_class_name"]
    if name not in PIPELINES:
        raise ModelError(f"{folder} is a {name}; this version takes folders of {', '.join(PIPELINES)}")
    missing = [part for part in PIPELINES[name].folders if not (folder / part).is_dir()]
    if missing:
        raise ModelError(f"{folder} is incomplete: no folder {', '.join(missing)}; copy the whole pipeline folder")
    return PIPELINES[name]


def parts_from_folder(folder: Path, allow_download: bool = False) -> ModelParts:
    """Read every part of the pipeline; ModelError says which one is missing or broken."""
    spec = read_pipeline_spec(folder)
    unet: Any = load_diffusers_module(folder / "unet", (spec.unet,))
    vae = load_diffusers_module(folder / spec.vae_folder, spec.vae)
    text = {
        name: TextParts(
            load_text_encoder(folder / text_spec.folder, text_spec),
            load_tokenizer(folder / name_tokenizer(name), text_spec, allow_download),
        )
        for name, text_spec in spec.text_encoders.items()
    }
    return ModelParts(
        unet,
        vae,
        text,
        scheduler_config=read_json(folder / SCHEDULER / "scheduler_config.json"),
        scaling_factor=read_scaling_factor(vae, read_json(folder / spec.vae_folder / "config.json")),
        sample_size=unet.config.sample_size,
    )


def load_diffusers_module(folder: Path, classes: tuple[str, ...]) -> nn.Module:
    """The module whose class, one of ``classes``, the folder's ``config.json`` names."""
    import diffusers

    module: nn.Module
    name = read_json(folder / "config.json").get("_class_name")
    if name not in classes:
        raise ModelError(f"{folder} holds a {name}, expected {' or '.join(classes)}")
    module, info = getattr(diffusers, name).from_pretrained(
        folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
    )
    check_complete(folder, info)
    return module


def load_text_encoder(folder: Path, spec: TextEncoderSpec) -> nn.Module:
    """The text encoder in ``folder``."""
    module: nn.Module
    import transformers
    from diffusers.pipelines import latent_diffusion
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading shows one of its own on every call
    library: Any = transformers if hasattr(transformers, spec.encoder) else latent_diffusion
    module, info = getattr(library, spec.encoder).from_pretrained(
        folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    check_complete(folder, info)
    return module


def check_complete(folder: Path, info: Mapping[str, Any]) -> None:
    """ModelError when the weights lack tensors, which the libraries would fill with noise."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {folder} lack {join_names(missing)}; "
            "copy them again, or mend config.json if it is another model's"
        )


def load_tokenizer(folder: Path, spec: TextEncoderSpec, allow_download: bool = False) -> Any:
    """The tokenizer in ``folder``; ModelError says which file to put there (transformers would load an empty one)."""
    import transformers

    tokenizer_class = getattr(transformers, spec.tokenizer)
    missing = [name for name in spec.vocabulary if not (folder / name).is_file()]
    if not missing or (folder / TOKENIZER_FILE).is_file():
        return tokenizer_class.from_pretrained(folder, local_files_only=True)
    if not allow_download:
        raise ModelError(
            f"{folder} holds no tokenizer: put {' and '.join(spec.vocabulary)} (or {TOKENIZER_FILE}) of {spec.hub} "
            "there, or let --allow-download fetch it"
        )
    try:
        return tokenizer_class.from_pretrained(spec.hub)
    except OSError as exc:
        raise ModelError(f"the tokenizer {spec.hub} cannot be fetched: {exc}") from exc


def read_scaling_factor(vae: Any, config: Mapping[str, Any]) -> float:
    """What ``config.json`` says; where it is silent, 1 for a VQ model and the class's own for a KL one.

    CompVis' VQ models were trained on unscaled latents and their published folders say nothing, which
    diffusers since 0.22 takes for 0.18215, Stable Diffusion's (huggingface/diffusers issue 6725).
    """
    if "scaling_factor" not in config and is_vq(vae):
        return 1.0
    return float(vae.config.scaling_factor)
