"""Files in the original layout, written from its modules: the state as published, the checkpoint and its YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tests.models.original_ldm import TOKENS, LatentDiffusion, Sizes, TextSizes


def original_state(model: LatentDiffusion, ema: bool = False) -> dict[str, Tensor]:
    """The state dict as published: CLIP's as transformers 4 named it, with LitEma's averaged copy on demand."""
    state = dict(model.state_dict())
    old = "cond_stage_model.transformer."
    if model.sizes.text is not None and model.sizes.text.kind == "clip":
        state = {name.replace(old, f"{old}text_model."): value for name, value in state.items()}
        state[f"{old}text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    if ema:
        torch.manual_seed(99)
        averaged = {
            "model_ema." + name.replace(".", ""): value + 0.05 * value.std(correction=0) * torch.randn_like(value)
            for name, value in model.model.named_parameters()
        }
        state |= averaged | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return state


def write_ckpt(state: dict[str, Tensor], path: Path, **more: Any) -> Path:
    """As Lightning 1.4 saved it, without its callbacks (they need its classes)."""
    outer = {"epoch": 3, "global_step": 5, "pytorch-lightning_version": "1.4.2", "state_dict": state}
    torch.save(outer | more, path)
    return path


def write_yaml(sizes: Sizes, path: Path) -> Path:
    """The sizes in the layout of the published YAML files."""
    unet = {name: value for name, value in vars(sizes.unet).items() if value not in (-1, None, False)}
    stage = vars(sizes.first_stage)
    ddconfig = {name: value for name, value in stage.items() if name not in ("embed_dim", "n_embed")}
    codebook = {} if sizes.first_stage.n_embed is None else {"n_embed": sizes.first_stage.n_embed}
    params = {
        "linear_start": sizes.linear_start,
        "linear_end": sizes.linear_end,
        "timesteps": 1000,
        "image_size": sizes.image_size,
        **({} if sizes.parameterization is None else {"parameterization": sizes.parameterization}),
        **({"scale_by_std": True} if sizes.scale_by_std else {"scale_factor": sizes.scale_factor}),
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"params": {"embed_dim": sizes.first_stage.embed_dim, **codebook, "ddconfig": ddconfig}},
        "cond_stage_config": _cond_stage(sizes.text),
    }
    lists = _with_lists({"model": {"base_learning_rate": 2.0e-06, "params": params}})
    path.write_text(yaml.safe_dump(lists), encoding="utf-8")
    return path


def _cond_stage(text: TextSizes | None) -> Any:
    if text is None:
        return "__is_unconditional__"
    name, params = {
        "bert": ("BERTEmbedder", {"n_embed": text.width, "n_layer": text.layers}),
        "clip": ("FrozenCLIPEmbedder", {}),
        "open_clip": ("FrozenOpenCLIPEmbedder", {"freeze": True, "layer": "penultimate"}),
    }[text.kind]
    return {"target": f"ldm.modules.encoders.modules.{name}", "params": params}


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_lists(inner) for name, inner in value.items()}
    return [_with_lists(inner) for inner in value] if isinstance(value, tuple) else value


def edit_yaml(file: Path, section: str, **values: Any) -> Path:
    """Change ``model.params`` or, below it, ``section``; a value of None is written as null."""
    path = file.with_suffix(".yaml")
    document = yaml.safe_load(path.read_text())
    target = document["model"]["params"]
    for name in filter(None, section.split(".")):
        target = target.setdefault(name, {})
    target.update(values)
    path.write_text(yaml.safe_dump(document))
    return path
