"""What a model, calibration set, table or bundle holds, as label-value rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.components import TEXT_ENCODER, VAE_DECODER
from qdeploy.artifacts.file_kind import CALIBRATION, TABLE, read_file_kind
from qdeploy.artifacts.graph_format import GraphFormat, find_format
from qdeploy.artifacts.manifest import MANIFEST, ComponentInfo
from qdeploy.artifacts.table import QuantTable, load_table
from qdeploy.base.errors import UsageError
from qdeploy.inspection.table import FactRows, describe_table, format_widths

if TYPE_CHECKING:
    from qdeploy.calibrate.dataset import CalibrationSet

MAX_GRAPH_BYTES = 2**31  # of a lone file, whose weights may be in it


def describe(path: str, show_all: bool = False) -> FactRows:
    """Facts about the file or folder at ``path``; UsageError when it is nothing that qdeploy knows.

    ``show_all``: list all layers of a table by sensitivity, not only the worst.
    """
    if path.startswith("builtin:") or (Path(path) / "model_index.json").is_file():
        return describe_model(path)
    if (Path(path) / MANIFEST).is_file():
        return describe_bundle(Path(path))
    key = read_file_kind(Path(path))
    if key == TABLE:
        return describe_table(Path(path), show_all)
    if key == CALIBRATION:
        return describe_calibration(Path(path))
    if Path(path).is_file() and is_checkpoint(path):
        return describe_single_file(Path(path))
    graph_format = find_format(Path(path))
    if Path(path).is_file() and graph_format is not None:
        return describe_graph(Path(path), graph_format)
    raise UsageError(
        f"{path} is neither a model folder or checkpoint file, builtin:NAME, a calibration set, a table, a bundle nor "
        "a graph's file"
    )


def is_checkpoint(path: str) -> bool:
    """Whether ``path`` is a model in one file, by its content or suffix."""
    from qdeploy.models.checkpoints.file import may_be_checkpoint

    return may_be_checkpoint(Path(path))


def load_table_to_plot(path: str) -> QuantTable:
    """The table at ``path``; UsageError when something else lies there."""
    if read_file_kind(Path(path)) != TABLE:
        raise UsageError(f"--plot draws a table's sensitivities and {path} is no table; give one of `qdeploy quantize`")
    return load_table(Path(path))


def describe_bundle(path: Path) -> FactRows:
    """Target, sizes, bits and provenance; BundleError where a hash differs."""
    bundle = open_bundle(path)
    manifest = bundle.manifest
    facts = [
        ("bundle", str(path)),
        ("kind", manifest.kind),
        ("target", f"{manifest.target} ({manifest.precision})"),
        ("size", f"{bundle.total_bytes / 1e6:.1f} MB, hashes verified"),
        ("model", str(manifest.provenance.get("model"))),
        *(("lora", str(lora)) for lora in manifest.provenance.get("loras", [])),
    ]
    for name, info in manifest.components.items():
        facts.append(
            (
                name,
                ", ".join(
                    [
                        f"{bundle.component_bytes(name) / 1e6:.1f} MB",
                        f"{format_widths(info.weight_bits)}A{info.act_bits}",
                        *format_gate(info),
                    ]
                ),
            )
        )
        facts += [(f"  {key}", f"{t.dtype}{list(t.shape)}") for key, t in {**info.inputs, **info.outputs}.items()]
    return facts


def format_gate(info: ComponentInfo) -> list[str]:
    """Results of the export gate, and what it did not check."""
    ran = "engine" if info.parity_engine is None else info.parity_engine
    figures = {
        f"{ran}/simulator": info.parity_db,
        f"{ran}/float": info.engine_sqnr_db,
        "simulator/float": info.simulator_sqnr_db,
    }
    measured = [f"{pair} {db:.1f} dB" for pair, db in figures.items() if db is not None]
    location = " in the file" if info.parity_engine is not None or info.acceptance else ""
    texts = [f"{info.integer_mac_share:.1%} of MACs in int8{location}"]
    texts += [f"SQNR {', '.join(measured)}"] if measured else []
    texts += [f"computed by {ran} instead of the engine"] if measured and info.parity_engine is not None else []
    return texts + ([info.acceptance] if info.acceptance else [])


def describe_graph(path: Path, graph_format: GraphFormat) -> FactRows:
    """A graph file's signature; what it computes is for ``--audit``."""
    try:
        graph = graph_format.read(path, max(graph_format.max_bytes, MAX_GRAPH_BYTES))
    except (OSError, ValueError) as exc:
        raise UsageError(f"{path} is not a readable {graph_format.title} ({exc}); get the file again") from exc
    tensors = {**graph.inputs, **graph.outputs}
    return [
        ("graph", str(path)),
        ("size", f"{path.stat().st_size / 1e6:.1f} MB"),
        ("weights in", ", ".join(sorted(graph.external_files - {""})) or "the file itself"),
        *((f"  {name}", f"{dtype}{list(shape)}") for name, (dtype, shape) in tensors.items()),
    ]


