"""What a QuantTable holds, as label-value rows: widths and sizes, how it was made, and the most sensitive layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qdeploy.artifacts.table import ComponentQuant, LayerQuant, load_table
from qdeploy.calibrate.allocate.knapsack import count_layer_bytes

FactRows = list[tuple[str, str]]
DEFAULT_SHOWN = 20  # layers listed by sensitivity unless all are wanted


def describe_table(path: Path, show_all: bool = False) -> FactRows:
    """Facts about the table at ``path``; ``show_all``: all layers by sensitivity, not only the worst 20."""
    table = load_table(path)
    correction = table.noise_correction
    facts = [
        ("table", str(path)),
        ("size", f"{path.stat().st_size / 1e6:.1f} MB"),
        ("model", table.model),
        ("made with", json.dumps(dict(table.provenance))),
        ("noise correction", "none" if correction is None else f"at {len(correction.timesteps)} timesteps"),
    ]
    for name, quant in table.components.items():
        facts += describe_component(name, quant)
        facts += describe_sensitivity(quant, None if show_all else DEFAULT_SHOWN)
    return facts


def describe_component(name: str, quant: ComponentQuant) -> FactRows:
    """One component: its layers by weight bits and in float, and how they were made."""
    layers = quant.layers.values()
    mixed = format_widths(quant.weight_bits)
    facts = [(name, f"{len(layers)} layers in {mixed}, {quant.integer_mac_share():.1%} of MACs")]
    facts += [(f"  W{bits}", format_width(quant, bits)) for bits in quant.weight_bits]
    share = sum(compute_mac_share(quant, layer) for layer in quant.float_layers)
    facts += [
        ("  float", f"{len(quant.float_layers)} layers, {share:.1%} of MACs"),
        ("  rewrites", ", ".join(quant.rewrites) or "none"),
        ("  equalized", format_count([layer.input_ratio is not None for layer in layers])),
        ("  two passes", format_count([layer.passes == 2 for layer in layers])),
        ("  float output", format_count([has_float_output(layer) for layer in layers])),
        ("  corrected biases", format_count([layer.bias is not None for layer in layers])),
        ("  first token in float", format_count([layer.first_token_float for layer in layers])),
        ("  attention", format_attention(quant)),
    ]
    facts += [
        (f"  float: {layer}", f"{float_layer.macs:,} MACs, {float_layer.reason}")
        for layer, float_layer in quant.float_layers.items()
    ]
    return facts


def has_float_output(layer: LayerQuant) -> bool:
    """Whether it is a spatial convolution whose output no engine rounds."""
    return layer.output is None and layer.weight.ndim == 4 and layer.weight.shape[2:] != (1, 1)


def format_attention(quant: ComponentQuant) -> str:
    """Such as ``10 at 8 bits``: attentions whose two products are quantized."""
    bits = sorted({attention.bits for attention in quant.attention.values()})
    return f"{len(quant.attention)} at {'/'.join(map(str, bits))} bits" if bits else "float"


def describe_sensitivity(quant: ComponentQuant, limit: int | None) -> FactRows:
    """The ``limit`` most sensitive layers, or all with None: dB with only that layer quantized, fate and MAC share."""
    ranked = sort_by_sensitivity(quant)
    if not ranked:
        return []
    shown = ranked[:limit]
    rest = "" if len(shown) == len(ranked) else f"; the worst {len(shown)} of {len(ranked)}, --all lists the rest"
    facts = [("  sensitivity", f"output SQNR with only that layer quantized, before any rounding was learned{rest}")]
    return facts + [(f"    {layer}", format_sensitivity(quant, layer)) for layer in shown]


def format_sensitivity(quant: ComponentQuant, layer: str) -> str:
    """Such as `` 31.2 dB  W8  2 passes   4.1% of MACs``, or with the reason in place of bits and passes."""
    share = f"{compute_mac_share(quant, layer):6.2%} of MACs"
    start = f"{quant.sensitivity_db[layer]:5.1f} dB"
    if layer in quant.float_layers:
        return f"{start}  float        {share}, {quant.float_layers[layer].reason}"
    layer_quant = quant.layers[layer]
    passes = f"{layer_quant.passes} pass{'es' if layer_quant.passes > 1 else '  '}"
    return f"{start}  W{layer_quant.weight_bits}  {passes}  {share}"


def sort_by_sensitivity(quant: ComponentQuant) -> list[str]:
    """Layers whose sensitivity was measured, the worst one first."""
    known = [layer for layer in quant.sensitivity_db if layer in quant.layers or layer in quant.float_layers]
    return sorted(known, key=lambda layer: quant.sensitivity_db[layer])


def compute_mac_share(quant: ComponentQuant, layer: str) -> float:
    """Share of all Conv and Linear multiply-accumulates of the component, 0..1."""
    total = quant.total_macs
    macs = quant.float_layers[layer].macs if layer in quant.float_layers else quant.macs[layer]
    return macs / total if total else 0.0


def format_widths(weight_bits: Sequence[int]) -> str:
    """Such as ``W8``, or ``W8/W4`` where widths are mixed."""
    return "/".join(f"W{bits}" for bits in weight_bits) or "float"


def format_width(quant: ComponentQuant, bits: int) -> str:
    """Layers, MAC share and megabytes (1e6 bytes, scales included) at one weight width."""
    names = [name for name, layer in quant.layers.items() if layer.weight_bits == bits]
    share = sum(compute_mac_share(quant, name) for name in names)
    size = sum(count_layer_bytes(quant.layers[name]) for name in names)
    return f"{len(names)} layers, {share:.1%} of MACs, {size / 1e6:.2f} MB"


def format_count(flags: Sequence[bool]) -> str:
    """How many of the layers have the flag, in words."""
    return f"{sum(flags)} of {len(flags)} layers"
