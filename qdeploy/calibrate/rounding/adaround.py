"""AdaRound: learn for each weight whether it is rounded down or up (Nagel et al. 2020, arXiv 2004.10568).

Symbols are the paper's: V the continuous variable, h(V) the rectified sigmoid (eq. 23), f_reg the
regularizer that pushes h to 0 or 1 (eq. 24). :class:`SoftLayer` is a Conv or Linear in training:
weight rounded by h(V), input quantized with a straight-through gradient (LSQ, Esser et al. 2020,
arXiv 1902.08153) to the scale.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdeploy.artifacts.table import Affine, LayerQuant
from qdeploy.calibrate.ranges.observe import channel_axis
from qdeploy.calibrate.ranges.weights import weight_range
from qdeploy.calibrate.rounding.gradients import GAMMA, ZETA, FakeQuantize, RectifiedSigmoid, RoundingRegularizer
from qdeploy.calibrate.spec import Reconstruction
from qdeploy.simulate.ops import broadcast_along

BETA_HIGH, BETA_LOW = 20.0, 2.0
WARM_UP = 0.2  # share of the iterations without regularizer
LAMBDA = 0.01
CODE_SHARE = 0.75  # h of a code that the weight is given, against its neighbour


def h(v: Tensor) -> Tensor:
    """``clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)``, eq. 23."""
    rectified: Tensor = RectifiedSigmoid.apply(v)
    return rectified


def v_from_share(share: Tensor) -> Tensor:
    """The V whose h(V) is ``share``, in 0..1 (not the ends, where h is flat)."""
    unit = (share - GAMMA) / (ZETA - GAMMA)
    return torch.log(unit / (1 - unit))


def regularizer(v: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h(V) - 1|^beta)``, eq. 24."""
    penalty: Tensor = RoundingRegularizer.apply(h(v), beta)
    return penalty


def anneal_beta(progress: float) -> float:
    """Annealed from 20 to 2 by a cosine once the warm-up share of ``progress`` 0..1 is over."""
    after = max(0.0, (progress - WARM_UP) / (1 - WARM_UP))
    return BETA_LOW + 0.5 * (BETA_HIGH - BETA_LOW) * (1 + math.cos(after * math.pi))


class SoftLayer(nn.Module):
    """A Conv or Linear whose rounding, bias and input scale are being learned."""

    ratio: Tensor
    weight_scale: Tensor
    floor: Tensor  # shaped like the weight, as are ``free`` and ``step``: weight = (floor + free h(V)) step
    free: Tensor
    step: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, quant: LayerQuant, settings: Reconstruction) -> None:
        super().__init__()
        self.low, self.high = weight_range(quant.weight_bits, half=quant.half_weight is not None)
        self.layer, self.quant = layer, quant = layer, quant.in_half_range()
        ratio = torch.ones(layer.weight.shape[1]) if quant.input_ratio is None else torch.from_numpy(quant.input_ratio)
        self.register_buffer("ratio", ratio)
        self.register_buffer("weight_scale", broadcast_along(torch.from_numpy(quant.weight_scale), layer.weight, 0))
        for name in ("floor", "free", "step"):
            self.register_buffer(name, None)
        self.v = nn.Parameter(torch.empty_like(layer.weight), requires_grad=settings.learn_rounding)
        steps = self.weight_in_steps()
        self.init_rounding(steps.floor(), steps - steps.floor())
        self.hard = not settings.learn_rounding
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(quant.input.scale)), requires_grad=settings.learn_act_scales and quant.passes == 1
        )

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own: ``float32[B, in, ...]`` -> ``float32[B, out, ...]``, or channels last for a Linear."""
        if self.quant.first_token_float:  # float[B, T, C]; the first token stays in float, so nothing is learned on it
            return torch.cat([self.layer(x[:, :1]), self.forward_soft(x[:, 1:])], dim=1)
        return self.forward_soft(x)

    def forward_soft(self, x: Tensor) -> Tensor:
        """The layer with its weight and input as rounded so far."""
        x, weight = self.quantize_input(x), self.weight()
        if isinstance(self.layer, nn.Conv2d):
            conv = self.layer
            return F.conv2d(x, weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return F.linear(x, weight, self.bias)

    def weight_in_steps(self) -> Tensor:
        """The float weight in units of its scale, like ``floor``."""
        return self.layer.weight.detach() * broadcast_along(self.ratio, self.v, 1) / self.weight_scale

    def effective_input(self, x: Tensor) -> Tensor:
        """The integer weight's other factor when the layer is given ``x``: quantized, ratio taken out."""
        x = x[:, 1:] if self.quant.first_token_float else x
        return self.quantize_input(x) / broadcast_along(self.ratio, x, channel_axis(self.layer, x))

    def init_from_codes(self, codes: Tensor) -> None:
        """Let V choose between each of these codes and its neighbour towards the float weight, leaning to the code."""
        steps = self.weight_in_steps()
        floor = torch.where(steps >= codes, codes, codes - 1)
        self.init_rounding(floor, CODE_SHARE * (codes - floor) + (1 - CODE_SHARE) * (steps - floor).clamp(0, 1))

    def init_rounding(self, floor: Tensor, share: Tensor) -> None:
        """Let V choose between ``floor`` and one more, ``share`` 0..1 of the way up; both within the weight's bits."""
        self.floor = floor.clamp(self.low, self.high)
        self.free = ((floor >= self.low) & (floor < self.high)).float()  # others are at an end whatever V says
        self.step = self.weight_scale / broadcast_along(self.ratio, floor, 1)
        self.v.data.copy_(v_from_share(share))

    def weight(self) -> Tensor:
        """The weight as the layer sees it, ratio taken out again."""
        return self.codes() * self.step

    def codes(self) -> Tensor:
        """``clip(floor(w / s) + h(V))``; h rounded once ``hard``."""
        return torch.addcmul(self.floor, (self.v > 0).float() if self.hard else h(self.v), self.free)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Input through its 8-bit quantizer; two passes round off almost nothing, so nothing is learned."""
        if self.quant.passes == 2:
            return x
        ratio = broadcast_along(self.ratio, x, channel_axis(self.layer, x))
        quantized: Tensor = FakeQuantize.apply(x, self.log_scale, ratio, self.quant.input.zero_point)
        return quantized

    def learned_input(self) -> Affine:
        """The input's quantizer, with its scale as learned."""
        initial = self.quant.input
        return Affine(float(self.log_scale.exp()), initial.zero_point) if self.log_scale.requires_grad else initial

    def to_layer_quant(self) -> LayerQuant:
        """The learned layer, as the table holds it."""
        with torch.no_grad():
            self.hard = True
            return replace(
                self.quant,
                weight=self.codes().to(torch.int8).cpu().numpy() if self.v.requires_grad else self.quant.weight,
                input=self.learned_input(),
                bias=None if self.bias is None else self.bias.detach().cpu().numpy().copy(),
            )
