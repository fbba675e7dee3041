"""Fit one unit's rounding, input scales and biases to its float output (AdaRound's arithmetic, BRECQ's loss)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.calibrate.adaround import LAMBDA, WARM_UP, SoftLayer, beta_at, regularizer
from qdeploy.calibrate.cache import CallCache, Rows
from qdeploy.calibrate.gptq import MOST_INPUTS, gptq_codes, hessian_of
from qdeploy.calibrate.unit_calls import Stop, first_tensor
from qdeploy.calibrate.units import Unit
from qdeploy.models.rewrites.surgery import copy_of, replace_module
from qdeploy.spec import Reconstruction
from qdeploy.table import LayerQuant

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
    outputs: Rows,
    settings: Reconstruction,
    seed: int,
    progress: OnIteration,
) -> dict[str, LayerQuant]:
    """Adam over V, input scales and biases on random batches; the better of start and end by held-out error."""
    soft = on_device(soft, settings.device)
    softs = {layer: soft_layer(soft, unit, layer) for layer in unit.layers}
    rng = np.random.default_rng([settings.seed, seed])
    order = rng.permutation(outputs.count)
    held_out, training = order[:CHECK_ROWS], order[min(CHECK_ROWS, outputs.count // 4) :]
    target = outputs.read(held_out).to(settings.device)
    norm = target.square().mean().clamp(min=1e-12).sqrt()
    start = hard_error(soft, softs, inputs, held_out, target, norm, settings)
    start_layers = {layer: one.quant for layer, one in softs.items()}
    if settings.learn_rounding and settings.gptq_start:
        start_second_order(soft, softs, inputs, training, settings)
    optimizer = torch.optim.Adam(parameter_groups(softs, settings.iterations), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, *[cosine(settings.iterations)] * 2])
    for iteration in range(settings.iterations):
        rows = rng.choice(training, min(settings.batch, len(training)), replace=False)
        args, kwargs = inputs.read(rows, settings.device)
        optimizer.zero_grad(set_to_none=True)
        error = channel_sum(soft, args, kwargs, outputs.read(rows).to(settings.device), norm)
        loss = error + rounding_loss(softs, iteration / settings.iterations, settings)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(iteration + 1, settings.iterations, error.item())
    end = hard_error(soft, softs, inputs, held_out, target, norm, settings)
    return {layer: one.result() for layer, one in softs.items()} if end < start else start_layers


def soft_unit(module: nn.Module, unit: Unit, before: Mapping[str, LayerQuant], settings: Reconstruction) -> nn.Module:
    """A copy of the unit, its float weights shared, with a SoftLayer for each of its quantized layers."""
    soft = copy_of(module)
    for layer in unit.layers:
        inside = below(unit, layer)
        if not inside:
            return SoftLayer(soft, before[layer], settings)  # type: ignore[arg-type]
        replace_module(soft, inside, SoftLayer(soft.get_submodule(inside), before[layer], settings))  # type: ignore[arg-type]
    return soft


def soft_layer(soft: nn.Module, unit: Unit, layer: str) -> SoftLayer:
    found = soft.get_submodule(below(unit, layer))
    assert isinstance(found, SoftLayer)
    return found


def below(unit: Unit, layer: str) -> str:
    """The layer's name inside its unit; empty where it is the unit."""
    return layer.removeprefix(unit.name).lstrip(".")


def on_device(soft: nn.Module, device: str) -> nn.Module:
    """``soft`` itself on the CPU, elsewhere a copy: the float weights it shares with the model stay where they are."""
    return soft if device == "cpu" else copy.deepcopy(soft).to(device)


@torch.no_grad()
def start_second_order(
    soft: nn.Module, softs: Mapping[str, SoftLayer], inputs: CallCache, rows: np.ndarray, settings: Reconstruction
) -> None:
    """Round each layer by GPTQ on what it reads behind the unit's rounded layers before it, for V to start from."""
    set_hard(softs, True)
    for one in softs.values():
        if one.floor[0].numel() > MOST_INPUTS:
            continue
        hessian, seen = torch.zeros((), device=settings.device), 0
        for chunk in np.array_split(rows, -(-len(rows) // settings.batch)):
            part, count = hessian_of(
                one.layer, one.multiplied(input_of(one, soft, inputs.read(chunk, settings.device)))
            )
            hessian, seen = hessian + part, seen + count
            if seen >= ROWS_PER_INPUT * len(hessian):
                break
        codes = gptq_codes(one.steps().flatten(1), hessian, one.low, one.high)
        one.start_from(codes.view_as(one.floor))
    set_hard(softs, False)


def set_hard(softs: Mapping[str, SoftLayer], hard: bool) -> None:
    """Whether the layers round their weights for good."""
    for one in softs.values():
        one.hard = hard


def input_of(one: SoftLayer, soft: nn.Module, call: tuple[tuple, dict]) -> Tensor:
    """What ``one`` is given in ``soft(*args, **kwargs)``."""
    seen = []

    def hook(_: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise Stop

    handle = one.register_forward_pre_hook(hook)
    try:
        soft(*call[0], **call[1])
    except Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def channel_sum(soft: nn.Module, args: tuple, kwargs: dict, target: Tensor, norm: Tensor) -> Tensor:
    """Reconstruction loss: squared error summed over channels, mean over the rest (BRECQ), in units of the target."""
    output = first_tensor(soft(*args, **kwargs))
    channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
    return ((output - target) / norm).square().mean() * channels


def rounding_loss(softs: Mapping[str, SoftLayer], progress: float, settings: Reconstruction) -> Tensor | float:
    """The regularizer of every layer of the unit, both halves of a split one included; none while warming up."""
    if progress < WARM_UP or not settings.learn_rounding:
        return 0.0
    return LAMBDA * torch.stack([regularizer(soft.v, beta_at(progress)) for soft in softs.values()]).sum()


def hard_error(
    soft: nn.Module, softs: Mapping[str, SoftLayer], inputs: CallCache, rows: np.ndarray, target: Tensor, norm: Tensor,
    settings: Reconstruction,
) -> float:  # fmt: skip
    """Held-out loss with every weight rounded for good."""
    set_hard(softs, True)
    with torch.no_grad():
        args, kwargs = inputs.read(rows, settings.device)
        error = float(channel_sum(soft, args, kwargs, target, norm))
    set_hard(softs, not settings.learn_rounding)
    return error


def parameter_groups(softs: Mapping[str, SoftLayer], iterations: int) -> list[dict]:
    """V first, with a constant rate; then scales and biases, whose rate falls by a cosine."""

    def of(name: str) -> list[nn.Parameter]:
        return [parameter for soft in softs.values() if (parameter := getattr(soft, name)) is not None]

    v_rate = float(np.clip(V_TRAVEL / iterations, *V_RATES))
    return [{"params": of("v"), "lr": v_rate}, *({"params": of(n), "lr": rate} for n, rate in LEARNING_RATES.items())]


def cosine(iterations: int) -> Callable[[int], float]:
    return lambda step: 0.5 * (1 + np.cos(np.pi * min(step / iterations, 1)))
