"""Q-Diffusion's calibration layout (Li et al. 2023, arXiv:2302.04304): one ``.pt`` file, read without running it.

A dict over the S steps of a scheduler, noisiest first, for N samples each; lists over steps or whole tensors::

    xs   float[S, N, C, h, w]   what the UNet was given
    ts   int[S, N]              its timestep
    cs   float[S, N, T, D]      text embeddings of the conditional half, for text-to-image models
    ucs  float[S, N, T, D]      and of the unconditional one

Its ``--cali_st`` takes every (S // cali_st)-th step from the first on, so a few more than ``cali_st``
where that does not divide S; its ``--cali_n`` takes the first samples of each.
"""

from __future__ import annotations

from itertools import groupby
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdeploy.artifacts.outputs import QDIFFUSION_MARK
from qdeploy.base.errors import CalibrationError, UsageError
from qdeploy.base.files import stage_file
from qdeploy.base.version import read_version
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.record.conditioning import half_from_float
from qdeploy.models.checkpoints.file import torch_load

MAX_FILE_BYTES = 64 * 2**30
MAX_ELEMENTS = 2**33  # of one tensor, 16 GiB in float16; the published Stable Diffusion set has 3e9
MAX_STEPS, MAX_TIMESTEP = 10_000, 2**31
REMEDY = "make it again with Q-Diffusion, or calibrate with `qdeploy calibrate`"


def calibration_from_qdiffusion(path: Path, steps: int | None = None, per_step: int | None = None) -> CalibrationSet:
    """The set that Q-Diffusion would take from ``path`` with ``--cali_st steps --cali_n per_step``; None: all.

    The layout holds neither tokens nor final latents, so the set calibrates only the UNet.
    """
    parts = _check_parts(_load(path), path)
    chosen = _choose_steps(len(parts["ts"]), steps)
    count = _check_count(len(parts["ts"][0]), per_step)
    rows = {name: torch.cat([part[i][:count] for i in chosen]) for name, part in parts.items() if name in ("xs", "ts")}
    text: dict[str, Any] = (
        {}
        if "cs" not in parts
        else _collect_contexts([parts["cs"][i][:count] for i in chosen], parts["ucs"], chosen, count)
    )
    return CalibrationSet(
        sample=half_from_float(rows["xs"], f"{path}: `xs`"),
        timestep=_timesteps_from_tensor(rows["ts"], path),
        **text,
        provenance={"mode": "qdiffusion", "file": path.name, "cali_st": steps, "cali_n": per_step},
    )


