"""Runs on the other processor, without torch: a bundle, or graphs, on given inputs; writes the outputs as ``.npz``.

python -m tests.emulated.compute bundle BUNDLE FEEDS.npz OUT.npz    feeds are named COMPONENT/NUMBER/INPUT
python -m tests.emulated.compute graphs FOLDER OUT.npz ENGINE...    every FOLDER/*.onnx on its FOLDER/*.npy
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import qdeploy
from qdeploy.base.cpu import read_integer_flags

PICTURE = dict(prompt="red apple", steps=4, seed=0)  # short: emulated, a step of the built-in model takes seconds
Arrays = dict[str, NDArray]


def compute_bundle(folder: str, feeds_file: str, out: str) -> None:
    """Every component on its feeds, and a picture from prompt to pixels."""
    feeds: dict[tuple[str, str], Arrays] = {}
    for key, value in np.load(feeds_file).items():
        component, number, name = key.split("/")
        feeds.setdefault((component, number), {})[name] = value
    outputs: Arrays = {}
    with qdeploy.load(folder, threads=1) as pipe:
        for (component, number), given in feeds.items():
            with pipe.component(component).hold() as session:
                (outputs[f"{component}/{number}"],) = session.run(given).values()
        outputs["picture"] = np.asarray(pipe(**PICTURE).images[0])
    np.savez(out, **outputs)


def compute_graphs(folder: str, out: str, *engines: str) -> None:
    """Each graph in each of ENGINES; no option of ours is set."""
    outputs = {
        f"{graph.stem}/{engine}": ENGINES[engine](graph, np.load(graph.with_suffix(".npy")))
        for graph in sorted(Path(folder).glob("*.onnx"))
        for engine in engines
    }
    np.savez(out, **outputs)


def run_onnxruntime(graph: Path, x: NDArray, precise: bool = False) -> NDArray:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    session = onnxruntime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def run_onnxruntime_precise(graph: Path, x: NDArray) -> NDArray:
    return run_onnxruntime(graph, x, precise=True)


def run_openvino(graph: Path, x: NDArray) -> NDArray:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({"x": x})[0]


ENGINES: dict[str, Callable[[Path, NDArray], NDArray]] = {
    "onnxruntime": run_onnxruntime,
    "onnxruntime-precise": run_onnxruntime_precise,
    "openvino": run_openvino,
}

if __name__ == "__main__":
    {"bundle": compute_bundle, "graphs": compute_graphs}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"flags": read_integer_flags()}))
