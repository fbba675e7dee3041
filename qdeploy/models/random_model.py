"""A small random model of a published architecture: the same classes and blocks, few channels, to try things on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from qdeploy.models.architectures import Architecture, architecture_named, narrowed
from qdeploy.models.checkpoints.first_stage import first_stage_class
from qdeploy.models.checkpoints.heads import heads_of
from qdeploy.models.checkpoints.schedule import scheduler_config
from qdeploy.models.checkpoints.text import clip_config
from qdeploy.models.checkpoints.unet import build_unet
from qdeploy.models.latent_diffusion import LatentDiffusion, Parts, assemble
from qdeploy.models.pipelines import CLIP, TOKENIZER, load_tokenizer

TOKENIZER_OF = Path(__file__).parent / "builtin" / "emoji"  # a CLIP tokenizer that is always there


def random_model(name: str, seed: int = 0) -> LatentDiffusion:
    """The narrowed architecture called ``name`` with seeded random weights; the caller's random state is kept."""
    sizes = narrowed(architecture_named(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = parts_of(sizes)
    return assemble(parts, source=f"random:{name}", folder=TOKENIZER_OF, sha256=weights_sha256(parts))


def parts_of(sizes: Architecture) -> Parts:
    """Every part, its weights drawn as each class draws them; a codebook as far apart as unit-variance latents."""
    factor = sizes.first_stage.factor
    make, config = first_stage_class(sizes.first_stage, sizes.side * factor, sizes.scaling_factor)
    vae: Any = make(**config)
    if sizes.first_stage.n_embed is not None:
        vae.quantize.embedding.weight.data.normal_()
    heads = heads_of(sizes.kind, sizes.unet.channel_mult, None)
    unet = build_unet(lambda unet_class, config: unet_class(**config), sizes.unet, heads, sizes.side)
    text = tokenizer = None
    if sizes.unet.context_dim is not None:
        from transformers import CLIPTextModel

        tokenizer = load_tokenizer(TOKENIZER_OF / TOKENIZER, CLIP)
        width = sizes.unet.context_dim
        text = CLIPTextModel(clip_config(len(tokenizer), width, 4 * width, sizes.text_layers, positions=77))
    return Parts(unet, vae, text, tokenizer, schedule_of(sizes), sizes.scaling_factor, sizes.side)


def schedule_of(sizes: Architecture) -> dict[str, Any]:
    """The scheduler config that a checkpoint of the architecture is given, read off its betas."""
    first, last = sizes.betas
    betas = torch.linspace(first**0.5, last**0.5, 1000, dtype=torch.float64) ** 2
    return scheduler_config(sizes.kind, {"betas": betas.float()}, None)


def weights_sha256(parts: Parts) -> str:
    """One hash over all weights, by name."""
    digest = hashlib.sha256()
    for module in filter(None, (parts.text_encoder, parts.unet, parts.vae)):
        for name, value in module.state_dict().items():
            digest.update(f"{name} ".encode() + value.numpy().tobytes())
    return digest.hexdigest()
