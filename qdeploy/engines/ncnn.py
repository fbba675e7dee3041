"""ncnn on the CPU, in float32 arithmetic around the integer layers, one row of the batch after another."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.formats.ncnn_files.graph import NcnnGraph, list_index_inputs, name_bin, read_ncnn_graph
from qdeploy.artifacts.formats.ncnn_files.layers import is_integer
from qdeploy.artifacts.formats.ncnn_files.param import Layer
from qdeploy.artifacts.formats.ncnn_files.ports import Ports
from qdeploy.base.arrays import AnyArray, Feeds
from qdeploy.base.errors import EngineError
from qdeploy.engines.base import TIMED_RUNS, EngineOptions, Kernel, Port, check_feeds, import_package

if TYPE_CHECKING:
    import ncnn

# In int8 ncnn's Winograd F(4, 3) holds 576 times a convolution's sum in 32 bits: sums beyond 3.7 million are wrong, and
# no error tells; 64 channels of the largest codes have 9.3. Its matrix product holds the sum itself, and takes less
# time than F(2, 3) but for the widest convolutions. In float F(4, 3) pays where its tiles of 4x4 fill the picture.
WINOGRAD, LARGE_TILES = "use_winograd_convolution", "use_winograd43_convolution"
LARGE_SIDE = 16  # of a picture that it is faster on
LARGE_SHARE = 2 / 3  # of a graph's 3x3 convolutions, by multiply-accumulates: the option is the whole net's
NOT_COMPUTED = ("Input", "Split", "MemoryData")
# Half precision is what the processor has, and the simulator computes none; int8 has no other form.
DISABLED = (
    "use_vulkan_compute", "use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed",
    "use_bf16_storage",
)  # fmt: skip


class NcnnSession:
    """One net. Each call has an extractor of its own, so that many threads may run at once."""

    def __init__(self, module: ModuleType, net: ncnn.Net, graph: NcnnGraph, path: Path) -> None:
        self._module = module
        self._net: ncnn.Net | None = net
        self._ports, self._path = graph.ports, path
        self._index_inputs = list_index_inputs(graph)
        self._checked = list_ports(graph.ports)

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Compute every output, by name; EngineError when a feed does not fit or the session is closed."""
        net = self._net
        if net is None:
            raise EngineError(f"{self._path}: the session was closed")
        check_feeds(self._path, self._checked, feeds)
        rows = [self._run_row(net, feeds, row) for row in range(self._ports.rows)]
        return {name: np.stack([row[name] for row in rows]) for name in self._ports.outputs}

    def close(self) -> None:
        """Free the net; a second call does nothing."""
        self._net = None

    def _run_row(self, net: ncnn.Net, feeds: Feeds, row: int) -> dict[str, NDArray[np.float32]]:
        """One row of the outputs."""
        arrays = cut_row(self._ports, self._index_inputs, feeds, row)
        extractor = start(self._module, net, arrays, self._path)
        outputs = {}
        for name, port in self._ports.outputs.items():
            code, mat = extractor.extract(name)
            output = np.array(mat, np.float32)  # a copy: the extractor's memory ends with it
            if code != 0 or output.shape != port.row:
                raise EngineError(f"{self._path}: ncnn returned {code} and {list(output.shape)} as {name}")
            outputs[name] = output.reshape(port.shape[1:])
        return outputs


def versions() -> dict[str, str]:
    """Package versions; EngineUnavailableError when ncnn is not installed."""
    return {"ncnn": str(_import_ncnn().__version__)}


def open_session(path: Path, options: EngineOptions) -> NcnnSession:
    """Load the net whose ``.param`` is at ``path``, after everything in it was checked."""
    options.check_providers("ncnn", ())
    module, graph = _import_ncnn(), read_checked(path)
    return NcnnSession(module, load_net(module, path, graph, options), graph, path)


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """Every layer that computes something; with ``feeds`` each one's time for all rows."""
    module, graph = _import_ncnn(), read_checked(path)
    net = load_net(module, path, graph, options)
    seconds: dict[str, float] = {}
    if feeds is not None:
        check_feeds(path, list_ports(graph.ports), feeds)
        indexed = list_index_inputs(graph)
        for run in range(TIMED_RUNS + 1):
            for row in range(graph.ports.rows):
                arrays = cut_row(graph.ports, indexed, feeds, row)
                for name, spent in time_layers(start(module, net, arrays, path, light=False), graph.layers):
                    seconds[name] = seconds.get(name, 0.0) + (spent / TIMED_RUNS if run else 0.0)
    return [
        Kernel(
            f"{layer.type} int8" if is_integer(layer) else layer.type,
            (layer.name, *layer.tops),
            integer=is_integer(layer),
            seconds=seconds.get(layer.name),
        )
        for layer in graph.layers
        if layer.type not in NOT_COMPUTED
    ]


