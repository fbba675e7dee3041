"""Block by block: fit the rounding and input scales of each block to its float output (AdaRound, BRECQ).

A block reads what the already quantized blocks before it put out, and is fitted to what the float
block puts out on float inputs, so that it also makes up for errors made before it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.calibrate.adaround import LAMBDA, WARM_UP, SoftLayer, beta_at, regularizer
from qdeploy.calibrate.cache import CallCache, Rows
from qdeploy.calibrate.checkpoint import batch_file
from qdeploy.calibrate.dataset import CalibrationSet, Feeds, rows_of, spread
from qdeploy.calibrate.gptq import MOST_INPUTS, gptq_codes, hessian_of
from qdeploy.calibrate.units import Unit, units_of
from qdeploy.errors import UsageError
from qdeploy.models.components import Component
from qdeploy.models.rewrites.surgery import copy_of, replace_module
from qdeploy.progress import OnProgress
from qdeploy.simulate.twin import quantized_layer, quantized_twin
from qdeploy.spec import Reconstruction
from qdeploy.table import ComponentQuant, LayerQuant, QuantTable, load_table, save_table

SCRATCH = "scratch"
CHECK_ROWS = 64
ROWS_PER_INPUT = 16  # of GPTQ's least squares
LEARNING_RATES = {"log_scale": 1e-3, "bias": 1e-3}
V_TRAVEL = 40.0  # V must be able to cross from one end of h to the other within the run, whatever its length
V_RATES = (1e-3, 0.1)  # the paper's, for its 20,000 iterations; 300 at 0.1 gained 4.9 dB on a block, at 0.03 4.0


def reconstruct(
    component: Component,
    quant: ComponentQuant,
    calibration: CalibrationSet,
    name: str,
    settings: Reconstruction,
    on_progress: OnProgress,
    work: Path | None = None,
) -> ComponentQuant:
    """``quant`` with every unit's layers learned. With ``work``, finished units are kept there and not done again."""
    check_device(settings.device)
    units = units_of(component.inner, quant.layers)
    feeds = list(spread(calibration, name, settings.samples))
    done_folder = None if work is None else work / digest(quant, settings, calibration)
    twin = quantized_twin(component, quant, conv_output_quantized=False)
    layers = dict(quant.layers)
    with scratch_folder(work) as scratch:
        targets = Targets(component, units, feeds, settings.cache_gb / 2, scratch)
        for number, unit in enumerate(units):
            learned = None if done_folder is None else finished(done_folder, number)
            if learned is None:
                before = {layer: layers[layer] for layer in unit.layers}
                progress = UnitProgress(on_progress, f"{name}: reconstruction", unit.name, number, len(units))
                inputs = unit_inputs(twin, unit, feeds, scratch)
                soft = soft_unit(component.inner.get_submodule(unit.name), unit, before, settings)
                learned = optimize(soft, unit, inputs, targets.of(number), settings, number, progress)
                inputs.remove()
                targets.drop(number)
                if done_folder is not None:
                    keep(done_folder, number, name, learned, quant)
            layers.update(learned)
            put_into(twin, component, learned)
    return replace(quant, layers=layers)


@dataclass(frozen=True)
class UnitProgress:
    """Shows the loss in the description of one bar over all blocks."""

    on_progress: OnProgress
    what: str
    unit: str
    number: int
    count: int

    def __call__(self, iteration: int, iterations: int, error: float) -> None:
        done = self.number * iterations + iteration
        self.on_progress(self.what, done, self.count * iterations, f"{self.unit}, error {error:.2e}")


def unit_inputs(twin: Component, unit: Unit, feeds: Sequence[Feeds], scratch: Path) -> CallCache:
    """What the unit is called with in the quantized twin, over all feeds."""
    inputs = CallCache(scratch)
    for feed in feeds:
        inputs.append(*inputs_of(twin, unit.name, feed), rows_of(feed))
    return inputs


