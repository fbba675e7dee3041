"""Files of published sizes with random float16 weights, under the original's own names and shapes; written as a stream.

The names are those of the originals that the tests hold conversion against, built without weights.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qdeploy.base.files import stage_file, stage_folder
from qdeploy.models.source import find_model_folder
from tests.models.original_files import original_state
from tests.models.original_ldm import FULL, KL_F8, LatentDiffusion, TextSizes, tiny
from tests.models.original_sgm import XL_UNET, DiffusionEngine, list_state, make_tiny_xl

State = Mapping[str, Tensor]
TOKENS = 77
VOCABULARY = 49408
BLOCK = 2**22  # random numbers that are drawn; a weight repeats them, on which neither time nor memory depends
TYPES = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}


@dataclass(frozen=True)
class PublishedSize:
    """A published model: its state without weights, and that of a small one, whose buffers have the same values."""

    make_state: Callable[[], State]
    make_small: Callable[[], State]


def make_original(name: str) -> State:
    """The state of a CompVis model."""
    state: State = original_state(LatentDiffusion(FULL[name]))
    return state


def make_small_original(name: str) -> State:
    """The state of a narrow one."""
    state: State = original_state(LatentDiffusion(tiny(name)))
    return state


def make_xl(depths: tuple[int, ...]) -> State:
    """The state of Stable Diffusion XL, with as many transformer blocks at each level."""
    texts = (TextSizes("clip", 768, 12, VOCABULARY), TextSizes("open_clip", 1280, 32, VOCABULARY))
    engine = DiffusionEngine(replace(XL_UNET, transformer_depth=depths), KL_F8, texts, projected=1280)
    state: State = list_state(engine)
    return state


def make_small_xl() -> State:
    """The state of a narrow one."""
    state: State = list_state(make_tiny_xl())
    return state


MODELS = {
    "sd15": PublishedSize(partial(make_original, "sd-v1-4"), partial(make_small_original, "sd-v1-4")),
    "sd21": PublishedSize(partial(make_original, "sd-v2-1"), partial(make_small_original, "sd-v2-1")),
    "sdxl": PublishedSize(partial(make_xl, (0, 2, 10)), make_small_xl),
    "sdxl-shallow": PublishedSize(partial(make_xl, (0, 1, 1)), make_small_xl),  # to try the study with
}


def write_model(name: str, folder: Path) -> Path:
    """``folder`` with the file of the model ``name`` and a tokenizer; returns the file's path."""
    small = find_model_folder("builtin:emoji")  # for its tokenizer; the meaning of words does not matter
    with stage_folder(folder) as scratch:
        shutil.copytree(small / "tokenizer", scratch / "tokenizer")
        config = scratch / "tokenizer" / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": TOKENS}))
        write_file(name, scratch / "model.safetensors")
    return folder / "model.safetensors"


def write_file(name: str, path: Path) -> None:
    """The file of the model ``name``, one weight in memory at a time."""
    shapes = list_shapes(name)
    small = MODELS[name].make_small()
    buffers = {key: small[key].numpy() for key in shapes if is_buffer(key)}
    kinds = {key: buffers[key].dtype if key in buffers else np.dtype(np.float16) for key in shapes}
    with stage_file(path) as scratch, scratch.open("wb") as file:
        file.write(build_header(shapes, kinds))
        for key, shape in shapes.items():
            for part in [buffers[key]] if key in buffers else draw_weight(key, shape):
                file.write(np.ascontiguousarray(part).tobytes())


def list_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the model ``name``, without a weight in memory."""
    with torch.device("meta"):
        state = MODELS[name].make_state()
    return {key: tuple(value.shape) for key, value in state.items()}


def is_buffer(name: str) -> bool:
    """Whether a tensor is no weight: schedule and position indices."""
    return not name.startswith(("model.", "first_stage_model.", "cond_stage_model.", "conditioner.")) or name.endswith(
        "position_ids"
    )


def build_header(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, np.dtype]) -> bytes:
    """The header of safetensors: its length, and names with types, shapes and places."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * kinds[name].itemsize
        header[name] = {"dtype": TYPES[kinds[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def draw_weight(name: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.float16]]:
    """Random numbers that keep activations in range: norms around 1, biases around 0, weights by their inputs."""
    count = math.prod(shape)
    rng = np.random.default_rng(abs(hash_name(name)))
    drawn = rng.standard_normal(min(count, BLOCK), np.float32)
    if len(shape) < 2:
        drawn = 1 + 0.1 * drawn if name.endswith("weight") else 0.05 * drawn
    elif "embedding" in name:
        drawn *= 0.02
    else:
        drawn /= math.sqrt(math.prod(shape[1:]))
    block = drawn.astype(np.float16)
    for start in range(0, count, BLOCK):
        yield block[: min(BLOCK, count - start)]


def hash_name(name: str) -> int:
    """The same in every process."""
    return int.from_bytes(name.encode()[-8:], "little")
