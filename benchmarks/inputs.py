"""Inputs of all rows, made once in the work folder: reference, calibration set, float ONNX UNet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.protocol import (
    Protocol,
    Reference,
    draw_fresh_prompts,
    load_reference,
    record_reference,
    save_reference,
)
from qdeploy.artifacts.components import choose_graph_batch
from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import UsageError
from qdeploy.base.files import stage_folder
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.dataset_file import load_calibration, save_calibration
from qdeploy.calibrate.record.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.export.graph import graph_from_component
from qdeploy.models.components import TorchComponent
from qdeploy.models.source import LatentDiffusion
from qdeploy.targets.base import load_target

MODEL = "builtin:emoji"
TARGET = "ort-cpu"
PLAIN_TARGET = "openvino"  # its float graphs have standard operators only, which every peer reads


@dataclass(frozen=True)
class WorkFolder:
    """The paths of everything that rows share."""

    root: Path

    @property
    def reference(self) -> Path:
        """Inputs and outputs of the float UNet that rows are compared on, a safetensors file."""
        return self.root / "reference.safetensors"

    @property
    def calibration(self) -> Path:
        """The calibration set that ours and the peers share."""
        return self.root / "calibration.safetensors"

    @property
    def float_unet(self) -> Path:
        """Static batch 2, opset 20, Conv and Gemm nodes named after the torch layers."""
        return self.root / "float_unet" / "model.onnx"

    def model_folder(self, row: str) -> Path:
        """Folder for the quantized model of ``row``."""
        return self.root / "models" / row

    def figures_path(self, row: str) -> Path:
        """The measured figures of ``row``."""
        return self.root / "rows" / f"{row}.json"


def make_inputs(
    work: WorkFolder, model: LatentDiffusion, protocol: Protocol, on_progress: OnProgress = ignore_progress
) -> Reference:
    """Make what is missing; the reference. UsageError when the folder was made with other settings."""
    prompts = read_prompts(None, model.folder)
    if not work.calibration.exists():
        settings = TimestepAwareSettings(
            protocol.calibrated, protocol.steps, protocol.steps, protocol.guidance_scale, seed=protocol.calibrated_seed
        )
        calibration_prompts = draw_prompts(prompts, protocol.calibrated, protocol.calibrated_seed)
        save_calibration(record_trajectories(model, calibration_prompts, settings, on_progress), work.calibration)
    if not work.reference.exists():
        save_reference(
            record_reference(model, draw_fresh_prompts(prompts, protocol), protocol, on_progress), work.reference
        )
    if not work.float_unet.exists():
        with stage_folder(work.float_unet.parent) as folder:
            export_unet(model.unet, model, folder / work.float_unet.name, PLAIN_TARGET)  # what every peer quantizes
    reference = load_reference(work.reference)
    if (reference.protocol, reference.model_sha256) != (protocol, model.sha256):
        raise UsageError(
            f"{work.root} was made with {reference.protocol} on another model or settings than the {protocol} asked "
            f"for; give another --work folder or remove this one"
        )
    return reference


def export_unet(unet: TorchComponent, model: LatentDiffusion, path: Path, target: str = TARGET) -> None:
    """The graph of ``model``'s UNet, float or simulated, at its static batch (2 where it reads text)."""
    example = model.make_example("unet", choose_graph_batch("unet", model.reads_text))
    graph = graph_from_component(unet, example, load_target(target).opset)
    load_target(target).lower(graph)
    load_target(target).files.write(graph, path)


def list_unet_feeds(calibration: CalibrationSet) -> list[Feeds]:
    """Every recorded x_t with its own t, both halves of guidance: the graph's static batch of 2."""
    return [
        {
            name: np.array(value.numpy()) for name, value in feeds.items()
        }  # ascontiguousarray would make the scalar rank 1
        for feeds in calibration.batches("unet", choose_graph_batch("unet", is_guided=True))
    ]


def load_peer_feeds(work: WorkFolder) -> list[Feeds]:
    """:func:`list_unet_feeds` of the work folder's calibration set."""
    return list_unet_feeds(load_calibration(work.calibration))
