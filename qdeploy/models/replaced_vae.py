"""A VAE in a folder of its own (`--vae`) in place of the model's: a fine-tuned one, or TAESD, a tenth of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdeploy.base.errors import ModelError
from qdeploy.base.files import hash_file
from qdeploy.models.config_files import read_config
from qdeploy.models.latent_diffusion import ModelParts, count_latent_channels
from qdeploy.models.model_index import INDEX_FILE, ModelIndex
from qdeploy.models.module_configs import check_vae_config
from qdeploy.models.pipelines import load_diffusers_module
from qdeploy.models.weight_files import check_weight_files

CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def take_vae(parts: ModelParts, folder: Path | None) -> ModelParts:
    """``parts`` with the VAE in ``folder``, its scaling factor and its need of float32; ModelError unless it fits.

    A corrections' line says so, since nothing in the model's own files does.
    """
    if folder is None:
        return parts
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"--vae: {folder} holds no config.json; give a folder with a VAE of its own, such as the folder `vae` of a "
            "pipeline"
        )
    config = read_config(path)
    check_vae_config(path, config)
    check_weight_files(folder, (".",), "copy the file again")
    vae: Any = load_diffusers_module(folder, CLASSES, ModelIndex(folder / INDEX_FILE, {}))
    channels = count_latent_channels(parts.vae)
    if count_latent_channels(vae) != channels or _count_halvings(vae) != _count_halvings(parts.vae):
        raise ModelError(
            f"--vae: {folder} has latents of {count_latent_channels(vae)} channels at 1/{2 ** _count_halvings(vae)} of "
            f"the size, the model's own of {channels} at 1/{2 ** _count_halvings(parts.vae)}; give one for this model"
        )
    return replace(
        parts,
        vae=vae,
        scaling_factor=float(vae.config.scaling_factor),
        float32_vae=parts.float32_vae and bool(vae.config.force_upcast),
        corrections=(*parts.corrections, f"the VAE is the one in {folder.name} (--vae)"),
    )


def hash_vae(digest: str, folder: Path) -> str:
    """The model's hash with the other VAE: over both and the settings that change what it computes."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    hashes = " ".join(hash_file(path) for path in files)
    return hashlib.sha256(f"{digest} vae {hashes}\n".encode()).hexdigest()


def _count_halvings(vae: Any) -> int:
    return len(vae.config.block_out_channels) - 1
