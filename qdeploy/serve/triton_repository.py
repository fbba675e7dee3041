"""A model repository for Triton: a folder for each bundle with config.pbtxt, ``model.py`` and the bundle itself."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qdeploy.artifacts.bundle import Bundle, open_bundle
from qdeploy.artifacts.manifest import Manifest
from qdeploy.artifacts.outputs import TRITON_MARK
from qdeploy.base.staging import stage_folder
from qdeploy.serve.triton_model import BUNDLE_FOLDER

VERSION = "1"
MODEL = f'''"""{TRITON_MARK}: the bundle next to this file, run by qdeploy, which Triton's Python must have."""

from qdeploy.serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class TritonSettings:
    """What config.pbtxt says besides the bundle's own tensors.

    instances: processes that each load the bundle. batch: rows that the dynamic batcher brings together at most.
    delay_us: how long it waits for them. queue: requests that may wait; more are rejected. timeout_us: for how long.
    steps, guidance_scale: of a request that names none.
    """

    engine: str | None = None
    threads: int | None = None
    instances: int = 1
    batch: int = 4
    delay_us: int = 2000
    queue: int = 64
    timeout_us: int = 300_000_000
    steps: int = 25
    guidance_scale: float = 7.5


def write_repository(folders: Mapping[str, Path], out: Path, settings: TritonSettings) -> None:
    """The repository ``out`` with a model of each bundle; BundleError for one that is broken."""
    bundles = {name: open_bundle(folder) for name, folder in folders.items()}
    with stage_folder(out, measure_bytes(bundles)) as scratch:
        for name, bundle in bundles.items():
            version = scratch / name / VERSION
            shutil.copytree(bundle.folder, version / BUNDLE_FOLDER)
            (version / "model.py").write_text(MODEL, encoding="utf-8")
            (scratch / name / "config.pbtxt").write_text(make_config(name, bundle.manifest, settings), encoding="utf-8")


def measure_bytes(bundles: Mapping[str, Bundle]) -> int:
    """About how much the repository takes."""
    return sum(bundle.total_bytes for bundle in bundles.values())


def make_config(name: str, manifest: Manifest, settings: TritonSettings) -> str:
    """config.pbtxt of one bundle, in protobuf's text format."""
    sides = (
        [-1, -1] if manifest.latents.side_multiple else [manifest.latents.image_height, manifest.latents.image_width]
    )
    parameters = {
        "engine": settings.engine or manifest.engine, "threads": settings.threads or "", "steps": settings.steps,
        "guidance_scale": settings.guidance_scale, "pictures_at_once": settings.batch,
    }  # fmt: skip
    blocks = [
        f"# {TRITON_MARK}",
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {settings.batch}",
        *list_inputs(manifest),
        format_tensor("output", "IMAGES", "TYPE_UINT8", [*sides, 3]),
        format_tensor("output", "SEEDS", "TYPE_INT64", [1]),
        "# The engine opens its own device, so an instance is a process on the CPU for Triton.",
        f"instance_group [ {{ count: {settings.instances} kind: KIND_CPU }} ]",
        f"dynamic_batching {{\n  max_queue_delay_microseconds: {settings.delay_us}\n  default_queue_policy {{\n"
        f"    max_queue_size: {settings.queue}\n    timeout_action: REJECT\n"
        f"    default_timeout_microseconds: {settings.timeout_us}\n    allow_timeout_override: true\n  }}\n}}",
        *(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()),
    ]
    return "\n".join(blocks) + "\n"


def list_inputs(manifest: Manifest) -> list[str]:
    """Inputs that a request to this bundle may have; those that it must have come first."""
    texts = ["PROMPT", "NEGATIVE_PROMPT"] if manifest.reads_text else []
    needed = texts[0] if texts else "SEED"  # a batch needs an input that is always there
    types = {**dict.fromkeys(texts, "TYPE_STRING"), "SEED": "TYPE_INT64", "STEPS": "TYPE_INT32",
             "GUIDANCE_SCALE": "TYPE_FP32"}  # fmt: skip
    if manifest.latents.side_multiple:
        types |= {"WIDTH": "TYPE_INT32", "HEIGHT": "TYPE_INT32"}
    return [format_tensor("input", name, kind, [1], optional=name != needed) for name, kind in types.items()]


def format_tensor(group: str, name: str, kind: str, dims: list[int], *, optional: bool = False) -> str:
    """One input or output."""
    more = " optional: true" if optional else ""
    return f'{group} [ {{ name: "{name}" data_type: {kind} dims: {dims}{more} }} ]'
