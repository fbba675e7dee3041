"""A calibration set's file: one safetensors file, checked before anything takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdeploy.artifacts.components import MAX_PER_KIND, SIZES, TEXT_ENCODER, name_component
from qdeploy.base.documents import parse_json
from qdeploy.base.errors import CalibrationError, join_names
from qdeploy.base.files import stage_file
from qdeploy.calibrate.dataset import CalibrationSet, find_not_finite, name_ids

SCHEMA_VERSION = 1
MAX_TIMESTEP = 2**20  # schedulers are trained on 1000
REMEDY = "make it again with `qdeploy calibrate`"
TEXT_ENCODERS = [name_component(TEXT_ENCODER, number) for number in range(MAX_PER_KIND)]
# name: (dtype, dimensions); a file without the optional ones is one of fewer components.
REQUIRED = {"sample": (torch.float16, 4), "timestep": (torch.int64, 1)}
OPTIONAL = {
    "prompt": (torch.int64, 1),
    "contexts": (torch.float16, 3),
    "latents": (torch.float16, 4),
    "pooled": (torch.float16, 2),
    "sizes": (torch.float32, 2),
    "guidance": (torch.float16, 2),
    "guided": (torch.bool, 1),
}
INPUT_IDS = (torch.int64, 2)  # of each text encoder: `input_ids`, `input_ids_2`


def save_calibration(calibration: CalibrationSet, path: Path) -> None:
    """Write the set to ``path``, atomically."""
    from safetensors.torch import save_file

    document = {"schema_version": SCHEMA_VERSION, "provenance": dict(calibration.provenance)}
    header = json.dumps(document | ({} if calibration.is_guided else {"is_guided": False}))
    fields = {name: getattr(calibration, name) for name in (*REQUIRED, *OPTIONAL)}
    fields |= {name_ids(encoder): ids for encoder, ids in calibration.input_ids.items()}
    tensors = {name: tensor.contiguous() for name, tensor in fields.items() if tensor is not None}
    with stage_file(path, sum(tensor.nbytes for tensor in tensors.values())) as scratch:
        save_file(tensors, scratch, metadata={"qdeploy_calibration": header})


def load_calibration(path: Path) -> CalibrationSet:
    """Read a set; CalibrationError when the file is not one or is truncated."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = _parse_header((file.metadata() or {})["qdeploy_calibration"], path)
            held = set(file.keys())
            unknown = sorted(held - {*REQUIRED, *OPTIONAL, *map(name_ids, TEXT_ENCODERS)})
            if unknown:
                raise ValueError(f"it holds tensors that no set has: {join_names(unknown)}")
            calibration = CalibrationSet(
                **{name: file.get_tensor(name) for name in (*REQUIRED, *(held & OPTIONAL.keys()))},
                input_ids={
                    encoder: file.get_tensor(name_ids(encoder))
                    for encoder in TEXT_ENCODERS
                    if name_ids(encoder) in held
                },
                provenance=header.provenance,
                is_guided=header.is_guided,
            )
        _check_tensors(calibration)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as exc:
        raise CalibrationError(f"{path} is not a readable calibration set ({exc}); {REMEDY}") from exc
    return calibration


@dataclass(frozen=True)
class CalibrationHeader:
    """The JSON document in the file's header."""

    schema_version: int
    provenance: Mapping[str, Any]
    is_guided: bool = True


def _parse_header(text: str, path: Path) -> CalibrationHeader:
    header = parse_json(text.encode(), str(path), CalibrationHeader, error=CalibrationError, remedy=REMEDY)
    if header.schema_version != SCHEMA_VERSION:
        raise CalibrationError(
            f"{path} has calibration schema {header.schema_version}, this qdeploy reads {SCHEMA_VERSION}"
        )
    return header


def _check_tensors(calibration: CalibrationSet) -> None:
    """ValueError unless the tensors have their types and agree with one another."""
    tensors = {name: (getattr(calibration, name), form) for name, form in {**REQUIRED, **OPTIONAL}.items()}
    tensors |= {name_ids(encoder): (ids, INPUT_IDS) for encoder, ids in calibration.input_ids.items()}
    for name, (tensor, (dtype, dimensions)) in tensors.items():
        if tensor is not None and (tensor.dtype, tensor.dim()) != (dtype, dimensions):
            raise ValueError(
                f"`{name}` is {tensor.dtype}{list(tensor.shape)}, expected {dtype} of {dimensions} dimensions"
            )
    samples, contexts, prompt = len(calibration.sample), calibration.contexts, calibration.prompt
    if samples == 0 or len(calibration.timestep) != samples:
        raise ValueError(f"{samples} samples but {len(calibration.timestep)} timesteps")
    if calibration.timestep.min() < 0 or calibration.timestep.max() >= MAX_TIMESTEP:
        low, high = int(calibration.timestep.min()), int(calibration.timestep.max())
        raise ValueError(f"`timestep` holds {low if low < 0 else high}, expected 0 to {MAX_TIMESTEP - 1}")
    for encoder, ids in calibration.input_ids.items():
        if ids.numel() and ids.min() < 0:
            raise ValueError(f"`{name_ids(encoder)}` holds {int(ids.min())}, expected tokens from 0 up")
    broken = find_not_finite(calibration)
    if broken is not None:
        raise ValueError(f"`{broken}` holds NaN or infinity")
    _check_added(calibration)
    if contexts is None or prompt is None:
        if contexts is not None or prompt is not None or calibration.input_ids:
            raise ValueError("`prompt`, `contexts` and `input_ids` go together")
        return
    if len(prompt) != samples or len(contexts) == 0 or prompt.min() < 0 or prompt.max() >= len(contexts):
        raise ValueError(f"`prompt` does not name one of the {len(contexts)} contexts for each of {samples} samples")
    for ids in calibration.input_ids.values():
        if len(ids) != len(contexts):
            raise ValueError(f"{len(ids)} rows of tokens but {len(contexts)} contexts")


def _check_added(calibration: CalibrationSet) -> None:
    """ValueError unless pooled text and sizes are both there, or neither, one for each context and sample."""
    if calibration.guidance is not None and len(calibration.guidance) != len(calibration.sample):
        raise ValueError(f"`guidance` has {len(calibration.guidance)} rows for {len(calibration.sample)} samples")
    if calibration.guided is not None and (
        len(calibration.guided) != len(calibration.sample) or calibration.contexts is None or not calibration.is_guided
    ):
        raise ValueError(
            f"`guided` has {len(calibration.guided)} rows for {len(calibration.sample)} samples; expected one for each "
            "sample of a set with text that was recorded with guidance"
        )
    pooled, sizes, contexts = calibration.pooled, calibration.sizes, calibration.contexts
    if pooled is None and sizes is None:
        return
    if pooled is None or sizes is None or contexts is None:
        raise ValueError("`pooled` and `sizes` go together, with `contexts`")
    if len(pooled) != len(contexts) or tuple(sizes.shape) != (len(calibration.sample), SIZES):
        raise ValueError(
            f"`pooled` has {len(pooled)} rows for {len(contexts)} contexts, and `sizes` is {list(sizes.shape)} for "
            f"{len(calibration.sample)} samples of {SIZES} numbers"
        )
