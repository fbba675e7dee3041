"""A graph that was traced before stands for another trace only where that would read the very same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from qdeploy.export.graph import graph_from_component
from qdeploy.export.open_dims import STATIC
from qdeploy.models.components import TorchComponent
from qdeploy.models.source import load_model
from tests import traces
from tests.traces import Traces, hash_trace

HASH = """
import sys
from qdeploy.models.source import load_model
from tests.traces import hash_trace
model = load_model(sys.argv[1])
print(*(hash_trace(model.component(name)) for name in model.components))
"""


class Scaled(TorchComponent):
    outputs = ("y",)

    def __init__(self, factor: float) -> None:
        super().__init__(torch.nn.Linear(3, 3))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The components that are really traced."""
    traced: list[object] = []

    def trace(component: TorchComponent, *rest: object) -> ir.Model:
        traced.append(component)
        return graph_from_component(component, *rest)

    monkeypatch.setattr(traces, "graph_from_component", trace)
    return traced


@pytest.mark.exports
def test_equal_components_are_traced_once(counted: list[object], tmp_path: Path) -> None:
    store = Traces(tmp_path / "traces", lambda: None)
    torch.manual_seed(0)
    one, other = Scaled(2.0), Scaled(2.0)
    other.load_state_dict(one.state_dict())
    feeds = {"x": torch.ones(2, 3)}
    made, read = (ir.to_proto(store.trace(each, feeds, 20, STATIC, 1)) for each in (one, other))
    assert counted == [one]
    assert made.SerializeToString(deterministic=True) == read.SerializeToString(deterministic=True)
    changed = Scaled(3.0)
    changed.load_state_dict(one.state_dict())
    for component, x, opset in ((changed, feeds["x"], 20), (one, torch.ones(4, 3), 20), (one, feeds["x"], 21)):
        store.trace(component, {"x": x}, opset, STATIC, 1)
    with torch.no_grad():
        other.inner.weight[0, 0] += 1e-6
    store.trace(other, feeds, 20, STATIC, 1)
    assert counted == [one, changed, one, one, other]


def test_every_process_says_the_same(tiny_folder: Path) -> None:
    said = set()
    for seed in "34":  # of the order of sets
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", HASH, str(tiny_folder)]
        said.add(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert len(said) == 1
    assert len(said.pop().split()) == 3


def test_the_folder_that_a_model_was_read_from_is_no_part_of_it(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "copy")
    models = [load_model(str(folder)) for folder in (tiny_folder, tmp_path / "copy")]
    for name in models[0].components:
        one, other = (hash_trace(model.component(name)) for model in models)
        assert one is not None
        assert one == other, name


def test_what_cannot_be_pickled_is_traced_each_time() -> None:
    assert hash_trace(lambda x: x) is None
    assert hash_trace(1) == hash_trace(1) != hash_trace(2)
    sets = hash_trace(torch.nn.Identity()), hash_trace({"b": torch.ones(2)}), hash_trace({"b": torch.zeros(2)})
    assert len({*sets}) == 3