def save_qdiffusion(calibration: CalibrationSet, path: Path) -> None:
    """Write the UNet's inputs in Q-Diffusion's layout, float32; it cannot hold tokens and decoder latents.

    CalibrationError unless the set holds whole trajectories: the same number of samples at each t, and t falling.
    """
    timestep = calibration.timestep
    count = gcd(*(len(list(run)) for _, run in groupby(timestep.tolist())))
    if (timestep.diff() > 0).any():
        raise CalibrationError(
            "Q-Diffusion's layout holds the same samples at each step of a scheduler, noisiest first, which this "
            f"set ({calibration.provenance.get('mode')}) is not; write it to a .safetensors file"
        )
    shape = (len(timestep) // count, count)
    parts = {"xs": calibration.sample.float().unflatten(0, shape), "ts": timestep.clone().unflatten(0, shape)}
    if calibration.contexts is not None and calibration.prompt is not None:
        contexts = calibration.contexts.float()
        parts["cs"] = contexts[calibration.prompt].unflatten(0, shape)
        parts["ucs"] = contexts[:1].clone().expand(*shape, *contexts.shape[1:])  # stored once
    with stage_file(path, sum(part.untyped_storage().nbytes() for part in parts.values())) as scratch:
        torch.save({**parts, QDIFFUSION_MARK: f"qdeploy {read_version()}"}, scratch)


def _load(path: Path) -> Any:
    """The unpickled file, tensors left on disk; only tensors and plain containers come out of it."""
    if not path.is_file() or not 0 < path.stat().st_size <= MAX_FILE_BYTES:
        raise CalibrationError(f"{path} is not a file of 1 byte to {MAX_FILE_BYTES >> 30} GiB; {REMEDY}")
    try:
        return torch_load(path)
    except ValueError as exc:
        raise CalibrationError(f"{path} is not a readable torch.save file of plain tensors ({exc}); {REMEDY}") from exc


def _check_parts(loaded: Any, path: Path) -> dict[str, list[Tensor]]:
    """Each part as its S tensors, with matching lengths, dimensions and bounded sizes."""
    if not isinstance(loaded, dict) or not {"xs", "ts"} <= loaded.keys():
        raise CalibrationError(
            f"{path} holds no dict with `xs` and `ts`; finished pictures without timesteps (Q-Diffusion's cali_st 1) "
            f"cannot be calibrated on; {REMEDY}"
        )
    if ("cs" in loaded) != ("ucs" in loaded):
        raise CalibrationError(f"{path} holds one of `cs` and `ucs`; a text-to-image set has both; {REMEDY}")
    names = [name for name in ("xs", "ts", "cs", "ucs") if name in loaded]
    parts = {name: _split_steps(loaded[name], name, path) for name in names}
    for name, dimensions in (("ts", 1), ("xs", 4), ("cs", 3), ("ucs", 3)):
        if name in parts:
            _check_part(parts[name], name, dimensions, (len(parts["ts"]), *parts["ts"][0].shape[:1]), path)
    _check_storage(parts, path)
    if "cs" in parts and parts["cs"][0].shape != parts["ucs"][0].shape:
        raise CalibrationError(f"{path}: `cs` and `ucs` have different shapes; {REMEDY}")
    return parts


def _split_steps(part: Any, name: str, path: Path) -> list[Tensor]:
    """A list over steps, or a tensor whose first dimension they are, as a list of tensors."""
    steps = part if isinstance(part, list | tuple) else part.unbind() if _is_dense(part) and part.dim() > 0 else []
    if not 0 < len(steps) <= MAX_STEPS or not all(_is_dense(step) for step in steps):
        raise CalibrationError(f"{path}: `{name}` is not a tensor over 1 to {MAX_STEPS} steps, nor a list; {REMEDY}")
    return [step.detach() for step in steps]


def _is_dense(part: Any) -> bool:
    """Whether ``part`` is a plain tensor of real numbers with its values in this file."""
    is_plain = isinstance(part, Tensor) and part.layout == torch.strided and part.device.type == "cpu"
    return is_plain and not (part.is_nested or part.is_quantized or part.is_complex())


def _check_part(part: list[Tensor], name: str, dimensions: int, expected: tuple[int, ...], path: Path) -> None:
    """``expected`` is (S, N)."""
    first = part[0].shape
    if len(first) != dimensions or any(step.shape != first for step in part):
        raise CalibrationError(
            f"{path}: a step of `{name}` is {list(first)}, expected {dimensions} equal dimensions a step; {REMEDY}"
        )
    if (len(part), *first[:1]) != expected or 0 in first:
        raise CalibrationError(
            f"{path}: `{name}` has {len(part)} steps of {first[0]} samples, `ts` {expected[0]} of {expected[1]}; they "
            f"must agree and not be empty; {REMEDY}"
        )
    if len(part) * part[0].numel() > MAX_ELEMENTS:
        raise CalibrationError(f"{path}: `{name}` has more than {MAX_ELEMENTS} numbers; save fewer samples")


def _check_storage(parts: dict[str, list[Tensor]], path: Path) -> None:
    """A small file can describe huge tensors, by strides of 0; of `ucs`, stored once, only a row counts."""
    for name, steps in parts.items():
        described = steps[0][0].nbytes if name == "ucs" else sum(step.nbytes for step in steps)
        if described > 2 * path.stat().st_size:
            raise CalibrationError(
                f"{path}: `{name}` describes {described:,} bytes, far more than the file holds; {REMEDY}"
            )


def _choose_steps(available: int, steps: int | None) -> range:
    """Q-Diffusion's choice among the recorded steps."""
    if steps is None:
        return range(available)
    if not 1 <= steps <= available:
        raise UsageError(f"--cali-st: got {steps}, expected 1 to {available}, the steps in the file")
    return range(0, available, available // steps)


def _check_count(available: int, per_step: int | None) -> int:
    if per_step is None:
        return available
    if not 1 <= per_step <= available:
        raise UsageError(f"--cali-n: got {per_step}, expected 1 to {available}, the samples of each step in the file")
    return per_step


def _timesteps_from_tensor(timesteps: Tensor, path: Path) -> Tensor:
    """``int64[N]``; Q-Diffusion's pixel-space scheduler keeps them as floats."""
    whole = timesteps.double()
    if not ((whole == whole.round()) & (whole >= 0) & (whole < MAX_TIMESTEP)).all():
        raise CalibrationError(f"{path}: `ts` holds something other than whole timesteps from 0 up; {REMEDY}")
    return whole.long()


def _collect_contexts(cond: list[Tensor], uncond: list[Tensor], chosen: range, count: int) -> dict[str, Tensor]:
    """``prompt`` and ``contexts``: equal embeddings become one row, the unconditional one row 0."""
    contexts = [half_from_float(uncond[0][0], "`ucs`")]
    row_by_bytes = {_bytes_from_tensor(contexts[0]): 0}
    for step in chosen:
        rows = uncond[step][:count]
        for row in rows[:1] if rows.stride(0) == 0 else rows:  # stored once: the same row every time
            if _bytes_from_tensor(half_from_float(row, "`ucs`")) not in row_by_bytes:
                raise CalibrationError(
                    "`ucs` holds several unconditional embeddings (negative prompts?); expected one, the empty "
                    "prompt's; record the set without them"
                )
    prompt = []
    for embedding in (row for step in cond for row in step):
        half = half_from_float(embedding, "`cs`")
        prompt.append(row_by_bytes.setdefault(_bytes_from_tensor(half), len(contexts)))
        if prompt[-1] == len(contexts):
            contexts.append(half)
    return {"prompt": torch.tensor(prompt), "contexts": torch.stack(contexts)}


def _bytes_from_tensor(embedding: Tensor) -> bytes:
    return embedding.contiguous().numpy().tobytes()
