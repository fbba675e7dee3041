"""ONNX Runtime's ``quantize_static``: QDQ, activations u8 per tensor, weights s8 per channel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.base.arrays import Feeds
from qdeploy.calibrate.spec import QuantSpec

LAYER_OPS = ["Conv", "MatMul", "Gemm"]
STRIDE = 32  # feeds whose activations are held at once: 50 MB each, and np.histogram copies them


@dataclass(frozen=True)
class OrtSettings:
    """One way to call it.

    method: ``MinMax``, ``Entropy`` or ``Percentile`` (99.999, its default).
    keep_list: quantize the layers that qdeploy quantizes, instead of every op it can.
    outputs: put Q/DQ after a layer too, as it does by default; False leaves the layer's output in float.
    """

    method: str
    keep_list: bool = False
    outputs: bool = True

    @property
    def note(self) -> str:
        """The settings in words, for the table of figures."""
        layers = "qdeploy's layers" if self.keep_list else "all ops"
        order = ", feeds shuffled" if self.is_shuffled else ""
        return f"{self.method}, {layers}{'' if self.outputs else ', inputs and weights only'}{order}"

    @property
    def is_shuffled(self) -> bool:
        """Whether the feeds are shuffled: the entropy method on all ops does not finish otherwise.

        Its search costs the square of a histogram's bins, and the first feeds fix their width: after those of
        timestep 1 the embedding's own tensor has 123,010 of them and takes hours. (Finer bins also search better:
        with qdeploy's layers, 25.7 dB in the recorded order and 23.8 shuffled.)
        """
        return self.method == "Entropy" and not self.keep_list


def quantize_with_ort(float_unet: Path, feeds: list[Feeds], settings: OrtSettings, folder: Path) -> Path:
    """Pre-process, calibrate on all ``feeds`` and quantize into ``folder``; the ONNX file."""
    import onnxruntime.quantization as ortq
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if settings.is_shuffled:
        feeds = [feeds[index] for index in np.random.default_rng(0).permutation(len(feeds))]
    prepared, out = folder / "prepared.onnx", folder / "model.onnx"
    quant_pre_process(float_unet, prepared)
    ortq.quantize_static(
        prepared,
        out,
        FeedReader(feeds),
        quant_format=ortq.QuantFormat.QDQ,
        activation_type=ortq.QuantType.QUInt8,
        weight_type=ortq.QuantType.QInt8,
        per_channel=True,
        calibrate_method=ortq.CalibrationMethod[settings.method],
        op_types_to_quantize=LAYER_OPS if settings.keep_list else None,
        nodes_to_exclude=list_excluded_nodes(prepared) if settings.keep_list else None,
        extra_options={
            "CalibStridedMinMax": choose_stride(len(feeds)),  # in spite of its name it strides every method
            "OpTypesToExcludeOutputQuantization": [] if settings.outputs else LAYER_OPS,
        },
    )
    return out


def choose_stride(count: int) -> int:
    """The largest stride up to STRIDE that divides ``count``, as ``quantize_static`` asks."""
    return next(stride for stride in range(min(STRIDE, count), 0, -1) if count % stride == 0)


def list_excluded_nodes(graph: Path) -> list[str]:
    """Layers on qdeploy's keep list, and attention's MatMuls of two activations."""
    import onnx

    model = onnx.load(graph, load_external_data=False).graph
    weights = {tensor.name for tensor in model.initializer}
    spec = QuantSpec()
    return [
        node.name
        for node in model.node
        if node.op_type in LAYER_OPS and (node.input[1] not in weights or spec.keeps_float("unet", node.name))
    ]


class FeedReader:
    """ORT's ``CalibrationDataReader`` by its methods: all feeds, or the range that strided calibration asks for."""

    def __init__(self, feeds: list[Feeds]) -> None:
        self._feeds = feeds
        self._left = iter(feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with these feeds, the end left out."""
        self._left = iter(self._feeds[start_index:end_index])

    def get_next(self) -> Feeds | None:
        """One feed; None after the last."""
        return next(self._left, None)
