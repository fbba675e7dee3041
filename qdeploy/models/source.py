"""Finding and loading a model: a diffusers folder or ``builtin:NAME``."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qdeploy.errors import ModelError
from qdeploy.files import sha256_of
from qdeploy.models.latent_diffusion import LatentDiffusion, assemble
from qdeploy.models.lora import fuse_lora
from qdeploy.models.options import ModelOptions
from qdeploy.models.pipelines import kind_of, parts_from_folder

__all__ = ["BUILTIN", "LatentDiffusion", "builtin_names", "load_model", "model_folder", "prepared", "weights_sha256"]

BUILTIN = Path(__file__).parent / "builtin"


def builtin_names() -> list[str]:
    return sorted(path.name for path in BUILTIN.iterdir() if (path / "model_index.json").is_file())


def model_folder(source: str) -> Path:
    """The folder that ``source`` (a path or ``builtin:NAME``) stands for, checked to be whole."""
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in builtin_names():
            raise ModelError(f"no built-in model {name!r}; there are: {', '.join(builtin_names())}")
        return BUILTIN / name
    folder = Path(source)
    if not folder.exists():
        raise ModelError(
            f"{source} does not exist; give a diffusers folder or builtin:NAME ({', '.join(builtin_names())})"
        )
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{source} is not a diffusers pipeline folder: no model_index.json in it")
    kind_of(folder)
    return folder


def load_model(source: str, options: ModelOptions | None = None) -> LatentDiffusion:
    """Load the diffusers folder or built-in model ``source``; ModelError says what is missing or broken."""
    options = ModelOptions() if options is None else options
    try:
        folder = model_folder(source)
        parts = parts_from_folder(folder)
    except ModelError:
        raise
    except Exception as exc:  # diffusers, transformers and safetensors each have their own trees
        raise ModelError(f"{source} cannot be loaded, part of it is missing or broken: {exc}") from exc
    return prepared(assemble(parts, source=source, folder=folder, sha256=weights_sha256(folder)), options)


def prepared(model: LatentDiffusion, options: ModelOptions) -> LatentDiffusion:
    """``model`` as ``options`` ask for it, wherever it was loaded from."""
    for lora in options.loras:
        model = fuse_lora(model, lora.path, lora.scale)
    return model


def weights_sha256(folder: Path) -> str:
    """One hash over every weight file of the folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
