"""Write a bundle: trace each component, lower it for the target, check it, and add the runtime's files."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from qdeploy.artifacts.components import UNET, VAE_ENCODER, choose_graph_batch
from qdeploy.artifacts.graph_format import Signature, load_format
from qdeploy.artifacts.manifest import ComponentInfo, Manifest, TensorInfo, write_manifest
from qdeploy.artifacts.noise_correction import BUNDLE_FILE, save_noise_correction
from qdeploy.artifacts.outputs import BUNDLE
from qdeploy.artifacts.table import ComponentQuant, QuantTable
from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import EngineUnavailableError, UsageError
from qdeploy.base.files import stage_folder
from qdeploy.base.numerics import ACT_BITS
from qdeploy.base.outputs import Output, check_existing, check_output
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.base.version import read_version
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.engines.nvidia.profiles import ProfileSizes
from qdeploy.export.audit import audit_file, audit_graph
from qdeploy.export.fp16_range import check_fp16_range
from qdeploy.export.graph import graph_from_component
from qdeploy.export.open_dims import STATIC, OpenDims
from qdeploy.export.parity import ExpectedOutputs, choose_least_sqnr, compute_expected, measure_parities
from qdeploy.export.plans import check_buildable, check_profile, grid_from_model
from qdeploy.export.release import collect_new_objects_only, release_memory
from qdeploy.export.runtime_files import build_runtime_files, check_opens, write_runtime_files
from qdeploy.export.table_checks import check_exportable, check_probes, check_weights
from qdeploy.models.source import LatentDiffusion
from qdeploy.passes.edit import find_largest_weight_code
from qdeploy.sampling.few_steps import recognise_few_steps
from qdeploy.simulate.simulator import build_simulator, restrict_to_numerics
from qdeploy.targets.base import ONNX_FILES, Target

BYTES_PER_PARAMETER = {"fp32": 4.0, "fp16": 2.0, "int8": 1.2}  # some layers of the last stay in float
RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def export_bundle(
    model: LatentDiffusion,
    table: QuantTable | None,
    target: Target,
    out: Path,
    on_progress: OnProgress = ignore_progress,
    *,
    with_encoder: bool = False,
    open_dims: OpenDims = STATIC,
    sizes: ProfileSizes | None = None,
    build: bool = False,
    min_sqnr_db: float | None = None,
    unguided: bool | None = None,
) -> Manifest:
    """Export ``model`` in float (``table`` None) or as the table says, to the folder ``out``.

    ``with_encoder`` adds the VAE encoder, in float, for image-to-image and inpainting. ``open_dims`` says which
    dimensions the graphs leave open, and ``sizes`` TensorRT's profile of those. ``build`` adds TensorRT's engines for
    this machine's GPU. ``min_sqnr_db`` replaces the least SQNR of a quantized component that the gate asks for.
    ``unguided`` gives the UNet a batch of one row, for pictures without classifier-free guidance, or of two; by default
    a table decides as it was calibrated, and without one the scheduler (``sampling.few_steps``). ``out`` appears only
    when everything, gates included, has passed. Raises ExportError (AuditError, ParityError) and TableError, and
    EngineUnavailableError at once where engines cannot be built here.
    """
    target.check_open_dims(open_dims.names)
    check_profile(target, open_dims, sizes)
    if build:
        check_buildable(target)
    precision = target.choose_precision(table is not None)
    target.check_precision(precision)
    if table is not None:
        check_weights(table, model)
        check_probes(table, model)
        check_exportable(table)
    model = replace(model, unguided=choose_unguided(model, table, unguided))
    runtime_files = build_runtime_files(model)
    names = (*model.components, *([VAE_ENCODER.name] if with_encoder else []))
    needed_bytes = estimate_bytes(model, names, precision)
    check_output(Output(out, BUNDLE, needed_bytes=needed_bytes))
    with collect_new_objects_only(), stage_folder(out, needed_bytes) as folder:
        infos = {}
        for done, name in enumerate(names):
            on_progress(f"export: {target.name} {precision}", done, len(names))
            quant = None if table is None else table.components.get(name)
            probes = [] if table is None else table.probes.get(name, [])
            infos[name] = export_component(
                model, name, quant, probes, target, folder / name, open_dims, sizes, min_sqnr_db, on_progress
            )
        if build and target.plans is not None:
            target.plans.build([folder / info.file for info in infos.values()], on_progress)
        if table is not None and table.noise_correction is not None:
            save_noise_correction(folder / BUNDLE_FILE, table.noise_correction)
        write_runtime_files(runtime_files, folder)
        manifest = Manifest(
            kind=model.kind,
            target=target.name,
            engine=target.engine,
            precision=precision,
            components=infos,
            latents=replace(model.latents, side_multiple=model.size_multiple(UNET.name) if open_dims.size else 0),
            provenance=build_provenance(model, table),
            zero_negative=model.zero_negative,
            format=target.files.format,
        )
        write_manifest(folder, manifest)
        check_opens(folder, out)
        check_existing(Output(out, BUNDLE))  # again: what has appeared there meanwhile is not ours to replace
        on_progress(f"export: {target.name} {precision}", len(names), len(names))
    return manifest


def estimate_bytes(model: LatentDiffusion, names: Sequence[str], precision: str) -> int:
    """About what the bundle's graphs take on disk."""
    return int(sum(map(model.count_weights, names)) * BYTES_PER_PARAMETER[precision])


