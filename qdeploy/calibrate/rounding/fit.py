"""Fit one unit's rounding, input scales and biases to its float output (AdaRound's arithmetic, BRECQ's loss)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.artifacts.table import LayerQuant
from qdeploy.calibrate.rounding.adaround import LAMBDA, WARM_UP, SoftLayer, anneal_beta, regularizer
from qdeploy.calibrate.rounding.cache import Call, CallCache, RowCache
from qdeploy.calibrate.rounding.gptq import (
    add_to_hessians,
    compute_gptq_codes,
    factorize,
    input_rows,
    measure_largest,
    split_inputs,
)
from qdeploy.calibrate.rounding.unit_calls import StopForward, first_tensor
from qdeploy.calibrate.rounding.units import Unit
from qdeploy.calibrate.spec import Reconstruction
from qdeploy.models.rewrites.surgery import copy_module, replace_module

CHECK_ROWS = 64
ROWS_PER_INPUT = 16  # of GPTQ's least squares
LEARNING_RATES = {"log_scale": 1e-3, "bias": 1e-3}
V_TRAVEL = 40.0  # V must be able to cross from one end of h to the other within the run, whatever its length
V_RATES = (1e-3, 0.1)  # the paper's, for its 20,000 iterations; 300 at 0.1 gained 4.9 dB on a block, at 0.03 4.0

OnIteration = Callable[[int, int, float], None]  # iterations done, of how many, reconstruction error


def fit_unit(
    soft: nn.Module,
    unit: Unit,
    inputs: CallCache,
    outputs: RowCache,
    settings: Reconstruction,
    seed: int,
    progress: OnIteration,
) -> dict[str, LayerQuant]:
    """Adam over V, input scales and biases on random batches; the better of start and end by held-out error."""
    soft = copy_to_device(soft, settings.device)
    softs = {layer: get_soft_layer(soft, unit, layer) for layer in unit.layers}
    rng = np.random.default_rng([settings.seed, seed])
    order = rng.permutation(outputs.count)
    held_out, training = order[:CHECK_ROWS], order[min(CHECK_ROWS, outputs.count // 4) :]
    target = outputs.read(held_out).to(settings.device)
    norm = target.square().mean().clamp(min=1e-12).sqrt()
    start = measure_held_out_error(soft, softs, inputs, held_out, target, norm, settings)
    start_layers = {layer: soft_layer.quant for layer, soft_layer in softs.items()}
    if settings.learn_rounding and settings.gptq_start:
        init_with_gptq(soft, softs, inputs, training, settings)
    optimizer = torch.optim.Adam(build_parameter_groups(softs, settings.iterations), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda _: 1.0, *[cosine_schedule(settings.iterations)] * 2]
    )
    for iteration in range(settings.iterations):
        rows = rng.choice(training, min(settings.batch, len(training)), replace=False)
        args, kwargs = inputs.read(rows, settings.device)
        optimizer.zero_grad(set_to_none=True)
        error = reconstruction_loss(soft, args, kwargs, outputs.read(rows).to(settings.device), norm)
        loss = error + rounding_loss(softs, iteration / settings.iterations, settings)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(iteration + 1, settings.iterations, error.item())
    end = measure_held_out_error(soft, softs, inputs, held_out, target, norm, settings)
    return {layer: soft_layer.to_layer_quant() for layer, soft_layer in softs.items()} if end < start else start_layers


def build_soft_unit(
    module: nn.Module, unit: Unit, before: Mapping[str, LayerQuant], settings: Reconstruction
) -> nn.Module:
    """A copy of the unit, its float weights shared, with a SoftLayer for each of its quantized layers."""
    soft = copy_module(module)
    for layer in unit.layers:
        inner_name = name_in_unit(unit, layer)
        if not inner_name:
            return SoftLayer(soft, before[layer], settings)  # type: ignore[arg-type]
        replace_module(soft, inner_name, SoftLayer(soft.get_submodule(inner_name), before[layer], settings))  # type: ignore[arg-type]
    return soft


def get_soft_layer(soft: nn.Module, unit: Unit, layer: str) -> SoftLayer:
    """The soft layer in the unit's copy ``soft`` that has taken the place of ``layer``, named by its module path."""
    layer_module = soft.get_submodule(name_in_unit(unit, layer))
    assert isinstance(layer_module, SoftLayer)
    return layer_module


def name_in_unit(unit: Unit, layer: str) -> str:
    """The layer's name inside its unit; empty where it is the unit."""
    return layer.removeprefix(unit.name).lstrip(".")


