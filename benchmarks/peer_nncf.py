"""NNCF's ``nncf.quantize`` on the OpenVINO model of the same float ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.base.arrays import Feeds
from qdeploy.calibrate.spec import QuantSpec

LAYER_OPS = {"Convolution", "MatMul"}
NO_BIAS = "/WithoutBiases"  # what OpenVINO's ONNX frontend appends to the name of a layer with a bias


@dataclass(frozen=True)
class NncfSettings:
    """One way to call it.

    transformer: ``model_type=TRANSFORMER``, which turns SmoothQuant on.
    full_bias_correction: ``fast_bias_correction=False``.
    keep_list: quantize only the layers that qdeploy quantizes.
    subset: feeds to use, evenly spaced; None: all of them.
    """

    transformer: bool = False
    full_bias_correction: bool = False
    keep_list: bool = False
    subset: int | None = None

    @property
    def note(self) -> str:
        """The settings in words, for the table of figures."""
        kind = "TRANSFORMER (SmoothQuant)" if self.transformer else "MIXED"
        correction = "full bias correction" if self.full_bias_correction else "fast bias correction"
        layers = "qdeploy's layers" if self.keep_list else "its own choice of ops"
        return f"{kind}, {correction}, {layers}, {'all' if self.subset is None else self.subset} feeds"


def quantize_with_nncf(float_unet: Path, feeds: list[Feeds], settings: NncfSettings, folder: Path) -> Path:
    """Calibrate and quantize into ``folder``; the OpenVINO IR file."""
    import nncf
    import openvino as ov

    selected = feeds if settings.subset is None else space_evenly(feeds, settings.subset)
    model = ov.Core().read_model(float_unet)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(selected),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if settings.transformer else None,
        fast_bias_correction=not settings.full_bias_correction,
        subset_size=len(selected),
        ignored_scope=ignore_other_layers(model) if settings.keep_list else None,
    )
    out = folder / "model.xml"
    ov.save_model(quantized, out, compress_to_fp16=False)
    return out


def space_evenly(feeds: list[Feeds], count: int) -> list[Feeds]:
    """``count`` of the feeds, evenly spaced over the set, which is ordered by timestep."""
    return [feeds[i * len(feeds) // count] for i in range(min(count, len(feeds)))]


def ignore_other_layers(model: Any) -> Any:
    """``nncf.IgnoredScope`` of everything but the Conv and Linear layers that qdeploy quantizes."""
    import nncf

    ops = model.get_ops()
    kept = [op.get_friendly_name() for op in ops if op.get_type_name() in LAYER_OPS and stays_float(op)]
    others = {op.get_type_name() for op in ops} - LAYER_OPS - {"Constant", "Parameter", "Result"}
    return nncf.IgnoredScope(names=kept, types=sorted(others), validate=False)


def stays_float(op: Any) -> bool:
    """Whether a Convolution or MatMul is on qdeploy's keep list, or multiplies two activations."""
    layer = op.get_friendly_name().removesuffix(NO_BIAS)
    return QuantSpec().keeps_float("unet", layer) or not has_constant_weight(op)


def has_constant_weight(op: Any) -> bool:
    """Whether input 1 comes from a Constant, maybe through a Transpose or Convert."""
    source = op.input_value(1).get_node()
    while source.get_type_name() in ("Transpose", "Convert", "Reshape"):
        source = source.input_value(0).get_node()
    return bool(source.get_type_name() == "Constant")
