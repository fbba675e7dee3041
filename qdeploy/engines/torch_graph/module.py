"""Read an ONNX graph as a torch module: patterns are recognised, unused steps dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from qdeploy.base.errors import EngineError
from qdeploy.engines.torch_graph.ops import step_from_node
from qdeploy.engines.torch_graph.patterns import match_pattern, merge_linear_steps
from qdeploy.engines.torch_graph.steps import GraphStep, get_name, tensor_from_value


class OnnxModule(torch.nn.Module):
    """Computes the graph's outputs from its inputs, both in the graph's order and types."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        graph = model.graph
        self.inputs = [get_name(value) for value in graph.inputs if value.name not in graph.initializers]
        self.outputs = [get_name(value) for value in graph.outputs]
        self.steps = merge_linear_steps(
            drop_unused([match_pattern(node) or step_from_node(node) for node in graph], self.outputs)
        )
        self.products = torch.nn.ModuleList(
            step.compute for step in self.steps if isinstance(step.compute, torch.nn.Module)
        )
        read = {name for step in self.steps for name in step.inputs} | set(self.outputs)
        self._constants = {name: f"constant_{index}" for index, name in enumerate(graph.initializers) if name in read}
        for name, attribute in self._constants.items():
            self.register_buffer(attribute, tensor_from_value(graph.initializers[name]))

    def forward(self, *feeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The graph's inputs in its order -> its outputs in its order."""
        values = self.constants() | dict(zip(self.inputs, feeds, strict=True))
        for step in self.steps:
            run_step(step, values)
        return tuple(values[name] for name in self.outputs)

    def constants(self) -> dict[str, torch.Tensor]:
        """By name, those that steps read as inputs; what a step holds in a form of its own is not among them."""
        return {name: getattr(self, attribute) for name, attribute in self._constants.items()}


def read_module(path: Path) -> OnnxModule:
    """The module of the graph at ``path``; EngineError for one that torch-cuda cannot compute."""
    if not path.is_file():
        raise EngineError(f"{path}: there is no such file")
    try:
        return OnnxModule(ir.load(path.resolve()))  # resolved, or it does not hold external data to the folder
    except EngineError as exc:
        raise EngineError(f"{path}: {exc}") from exc
    except Exception as exc:  # the parser's own, and any error that a broken graph causes above
        raise EngineError(f"{path} is not a readable ONNX graph ({exc}); export the bundle again") from exc


def drop_unused(steps: list[GraphStep], outputs: list[str]) -> list[GraphStep]:
    """``steps`` without those whose outputs nothing reads."""
    read, used = set(outputs), []
    for step in reversed(steps):
        if read.intersection(step.outputs):
            used.append(step)
            read.update(step.inputs)
    return used[::-1]


def run_step(step: GraphStep, values: dict[str, Any]) -> None:
    """Compute ``step`` from ``values`` into them."""
    result = step.compute(*(values[name] for name in step.inputs))
    values.update(zip(step.outputs, (result,) if len(step.outputs) == 1 else result, strict=True))
