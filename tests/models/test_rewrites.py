"""The float rewrites change nothing but round-off, and leave the original as it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from qdeploy.base.errors import ModelError, TableError
from qdeploy.base.numerics import sqnr_db
from qdeploy.export.graph import graph_from_component
from qdeploy.models.components import TorchComponent, UNet, trace_layers
from qdeploy.models.rewrites import REWRITES, apply_rewrite
from qdeploy.models.rewrites.split_skips import SplitConv2d, find_skip_readers, split_skips
from qdeploy.models.rewrites.surgery import copy_module
from qdeploy.models.rewrites.timestep_table import TimestepTable, timestep_table
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.targets.base import load_target
from qdeploy.targets.onnx_files.graph import save_graph

SPLIT_DB = 110  # float32 sums in another order, through a whole UNet
TABLE_DB = 60  # float16 has 11 bits: 2**-11 of each entry's magnitude is 66 dB, and GroupNorms in between
HALF_ROUNDING = 2.0**-11
HALF_SUBNORMAL = 2.0**-25
SPLITS = {"tiny": 8, "builtin:emoji": 12}  # conv1 and conv_shortcut of each up-block resnet


class Unconditional(TorchComponent):
    """``sample, timestep`` -> ``noise_pred`` of a UNet2DModel."""

    outputs = ("noise_pred",)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(sample, timestep, return_dict=False)[0]


def unconditional() -> Unconditional:
    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=8, downsample_type="resnet", upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    return Unconditional(unet).eval().requires_grad_(False)


def output(component: TorchComponent, feeds: dict[str, Tensor], t: int) -> np.ndarray:
    with torch.no_grad():
        return component(**{**feeds, "timestep": torch.tensor(t)}).numpy()


@pytest.fixture(scope="module", params=["tiny", "builtin:emoji", "unconditional"])
def case(request: pytest.FixtureRequest) -> tuple[str, TorchComponent, dict[str, Tensor]]:
    torch.manual_seed(2)
    if request.param == "unconditional":
        return "unconditional", unconditional(), {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(500)}
    model = request.getfixturevalue("tiny_model") if request.param == "tiny" else load_model(request.param)
    return request.param, model.unet, model.make_example("unet", 2)


def test_a_copy_shares_weights_and_its_rewrites_do_not_show_in_the_original(tiny_model: LatentDiffusion) -> None:
    before = [name for name, _ in tiny_model.unet.named_modules()]
    copy = copy_module(tiny_model.unet)
    assert all(a is b for a, b in zip(copy.parameters(), tiny_model.unet.parameters(), strict=True))
    split_skips(copy)
    timestep_table(copy)
    assert [name for name, _ in tiny_model.unet.named_modules()] == before
    assert not any(resnet.skip_time_act for resnet in tiny_model.unet.inner.mid_block.resnets)


def test_rewrites_are_applied_by_name(tiny_model: LatentDiffusion) -> None:
    copy = copy_module(tiny_model.unet)
    for name in REWRITES:
        assert apply_rewrite(copy, name)
    modules = list(copy.inner.modules())
    assert any(isinstance(module, SplitConv2d) for module in modules)
    assert any(isinstance(module, TimestepTable) for module in modules)
    with pytest.raises(TableError, match="'no_such', expected one of split_skips, timestep_table"):
        apply_rewrite(copy, "no_such")


def test_split_skips_is_exact(case: tuple[str, TorchComponent, dict[str, Tensor]]) -> None:
    name, component, feeds = case
    split = copy_module(component)
    names = split_skips(split)
    assert len(names) == SPLITS.get(name, 8)
    assert sqnr_db(output(component, feeds, 300), output(split, feeds, 300)) > SPLIT_DB
    layers = {call.name for call in trace_layers(split, feeds)}
    assert {f"{name}.{part}" for name in names for part in ("h", "skip")} <= layers
    assert not layers & set(names)


def test_split_weights_are_views_and_the_bias_is_added_once(tiny_model: LatentDiffusion) -> None:
    split = copy_module(tiny_model.unet)
    for name in split_skips(split):
        original, halves = tiny_model.unet.inner.get_submodule(name), split.inner.get_submodule(name)
        assert isinstance(halves, SplitConv2d)
        storage = original.weight.untyped_storage().data_ptr()
        assert {half.weight.untyped_storage().data_ptr() for half in (halves.h, halves.skip)} == {storage}
        assert torch.equal(torch.cat([halves.h.weight, halves.skip.weight], dim=1), original.weight)
        assert halves.h.bias is original.bias
        assert halves.skip.bias is None


def test_the_boundary_is_the_hidden_states_channels(case: tuple[str, TorchComponent, dict[str, Tensor]]) -> None:
    """Seen from outside: what each up-block is given, and what each of its resnets outputs."""
    _, component, feeds = case
    seen: list[int] = []

    def on_block(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    def on_resnet(_: nn.Module, args: tuple, out: Tensor) -> None:
        seen.append(out.shape[1])

    handles = [block.register_forward_pre_hook(on_block, with_kwargs=True) for block in component.inner.up_blocks]
    for block in component.inner.up_blocks:
        handles += [resnet.register_forward_hook(on_resnet) for resnet in list(block.resnets)[:-1]]
    output(component, feeds, 1)
    for handle in handles:
        handle.remove()
    assert [hidden for _, hidden in find_skip_readers(component.inner)] == seen


def test_splitting_twice_and_unknown_blocks_are_refused(tiny_model: LatentDiffusion) -> None:
    split = copy_module(tiny_model.unet)
    split_skips(split)
    with pytest.raises(ModelError, match="once"):
        split_skips(split)
    strange = copy_module(tiny_model.unet)
    strange.inner.up_blocks[1] = nn.Sequential()
    with pytest.raises(ModelError, match=r"up_blocks\.1 is a Sequential"):
        split_skips(strange)


@pytest.mark.parametrize("timesteps", [1000, [1, 300, 999]])
def test_the_timestep_table_is_as_exact_as_float16(
    case: tuple[str, TorchComponent, dict[str, Tensor]], timesteps: int | list[int]
) -> None:
    _, component, feeds = case
    tabled = copy_module(component)
    names = timestep_table(tabled, timesteps)
    assert len(names) == sum(getattr(m, "time_emb_proj", None) is not None for m in component.inner.modules())
    for t in (1, 300, 999):
        assert sqnr_db(output(component, feeds, t), output(tabled, feeds, t)) > TABLE_DB
    layers = {call.name for call in trace_layers(tabled, {**feeds, "timestep": torch.tensor(300)})}
    assert not any("time_emb" in layer for layer in layers)


def test_each_row_is_within_float16_rounding_of_the_float_projection(
    case: tuple[str, TorchComponent, dict[str, Tensor]],
) -> None:
    _, component, feeds = case
    tabled = copy_module(component)
    names = timestep_table(tabled)
    exact: dict[str, Tensor] = {}
    handles = [
        component.inner.get_submodule(name).register_forward_hook(lambda _m, _a, out, n=name: exact.update({n: out[0]}))
        for name in names
    ]
    output(component, feeds, 421)
    for handle in handles:
        handle.remove()
    for name in names:
        table = tabled.inner.get_submodule(name)
        assert isinstance(table, TimestepTable)
        assert table.table.dtype == torch.float16
        slack = 1e-5 * exact[name].abs().max()  # float32 sums over another batch size
        bound = HALF_ROUNDING * exact[name].abs() + HALF_SUBNORMAL + slack
        assert ((table.table[421].float() - exact[name]).abs() <= bound).all()


def test_a_timestep_without_a_row_is_refused(tiny_model: LatentDiffusion) -> None:
    feeds = tiny_model.make_example("unet", 2)
    for timesteps, unknown in ((1000, 1000), (1000, -1), ([10, 20], 15), ([10, 20], 21)):
        tabled = copy_module(tiny_model.unet)
        timestep_table(tabled, timesteps)
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            output(tabled, feeds, unknown)
    with pytest.raises(ModelError, match=r"torch\.float32, expected torch\.int64"):
        tabled(**{**feeds, "timestep": torch.tensor(10.5)})


def test_what_a_table_cannot_hold_is_refused(tiny_model: LatentDiffusion) -> None:
    twice = copy_module(tiny_model.unet)
    timestep_table(twice)
    with pytest.raises(ModelError, match="already has"):
        timestep_table(twice)
    classes = copy_module(tiny_model.unet)
    classes.inner.class_embedding = nn.Embedding(3, 128)
    with pytest.raises(ModelError, match="class_embedding"):
        timestep_table(classes)
    for wrong in ([], [-1, 5], [0.5], 0):
        with pytest.raises(ModelError, match="whole numbers"):
            timestep_table(copy_module(tiny_model.unet), wrong)


def export_graph(component: TorchComponent, feeds: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "model.onnx"
    graph = graph_from_component(component, feeds, opset=20)
    load_target("ort-cpu").lower(graph)
    save_graph(graph, path)
    return path


def ops_between_timestep_and_add(graph: onnx.GraphProto) -> Counter[str]:
    """Operators that the timestep passes through until it is added to a block's activation."""
    reached, ops = {"timestep"}, Counter[str]()
    for node in graph.node:  # in topological order
        if reached & set(node.input):
            ops[node.op_type] += 1
            reached |= set() if node.op_type == "Add" else set(node.output)
    return ops


