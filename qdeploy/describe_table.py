"""What a QuantTable holds, as label-value rows: widths and sizes, how it was made, and the most sensitive layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qdeploy.calibrate.allocate import layer_bytes
from qdeploy.table import ComponentQuant, load_table

Facts = list[tuple[str, str]]
SHOWN = 20  # layers listed by sensitivity unless all are wanted


def describe_table(path: Path, every: bool = False) -> Facts:
    """Facts about the table at ``path``; ``every``: all layers by sensitivity, not the worst 20 alone."""
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
        facts += component_facts(name, quant)
        facts += sensitivity_facts(quant, None if every else SHOWN)
    return facts


def component_facts(name: str, quant: ComponentQuant) -> Facts:
    """One component: its layers by weight bits and in float, and how they were made."""
    layers = quant.layers.values()
    mixed = widths_text(quant.weight_bits)
    facts = [(name, f"{len(layers)} layers in {mixed}, {quant.integer_mac_share():.1%} of MACs")]
    facts += [(f"  W{bits}", width_text(quant, bits)) for bits in quant.weight_bits]
    share = sum(mac_share(quant, layer) for layer in quant.float_layers)
    facts += [
        ("  float", f"{len(quant.float_layers)} layers, {share:.1%} of MACs"),
        ("  rewrites", ", ".join(quant.rewrites) or "none"),
        ("  equalized", counted([layer.input_ratio is not None for layer in layers])),
        ("  two passes", counted([layer.passes == 2 for layer in layers])),
        ("  corrected biases", counted([layer.bias is not None for layer in layers])),
        ("  first token in float", counted([layer.first_token_float for layer in layers])),
        ("  attention", attention_text(quant)),
    ]
    facts += [(f"  float: {layer}", f"{kept.macs:,} MACs, {kept.reason}") for layer, kept in quant.float_layers.items()]
    return facts


def attention_text(quant: ComponentQuant) -> str:
    """Such as ``10 at 8 bits``: attentions whose two products are quantized."""
    bits = sorted({found.bits for found in quant.attention.values()})
    return f"{len(quant.attention)} at {'/'.join(map(str, bits))} bits" if bits else "float"


def sensitivity_facts(quant: ComponentQuant, most: int | None) -> Facts:
    """The ``most`` sensitive layers, or all with None: dB with that layer alone quantized, fate and MAC share."""
    ranked = by_sensitivity(quant)
    if not ranked:
        return []
    shown = ranked[:most]
    rest = "" if len(shown) == len(ranked) else f"; the worst {len(shown)} of {len(ranked)}, --all lists the rest"
    facts = [("  sensitivity", f"output SQNR with that layer alone quantized, before any rounding was learned{rest}")]
    return facts + [(f"    {layer}", sensitivity_text(quant, layer)) for layer in shown]


def sensitivity_text(quant: ComponentQuant, layer: str) -> str:
    """Such as `` 31.2 dB  W8  2 passes   4.1% of MACs``, or with the reason in place of bits and passes."""
    share = f"{mac_share(quant, layer):6.2%} of MACs"
    start = f"{quant.sensitivity_db[layer]:5.1f} dB"
    if layer in quant.float_layers:
        return f"{start}  float        {share}, {quant.float_layers[layer].reason}"
    found = quant.layers[layer]
    return f"{start}  W{found.weight_bits}  {found.passes} pass{'es' if found.passes > 1 else '  '}  {share}"


def by_sensitivity(quant: ComponentQuant) -> list[str]:
    """Layers whose sensitivity was measured, the worst one first."""
    known = [layer for layer in quant.sensitivity_db if layer in quant.layers or layer in quant.float_layers]
    return sorted(known, key=lambda layer: quant.sensitivity_db[layer])


def mac_share(quant: ComponentQuant, layer: str) -> float:
    """Share of all Conv and Linear multiply-accumulates of the component, 0..1."""
    total = quant.total_macs
    macs = quant.float_layers[layer].macs if layer in quant.float_layers else quant.macs[layer]
    return macs / total if total else 0.0


def widths_text(weight_bits: Sequence[int]) -> str:
    """Such as ``W8``, or ``W8/W4`` where widths are mixed."""
    return "/".join(f"W{bits}" for bits in weight_bits) or "float"


def width_text(quant: ComponentQuant, bits: int) -> str:
    """Layers, MAC share and megabytes (1e6 bytes, scales included) at one weight width."""
    names = [name for name, layer in quant.layers.items() if layer.weight_bits == bits]
    share = sum(mac_share(quant, name) for name in names)
    size = sum(layer_bytes(quant.layers[name]) for name in names)
    return f"{len(names)} layers, {share:.1%} of MACs, {size / 1e6:.2f} MB"


def counted(flags: Sequence[bool]) -> str:
    return f"{sum(flags)} of {len(flags)} layers"