def export_component(
    model: LatentDiffusion,
    name: str,
    quant: ComponentQuant | None,
    probes: Sequence[Feeds],
    target: Target,
    folder: Path,
    open_dims: OpenDims = STATIC,
    sizes: ProfileSizes | None = None,
    min_sqnr_db: float | None = None,
    on_progress: OnProgress = ignore_progress,
) -> ComponentInfo:
    """Trace, lower and save one component to ``folder``; audit it and compare it when quantized."""
    float_component = model.component(name)
    component = float_component
    target = target.in_float32() if float_component.stays_float32 else target
    quant = None if quant is None else restrict_to_numerics(quant, target.numerics)
    if quant is not None and not (quant.layers or quant.attention):
        quant = None  # all of it stays in float (--keep-float)
    if quant is not None:
        component = build_simulator(float_component, quant, target.numerics)
    # an open batch is traced at 2, since the exporter treats 1 as a constant
    example = model.make_example(name, 2 if open_dims.batch else choose_graph_batch(name, model.is_guided))
    feeds = [{key: x.numpy() for key, x in example.items()}] if quant is None else probes
    if target.numerics.float_type == "fp16":
        check_fp16_range(float_component, feeds, name)
    multiple = model.size_multiple(name)
    graph = graph_from_component(component, example, target.opset, open_dims, multiple)
    target.lower(graph)
    folder.mkdir(parents=True)
    graph_format = load_format(target.files.format)
    path = folder / graph_format.file
    target.files.write(graph, path)
    written = graph_format.read(path, graph_format.max_bytes)
    if sizes is not None and target.plans is not None:
        target.plans.write_profile(path, sizes, grid_from_model(model))
    info = ComponentInfo(
        file=f"{name}/{path.name}",
        inputs=tensor_infos_from_signature(written.inputs),
        outputs=tensor_infos_from_signature(written.outputs),
        weight_bits=(() if quant is None else quant.weight_bits) or (target.numerics.float_bits,),  # () with attention
        act_bits=target.numerics.float_bits if quant is None else ACT_BITS,
        parity_engine=choose_stand_in(target),
        largest_weight_code=find_largest_weight_code(graph),
    )
    del graph
    release_memory()
    info = replace(info, acceptance=target.check(path, name))
    is_as_traced = target.numerics.float_type == "fp32" and target.files is ONNX_FILES and not open_dims
    if quant is None and is_as_traced:
        return info
    if quant is not None:
        info = run_audit(info, path, target, quant)
    feed_sets = [feeds, [open_dims.vary_feeds(feeds[0], multiple)]] if open_dims else [feeds]
    expected = [compute_expected(float_component, component, probes, on_progress, name) for probes in feed_sets]
    del component
    release_memory()  # the simulator's memory, before the engine needs as much
    least_db = None if quant is None else choose_least_sqnr(quant.simulator_sqnr_db, min_sqnr_db)
    return check_parity(info, path, target, least_db, expected, on_progress)


