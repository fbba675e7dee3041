"""A small random model of a published architecture: the same classes and blocks with few channels, for trial runs."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from qdeploy.artifacts.components import TEXT_ENCODER, name_tokenizer
from qdeploy.models.architectures import Architecture, get_architecture, narrow
from qdeploy.models.builtin import find_builtin_folder
from qdeploy.models.checkpoints.first_stage import choose_first_stage_class
from qdeploy.models.checkpoints.heads import read_heads
from qdeploy.models.checkpoints.schedule import read_scheduler_config
from qdeploy.models.checkpoints.text import build_clip_config
from qdeploy.models.checkpoints.unet import build_unet
from qdeploy.models.latent_diffusion import LatentDiffusion, ModelParts, TextParts, assemble_model
from qdeploy.models.pipeline_specs import CLIP
from qdeploy.models.pipelines import load_tokenizer

TOKENIZER_MODEL = "emoji"  # the built-in model whose CLIP tokenizer a random model takes


def make_random_model(name: str, seed: int = 0) -> LatentDiffusion:
    """The narrowed architecture called ``name`` with seeded random weights; the caller's random state is kept."""
    full = get_architecture(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = make_parts(full)
    folder = find_builtin_folder(TOKENIZER_MODEL)
    return assemble_model(parts, source=f"random:{name}", folder=folder, sha256=hash_weights(parts))


def make_parts(full: Architecture) -> ModelParts:
    """Every part, narrowed, its weights drawn as each class draws them; a codebook as far apart as unit latents."""
    sizes = narrow(full)
    factor = sizes.first_stage.factor
    make, config = choose_first_stage_class(sizes.first_stage, sizes.side * factor, sizes.scaling_factor)
    vae: Any = make(**config)
    if sizes.first_stage.n_embed is not None:
        vae.quantize.embedding.weight.data.normal_()
    heads = read_heads(sizes.kind, full.unet.model_channels, sizes.unet.channel_mult, None)
    unet = build_unet(lambda unet_class, config: unet_class(**config), sizes.unet, heads, sizes.side)
    text = {}
    if sizes.unet.context_dim is not None:
        from transformers import CLIPTextModel

        tokenizer = load_tokenizer(find_builtin_folder(TOKENIZER_MODEL) / name_tokenizer(TEXT_ENCODER.name), CLIP)
        width = sizes.unet.context_dim
        clip = CLIPTextModel(build_clip_config(len(tokenizer), width, 4 * width, sizes.text_layers, positions=77))
        text[TEXT_ENCODER.name] = TextParts(clip, tokenizer)
    return ModelParts(unet, vae, text, make_scheduler_config(sizes), sizes.scaling_factor, sizes.side)


def make_scheduler_config(sizes: Architecture) -> dict[str, Any]:
    """The scheduler config that a checkpoint of the architecture is given, read off its betas."""
    first, last = sizes.betas
    betas = torch.linspace(first**0.5, last**0.5, 1000, dtype=torch.float64) ** 2
    return read_scheduler_config(sizes.kind, {"betas": betas.float()}, None)


def hash_weights(parts: ModelParts) -> str:
    """One hash over all weights, by name."""
    digest = hashlib.sha256()
    for module in (*(text.encoder for text in parts.text.values()), parts.unet, parts.vae):
        for name, value in module.state_dict().items():
            digest.update(f"{name} ".encode() + value.numpy().tobytes())
    return digest.hexdigest()
