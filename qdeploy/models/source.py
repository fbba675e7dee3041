"""Find and load a model: a diffusers folder, an original checkpoint file or ``builtin:NAME``."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qdeploy.base.errors import ModelError, UsageError
from qdeploy.base.files import hash_file
from qdeploy.models.builtin import PREFIX, REINSTALL, describe_builtins, find_builtin_folder, list_builtins
from qdeploy.models.checkpoints import SUFFIXES
from qdeploy.models.config_files import check_regular
from qdeploy.models.latent_diffusion import LatentDiffusion, assemble_model
from qdeploy.models.lora import fuse_lora
from qdeploy.models.options import ModelOptions
from qdeploy.models.pipelines import parts_from_folder, read_pipeline_spec
from qdeploy.models.replaced_vae import hash_vae, take_vae
from qdeploy.models.single_file import hash_source, is_single_file, parts_from_file
from qdeploy.models.single_parts import refuse_part

__all__ = [
    "LatentDiffusion",
    "apply_options",
    "find_model_folder",
    "hash_model",
    "hash_weights",
    "list_builtins",
    "load_model",
]


def find_model_folder(source: str) -> Path:
    """The folder that ``source`` (a path or ``builtin:NAME``) refers to, checked to be complete."""
    if source.startswith(PREFIX):
        return find_builtin_folder(source.removeprefix(PREFIX))
    folder = Path(source)
    if not folder.exists():
        raise ModelError(
            f"{source} does not exist; give a diffusers folder, a checkpoint file ({', '.join(SUFFIXES)}) or "
            f"{describe_builtins()}"
        )
    if not folder.is_dir():
        check_regular(folder)
    if not (folder / "model_index.json").exists():
        refuse_part(folder)
        raise ModelError(f"{source} is not a diffusers pipeline folder: no model_index.json in it")
    read_pipeline_spec(folder)
    return folder


def load_model(source: str, options: ModelOptions | None = None) -> LatentDiffusion:
    """Load the diffusers folder, checkpoint file or built-in model; ModelError says what is missing or broken."""
    options = ModelOptions() if options is None else options
    if is_single_file(source):
        path = Path(source)
        parts = take_vae(parts_from_file(path, options), options.vae)
        model = assemble_model(parts, source=source, folder=path.parent, sha256=hash_model(source, options))
    else:
        model = load_folder(source, options)
    return apply_options(model, options)


def load_folder(source: str, options: ModelOptions) -> LatentDiffusion:
    """The model in a diffusers folder or a built-in one."""
    if options.ema or options.config is not None:
        raise UsageError(f"--ema and --config are for checkpoint files; {source} is a folder or a built-in model")
    try:
        folder = find_model_folder(source)
        remedy = REINSTALL if source.startswith(PREFIX) else "copy the file again"
        parts = take_vae(parts_from_folder(folder, options.allow_download, remedy), options.vae)
    except ModelError:
        raise
    except Exception as exc:  # diffusers, transformers and safetensors each have their own trees
        reason = " ".join(str(exc).split())[:500]
        raise ModelError(f"{source} cannot be loaded, part of it is missing or broken: {reason}") from exc
    return assemble_model(parts, source=source, folder=folder, sha256=hash_model(source, options))


def apply_options(model: LatentDiffusion, options: ModelOptions) -> LatentDiffusion:
    """``model`` as ``options`` ask for it, wherever it was loaded from."""
    for lora in options.loras:
        model = fuse_lora(model, lora.path, lora.scale)
    return model


def hash_model(source: str, options: ModelOptions) -> str:
    """The hash that the model at ``source`` has once it is loaded, without LoRA files; nothing is loaded for it."""
    is_file = is_single_file(source)
    digest = hash_source(Path(source), options) if is_file else hash_weights(find_model_folder(source))
    return digest if options.vae is None else hash_vae(digest, options.vae)


def hash_weights(folder: Path) -> str:
    """One hash over every weight file of the folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        check_regular(path)
        digest.update(f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n".encode())
    return digest.hexdigest()
