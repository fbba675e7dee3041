"""The kinds of others' files: models as diffusers, CompVis and trainers of LoRAs save them, and pictures."""

from __future__ import annotations

import io
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from qdeploy.base.decode import decode_picture
from qdeploy.base.errors import ModelError
from qdeploy.base.pictures import open_picture_set
from qdeploy.models.options import LoraFile, ModelOptions
from qdeploy.models.source import load_model
from qdeploy.sampling import check_scheduler, make_scheduler
from qdeploy.sampling.config_file import read_scheduler_file
from tests.calibrate.record.test_raw_data import write_lmdb
from tests.hostile.cases import Case, Kind, mutate_file, mutate_json_file
from tests.hostile.mutate import Rules, mutate_bytes, mutate_document
from tests.models.original_files import original_state, write_ckpt, write_yaml
from tests.models.original_ldm import LatentDiffusion, tiny

THEIRS = Rules(is_open=True)  # keys that nothing of ours reads may say anything
SCHEDULER_RULES = Rules(
    ignored=frozenset({"clip_sample", "_diffusers_version"}),  # PNDM's never clips
    is_open_to_new=True,
    ranges={"beta_start": (0, 1), "beta_end": (0, 1), "num_train_timesteps": (1, 10_000)},
)
CONFIGS = {
    "model index": "model_index.json",
    "unet config": "unet/config.json",
    "vae config": "vae/config.json",
    "text encoder config": "text_encoder/config.json",
}
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FORMATS = ("PNG", "JPEG", "WEBP")


def read_scheduler(path: Path) -> object:
    config = read_scheduler_file(path, error=ModelError, remedy="")
    check_scheduler(config)
    return make_scheduler(config, 5).timesteps


def load(path: Path, **options: Any) -> object:
    return load_model(str(path), ModelOptions(**options))


def mutate_config(good: Path, name: str, rng: random.Random, folder: Path) -> Case:
    """A pipeline folder with one changed JSON file."""
    model = Path(shutil.copytree(good, folder / "model"))
    case = mutate_json_file(model / name, lambda _: load(model), THEIRS, rng, folder)
    (folder / Path(name).name).replace(model / name)
    return case


def mutate_yaml(good: Path, checkpoint: Path, rng: random.Random, folder: Path) -> Case:
    """An original YAML as JSON, which YAML reads, or with changed bytes."""
    path = folder / "config.yaml"
    if rng.random() < 0.3:
        data, what = mutate_bytes(good.read_bytes(), rng)
        path.write_bytes(data)
        return Case(what, False, partial(load, checkpoint, config=path))
    text, what, must_refuse = mutate_document(yaml.safe_load(good.read_text()), rng, THEIRS)
    path.write_text(text)
    return Case(what, must_refuse and "nan" not in what and "inf" not in what, partial(load, checkpoint, config=path))


def mutate_pickle(good: Path, config: Path, rng: random.Random, folder: Path) -> Case:
    """A checkpoint whose archive is whole and whose pickle is not."""
    path = folder / "model.ckpt"
    what = ""
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("/data.pkl"):
                data, what = mutate_bytes(data, rng)
            changed.writestr(name, data)
    return Case(what, False, partial(load, path, config=config))


def mutate_checkpoint(good: Path, config: Path, rng: random.Random, folder: Path) -> Case:
    return mutate_file(good, lambda path: load(path, config=config), rng, folder)


def mutate_lora_folder(good: Path, model: Path, rng: random.Random, folder: Path) -> Case:
    """A folder as PEFT saves it, with another adapter_config.json."""
    shutil.copytree(good, folder, dirs_exist_ok=True)
    read: Callable[[Path], object] = lambda path: load(model, loras=(LoraFile(path.parent),))  # noqa: E731
    return mutate_json_file(good / "adapter_config.json", read, THEIRS, rng, folder)


def cut_lmdb(good: Path, rng: random.Random, folder: Path) -> Case:
    """An lmdb that ends early: other bytes of it are its C library's, which trusts them."""
    data = (good / "data.mdb").read_bytes()
    size = rng.randrange(len(data))
    (folder / "data.mdb").write_bytes(data[:size])

    def read() -> object:
        pictures = open_picture_set(folder)
        return list(pictures.read_encoded(range(len(pictures))))

    return Case(f"cut at {size} of {len(data)}", True, read)


def mutate_picture(goods: Mapping[str, bytes], rng: random.Random, _: Path) -> Case:
    form = rng.choice(FORMATS)
    data, what = mutate_bytes(goods[form], rng)
    return Case(f"{form}: {what}", False, lambda: decode_picture(data, "the picture").load())


def write_goods(model: Path, work: Path) -> None:
    """A checkpoint with its YAML, a LoRA and its folder, an lmdb."""
    original = LatentDiffusion(tiny("lsun_churches256"))
    write_yaml(original.sizes, work / "config.yaml")
    write_ckpt(original_state(original, False), work / "model.ckpt")
    weight = load_model(str(model)).unet.inner.get_submodule(LAYER.removeprefix("unet.")).weight
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, weight.shape[1]),
               f"{LAYER}.lora_B.weight": torch.ones(weight.shape[0], 2)}  # fmt: skip
    save_file(tensors, work / "lora.safetensors", metadata={"format": "pt"})
    (work / "lora").mkdir()
    save_file({f"base_model.model.{key.removeprefix('unet.')}": value for key, value in tensors.items()},
              work / "lora" / "adapter_model.safetensors")  # fmt: skip
    (work / "lora" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": false, "rank_pattern": {}, "alpha_pattern": {}}'
    )
    write_lmdb(work / "lsun", {bytes([number]) * 20: encode(form) for number, form in enumerate(FORMATS)})


def encode(form: str) -> bytes:
    """A small picture with an orientation."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8))
    exif, buffer = picture.getexif(), io.BytesIO()
    exif[0x0112] = 6
    picture.save(buffer, format=form, exif=exif)
    return buffer.getvalue()


def build_outside_kinds(model: Path, work: Path) -> Mapping[str, Kind]:
    """Every kind, with good files made in ``work``."""
    write_goods(model, work)
    checkpoint, config, lora = work / "model.ckpt", work / "config.yaml", work / "lora.safetensors"
    for good in (lambda: load(checkpoint, config=config), lambda: load(model, loras=(LoraFile(lora),)),
                 lambda: load(model, loras=(LoraFile(work / "lora"),))):  # fmt: skip
        good()  # or nothing would be shown by refusing the others
    return {
        **{kind: partial(mutate_config, model, name) for kind, name in CONFIGS.items()},
        "scheduler config": partial(
            mutate_json_file, model / "scheduler" / "scheduler_config.json", read_scheduler, SCHEDULER_RULES
        ),
        "original yaml": partial(mutate_yaml, config, checkpoint),
        "checkpoint": partial(mutate_checkpoint, checkpoint, config),
        "checkpoint pickle": partial(mutate_pickle, checkpoint, config),
        "lora": partial(mutate_file, lora, lambda path: load(model, loras=(LoraFile(path),))),
        "lora folder": partial(mutate_lora_folder, work / "lora", model),
        "lmdb": partial(cut_lmdb, work / "lsun"),
        "picture": partial(mutate_picture, {form: encode(form) for form in FORMATS}),
    }
