"""Reading folders of diffusers pipelines; what each class is made of is in ``pipeline_specs.py``.

Weights are read from safetensors only, never from pickles, and never from the network.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qdeploy.artifacts.components import name_tokenizer
from qdeploy.base.errors import ModelError, UsageError, join_names
from qdeploy.models.config_files import check_regular, read_config, read_scheduler_config
from qdeploy.models.corrections import correct_sample_size, correct_scheduler
from qdeploy.models.folder_notes import MODULE_STEM, TEXT_STEM, is_unused_text_weight, list_notes
from qdeploy.models.half_weights import choose_type, keep_half
from qdeploy.models.latent_diffusion import ModelParts, TextParts, is_vq
from qdeploy.models.model_index import ModelIndex, read_model_index
from qdeploy.models.module_configs import (
    check_text_config,
    check_unet_config,
    check_vae_config,
    read_sample_size,
)
from qdeploy.models.pipeline_specs import PIPELINES, REFUSED, SCHEDULER, XL, PipelineSpec, TextEncoderSpec
from qdeploy.models.weight_files import check_weight_files, choose_variant, count_weights, list_weight_files

TOKENIZER_FILE = "tokenizer.json"


def read_pipeline_class(folder: Path) -> str:
    """The pipeline class of ``model_index.json``; ModelError for an unknown one."""
    name = read_model_index(folder).pipeline
    if not isinstance(name, str) or name not in PIPELINES:
        what = next((text for start, text in REFUSED.items() if str(name).startswith(start)), None)
        reason = "" if what is None else f": {what}, which is not supported"
        known = ", ".join(PIPELINES)
        raise ModelError(f"{folder} is a {name!r:.60}{reason}; this version takes folders of {known}")
    return name


def read_pipeline_spec(folder: Path) -> PipelineSpec:
    """What the folder's pipeline is made of; ModelError for an unknown one or when a part's folder is missing."""
    spec, index = PIPELINES[read_pipeline_class(folder)], read_model_index(folder).entries
    if spec is XL and (index.get("requires_aesthetics_score") or index.get("text_encoder") == [None, None]):
        raise ModelError(
            f"{folder} is the refiner of Stable Diffusion XL, which is not supported: it goes on from latents of the "
            "base model; give the base model"
        )
    missing = [part for part in spec.folders if not (folder / part).is_dir()]
    if missing:
        raise ModelError(f"{folder} is incomplete: no folder {', '.join(missing)}; copy the whole pipeline folder")
    return spec


def parts_from_folder(
    folder: Path, allow_download: bool = False, remedy: str = "copy the whole pipeline folder again"
) -> ModelParts:
    """Read every part of the pipeline, settings first; ModelError says which one is missing or broken."""
    spec, index = read_pipeline_spec(folder), read_model_index(folder)
    scheduler, unet_size, corrections = check_configs(folder, spec, index)
    check_weight_files(folder, spec.folders, remedy)
    unet = load_diffusers_module(folder / "unet", (spec.unet,), index)
    vae = load_diffusers_module(folder / spec.vae_folder, spec.vae, index)
    text = {
        name: TextParts(
            load_text_encoder(folder / text_spec.folder, text_spec),
            load_tokenizer(folder / name_tokenizer(name), text_spec, allow_download),
            text_spec.penultimate,
        )
        for name, text_spec in spec.text_encoders.items()
    }
    parts = ModelParts(
        unet,
        vae,
        text,
        scheduler_config=scheduler,
        scaling_factor=read_scaling_factor(vae, read_config(folder / spec.vae_folder / "config.json")),
        sample_size=unet_size,
        zero_negative=spec is XL and index.entries.get("force_zeros_for_empty_prompt", True) is True,
        float32_vae=spec is XL and bool(vae.config.force_upcast),  # type: ignore[union-attr]
    )
    notes = list_notes(folder, spec.vae_folder, [text_spec.folder for text_spec in spec.text], parts)
    return replace(parts, corrections=(*corrections, *index.list_left_out(spec.folders), *notes))


def check_configs(
    folder: Path, spec: PipelineSpec, index: ModelIndex
) -> tuple[dict[str, Any], int | tuple[int, int], tuple[str, ...]]:
    """The scheduler's settings and the latents' size as the pipeline uses them, and what it corrects in the files."""
    index.check_parts(spec.classes)
    scheduler_class, pipeline = index.read_class(SCHEDULER, "PNDMScheduler"), str(index.pipeline)
    unet_path, scheduler_path = folder / "unet" / "config.json", folder / SCHEDULER / "scheduler_config.json"
    unet_config = read_config(unet_path)
    check_unet_config(unet_path, unet_config)
    vae_path = folder / spec.vae_folder / "config.json"
    check_vae_config(vae_path, read_config(vae_path))
    for text in spec.text_encoders.values():
        text_path = folder / text.folder / "config.json"
        check_text_config(text_path, read_config(text_path))
    size, size_corrections = correct_sample_size(unet_config, pipeline)
    try:
        scheduler, corrections = correct_scheduler(read_scheduler_config(scheduler_path), pipeline, scheduler_class)
    except UsageError as exc:
        raise ModelError(f"{scheduler_path}: {exc}") from exc
    return scheduler, read_sample_size(unet_path, size), tuple(map(str, (*corrections, *size_corrections)))


def load_diffusers_module(folder: Path, classes: tuple[str, ...], index: ModelIndex) -> nn.Module:
    """The module whose class, one of ``classes``, the folder's ``config.json`` and the ``index`` name."""
    import diffusers

    module: nn.Module
    name = choose_class(folder, classes, index)
    module, info = load_weights(getattr(diffusers, name), folder, MODULE_STEM, "torch_dtype")
    check_complete(folder, info)
    return module