def time_layers(extractor: ncnn.Extractor, layers: Sequence[Layer]) -> Iterator[tuple[str, float]]:
    """Name and seconds of each layer that computes something, as its outputs are asked for one by one."""
    for layer in layers:
        begin = time.perf_counter()
        for blob in layer.tops:
            extractor.extract(blob, AS_IT_IS)
        if layer.type not in NOT_COMPUTED:
            yield layer.name, time.perf_counter() - begin


AS_IT_IS = 1  # of ncnn's `extract`: no conversion of an intermediate blob's layout


def list_ports(ports: Ports) -> list[Port]:
    """The inputs as ``check_feeds`` has them."""
    return [Port(name, np.dtype(port.dtype), port.shape) for name, port in ports.inputs.items()]


def cut_row(ports: Ports, index_inputs: set[str], feeds: Feeds, row: int) -> dict[str, AnyArray]:
    """One row of each feed in the element type that ncnn's layers read: int32 for tokens, else float32."""
    arrays: dict[str, AnyArray] = {}
    for name, port in ports.inputs.items():
        feed = np.asarray(feeds[name])
        part = feed[min(row, port.shape[0] - 1)] if port.shape else feed
        dtype = np.int32 if name in index_inputs else np.float32
        arrays[name] = np.ascontiguousarray(part, dtype).reshape(port.row)
    return arrays


def start(module: ModuleType, net: ncnn.Net, arrays: Feeds, path: Path, light: bool = True) -> ncnn.Extractor:
    """An extractor with its inputs; ``light`` frees each blob after its reader."""
    extractor: ncnn.Extractor = net.create_extractor()
    extractor.set_light_mode(light)
    for name, array in arrays.items():
        if extractor.input(name, module.Mat(array).clone()) != 0:
            raise EngineError(f"{path}: ncnn does not take the input {name}")
    return extractor


def read_checked(path: Path) -> NcnnGraph:
    """The graph at ``path``; EngineError for what ncnn would not survive."""
    try:
        return read_ncnn_graph(path)
    except (OSError, ValueError) as exc:
        raise EngineError(f"{path} is not a readable ncnn graph ({exc}); export the bundle again") from exc


def load_net(module: ModuleType, path: Path, graph: NcnnGraph, options: EngineOptions) -> ncnn.Net:
    """The net of a checked graph; EngineError where ncnn refuses it."""
    net: ncnn.Net = module.Net()
    for name in DISABLED:
        setattr(net.opt, name, False)
    setattr(net.opt, WINOGRAD, not any(is_integer(layer) for layer in graph.layers))
    setattr(net.opt, LARGE_TILES, has_large_pictures(graph))
    if options.threads is not None:
        net.opt.num_threads = options.threads
    for load, file in ((net.load_param, path), (net.load_model, name_bin(path))):
        code = load(str(file))
        if code != 0:
            raise EngineError(f"ncnn cannot load {file}: it returned {code}; its own message is on standard error")
    return net


def has_large_pictures(graph: NcnnGraph) -> bool:
    """Whether most of the work of 3x3 convolutions is on pictures of at least LARGE_SIDE."""
    convolutions = [
        (result.macs, min(result.shapes[0][1:]) >= LARGE_SIDE)
        for layer, result in zip(graph.layers, graph.results, strict=True)
        if layer.type == "Convolution" and layer.get_int(1) == 3
    ]
    return sum(macs for macs, is_large in convolutions if is_large) > LARGE_SHARE * sum(
        macs for macs, _ in convolutions
    )


def _import_ncnn() -> ModuleType:
    return import_package("ncnn", "ncnn", "pip install 'qdeploy[ncnn]'")
