"""Frozen settings that several floors share: how to quantize, and what each target's graph needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from qdeploy.errors import UsageError

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
GRAPH_BATCH = {"text_encoder": 1, "unet": 2, "vae_decoder": 1}  # static; the UNet's two are the CFG halves

# Kept in float because an error here is spread by every later step while the layers hold a
# fraction of a percent of the MACs (QUANT.md; Q-Diffusion, section 4.1). Matched as the last
# dotted names of a module path.
KEEP_FLOAT = {
    "unet": ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "time_emb_proj"),
    "vae_decoder": ("post_quant_conv", "conv_in", "conv_out"),
    "text_encoder": (),
}


@dataclass(frozen=True)
class QuantSpec:
    """How a model is quantized after training."""

    weight_bits: int = 8
    act_bits: int = 8
    components: tuple[str, ...] = COMPONENTS
    keep_float: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(KEEP_FLOAT))

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8):
            raise UsageError(f"weight bits: got {self.weight_bits}, expected 4 or 8")
        if self.act_bits != 8:
            raise UsageError(
                f"activation bits: got {self.act_bits}, expected 8 (the engines' integer kernels are 8 bit)"
            )

    def keeps_float(self, component: str, layer: str) -> bool:
        """Whether the module path ``layer`` of ``component`` stays in float."""
        return any(layer == tail or layer.endswith("." + tail) for tail in self.keep_float[component])


@dataclass(frozen=True)
class TargetSpec:
    """What one target's graph needs; its lowering lives in ``qdeploy/export/targets``."""

    name: str
    engine: str
    opset: int
    conv_output_quantized: bool  # ONNX Runtime makes an integer Conv only where a Q follows it


TARGETS = {spec.name: spec for spec in (TargetSpec("ort-cpu", "ort-cpu", opset=20, conv_output_quantized=True),)}


def target_named(name: str) -> TargetSpec:
    """The target called ``name``; UsageError lists the known ones."""
    if name not in TARGETS:
        raise UsageError(f"unknown --target {name!r}; known targets: {', '.join(sorted(TARGETS))}")
    return TARGETS[name]
