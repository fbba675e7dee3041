"""Frozen settings that several floors share: how to quantize, and what each target's graph needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from qdeploy.artifacts.components import COMPONENTS, TEXT_ENCODER, UNET, VAE_DECODER, get_kind
from qdeploy.base.errors import UsageError
from qdeploy.base.names import matches_name

# Kept in float because an error here is spread by every later step while the layers hold a
# fraction of a percent of the MACs (Q-Diffusion, section 4.1); a decoder's 1x1 shortcuts because the
# transposes around their integer product cost more than it saves. Matched as the last dotted names of a module path.
KEEP_FLOAT = {
    UNET.name: (
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "add_embedding.linear_1",  # of Stable Diffusion XL's pooled text and sizes, added to that of the timestep
        "add_embedding.linear_2",
        "time_embedding.cond_proj",  # of the guidance scale
        "time_emb_proj",
    ),
    VAE_DECODER.name: ("post_quant_conv", "conv_in", "conv_out", "conv_shortcut"),
    TEXT_ENCODER.name: (),
}  # by the component's kind


# Read in two integer passes, a 16-bit activation: the 1x1 shortcuts carry x past all
# norms, and at the least noisy steps their rounding is most of the UNet's error (benchmarks/).
TWO_PASSES = {
    UNET.name: ("conv_shortcut", "conv_shortcut.h", "conv_shortcut.skip"),
    VAE_DECODER.name: (),
    TEXT_ENCODER.name: (),
}

# Keys and values of the text: its first token's embedding is an outlier (MixDQ, arXiv 2405.17873, section 4.1)
READ_TEXT = ("attn2.to_k", "attn2.to_v")

OBSERVERS = ("minmax", "percentile", "mse")
ATTENTION_BITS = (0, 8, 16)
PLACE = {"place": True}  # marks a setting on which the result does not depend


@dataclass(frozen=True)
class Reconstruction:
    """AdaRound with block reconstruction (Nagel et al. 2020, arXiv 2004.10568; BRECQ, Li et al. 2021, 2102.05426).

    iterations: optimizer steps for each block.
    samples: calibration inputs that a block is fitted on; cache_gb bounds them on disk.
    gptq_start: V starts from GPTQ's rounding instead of the float weight (Frantar et al. 2023, arXiv 2210.17323).
    learn_act_scales: the layers' input scales are learned too (LSQ, Esser et al. 2020, arXiv 1902.08153).
    """

    iterations: int = 2000
    samples: int = 512
    batch: int = 16
    learn_rounding: bool = True
    gptq_start: bool = True
    learn_act_scales: bool = False
    cache_gb: float = field(default=8.0, metadata=PLACE)
    seed: int = 0
    device: str = field(default="cpu", metadata=PLACE)

    def list_result_settings(self) -> dict[str, Any]:
        """The settings that decide the result: all but where it is computed and how much disk that may take."""
        return {one.name: getattr(self, one.name) for one in fields(self) if "place" not in one.metadata}

    def __post_init__(self) -> None:
        for name in ("iterations", "samples", "batch", "cache_gb"):
            if not 0 < getattr(self, name) < math.inf:  # NaN too, which no comparison would ever stop
                raise UsageError(f"reconstruction {name}: got {getattr(self, name)}, expected a number above 0")


EFFORTS = {
    "fast": Reconstruction(iterations=400, samples=256),
    "standard": Reconstruction(iterations=2000, samples=512),
    "paper": Reconstruction(iterations=20_000, samples=1024, batch=32),
}


@dataclass(frozen=True)
class QuantSpec:
    """How a model is quantized after training.

    components: kinds of those to quantize; keep_float and two_passes have layers by kind too.
    observer: how activation ranges are taken from the histograms, and weight scales from the weights
        ("minmax" for both, otherwise weights take the MSE scale).
    equalize: per-channel ratios between each layer's input and weight, and per-channel output scales.
    gptq: weights are rounded by GPTQ where no reconstruction learns their rounding; otherwise to nearest.
    full_range: 8-bit weights have codes within +-127 only; otherwise within +-64 too, one table for all targets.
    noise_correction: measure PTQD's correction of the quantized UNet for the runtime.
    rewrites: exact rewrites of the UNet made first (qdeploy.models.rewrites): split_skips, timestep_table.
    precise_end: the UNet's convolutions at full size keep their results in float, and the last that reads a skip
        connection takes its input in two passes.
    precise_macs: share of MACs, 0..1, to add in integers where that helps most: second passes over a layer's input,
        and convolutions as products, whose output no engine rounds.
    first_token_float: the text's first token stays in float where the UNet's cross-attention reads it.
    attention_bits: of the attentions' own products, softmax(Q K^T) V; 0 keeps them in float, 16 is for simulation.
    max_mb: most megabytes (1e6 bytes) for the UNet's integer weights and their scales; its layers then take 4 or 8
        weight bits, by their sensitivity at both. Layers in float and biases are not counted.
    """

    weight_bits: int = 8
    components: tuple[str, ...] = COMPONENTS
    keep_float: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(KEEP_FLOAT))
    two_passes: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(TWO_PASSES))
    observer: str = "mse"
    equalize: bool = True
    gptq: bool = True
    full_range: bool = False
    rewrites: tuple[str, ...] = ()
    sensitivity: bool = False
    precise_end: bool = True
    precise_macs: float = 0.0
    max_mb: float | None = None
    reconstruction: Reconstruction | None = None
    noise_correction: bool = False
    first_token_float: bool = False
    attention_bits: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise UsageError(f"weight bits: got {self.weight_bits}, expected 2 to 8")
        if self.observer not in OBSERVERS:
            raise UsageError(f"observer: got {self.observer!r}, expected one of {', '.join(OBSERVERS)}")
        if not 0 <= self.precise_macs < 1:
            raise UsageError(f"share of precise MACs: got {self.precise_macs}, expected 0 or more and less than 1")
        if self.attention_bits not in ATTENTION_BITS:
            raise UsageError(f"attention bits: got {self.attention_bits}, expected 0 (float), 8 or 16")
        if self.max_mb is not None and not 0 < self.max_mb < math.inf:
            raise UsageError(f"--max-mb: got {self.max_mb:g}, expected a number above 0")
        if self.max_mb is not None and self.precise_macs:
            raise UsageError("--max-mb and --precise-macs spend the same sensitivities in two ways; give one of them")

    @property
    def rounds_by_gptq(self) -> bool:
        """Whether weights are rounded by GPTQ; learned rounding starts from its own."""
        return self.gptq and self.reconstruction is None

    def list_result_settings(self) -> dict[str, Any]:
        """The settings that decide the result, see :meth:`Reconstruction.list_result_settings`."""
        learned = None if self.reconstruction is None else self.reconstruction.list_result_settings()
        return {**asdict(self), "reconstruction": learned}

    def keeps_float(self, component: str, layer: str) -> bool:
        """Whether the module path ``layer`` of ``component`` stays in float."""
        return matches_name(layer, self.keep_float[get_kind(component).name])

    def takes_two_passes(self, component: str, layer: str) -> bool:
        """Whether ``layer``'s activation is read in two integer passes."""
        return matches_name(layer, self.two_passes[get_kind(component).name])

    def keeps_first_token_float(self, layer: str) -> bool:
        """Whether ``layer`` reads the text and its first token stays in float."""
        return self.first_token_float and matches_name(layer, READ_TEXT)