def optimize(
    soft: nn.Module,
    unit: Unit,
    inputs: CallCache,
    outputs: Rows,
    settings: Reconstruction,
    seed: int,
    progress: UnitProgress,
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


def check_device(device: str) -> None:
    """UsageError for a device that torch cannot compute on here."""
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        reason = str(exc).partition("\n")[0]
        raise UsageError(f"--device {device}: torch {torch.__version__} cannot compute on it here: {reason}") from exc


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


def cosine(iterations: int):  # noqa: ANN201
    return lambda step: 0.5 * (1 + np.cos(np.pi * min(step / iterations, 1)))


class Targets:
    """Float outputs of the units, recorded for as many units a pass as the byte budget allows."""

    def __init__(
        self, component: Component, units: Sequence[Unit], feeds: Sequence[Feeds], budget_gb: float, folder: Path
    ) -> None:
        self._component, self._units, self._feeds = component, units, feeds
        self._budget = budget_gb * 1e9
        self._folder = folder
        self._rows: dict[int, Rows] = {}

    def of(self, number: int) -> Rows:
        """Outputs ``[N, ...]`` of unit ``number`` over all feeds."""
        if number not in self._rows:
            self._record(number)
        return self._rows[number]

    def drop(self, number: int) -> None:
        self._rows.pop(number).remove()

    def _record(self, first: int) -> None:
        last = self._last_that_fits(first)
        numbers = range(first, last + 1)
        self._rows = {number: Rows(self._folder / f"target-{number}") for number in numbers}
        for feed in self._feeds:
            for number, output in zip(numbers, self._outputs(numbers, feed), strict=True):
                self._rows[number].append(output)

    def _last_that_fits(self, first: int) -> int:
        numbers = range(first, len(self._units))
        rows = sum(map(rows_of, self._feeds))
        spent = 0.0
        for number, output in zip(numbers, self._outputs(numbers, self._feeds[0]), strict=True):
            spent += 2 * output[0].numel() * rows
            if spent > self._budget:
                return max(first, number - 1)
        return numbers[-1]

    def _outputs(self, numbers: Sequence[int], feed: Feeds) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        handles = [
            self._component.inner.get_submodule(self._units[number].name).register_forward_hook(
                lambda _, __, output, number=number: stop_after(found, number, first_tensor(output), numbers[-1])
            )
            for number in numbers
        ]
        run_until_stopped(self._component, feed, handles)
        return [found[number] for number in numbers]


class Stop(Exception):  # noqa: N818 - control flow, not an error
    """Raised in a hook: the rest of the forward pass is not needed."""


def stop_after(found: dict[int, Tensor], number: int, output: Tensor, last: int) -> None:
    found[number] = output
    if number == last:
        raise Stop


def inputs_of(component: Component, unit: str, feed: Feeds) -> tuple[tuple, dict]:
    """Arguments with which ``unit`` is called in a forward pass, which ends there."""
    seen: list[tuple[tuple, dict]] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))
        raise Stop

    handle = component.inner.get_submodule(unit).register_forward_pre_hook(hook, with_kwargs=True)
    run_until_stopped(component, feed, [handle])
    return seen[0]


def run_until_stopped(component: Component, feed: Feeds, handles: Sequence) -> None:
    try:
        with torch.no_grad():
            component(**feed)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


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


def put_into(twin: Component, component: Component, layers: Mapping[str, LayerQuant]) -> None:
    """Replace the twin's layers by newly learned ones."""
    for name, layer in layers.items():
        original = component.inner.get_submodule(name)
        replace_module(twin.inner, name, quantized_layer(original, layer, conv_output_quantized=False))  # type: ignore[arg-type]


def first_tensor(output: Tensor | tuple) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def scratch_folder(work: Path | None) -> Iterator[Path]:
    """Beside the finished units, so that ``--work`` decides which disk fills; what a killed run left there goes."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as scratch:
            yield Path(scratch)
        return
    folder = work / SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def digest(quant: ComponentQuant, settings: Reconstruction, calibration: CalibrationSet) -> str:
    """Names the run: only units of the very same start, settings and data are taken over."""
    seen = hashlib.sha256(json.dumps([asdict(settings), dict(calibration.provenance)], sort_keys=True).encode())
    for name, layer in quant.layers.items():
        seen.update(f"{name} {layer.input} {layer.passes} {layer.first_token_float}".encode())
        seen.update(layer.weight.tobytes())
        seen.update(layer.weight_scale.tobytes())
    seen.update(calibration.sample.numpy().tobytes())
    return seen.hexdigest()[:16]


def finished(folder: Path, number: int) -> dict[str, LayerQuant] | None:
    """Layers of a unit that an earlier run finished, or None."""
    path = batch_file(folder, number)
    if not path.exists():
        return None
    (quant,) = load_table(path).components.values()
    return dict(quant.layers)


def keep(folder: Path, number: int, name: str, learned: Mapping[str, LayerQuant], quant: ComponentQuant) -> None:
    """Put a finished unit aside, as a little table of its own."""
    part = ComponentQuant(dict(learned), macs={layer: quant.macs[layer] for layer in learned})
    save_table(QuantTable({name: part}, "", ""), batch_file(folder, number))
