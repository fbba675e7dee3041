"""What every target says; one target is one sibling file whose name is its command-line name.

A target's file holds ``TARGET = Target(...)``: what its engine computes, its precisions, its graph passes in order, its
rules for the written file, its parity limits and its stand-in. It imports the rest (passes, onnx) inside functions, so
that everybody can read what an engine computes. What several targets share is in folders next to them (``nvidia/``).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.artifacts.graph_format import DEFAULT_FORMAT, Signature
from qdeploy.artifacts.products import Product
from qdeploy.base.errors import UsageError
from qdeploy.base.progress import OnProgress

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdeploy.engines.nvidia.profiles import LatentGrid, ProfileSizes

DEFAULT_TARGET = "ort-cpu"
FLOAT_BITS = {"fp32": 32, "fp16": 16}
PRECISIONS = (*FLOAT_BITS, "int8")
OPENABLE = ("batch", "size")  # dimensions that a graph may leave open; size is height and width
HALF_PASSES = ("to_fp16", "halve_weights")
LAST_PASS = "strip_metadata"  # of lowerings to ONNX


@dataclass(frozen=True)
class Numerics:
    """What a target's engine computes; :func:`qdeploy.simulate.simulator.build_simulator` simulates just that.

    The defaults are the numerics that calibration fits layers under.

    conv_output_quantized: a Q follows every convolution whose output range the table has; the others become MatMul.
    half_range_weights: 8-bit weights keep within +-64, exact and fast on every processor; otherwise within +-127.
    signed_activations: codes are int8 around 0, without a zero point.
    two_passes: layers that the table reads in two passes are; otherwise they stay in float.
    quantized_attention: the attentions' own products take the table's bits; otherwise they stay in float.
    float_type: "fp32" or "fp16", of all that is not in integers.
    """

    conv_output_quantized: bool = False
    half_range_weights: bool = True
    signed_activations: bool = False
    two_passes: bool = True
    quantized_attention: bool = True
    float_type: str = "fp32"

    @property
    def float_bits(self) -> int:
        """Width of the float type."""
        return FLOAT_BITS[self.float_type]


CALIBRATION_NUMERICS = Numerics()


@dataclass(frozen=True)
class ParityLimits:
    """How far an engine's output may be from the simulator's and the float model's, as SQNR in dB.

    Engine and simulator do the same integer arithmetic. Float rounding in norms and softmax (1e-6) sometimes moves a
    value across a rounding edge, by one of 256 steps. Layer by layer that spreads: 130 dB in a shallow encoder, but in
    a deep UNet the two are in the end almost as far apart as either is from the float model. So the yardstick is the
    quantization noise itself.

    float_min_db: least SQNR of a graph in float against the float32 model.
    engine_loss_db: how much further than the simulator the engine may be from the float model. A saturating kernel or
        a wrong scale costs far more than half a dB.
    between_slack_db: how much further engine and simulator may be from each other than the simulator is from the float
        model. Two *unrelated* roundings of one model lie 3 dB beyond it, and a large decoder comes to 1.5.
    """

    float_min_db: float
    engine_loss_db: float = 0.5
    between_slack_db: float = 3.0


@dataclass(frozen=True)
class StandIn:
    """The engine that computes a target's graphs in the export gate where the target's own does not run.

    simulate_qdq: it reads another engine's form of QDQ and computes it node by node, exact on every processor.
    """

    engine: str
    simulate_qdq: bool = True


@dataclass(frozen=True)
class Plans:
    """Engine files that are built ahead of time, for a range of sizes where a graph's dimensions are open.

    write_profile: write the range next to the graph at a path.
    build: build each graph's plan for this machine and store it next to the graph.
    """

    write_profile: Callable[[Path, ProfileSizes, LatentGrid], None]
    build: Callable[[Sequence[Path], OnProgress], None]


@dataclass(frozen=True)
class GraphFiles:
    """How a target's graphs become files; the format that they have is one of ``qdeploy/artifacts/formats``.

    format: its name.
    write: a lowered graph to the file at a path, which engines open, and to files next to it.
    find_products: of the file at a path, for the audit.
    read_example: its inputs, without open dimensions.
    last_passes: after a target's own: nothing of the exporting machine stays in a file.
    """

    format: str
    write: Callable[[ir.Model, Path], None]
    find_products: Callable[[Path], list[Product]]
    read_example: Callable[[Path], Signature]
    last_passes: tuple[str, ...] = (LAST_PASS,)


def _write_onnx(graph: ir.Model, path: Path) -> None:
    from qdeploy.targets.onnx_files.graph import save_graph

    save_graph(graph, path)


def _find_onnx_products(path: Path) -> list[Product]:
    from qdeploy.targets.onnx_files.products import find_products

    return find_products(path)


def _read_onnx_example(path: Path) -> Signature:
    from qdeploy.targets.onnx_files.graph import read_example

    return read_example(path)


ONNX_FILES = GraphFiles(DEFAULT_FORMAT, _write_onnx, _find_onnx_products, _read_onnx_example)


@dataclass(frozen=True)
class Target:
    """Everything about one target.

    name: on the command line, the file's name with dashes.
    engine: that runs the bundle.
    opset: of ONNX, that the graphs are traced in.
    numerics: what the engine computes.
    passes: names of graph passes, which are files of ``qdeploy/passes``, in order.
    parity: how far the engine may be from the simulator.
    missing_precisions: those that its graphs do not come in, with the reason, which the user reads.
    fixed_dims: those of ``OPENABLE`` that its graphs cannot leave open, with the reason, which the user reads.
    stand_in: where the engine runs only on machines with a device; None where it runs on every one.
    check: hold the written graph of a component to the engine's own rules, AuditError where it breaks one; a phrase on
        what was tried, "" when nothing was.
    plans: where the engine's files are built ahead of time.
    files: how its graphs become files.
    """

    name: str
    engine: str
    opset: int
    numerics: Numerics
    passes: tuple[str, ...]
    parity: ParityLimits
    missing_precisions: Mapping[str, str] = field(default_factory=dict)
    fixed_dims: Mapping[str, str] = field(default_factory=dict)
    stand_in: StandIn | None = None
    check: Callable[[Path, str], str] = lambda path, component: ""
    plans: Plans | None = None
    files: GraphFiles = ONNX_FILES

    @property
    def precisions(self) -> tuple[str, ...]:
        """What ``--precision`` may say, the float one first."""
        return tuple(precision for precision in PRECISIONS if precision not in self.missing_precisions)

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that its graphs depend on, as JSON values."""
        named = {"target": self.name, "engine": self.engine, "opset": self.opset, "passes": list(self.passes)}
        named |= {"format": self.files.format}
        return named | asdict(self.numerics)

    def in_full_range(self) -> Target:
        """The target with 8-bit weight codes up to +-127, where it would take those within +-64."""
        return replace(self, numerics=replace(self.numerics, half_range_weights=False))

    def in_float32(self) -> Target:
        """The target with float32 where it would take fp16, for a component whose activations fp16 cannot hold."""
        passes = tuple(name for name in self.passes if name not in HALF_PASSES)
        return replace(self, numerics=replace(self.numerics, float_type="fp32"), passes=passes)

    def choose_precision(self, is_quantized: bool) -> str:
        """The precision of a table's graphs, or of a float model's."""
        return "int8" if is_quantized else self.numerics.float_type

    def check_precision(self, precision: str) -> None:
        """UsageError with the reason unless the target's graphs come in ``precision``."""
        if precision not in PRECISIONS:
            raise UsageError(f"unknown --precision {precision!r}; known: {', '.join(PRECISIONS)}")
        if precision in self.missing_precisions:
            raise UsageError(
                f"--target {self.name} has no --precision {precision}: {self.missing_precisions[precision]}; "
                f"it exports as {' or '.join(self.precisions)}"
            )

    def check_open_dims(self, names: Iterable[str]) -> None:
        """UsageError with the reason unless the target's graphs can leave the dimensions ``names`` open."""
        for name in names:
            if name in self.fixed_dims:
                raise UsageError(
                    f"--dynamic: --target {self.name} cannot leave {name} open: {self.fixed_dims[name]}; leave "
                    f"{name} out, and export a bundle for each {name} that you need"
                )

    def lower(self, model: ir.Model) -> None:
        """Turn the traced graph into the form that the engine runs fastest, in place."""
        for name in (*self.passes, *self.files.last_passes):
            load_pass(name)(model)