def spec_from_options(
    *,
    weight_bits: int = 8,
    observer: str = "mse",
    equalize: bool = True,
    gptq: bool = True,
    full_range: bool = False,
    split: bool = False,
    timestep_table: bool = False,
    keep_float: Sequence[str] = (),
    adaround: bool | None = None,
    effort: str = "standard",
    learn_act_scales: bool = False,
    cache_gb: float = 8.0,
    device: str = "cpu",
    sensitivity: bool = False,
    precise_end: bool = True,
    precise_macs: float = 0.0,
    max_mb: float | None = None,
    noise_correction: bool = False,
    first_token_float: bool = False,
    attention_bits: int = 0,
) -> QuantSpec:
    """The spec that `quantize`'s options (a recipe's too) mean; AdaRound is on where weights may have under 8 bits."""
    if effort not in EFFORTS:
        raise UsageError(f"effort: got {effort!r}, expected one of {', '.join(EFFORTS)}")
    reconstructs = weight_bits < 8 or max_mb is not None if adaround is None else adaround
    if learn_act_scales and not reconstructs:
        raise UsageError("--learn-act-scales: scales are learned together with the rounding; add --adaround")
    reconstruction = replace(EFFORTS[effort], learn_act_scales=learn_act_scales, cache_gb=cache_gb, device=device)
    rewrites = [name for name, on in (("split_skips", split), ("timestep_table", timestep_table)) if on]
    return QuantSpec(
        weight_bits=weight_bits,
        keep_float=KEEP_FLOAT | {UNET.name: (*KEEP_FLOAT[UNET.name], *keep_float)},
        observer=observer,
        equalize=equalize,
        gptq=gptq,
        full_range=full_range,
        rewrites=tuple(rewrites),
        sensitivity=sensitivity,
        precise_end=precise_end,
        precise_macs=precise_macs,
        max_mb=max_mb,
        reconstruction=reconstruction if reconstructs else None,
        noise_correction=noise_correction,
        first_token_float=first_token_float,
        attention_bits=attention_bits,
    )
