"""An ONNX graph as a torch module: read, its patterns recognised, what nothing reads dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from qdeploy.engines.torch_graph.ops import step_of
from qdeploy.engines.torch_graph.patterns import joined, pattern_at
from qdeploy.engines.torch_graph.steps import Step, name_of, tensor_of
from qdeploy.errors import EngineError


class OnnxModule(torch.nn.Module):
    """Computes the graph's outputs, in their order, of its inputs in theirs; both as tensors of the graph's types."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        graph = model.graph
        self.inputs = [name_of(value) for value in graph.inputs if value.name not in graph.initializers]
        self.outputs = [name_of(value) for value in graph.outputs]
        self.steps = joined(needed([pattern_at(node) or step_of(node) for node in graph], self.outputs))
        self.products = torch.nn.ModuleList(
            step.compute for step in self.steps if isinstance(step.compute, torch.nn.Module)
        )
        read = {name for step in self.steps for name in step.inputs} | set(self.outputs)
        self._constants = {name: f"constant_{index}" for index, name in enumerate(graph.initializers) if name in read}
        for name, attribute in self._constants.items():
            self.register_buffer(attribute, tensor_of(graph.initializers[name]))

    def forward(self, *feeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = self.constants() | dict(zip(self.inputs, feeds, strict=True))
        for step in self.steps:
            run_step(step, values)
        return tuple(values[name] for name in self.outputs)

    def constants(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, attribute) for name, attribute in self._constants.items()}


def read_module(path: Path) -> OnnxModule:
    """The module of the graph at ``path``; EngineError when it is none, or has what torch-cuda does not compute."""
    if not path.is_file():
        raise EngineError(f"{path}: there is no such file")
    try:
        return OnnxModule(ir.load(path.resolve()))  # resolved, or it does not hold external data to the folder
    except EngineError as exc:
        raise EngineError(f"{path}: {exc}") from exc
    except Exception as exc:  # the parser's own, and what a broken graph makes of the code above
        raise EngineError(f"{path} is not a readable ONNX graph ({exc}); export the bundle again") from exc


def needed(steps: list[Step], outputs: list[str]) -> list[Step]:
    """``steps`` without those whose outputs nothing reads."""
    read, kept = set(outputs), []
    for step in reversed(steps):
        if read.intersection(step.outputs):
            kept.append(step)
            read.update(step.inputs)
    return kept[::-1]


def run_step(step: Step, values: dict[str, Any]) -> None:
    """Compute ``step`` from ``values`` into them."""
    found = step.compute(*(values[name] for name in step.inputs))
    values.update(zip(step.outputs, (found,) if len(step.outputs) == 1 else found, strict=True))
