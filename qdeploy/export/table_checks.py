"""What a table must be so that a model can be exported with it; its own values were checked when it was read."""

from __future__ import annotations

from qdeploy.artifacts.table import QuantTable
from qdeploy.base.errors import ExportError, TableError
from qdeploy.models.source import LatentDiffusion


def check_weights(table: QuantTable, model: LatentDiffusion) -> None:
    """TableError unless ``model`` holds the weights that the table was made for, fused LoRA files included."""
    if table.model_sha256 != model.sha256:
        loras = list(table.provenance.get("loras", []))
        fused = f", which had {' and '.join(loras)} fused in (--lora)" if loras else ""
        raise TableError(
            f"the table was made for other weights than {model.source} holds now{fused}; load the same model "
            "or quantize this one again"
        )


def check_probes(table: QuantTable, model: LatentDiffusion) -> None:
    """TableError unless every component has recorded inputs, of the model's names, types and shapes, for the gate."""
    for name in table.components:
        probes = table.probes.get(name)
        if not probes:
            raise TableError(f"the table holds no probes for {name}; make it again with `qdeploy quantize`")
        example = {key: value.numpy() for key, value in model.make_example(name, batch=1).items()}
        expected = {key: (value.dtype, value.shape[1:]) for key, value in example.items()}
        for probe in probes:
            actual = {key: (value.dtype, value.shape[1:]) for key, value in probe.items()}
            if actual != expected:
                shown = ", ".join(f"{key} {value.dtype}{list(value.shape)}" for key, value in probe.items())
                raise TableError(
                    f"the table's probes for {name} are {shown[:300]}, which this model does not take; make it again "
                    "with `qdeploy quantize`"
                )


def check_exportable(table: QuantTable) -> None:
    """ExportError when the table holds what only the simulator computes."""
    wide = [
        name
        for quant in table.components.values()
        for name, attention in quant.attention.items()
        if attention.bits == 16
    ]
    if wide:
        raise ExportError(
            f"{wide[0]} and {len(wide) - 1} more attentions are quantized to 16 bits, which no engine has integer "
            "kernels for; quantize again with --attention-bits 8, or 0 for float attention"
        )
