"""qdeploy's own rows: which settings are measured, and how a row's UNet is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.inputs import MODEL, WorkFolder, export_unet
from qdeploy.artifacts.noise_correction import NoiseCorrection
from qdeploy.artifacts.table import QuantTable, load_table, save_table
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.spec import EFFORTS, QuantSpec, Reconstruction
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import load_target

TABLE = "table.safetensors"
ENGINES = ("ort-cpu",)


@dataclass(frozen=True)
class QualityRow:
    """One row of ours: ``settings`` are QuantSpec's."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "ort-cpu"

    @property
    def note(self) -> str:
        """The settings in words, for the table of figures."""
        return "qdeploy, " + (
            ", ".join(f"{key}={format_setting(value)}" for key, value in self.settings.items()) or "defaults"
        )


def format_setting(value: Any) -> str:
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


def list_rows(bits: int) -> list[QualityRow]:
    """Rows that each add one method, then each option by itself; all in the full range, without the precise end."""
    name = f"qdeploy-w{bits}a8"
    bit: dict[str, Any] = {"weight_bits": bits, "precise_end": False} | ({"full_range": True} if bits == 8 else {})
    nearest = bit | {"gptq": False}
    return [
        QualityRow(f"{name}-minmax", nearest | {"observer": "minmax"} | PLAIN),
        QualityRow(f"{name}-mse", nearest | PLAIN),
        QualityRow(f"{name}-equalize", nearest | {"two_passes": ONE_PASS}),
        QualityRow(f"{name}-two-passes", nearest),
        QualityRow(f"{name}-gptq", bit),
        QualityRow(f"{name}-adaround", bit | {"reconstruction": NEAREST_START}),
        QualityRow(f"{name}-gptq-start", bit | {"reconstruction": ROUNDING}),
        QualityRow(f"{name}-act-scales", bit | {"reconstruction": AND_SCALES}),
        QualityRow(f"{name}-split", nearest | {"rewrites": ("split_skips",)}),
        QualityRow(f"{name}-timestep-table", nearest | {"rewrites": ("timestep_table",)}),
        QualityRow(f"{name}-noise-correction", nearest | {"noise_correction": True}),
        QualityRow(f"{name}-first-token", nearest | {"first_token_float": True}),
    ]


OURS: list[QualityRow] = [
    QualityRow("qdeploy-w8a8"),
    QualityRow("qdeploy-w8a8-plain-end", {"precise_end": False}),
    QualityRow("qdeploy-w8a8-precise", {"precise_macs": 0.05}),
    QualityRow("qdeploy-w8a8-nearest", {"gptq": False}),
    *list_rows(8),
    QualityRow(
        "qdeploy-w8a8-attention", {"attention_bits": 8, "full_range": True, "gptq": False, "precise_end": False}
    ),
    *list_rows(4),
    QualityRow("qdeploy-w4a8-fast", {"weight_bits": 4, "reconstruction": ROUNDING}),
    QualityRow(
        "qdeploy-w4a8-gptq-start-split",
        {"weight_bits": 4, "reconstruction": ROUNDING, "rewrites": ("split_skips",), "precise_end": False},
    ),
    QualityRow("qdeploy-w4a8-standard", {"weight_bits": 4, "reconstruction": EFFORTS["standard"]}),
]


def quantize_ours(row: QualityRow, work: WorkFolder) -> Path:
    """Quantize the UNet on the work folder's calibration set: its table, and the ONNX file for ``row``'s engine."""
    model = load_model(MODEL)
    spec = QuantSpec(components=("unet",), **row.settings)
    folder = work.model_folder(row.name)
    table = quantize_model(model, load_calibration(work.calibration), spec, work=folder / "blocks")
    save_table(table, folder / TABLE)
    for engine in ENGINES:
        save_graph_for(engine, model, table, folder)
    return folder / f"{row.engine}.onnx"


def save_graph_for(engine: str, model: LatentDiffusion, table: QuantTable, folder: Path) -> None:
    """``ENGINE.onnx``: with Q after spatial convolutions for ONNX Runtime, without for OpenVINO."""
    simulator = build_simulator(model.unet, table.components["unet"], load_target(engine).numerics)
    export_unet(simulator, model, folder / f"{engine}.onnx", engine)


def load_correction(row: QualityRow, work: WorkFolder) -> NoiseCorrection | None:
    """The correction that the runtime would subtract from the UNet's output."""
    return load_table(work.model_folder(row.name) / TABLE).noise_correction
