"""Each quantized layer beside its float original, on the first input that the table recorded. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import PackageMissingError, TableError
from qdeploy.evaluate.layer_figures import Histogram, LayerFigures, Layers, TableOfBundle
from qdeploy.numerics import sqnr_db
from qdeploy.progress import OnProgress, silent
from qdeploy.table import ComponentQuant, LayerQuant

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qdeploy.models.components import Component
    from qdeploy.spec import TargetSpec

BINS = 64
ACT_BITS = 8  # of one pass; two make 16


def check_models(tables: Sequence[TableOfBundle]) -> None:
    """Whether the model of each table is there, before hours of sampling.

    PackageMissingError without torch, ModelError without the model, TableError where it holds other weights.
    """
    if not tables:
        return
    try:
        from qdeploy.models.options import ModelOptions
        from qdeploy.models.source import model_sha256
    except ImportError as exc:
        raise PackageMissingError(
            f"--table needs the package {exc.name}; run `pip install 'qdeploy[quantize]'`"
        ) from exc
    hashes = {one.table.model: model_sha256(one.table.model, ModelOptions()) for one in tables}
    for one in tables:
        if hashes[one.table.model] != one.table.model_sha256:
            raise TableError(
                f"{one.path} was made for other weights than {one.table.model} holds now, or with LoRA files fused "
                "in; leave --table out, or quantize this model again"
            )


def measure_layers(
    tables: Sequence[TableOfBundle], names: Sequence[str], on_progress: OnProgress = silent
) -> list[Layers]:
    """The layers of each table's bundle, on the float model that the table names; ``names`` are of all bundles."""
    if not tables:
        return []
    from qdeploy.models.source import load_model
    from qdeploy.spec import target_named

    models = {source: load_model(source) for source in dict.fromkeys(one.table.model for one in tables)}
    found = []
    for one in tables:
        target, name = target_named(one.manifest.target), names[one.number]
        figures: list[LayerFigures] = []
        for done, (component, quant) in enumerate(one.table.components.items()):
            on_progress(f"{name}, its layers", done, len(one.table.components), component)
            probes = one.table.probes.get(component)
            if probes:
                figures += layers_of(component, models[one.table.model].component(component), quant, target, probes[0])
        on_progress(f"{name}, its layers", len(one.table.components), len(one.table.components))
        found.append(Layers(name, figures))
    return found


def layers_of(
    name: str, component: Component, quant: ComponentQuant, target: TargetSpec, feeds: Mapping[str, NDArray]
) -> list[LayerFigures]:
    """Every layer that ``target`` computes in integers, on what it reads where the float one runs on ``feeds``."""
    import torch

    from qdeploy.models.rewrites import apply_rewrite, copy_of
    from qdeploy.simulate.twin import on_target

    component = copy_of(component)
    for rewrite in quant.rewrites:
        apply_rewrite(component, rewrite)
    modules = dict(component.inner.named_modules())
    found: dict[str, LayerFigures] = {}

    def watch(path: str, layer: LayerQuant) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if path not in found:
                found[path] = compare(name, path, module, layer, target, args[0], output)

        return hook

    handles = []
    for path, layer in on_target(quant, target).layers.items():
        module = modules.get(path)
        if module is None:
            raise TableError(f"the table's layer {path} is not in the model; wrong model?")
        handles.append(module.register_forward_hook(watch(path, layer)))
    try:
        with torch.no_grad():
            component(**{key: torch.from_numpy(np.asarray(x)) for key, x in feeds.items()})
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def compare(
    component: str,
    path: str,
    module: nn.Conv2d | nn.Linear,
    layer: LayerQuant,
    target: TargetSpec,
    x: Tensor,
    y: Tensor,
) -> LayerFigures:
    """One layer: ``module`` made ``y`` of ``x``."""
    from qdeploy.simulate.layers import InputQuant
    from qdeploy.simulate.twin import quantized_layer

    quantized = quantized_layer(module, layer, target.conv_output_quantized, target.signed_activations)
    values, ratio = x[:, 1:] if layer.first_token_float else x, layer.input_ratio
    axis = 1 if len(layer.weight.shape) == 4 else x.dim() - 1
    reader = InputQuant(layer, target.signed_activations)
    read = sum(back(codes) for codes, back in reader(values, axis)).numpy()  # type: ignore[union-attr]
    read = read if ratio is None else read * along(ratio, read.ndim, axis)
    weight, original = weight_of(layer), module.weight.detach().float().numpy()
    return LayerFigures(
        component=component,
        name=path,
        weight_bits=layer.weight_bits,
        act_bits=ACT_BITS * layer.passes,
        weight_db=sqnr_db(original, weight),
        input_db=sqnr_db(values.numpy(), read),
        output_db=sqnr_db(y.numpy(), quantized(x).numpy()),
        weight=histogram(original, weight),
        input=histogram(values.numpy(), read),
    )


def weight_of(layer: LayerQuant) -> NDArray[np.float32]:
    """What the codes stand for in the model's own units: ``codes * weight_scale / input_ratio``."""
    weight = layer.weight * along(layer.weight_scale, layer.weight.ndim, 0)
    return weight if layer.input_ratio is None else weight / along(layer.input_ratio, weight.ndim, 1)


def along(values: NDArray, dims: int, axis: int) -> NDArray:
    """``values`` shaped to broadcast along ``axis`` of an array with ``dims`` dimensions."""
    return values.reshape([-1 if one == axis else 1 for one in range(dims)])


def histogram(before: NDArray, after: NDArray) -> Histogram:
    """Both over the range of the two."""
    low, high = min(before.min(), after.min()), max(before.max(), after.max())
    counts, edges = np.histogram(before, BINS, (float(low), float(high)))
    return Histogram(edges, counts, np.histogram(after, edges)[0])
