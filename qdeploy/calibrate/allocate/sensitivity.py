"""What each layer's quantization costs by itself: its noise in the component's output, to first order.

A forward and a backward pass of the float component for each input serve all layers, where running it once for each
layer takes hundreds. On `builtin:emoji` the sum over layers is within 1 dB of the noise of the whole simulator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from qdeploy.artifacts.table import ComponentQuant, LayerQuant
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import Feeds
from qdeploy.calibrate.ranges.observe import channel_axis
from qdeploy.models.components import list_outputs
from qdeploy.simulate.layers import InputQuant
from qdeploy.simulate.ops import broadcast_along
from qdeploy.simulate.simulator import build_quant_layer
from qdeploy.targets.base import CALIBRATION_NUMERICS

SAMPLES = 24  # inputs, with one backward pass each

Layer = nn.Conv2d | nn.Linear
Noise = Mapping[str, Tensor]  # float64[ways] a layer


def measure_sensitivity(component: CalibratedComponent, quant: ComponentQuant) -> dict[str, float]:
    """Layer -> SQNR in dB of the component's output with only that layer quantized."""
    noise = measure_noise(component, {name: [layer] for name, layer in quant.layers.items()})
    return {name: sqnr_from_noise(power) for name, (power,) in noise.items()}


def sqnr_from_noise(power: float) -> float:
    """In dB; infinite without noise."""
    return -10 * math.log10(power) if power > 0 else math.inf


def measure_noise(
    component: CalibratedComponent, ways: Mapping[str, Sequence[LayerQuant]]
) -> dict[str, tuple[float, ...]]:
    """For each layer and each way to quantize it: noise power in the output relative to the signal's, mean over inputs.

    For a vector v of random signs and an error e inside the component, with g the gradient of v.y there, (g.e)^2 has
    the expectation |J e|^2, the power of the error after all later layers to first order (Hutchinson 1990). The
    errors are exact, by the simulator's modules. Rounding errors of an input are taken as independent, those at an
    output as independent from channel to channel (a weight's is the same at all positions), which leaves little to
    chance. Of several outputs, the sum of their relative noises.
    """
    noise = {name: torch.zeros(len(several), dtype=torch.float64) for name, several in ways.items()}
    samples = component.sample(SAMPLES)
    generator = torch.Generator().manual_seed(0)
    for done, feeds in enumerate(samples, start=1):
        add_probe(component, ways, noise, feeds, generator)
        component.report("sensitivity", done, len(samples))
    return {name: tuple((power / len(samples)).tolist()) for name, power in noise.items()}


def add_probe(
    component: CalibratedComponent,
    ways: Mapping[str, Sequence[LayerQuant]],
    noise: Noise,
    feeds: Feeds,
    generator: torch.Generator,
) -> None:
    """Add the estimates of one forward and backward pass to ``noise``."""
    leaves: list[Tensor] = []
    with watch_layers(component, ways, noise, leaves), torch.enable_grad():
        outputs = list_outputs(component.module(**feeds))
        probe = torch.stack([project(output, generator) for output in outputs]).sum()
    torch.autograd.backward(probe, inputs=leaves)  # and no gradients of weights


def project(output: Tensor, generator: torch.Generator) -> Tensor:
    """The output along random signs, relative to its norm."""
    signs = torch.randint(0, 2, output.shape, generator=generator).float() * 2 - 1
    projected: Tensor = (output * signs).sum() / output.detach().norm()
    return projected


@contextmanager
def watch_layers(
    component: CalibratedComponent, ways: Mapping[str, Sequence[LayerQuant]], noise: Noise, leaves: list[Tensor]
) -> Iterator[None]:
    """While open, a forward pass keeps its graph, and the backward pass through that adds to ``noise``.

    leaves: gets the inputs at which the graph begins.
    """
    handles = []
    for name, several in ways.items():
        module = component.module.inner.get_submodule(name)
        assert isinstance(module, nn.Conv2d | nn.Linear)  # nothing else is in a table
        quantized = [QuantizedCopy(module, layer) for layer in several]
        handles.append(module.register_forward_pre_hook(partial(watch_input, noise[name], quantized, leaves)))
        handles.append(module.register_forward_hook(partial(watch_output, noise[name], quantized)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class QuantizedCopy:
    """One way to quantize a layer, as most engines compute it, with the two places where it adds errors."""

    def __init__(self, module: Layer, layer: LayerQuant) -> None:
        self.module, self.layer = module, layer.in_half_range()
        numerics = replace(CALIBRATION_NUMERICS, conv_output_quantized=layer.rounds_output)
        self.quantized = build_quant_layer(module, self.layer, numerics)
        assert isinstance(self.quantized.input_quant, InputQuant)
        self.input_quant = self.quantized.input_quant

    def round_input(self, x: Tensor) -> Tensor:
        """The layer's input as its codes have it, in the shape of ``x``."""
        axis = channel_axis(self.module, x)
        codes = x[:, 1:] if self.layer.first_token_float else x
        rounded = torch.stack([back(code) for code, back in self.input_quant(codes, axis)]).sum(dim=0)
        if self.layer.input_ratio is not None:
            rounded = rounded * broadcast_along(torch.from_numpy(self.layer.input_ratio), rounded, axis)
        return torch.cat([x[:, :1], rounded], dim=1) if self.layer.first_token_float else rounded

    def compute_output_error(self, x: Tensor) -> Tensor:
        """What weight and output add to the rounded input's error, in the output's shape."""
        error: Tensor = self.quantized(x) - self.module.forward(self.round_input(x))
        return error


def watch_input(
    noise: Tensor, quantized: Sequence[QuantizedCopy], leaves: list[Tensor], _: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Forward pre-hook: an input of the layer's own (others may read it too), whose gradient adds to ``noise``."""
    x = args[0].view_as(args[0]) if args[0].requires_grad else args[0].detach().requires_grad_()
    if x.is_leaf:
        leaves.append(x)
    values = x.detach()

    def add(gradient: Tensor) -> None:
        for way, copy in enumerate(quantized):
            noise[way] += (gradient * (copy.round_input(values) - values)).square().sum(dtype=torch.float64)

    x.register_hook(add)
    return (x, *args[1:])


def watch_output(
    noise: Tensor, quantized: Sequence[QuantizedCopy], module: Layer, args: tuple[Tensor, ...], y: Tensor
) -> None:
    """Forward hook: the gradient at the output adds to ``noise``."""
    values = args[0].detach()

    def add(gradient: Tensor) -> None:
        over = tuple(range(gradient.dim() - 1)) if isinstance(module, nn.Linear) else (0, 2, 3)
        for way, copy in enumerate(quantized):
            by_channel = (gradient * copy.compute_output_error(values)).sum(dim=over, dtype=torch.float64)
            noise[way] += by_channel.square().sum()

    y.register_hook(add)
