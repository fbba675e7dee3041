"""Measure int8 with and without VNNI: ``python -m benchmarks.processors --size sd15``.

The UNet in float32, in W8A8 as `ort-cpu` has it by default (weight codes within +-64) and in full range (+-127), each
a session of ONNX Runtime, timed in turn. Run it by itself and as on older processors::

    python -m benchmarks.processors
    python -m benchmarks.mask_cpu --without vnni -- python -m benchmarks.processors
    python -m benchmarks.mask_cpu --without vnni --without avx512 -- python -m benchmarks.processors

Time depends on shapes only, so weights of Stable Diffusion's size are random and all ranges are stand-ins.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from benchmarks.inputs import MODEL
from qdeploy.artifacts.table import Affine, ComponentQuant, LayerQuant
from qdeploy.base.arrays import Feeds
from qdeploy.base.cpu import read_cpu_model, read_integer_flags
from qdeploy.base.files import stage_folder
from qdeploy.bench.idle import wait_until_idle
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.engines.base import EngineOptions, Session, load_engine
from qdeploy.models.components import TorchComponent, UNet, trace_layers
from qdeploy.targets.base import load_target

TARGET = "ort-cpu"
STAND_IN = Affine(0.04, 120)  # of every activation
SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # the rest are diffusers' defaults


@dataclass(frozen=True)
class ProcessorRow:
    """One form of the UNet; ``largest_code`` of its weights."""

    name: str
    largest_code: int


ROWS = (ProcessorRow("fp32", 0), ProcessorRow("w8a8", 64), ProcessorRow("w8a8-full-range", 127))


def load_unet(size: str) -> tuple[TorchComponent, Feeds]:
    """The float UNet and inputs of its static batch of 2: normal noise, timestep 500."""
    import torch
    from diffusers import UNet2DConditionModel

    from qdeploy.models.source import load_model

    torch.manual_seed(0)
    unet = load_model(MODEL).unet if size == "builtin" else UNet(cast(Any, UNet2DConditionModel(**SD15))).eval()
    config: Any = unet.inner.config
    side, tokens = config.sample_size, 32 if size == "builtin" else 77
    noise = np.random.default_rng(0)
    return unet, {
        "sample": noise.standard_normal((2, config.in_channels, side, side), np.float32),
        "timestep": np.array(500, np.int64),
        "encoder_hidden_states": noise.standard_normal((2, tokens, config.cross_attention_dim), np.float32),
    }


def quantize_unet(unet: TorchComponent, feeds: Feeds, row: ProcessorRow) -> TorchComponent:
    """The simulator of ``row``: min-max weight scales, stand-in ranges."""
    import torch

    from qdeploy.calibrate.ranges.observe import needs_output_range
    from qdeploy.calibrate.ranges.weights import minmax_scale, round_to_nearest
    from qdeploy.simulate.simulator import build_simulator

    spec, layers, macs = QuantSpec(), {}, {}
    codes = -row.largest_code, row.largest_code
    for call in trace_layers(unet, {name: torch.from_numpy(value) for name, value in feeds.items()}):
        if spec.keeps_float("unet", call.name):
            continue
        weight = call.module.weight.detach()
        scale = minmax_scale(weight, codes)
        layers[call.name] = LayerQuant(
            round_to_nearest(weight, scale, codes), scale.numpy(), 8, STAND_IN,
            output=STAND_IN if needs_output_range(call.module) else None,
            passes=2 if spec.takes_two_passes("unet", call.name) else 1,
        )  # fmt: skip
        macs[call.name] = call.macs
    return build_simulator(unet, ComponentQuant(layers, macs=macs), load_target(TARGET).numerics)


def make_graphs(size: str, folder: Path) -> None:
    """Every row's graph in a folder of its name, and the inputs."""
    import torch

    from qdeploy.export.graph import graph_from_component
    from qdeploy.export.release import release_memory
    from qdeploy.targets.onnx_files.graph import save_graph

    torch.set_grad_enabled(False)
    unet, feeds = load_unet(size)
    example = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with stage_folder(folder) as scratch:
        for row in ROWS:
            component = quantize_unet(unet, feeds, row) if row.largest_code else unet
            graph = graph_from_component(component, example, load_target(TARGET).opset)
            load_target(TARGET).lower(graph)
            (scratch / row.name).mkdir()
            save_graph(graph, scratch / row.name / "model.onnx")
            del component, graph
            release_memory()
        np.savez(scratch / "feeds.npz", **feeds)  # type: ignore[arg-type]


def time_in_turn(sessions: dict[str, Session], feeds: Feeds, rounds: int) -> dict[str, list[float]]:
    """Seconds of every session, run in turn once the previous one's threads are idle; the first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(rounds + 1):
        for name, session in sessions.items():
            wait_until_idle()
            start = time.perf_counter()
            session.run(feeds)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--size", type=click.Choice(["builtin", "sd15"]), default="builtin", show_default=True, help="Which UNet."
)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path(__file__).parent / "work", help="Where graphs go."
)
@click.option("--rounds", default=15, show_default=True, help="Timed runs of each row.")
def main(size: str, work: Path, rounds: int) -> None:
    """Make the graphs that are missing, time them in turn, and print a row each."""
    folder = work / f"processors-{size}"
    if not folder.exists():
        make_graphs(size, folder)
    with np.load(folder / "feeds.npz", allow_pickle=False) as stored:
        feeds = dict(stored)
    engine = load_engine(TARGET)
    sessions = {
        row.name: engine.open_session(
            folder / row.name / "model.onnx", EngineOptions(largest_weight_code=row.largest_code)
        )
        for row in ROWS
    }
    seconds = time_in_turn(sessions, feeds, rounds)
    instructions = " ".join(read_integer_flags()) or "unknown"
    click.echo(f"{read_cpu_model()}, integer instructions: {instructions}; {size}, {rounds} rounds")
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds[ROWS[0].name], strict=True))
        click.echo(f"{name}: {statistics.median(own) * 1e3:.1f} ms a UNet step, {ratio:.2f} of fp32's")


if __name__ == "__main__":
    main()