def describe_calibration(path: Path) -> FactRows:
    """Counts of each component's inputs, and provenance."""
    from qdeploy.calibrate.dataset_file import load_calibration

    calibration = load_calibration(path)
    return [
        ("calibration set", str(path)),
        ("made with", json.dumps(dict(calibration.provenance))),
        (
            "unet samples",
            f"{len(calibration.sample)} x {list(calibration.sample.shape[1:])}, " + describe_halves(calibration),
        ),
        (
            "timesteps",
            f"{len(calibration.timestep.unique())} from {calibration.timestep.min()} to {calibration.timestep.max()}",
        ),
        ("text encoder inputs", str(calibration.count(TEXT_ENCODER.name))),
        *(
            []
            if calibration.pooled is None
            else [("pooled text", f"{calibration.pooled.shape[1]} channels, and sizes")]
        ),
        ("decoder latents", str(calibration.count(VAE_DECODER.name))),
    ]


def describe_halves(calibration: CalibrationSet) -> str:
    """Which guidance halves ran on the samples."""
    if calibration.contexts is None:
        return "unconditional"
    if not calibration.is_guided:
        return "without guidance"
    if calibration.guided is None:
        return "both guidance halves"
    return f"both guidance halves of {int(calibration.guided.sum())}, the others without guidance"


def describe_single_file(path: Path) -> FactRows:
    """An original checkpoint by its tensors' names and shapes; no weight is read."""
    from qdeploy.models.checkpoints import describe_checkpoint
    from qdeploy.models.name_architecture import NAMES

    summary = describe_checkpoint(path)
    return [
        ("model", str(path)),
        ("size", f"{path.stat().st_size / 1e6:.1f} MB"),
        ("kind", summary.kind),
        ("architecture", NAMES[summary.kind]),
        ("picture", f"{summary.image_side}x{summary.image_side}"),
        ("latents", "x".join(map(str, summary.latents))),
        ("averaged weights", "of the UNet, take them with --ema" if summary.ema else "none"),
        *(("corrected", text) for text in summary.corrections),
        *((name, f"{count / 1e6:.2f} M parameters") for name, count in summary.parameters.items()),
        ("missing", "; ".join(summary.missing) or "nothing"),
    ]


def describe_model(source: str) -> FactRows:
    """Sizes of pictures and latents, and parameters of each component; reads the weights."""
    from qdeploy.models.name_architecture import name_architecture
    from qdeploy.models.source import load_model

    model = load_model(source)
    latents = model.latents
    facts = [
        ("model", source),
        ("architecture", name_architecture(model)),
        ("picture", f"{latents.image_width}x{latents.image_height}"),
        ("latents", f"{latents.channels}x{latents.height}x{latents.width}"),
        ("kind", model.kind),
        *([("prompt", f"{latents.tokens} tokens")] if model.reads_text else []),
        ("scheduler", str(model.scheduler_config.get("_class_name"))),
        *(("corrected", text) for text in model.corrections),
    ]
    for name in model.components:
        component = model.component(name)
        count = sum(parameter.numel() for parameter in component.parameters())
        facts.append((name, f"{count / 1e6:.2f} M parameters{component.remark}"))
    return facts