def load_pass(name: str) -> Callable[[ir.Model], object]:
    """The graph pass ``name``: the function of that name in its file."""
    graph_pass: Callable[[ir.Model], object] = getattr(importlib.import_module(f"qdeploy.passes.{name}"), name)
    return graph_pass


def list_targets() -> list[str]:
    """Command-line names of all targets, found by their files."""
    import qdeploy.targets as package

    files = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    return sorted(name.replace("_", "-") for name in files if name != "base")


def load_target(name: str) -> Target:
    """The target called ``name``; UsageError lists the known ones."""
    if name not in list_targets():
        raise UsageError(f"unknown --target {name!r}; known targets: {', '.join(list_targets())}")
    target: Target = importlib.import_module(f"qdeploy.targets.{name.replace('-', '_')}").TARGET
    return target


def load_graph_files(graph_format: str) -> GraphFiles:
    """How some target makes files of ``graph_format``; UsageError where none does."""
    files = (load_target(name).files for name in list_targets())
    chosen = next((each for each in files if each.format == graph_format), None)
    if chosen is None:
        raise UsageError(f"no target writes graphs as {graph_format!r:.60}; known targets: {', '.join(list_targets())}")
    return chosen


def describe_targets() -> str:
    """Every target with its precisions, in one line for a help text."""
    targets = [load_target(name) for name in list_targets()]
    return "; ".join(f"{target.name} ({', '.join(target.precisions)})" for target in targets)