def choose_unguided(model: LatentDiffusion, table: QuantTable | None, requested: bool | None) -> bool:
    """Whether the UNet's graph takes one row; UsageError where a table was calibrated with another number."""
    if table is None or UNET.name not in table.components:
        is_few_step = recognise_few_steps(model.scheduler_config) is not None
        return model.is_guided and (is_few_step if requested is None else requested)
    one_row = max(len(x) for x in table.probes[UNET.name][0].values() if x.ndim) == 1
    if requested and not one_row:
        raise UsageError(
            "--unguided: the table was calibrated with both halves of guidance; calibrate with --guidance 1 first"
        )
    if requested is False and one_row and model.is_guided:
        raise UsageError(
            "--guided: the table was calibrated without guidance; calibrate with the guidance scale that is to be used"
        )
    return model.is_guided and one_row


def choose_stand_in(target: Target) -> str | None:
    """The engine that replaces the target's own in the gate where that does not run here; else None."""
    if target.stand_in is None:
        return None
    try:
        load_engine(target.engine).versions()
    except EngineUnavailableError:
        return target.stand_in.engine
    return None


def run_audit(info: ComponentInfo, path: Path, target: Target, quant: ComponentQuant) -> ComponentInfo:
    """``info`` with the share of MACs in integers; AuditError where a layer of ``quant`` is not."""
    options = EngineOptions(largest_weight_code=info.largest_weight_code)
    if target.stand_in is None:
        audit = audit_graph(path, target.engine, options, files=target.files)
    else:
        audit = audit_file(path, target.files)
    release_memory()
    audit.check(path.parent.name, quant)
    return replace(info, integer_mac_share=audit.integer_mac_share)


def check_parity(
    info: ComponentInfo,
    path: Path,
    target: Target,
    least_db: float | None,
    expected: Sequence[ExpectedOutputs],
    on_progress: OnProgress = ignore_progress,
) -> ComponentInfo:
    """``info`` with the engine's distance from simulator and float model; ParityError where it is too large.

    least_db: of the simulator against the float model; None for a float graph.

    Every one of ``expected``, of a shape each, must pass with each output; the manifest records the first one's first.
    """
    stand_in = None if info.parity_engine is None else target.stand_in
    options = EngineOptions(
        largest_weight_code=info.largest_weight_code, simulate_qdq=stand_in is not None and stand_in.simulate_qdq
    )
    session = load_engine(info.parity_engine or target.engine).open_session(path, options)
    name = path.parent.name
    try:
        parities = [parity for outputs in expected for parity in measure_parities(outputs, session, on_progress, name)]
    finally:
        session.close()
    for parity in parities:
        if least_db is not None:
            parity.check_quality(name, least_db)
            parity.check(name, target.parity)
        else:
            parity.check_float(name, target.numerics.float_type, target.parity)
    if least_db is None:
        return replace(info, engine_sqnr_db=parities[0].engine_db)
    return replace(
        info,
        parity_db=parities[0].between_db,
        simulator_sqnr_db=parities[0].simulator_db,
        engine_sqnr_db=parities[0].engine_db,
    )


def tensor_infos_from_signature(signature: Signature) -> dict[str, TensorInfo]:
    """Inputs or outputs as the manifest has them."""
    return {name: TensorInfo(dtype, shape) for name, (dtype, shape) in signature.items()}


def build_provenance(model: LatentDiffusion, table: QuantTable | None) -> dict[str, Any]:
    """Where the bundle came from: model, calibration, settings, package versions."""
    versions = {package: metadata.version(package) for package in RECORDED_PACKAGES}
    return {
        **model.provenance,
        "quantization": None if table is None else dict(table.provenance),
        "qdeploy": read_version(),
        "python": platform.python_version(),
        "packages": versions,
    }