@pytest.mark.exports
def test_the_exported_graph_gathers_by_t_and_computes_no_embedding(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    rewritten: UNet = copy_module(tiny_model.unet)
    split_skips(rewritten)
    names = timestep_table(rewritten)
    feeds = tiny_model.make_example("unet", 2)
    path = export_graph(rewritten, feeds, tmp_path)
    graph = onnx.load(path, load_external_data=False).graph
    assert not {"Sin", "Cos"} & {node.op_type for node in graph.node}
    from_t = ops_between_timestep_and_add(graph)
    assert from_t["Gather"] == len(names) + 1  # row of t, then a row of each table
    assert not {"Gemm", "MatMul", "Conv", "Sigmoid"} & set(from_t)
    assert from_t["Add"] == len(names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    numpy_feeds = {name: value.numpy() for name, value in feeds.items()}
    for t in (0, 7, 500, 999):
        (actual,) = session.run(None, {**numpy_feeds, "timestep": np.array(t, np.int64)})
        assert sqnr_db(output(rewritten, feeds, t), actual) > SPLIT_DB
        assert sqnr_db(output(tiny_model.unet, feeds, t), actual) > TABLE_DB
    for unknown in (1000, -1):
        with pytest.raises(Exception, match="out of"):
            session.run(None, {**numpy_feeds, "timestep": np.array(unknown, np.int64)})
