"""qdeploy's own rows: which settings are measured, and how a row's UNet is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.inputs import MODEL, WorkFolder, export_unet
from qdeploy.calibrate.dataset import load_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.noise_correction import NoiseCorrection
from qdeploy.simulate.twin import on_target, quantized_twin
from qdeploy.spec import EFFORTS, QuantSpec, Reconstruction, target_named
from qdeploy.table import QuantTable, load_table, save_table

TABLE = "table.safetensors"
ENGINES = ("ort-cpu",)


@dataclass(frozen=True)
class Row:
    """One row of ours: ``settings`` are QuantSpec's."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "ort-cpu"

    @property
    def note(self) -> str:
        return "qdeploy, " + (", ".join(f"{key}={told(value)}" for key, value in self.settings.items()) or "defaults")


def told(value: Any) -> str:
    """A setting as a row's note says it: of a Reconstruction only what is not the default."""
    if not isinstance(value, Reconstruction):
        return str(value)
    default = Reconstruction()
    changed = {field.name: getattr(value, field.name) for field in fields(value)}
    return " ".join(f"{name} {now}" for name, now in changed.items() if now != getattr(default, name)) or "standard"


ONE_PASS: dict[str, tuple[str, ...]] = {"unet": ()}
PLAIN: dict[str, Any] = {"equalize": False, "two_passes": ONE_PASS}
ROUNDING = EFFORTS["fast"]
NEAREST_START = replace(ROUNDING, gptq_start=False)
AND_SCALES = replace(ROUNDING, learn_act_scales=True)


def ladder(bits: int) -> list[Row]:
    """One ingredient more from row to row, then each option by itself, all on the full range and nearest rounding."""
    name = f"qdeploy-w{bits}a8"
    bit: dict[str, Any] = {"weight_bits": bits} | ({"full_range": True} if bits == 8 else {})
    nearest = bit | {"gptq": False}
    return [
        Row(f"{name}-minmax", nearest | {"observer": "minmax"} | PLAIN),
        Row(f"{name}-mse", nearest | PLAIN),
        Row(f"{name}-equalize", nearest | {"two_passes": ONE_PASS}),
        Row(f"{name}-two-passes", nearest),
        Row(f"{name}-gptq", bit),
        Row(f"{name}-adaround", bit | {"reconstruction": NEAREST_START}),
        Row(f"{name}-gptq-start", bit | {"reconstruction": ROUNDING}),
        Row(f"{name}-act-scales", bit | {"reconstruction": AND_SCALES}),
        Row(f"{name}-split", nearest | {"rewrites": ("split_skips",)}),
        Row(f"{name}-timestep-table", nearest | {"rewrites": ("timestep_table",)}),
        Row(f"{name}-noise-correction", nearest | {"noise_correction": True}),
        Row(f"{name}-first-token", nearest | {"first_token_float": True}),
    ]


OURS: list[Row] = [
    Row("qdeploy-w8a8"),
    Row("qdeploy-w8a8-nearest", {"gptq": False}),
    *ladder(8),
    Row("qdeploy-w8a8-attention", {"attention_bits": 8, "full_range": True, "gptq": False}),
    *ladder(4),
    Row("qdeploy-w4a8-gptq-start-split", {"weight_bits": 4, "reconstruction": ROUNDING, "rewrites": ("split_skips",)}),
    Row("qdeploy-w4a8-standard", {"weight_bits": 4, "reconstruction": EFFORTS["standard"]}),
]


def quantize_ours(row: Row, work: WorkFolder) -> Path:
    """Quantize the UNet on the work folder's calibration set: its table, and the ONNX file for ``row``'s engine."""
    model = load_model(MODEL)
    spec = QuantSpec(components=("unet",), **row.settings)
    folder = work.model_of(row.name)
    table = quantize_model(model, load_calibration(work.calibration), spec, work=folder / "blocks")
    save_table(table, folder / TABLE)
    for engine in ENGINES:
        save_for(engine, model, table, folder)
    return folder / f"{row.engine}.onnx"


def save_for(engine: str, model: LatentDiffusion, table: QuantTable, folder: Path) -> None:
    """``ENGINE.onnx``: with Q behind spatial convolutions for ONNX Runtime, without for OpenVINO."""
    target = target_named(engine)
    quant = on_target(table.components["unet"], target)
    twin = quantized_twin(model.unet, quant, target.conv_output_quantized)
    export_unet(twin, model, folder / f"{engine}.onnx", engine)


def correction_of(row: Row, work: WorkFolder) -> NoiseCorrection | None:
    """What the runtime would take off the UNet's output."""
    return load_table(work.model_of(row.name) / TABLE).noise_correction
