"""Compare each quantized layer with its float original, on the first input that the table recorded. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.table import ComponentQuant, LayerQuant
from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import PackageMissingError, TableError
from qdeploy.base.extras import format_install
from qdeploy.base.numerics import ACT_BITS, sqnr_db
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.evaluate.layer_figures import BundleLayers, BundleTable, LayerFigures, LayerHistogram

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qdeploy.models.components import TorchComponent
    from qdeploy.targets.base import Numerics

BINS = 64


def check_models(tables: Sequence[BundleTable]) -> None:
    """Whether the model of each table is there, before hours of sampling.

    PackageMissingError without torch, ModelError without the model, TableError where it holds other weights.
    """
    if not tables:
        return
    try:
        from qdeploy.models.options import ModelOptions
        from qdeploy.models.source import hash_model
    except ImportError as exc:
        install = format_install(exc.name, preferred="quantize")
        raise PackageMissingError(f"--table needs the package {exc.name}; run `{install}`") from exc
    hashes = {entry.table.model: hash_model(entry.table.model, ModelOptions()) for entry in tables}
    for entry in tables:
        if hashes[entry.table.model] != entry.table.model_sha256:
            raise TableError(
                f"{entry.path} was made for other weights than {entry.table.model} holds now, or with LoRA files fused "
                "in; leave --table out, or quantize this model again"
            )


def measure_layers(
    tables: Sequence[BundleTable], names: Sequence[str], on_progress: OnProgress = ignore_progress
) -> list[BundleLayers]:
    """The layers of each table's bundle, on the float model that the table names; ``names`` are of all bundles."""
    if not tables:
        return []
    from qdeploy.models.source import load_model
    from qdeploy.targets.base import load_target

    models = {source: load_model(source) for source in dict.fromkeys(entry.table.model for entry in tables)}
    measured = []
    for entry in tables:
        numerics, name = load_target(entry.manifest.target).numerics, names[entry.number]
        figures: list[LayerFigures] = []
        for done, (component, quant) in enumerate(entry.table.components.items()):
            on_progress(f"{name}, its layers", done, len(entry.table.components), component)
            probes = entry.table.probes.get(component)
            if probes:
                figures += measure_bundle_layers(
                    component, models[entry.table.model].component(component), quant, numerics, probes[0]
                )
        on_progress(f"{name}, its layers", len(entry.table.components), len(entry.table.components))
        measured.append(BundleLayers(name, figures))
    return measured


def measure_bundle_layers(
    name: str, component: TorchComponent, quant: ComponentQuant, numerics: Numerics, feeds: Feeds
) -> list[LayerFigures]:
    """Every layer that ``numerics`` has in integers, on its inputs in the float model run on ``feeds``."""
    import torch

    from qdeploy.models.rewrites import apply_rewrite, copy_module
    from qdeploy.simulate.simulator import restrict_to_numerics

    component = copy_module(component)
    for rewrite in quant.rewrites:
        apply_rewrite(component, rewrite)
    modules = dict(component.inner.named_modules())
    figures: dict[str, LayerFigures] = {}

    def make_hook(path: str, layer: LayerQuant) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if path not in figures:
                figures[path] = measure_layer(name, path, module, layer, numerics, args[0], output)

        return hook

    handles = []
    for path, layer in restrict_to_numerics(quant, numerics).layers.items():
        module = modules.get(path)
        if module is None:
            raise TableError(f"the table's layer {path} is not in the model; wrong model?")
        handles.append(module.register_forward_hook(make_hook(path, layer)))
    try:
        with torch.no_grad():
            component(**{key: torch.from_numpy(np.asarray(x)) for key, x in feeds.items()})
    finally:
        for handle in handles:
            handle.remove()
    return list(figures.values())


def measure_layer(
    component: str,
    path: str,
    module: nn.Conv2d | nn.Linear,
    layer: LayerQuant,
    numerics: Numerics,
    x: Tensor,
    y: Tensor,
) -> LayerFigures:
    """One layer: ``module`` made ``y`` of ``x``."""
    from qdeploy.simulate.layers import InputQuant
    from qdeploy.simulate.simulator import build_quant_layer

    quantized = build_quant_layer(module, layer, numerics)
    values, ratio = x[:, 1:] if layer.first_token_float else x, layer.input_ratio
    axis = 1 if len(layer.weight.shape) == 4 else x.dim() - 1
    reader = InputQuant(layer, numerics)
    dequantized = sum(dequantize(codes) for codes, dequantize in reader(values, axis)).numpy()
    dequantized = dequantized if ratio is None else dequantized * broadcast_along(ratio, dequantized.ndim, axis)
    weight, original = dequantize_weight(layer), module.weight.detach().float().numpy()
    return LayerFigures(
        component=component,
        name=path,
        weight_bits=layer.weight_bits,
        act_bits=ACT_BITS * layer.passes,
        weight_db=sqnr_db(original, weight),
        input_db=sqnr_db(values.numpy(), dequantized),
        output_db=sqnr_db(y.numpy(), quantized(x).numpy()),
        weight=build_histogram(original, weight),
        input=build_histogram(values.numpy(), dequantized),
    )


def dequantize_weight(layer: LayerQuant) -> NDArray[np.float32]:
    """The values of the codes in the model's own units: ``codes * weight_scale / input_ratio``."""
    weight: NDArray[np.float32] = layer.weight * broadcast_along(layer.weight_scale, layer.weight.ndim, 0)
    return weight if layer.input_ratio is None else weight / broadcast_along(layer.input_ratio, weight.ndim, 1)


def broadcast_along(values: NDArray[np.float32], dims: int, axis: int) -> NDArray[np.float32]:
    """``values`` shaped to broadcast along ``axis`` of an array with ``dims`` dimensions."""
    return values.reshape([-1 if dim == axis else 1 for dim in range(dims)])


def build_histogram(before: NDArray[np.float32], after: NDArray[np.float32]) -> LayerHistogram:
    """Both over the range of the two."""
    low, high = min(before.min(), after.min()), max(before.max(), after.max())
    counts, edges = np.histogram(before, BINS, (float(low), float(high)))
    return LayerHistogram(edges, counts, np.histogram(after, edges)[0])
