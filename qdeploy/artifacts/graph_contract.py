"""What the runtime gives each component's graph and expects of it: names, element types and shapes.

Dimensions are written as symbols. What the manifest says of the latents gives some of them their sizes; every other one
gets the size that it is first met with and must have it everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from qdeploy.artifacts.components import get_kind
from qdeploy.artifacts.graph_format import OPEN, Signature

Pattern: TypeAlias = Mapping[str, tuple[str, tuple[str | int, ...]]]

# A batch is each component's own. UNet inputs: latents, and with inpainting a mask and the masked picture's latents.
INPUTS: Mapping[str, Pattern] = {
    "text_encoder": {"input_ids": ("int64", ("batch", "T"))},
    "unet": {
        "sample": ("float32", ("batch", "C in", "h", "w")),
        "timestep": ("int64", ()),
        "encoder_hidden_states": ("float32", ("batch", "T", "D")),
    },
    "vae_decoder": {"latents": ("float32", ("batch", "C", "h", "w"))},
    "vae_encoder": {"image": ("float32", ("batch", 3, "H", "W"))},
}
OUTPUTS: Mapping[str, Pattern] = {
    "text_encoder": {"hidden": ("float32", ("batch", "T", "D"))},
    "unet": {"noise_pred": ("float32", ("batch", "C", "h", "w"))},
    "vae_decoder": {"image": ("float32", ("batch", 3, "H", "W"))},
    "vae_encoder": {"latents": ("float32", ("batch", "C", "h", "w"))},
}
# The embedding of the guidance scale, which a UNet that was distilled with guidance reads; and Stable Diffusion XL's
# pooled text and sizes, the first of which a text encoder returns.
OPTIONAL_INPUTS: Mapping[str, Pattern] = {
    "unet": {
        "timestep_cond": ("float32", ("batch", "G")),
        "text_embeds": ("float32", ("batch", "P")),
        "time_ids": ("float32", ("batch", 6)),
    }
}
OPTIONAL_OUTPUTS: Mapping[str, Pattern] = {"text_encoder": {"pooled": ("float32", ("batch", "P"))}}
TOGETHER = {"text_embeds", "time_ids"}
MAY_BE_OPEN = {"batch", "h", "w", "H", "W"}
TEXT_INPUT = "encoder_hidden_states"


def find_mismatches(
    signatures: Mapping[str, tuple[Signature, Signature]], sizes: Mapping[str, int], reads_text: bool
) -> Iterator[str]:
    """What does not fit, one sentence each.

    signatures: component -> its inputs and outputs. sizes: of the symbols C, h, w, H, W and, with text, T.
    """
    shared, text_width = dict(sizes), 0
    yield from _find_pooled_mismatches(signatures)
    for name in sorted(signatures, key=lambda name: list(INPUTS).index(get_kind(name).name)):
        kind_name, for_text = get_kind(name).name, get_kind(name).for_text
        known = {symbol: size for symbol, size in shared.items() if symbol != "batch"}
        if for_text:
            known.pop("D", None)  # each has its own; the UNet reads all of them, one after another
        for pattern, signature, kind in zip((INPUTS, OUTPUTS), signatures[name], ("input", "output"), strict=True):
            expected = dict(pattern[kind_name])
            optional = (OPTIONAL_INPUTS if kind == "input" else OPTIONAL_OUTPUTS).get(kind_name, {})
            expected |= {key: value for key, value in optional.items() if key in signature}
            if not reads_text:
                expected.pop(TEXT_INPUT, None)
            if set(signature) != set(expected):
                yield f"{name} has the {kind}s {_join(signature)}, expected {_join(expected)}"
                continue
            for tensor, (dtype, symbols) in expected.items():
                if not _fits(signature[tensor], dtype, symbols, known):
                    yield (
                        f"{name} has the {kind} {tensor} {signature[tensor][0]}{list(signature[tensor][1])}, expected "
                        f"{dtype}[{', '.join(_format_symbol(symbol, known) for symbol in symbols)}]"
                    )
        if for_text:
            text_width += known.get("D", 0)
            known["D"] = text_width
        shared = known


def _find_pooled_mismatches(signatures: Mapping[str, tuple[Signature, Signature]]) -> Iterator[str]:
    """A UNet reads pooled text and sizes, or neither; one text encoder gives that text where it is read."""
    givers = [name for name, (_, outputs) in signatures.items() if "pooled" in outputs]
    for name, (inputs, _) in signatures.items():
        read = TOGETHER & set(inputs)
        if read and read != TOGETHER:
            yield f"{name} has the input {read.pop()}, expected {' and '.join(sorted(TOGETHER))} together"
        if read and len(givers) != 1:
            yield f"{name} reads text_embeds and {', '.join(givers) or 'no text encoder'} gives them, expected one"


def _fits(
    actual: tuple[str, tuple[int, ...]], dtype: str, symbols: tuple[str | int, ...], known: dict[str, int]
) -> bool:
    if actual[0] != dtype or len(actual[1]) != len(symbols):
        return False
    return all(_fits_side(side, symbol, known) for side, symbol in zip(actual[1], symbols, strict=True))


def _fits_side(side: int, symbol: str | int, known: dict[str, int]) -> bool:
    """Whether ``side`` is ``symbol``'s size, which it is given where it has none yet."""
    if isinstance(symbol, int):
        return side == symbol
    if symbol == "C in":
        return side in (known["C"], 2 * known["C"] + 1)
    if side == OPEN and symbol in MAY_BE_OPEN:
        return symbol != "batch" or known.setdefault(symbol, OPEN) == OPEN
    return side >= 1 and known.setdefault(symbol, side) == side


def _format_symbol(symbol: str | int, known: Mapping[str, int]) -> str:
    if symbol == "C in":
        return f"{known['C']} or {2 * known['C'] + 1}"
    return str(known.get(symbol, symbol)) if isinstance(symbol, str) else str(symbol)


def _join(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names))[:200] or "(none)"
