"""Graphs without their weights: what a machine without network is given of a model too large to carry.

What a kernel costs depends on shapes, not on values. So a shell has the graph, its small tensors as they are and of
each large one the mean and deviation; ``fill_shell`` draws those anew, from a seed, on the machine that measures.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.arrays import AnyArray
from qdeploy.base.files import stage_file

KEPT_BYTES = 64 * 2**10  # tensors up to this size are carried: biases, norms, scales
DRAWING, KEPT = "fill.json", "kept.npz"
DTYPES: dict[int, type] = {1: np.float32, 3: np.int8, 7: np.int64, 10: np.float16}  # of onnx.TensorProto.DataType


@dataclass(frozen=True)
class TensorPiece:
    """One tensor's place in the file of external data, in bytes; ``kept`` ones lie in ``kept.npz`` by their offset."""

    offset: int
    size: int
    dtype: str
    mean: float
    std: float
    kept: bool


def make_shell(graph: Path, out: Path) -> None:
    """Write the shell of ``graph``, whose weights lie in ``GRAPH.data``, to the folder ``out``."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    weights = np.memmap(graph.with_name(graph.name + ".data"), np.uint8, mode="r")
    pieces, kept = [], {}
    for tensor in model.graph.initializer:
        location = {entry.key: entry.value for entry in tensor.external_data}
        if location:
            piece, values = _read_piece(
                weights, int(location["offset"]), int(location["length"]), DTYPES[tensor.data_type]
            )
            pieces.append(piece)
            if piece.kept:
                kept[str(piece.offset)] = values
    out.mkdir(parents=True, exist_ok=True)
    (out / graph.name).write_bytes(graph.read_bytes())
    np.savez_compressed(out / KEPT, **kept)  # type: ignore[arg-type]
    plan = {"graph": graph.name, "bytes": len(weights), "pieces": [asdict(piece) for piece in pieces]}
    (out / DRAWING).write_text(json.dumps(plan) + "\n", encoding="utf-8")


def fill_shell(shell: Path, seed: int = 0) -> Path:
    """Write the weights of the shell in the folder ``shell``, unless they are there; the graph, ready to load."""
    plan: dict[str, Any] = json.loads((shell / DRAWING).read_text(encoding="utf-8"))
    graph = shell / str(plan["graph"])
    weights = graph.with_name(graph.name + ".data")
    if not weights.is_file():
        rng, kept = np.random.default_rng(seed), np.load(shell / KEPT)
        with stage_file(weights) as scratch:
            content = np.memmap(scratch, np.uint8, mode="w+", shape=(plan["bytes"],))
            for piece in (TensorPiece(**entry) for entry in plan["pieces"]):
                values = kept[str(piece.offset)] if piece.kept else draw_values(piece, rng)
                content[piece.offset : piece.offset + piece.size] = np.ascontiguousarray(values).view(np.uint8).ravel()
            content.flush()
    return graph


def draw_values(piece: TensorPiece, rng: np.random.Generator) -> AnyArray:
    """Normal values of the tensor's mean and deviation, in its own type."""
    dtype = np.dtype(piece.dtype)
    values: AnyArray = (
        rng.standard_normal(piece.size // dtype.itemsize, np.float32) * np.float32(piece.std) + piece.mean
    )
    if dtype.kind == "i":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min + 1, limits.max)  # codes are symmetric
    return values.astype(dtype)


def _read_piece(weights: NDArray[np.uint8], offset: int, size: int, dtype: type) -> tuple[TensorPiece, AnyArray]:
    values: AnyArray = np.frombuffer(weights[offset : offset + size].tobytes(), dtype)
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return TensorPiece(offset, size, np.dtype(dtype).name, mean, std, size <= KEPT_BYTES), values