def copy_to_device(soft: nn.Module, device: str) -> nn.Module:
    """``soft`` itself on the CPU, elsewhere a copy: the float weights it shares with the model stay where they are."""
    return soft if device == "cpu" else copy.deepcopy(soft).to(device)


@torch.no_grad()
def init_with_gptq(
    soft: nn.Module, softs: Mapping[str, SoftLayer], inputs: CallCache, rows: np.ndarray, settings: Reconstruction
) -> None:
    """Round each layer by GPTQ on its input after the unit's preceding rounded layers, as a start for V."""
    set_hard_rounding(softs, True)
    for soft_layer in softs.values():
        blocks, hessians, row_count = split_inputs(soft_layer.layer), list[Tensor](), 0
        for chunk in np.array_split(rows, -(-len(rows) // settings.batch)):
            x = capture_input(soft_layer, soft, inputs.read(chunk, settings.device))
            part = input_rows(soft_layer.layer, soft_layer.effective_input(x))
            hessians, row_count = add_to_hessians(hessians, part, blocks), row_count + len(part)
            if row_count >= ROWS_PER_INPUT * measure_largest(blocks):
                break
        steps = soft_layer.weight_in_steps().flatten(1)
        codes = [
            compute_gptq_codes(steps[:, slice(*block)], factorize(hessian), soft_layer.low, soft_layer.high)
            for block, hessian in zip(blocks, hessians, strict=True)
        ]
        soft_layer.init_from_codes(torch.cat(codes, dim=1).view_as(soft_layer.floor))
    set_hard_rounding(softs, False)


def set_hard_rounding(softs: Mapping[str, SoftLayer], hard: bool) -> None:
    """Switch the layers between hard and soft rounding of their weights."""
    for soft_layer in softs.values():
        soft_layer.hard = hard


def capture_input(soft_layer: SoftLayer, soft: nn.Module, call: Call) -> Tensor:
    """The input of ``get_soft_layer`` in ``soft(*args, **kwargs)``."""
    captured: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured.append(args[0])
        raise StopForward

    handle = soft_layer.register_forward_pre_hook(hook)
    try:
        soft(*call[0], **call[1])
    except StopForward:
        pass
    finally:
        handle.remove()
    return captured[0]


def reconstruction_loss(
    soft: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor, norm: Tensor
) -> Tensor:
    """Reconstruction loss: squared error summed over channels, mean over the rest (BRECQ), in units of the target."""
    output = first_tensor(soft(*args, **kwargs))
    channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
    return ((output - target) / norm).square().mean() * channels


def rounding_loss(softs: Mapping[str, SoftLayer], progress: float, settings: Reconstruction) -> Tensor | float:
    """The regularizer of every layer of the unit, both halves of a split one included; none while warming up."""
    if progress < WARM_UP or not settings.learn_rounding:
        return 0.0
    return LAMBDA * torch.stack([regularizer(soft.v, anneal_beta(progress)) for soft in softs.values()]).sum()


def measure_held_out_error(
    soft: nn.Module, softs: Mapping[str, SoftLayer], inputs: CallCache, rows: np.ndarray, target: Tensor, norm: Tensor,
    settings: Reconstruction,
) -> float:  # fmt: skip
    """Held-out loss with all weights rounded."""
    set_hard_rounding(softs, True)
    with torch.no_grad():
        args, kwargs = inputs.read(rows, settings.device)
        error = float(reconstruction_loss(soft, args, kwargs, target, norm))
    set_hard_rounding(softs, not settings.learn_rounding)
    return error


def build_parameter_groups(softs: Mapping[str, SoftLayer], iterations: int) -> list[dict[str, Any]]:
    """V first, with a constant rate; then scales and biases, whose rate falls by a cosine."""

    def collect(name: str) -> list[nn.Parameter]:
        return [parameter for soft in softs.values() if (parameter := getattr(soft, name)) is not None]

    v_rate = float(np.clip(V_TRAVEL / iterations, *V_RATES))
    return [
        {"params": collect("v"), "lr": v_rate},
        *({"params": collect(n), "lr": rate} for n, rate in LEARNING_RATES.items()),
    ]


def cosine_schedule(iterations: int) -> Callable[[int], float]:
    """The factor of the rates at each iteration: 1 at the first, 0 from the last on."""
    return lambda step: 0.5 * (1 + np.cos(np.pi * min(step / iterations, 1)))