def load_weights(module_class: Any, folder: Path, stem: str, type_option: str) -> tuple[Any, Mapping[str, Any]]:
    """The module in ``folder`` and what its library says of loading it; ModelError for weights that do not fit.

    stem: of the weight files. type_option: the library's own name for the weights' type.
    """
    variant = choose_variant(folder, stem)
    chosen = {type_option: choose_type(count_weights(list_weight_files(folder, stem)))}
    try:
        module, info = module_class.from_pretrained(
            folder, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True, **chosen
        )
        return keep_half(module), info
    except (RuntimeError, ValueError) as exc:
        if "ignore_mismatched_sizes" not in str(exc):  # what the libraries advise: to start those weights at random
            raise
        shape = r"torch\.Size\((.+?)\)"
        named = re.search(rf"because (\S+) expected shape {shape}, but got {shape}", str(exc))  # diffusers names one
        example = f" ({named[1]}: {named[3]}, not {named[2]})" if named else ""
        raise ModelError(
            f"the weights in {folder} have other shapes than its config.json says{example}; get the config.json that "
            "was saved with them"
        ) from exc


def choose_class(folder: Path, classes: tuple[str, ...], index: ModelIndex) -> str:
    """The class that ``config.json`` names, or the index where it is silent; ModelError where they disagree."""
    indexed = index.read_class(folder.name, classes[0])
    name = read_config(folder / "config.json").get("_class_name", indexed)
    if name not in classes:
        raise ModelError(f"{folder} holds a {reprlib.repr(name)}, expected {' or '.join(classes)}")
    if indexed not in (None, name):
        raise ModelError(
            f"{folder} holds a {name}, {index.path} says {indexed}; correct the one that is wrong, or copy the whole "
            "pipeline folder again"
        )
    return str(name)


def load_text_encoder(folder: Path, spec: TextEncoderSpec) -> nn.Module:
    """The text encoder in ``folder``."""
    module: nn.Module
    import transformers
    from diffusers.pipelines import latent_diffusion
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading shows one of its own on every call
    library: Any = transformers if hasattr(transformers, spec.encoder) else latent_diffusion
    module, info = load_weights(getattr(library, spec.encoder), folder, TEXT_STEM, "dtype")
    layers = getattr(module.config, "num_hidden_layers", None)
    check_complete(folder, info, lambda name: is_unused_text_weight(name, layers))
    return module


def check_complete(
    folder: Path, info: Mapping[str, Any], is_harmless: Callable[[str], bool] = lambda name: False
) -> None:
    """ModelError when the weights lack tensors, which the libraries would fill with noise, or hold more.

    What is left over is part of a module that the config does not ask for; the libraries leave it out with a warning.
    is_harmless: whether a name may be left over.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {folder} lack {join_names(missing)}; "
            "copy them again, or mend config.json if it is another model's"
        )
    surplus = sorted(name for name in info["unexpected_keys"] if not is_harmless(name))
    if surplus:
        raise ModelError(
            f"the weights in {folder} hold {join_names(surplus)}, which the module of config.json has no place for, so "
            "that pictures would lack what they do; get the config.json that was saved with them, or save the weights "
            "without them"
        )


def load_tokenizer(folder: Path, spec: TextEncoderSpec, allow_download: bool = False) -> Any:
    """The tokenizer in ``folder``; ModelError says which file to put there (transformers would load an empty one)."""
    import transformers

    tokenizer_class = getattr(transformers, spec.tokenizer)
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            check_regular(path)
    missing = [name for name in spec.vocabulary if not (folder / name).is_file()]
    pad = {} if spec.pad is None else {"pad_token": spec.pad}
    if not missing or (folder / TOKENIZER_FILE).is_file():
        return tokenizer_class.from_pretrained(folder, local_files_only=True, **pad)
    if not allow_download:
        raise ModelError(
            f"{folder} holds no tokenizer: put {' and '.join(spec.vocabulary)} (or {TOKENIZER_FILE}) of {spec.hub} "
            "there, or let --allow-download fetch it"
        )
    try:
        return tokenizer_class.from_pretrained(spec.hub, **pad)
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
