"""`--profile`'s arithmetic: text to ranges, ranges to each input's shapes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdeploy.engines.base import OPEN, Port
from qdeploy.engines.nvidia.profiles import (
    PROFILE_FILE,
    Grid,
    Range,
    Shapes,
    Sizes,
    parse_sizes,
    profile_for,
    provider_shapes,
    shapes_of,
    static_profile,
    write_profile,
)
from qdeploy.errors import EngineError, UsageError
from tests.engines.test_contract import TensorProto, helper, saved, tensor

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
UNET = [
    Port("sample", F32, (OPEN, 4, OPEN, OPEN)),
    Port("timestep", I64, ()),
    Port("encoder_hidden_states", F32, (OPEN, 77, 768)),
]
SD15 = Grid(factor=8, multiple=8)


def test_text_to_ranges() -> None:
    found = parse_sizes("batch=1:2:4, height=512:512:768,width=512")
    assert found == Sizes(Range(1, 2, 4), Range(512, 512, 768), Range(512, 512, 512))
    assert parse_sizes("batch=2") == Sizes(batch=Range(2, 2, 2))


@pytest.mark.parametrize(
    "text", ["", "batch", "depth=1", "batch=a", "batch=0", "batch=1:2", "batch=4:2:1", "batch=1:5:4", "batch=1,batch=2"]
)
def test_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--profile"):
        parse_sizes(text)


def test_each_inputs_shapes() -> None:
    found = shapes_of(parse_sizes("batch=1:2:2,height=512:512:768,width=512:640:768"), UNET, SD15)
    assert found == {
        "sample": Shapes((1, 4, 64, 64), (2, 4, 64, 80), (2, 4, 96, 96)),
        "timestep": Shapes((), (), ()),
        "encoder_hidden_states": Shapes((1, 77, 768), (2, 77, 768), (2, 77, 768)),
    }


def test_other_components_are_called_with_one_row_too() -> None:
    sizes = parse_sizes("batch=2:2:4,height=512,width=512")
    tokens = shapes_of(sizes, [Port("input_ids", I64, (OPEN, 77))], SD15)["input_ids"]
    image = shapes_of(sizes, [Port("image", F32, (OPEN, 3, OPEN, OPEN))], SD15)["image"]
    latents = shapes_of(sizes, [Port("latents", F32, (OPEN, 4, OPEN, OPEN))], SD15)["latents"]
    assert tokens == Shapes((1, 77), (1, 77), (4, 77))
    assert image.max == (4, 3, 512, 512)
    assert latents.max == (4, 4, 64, 64)


def test_what_is_fixed_stays() -> None:
    fixed = [Port("sample", F32, (2, 4, OPEN, OPEN)), Port("timestep", I64, ())]
    found = shapes_of(parse_sizes("height=512:512:768,width=512"), fixed, SD15)
    assert found["sample"] == Shapes((2, 4, 64, 64), (2, 4, 64, 64), (2, 4, 96, 64))


def test_an_open_side_that_nobody_asked_for_is_refused() -> None:
    with pytest.raises(UsageError, match="dimension 2 of 'sample' is open"):
        shapes_of(parse_sizes("batch=1:2:2"), UNET, SD15)


def test_a_side_that_the_unet_cannot_halve_is_refused() -> None:
    with pytest.raises(UsageError, match="--profile height: got 520, expected a multiple of 64"):
        shapes_of(parse_sizes("batch=2,height=512:520:576,width=512"), UNET, SD15)


def test_onnx_runtimes_words() -> None:
    """Scalars and static inputs are left out: they would be ``timestep:``, which does not parse."""
    found = provider_shapes(shapes_of(parse_sizes("batch=1:2:2,height=512,width=512"), UNET, SD15), UNET, "trt_profile")
    assert found == {
        "trt_profile_min_shapes": "sample:1x4x64x64,encoder_hidden_states:1x77x768",
        "trt_profile_opt_shapes": "sample:2x4x64x64,encoder_hidden_states:2x77x768",
        "trt_profile_max_shapes": "sample:2x4x64x64,encoder_hidden_states:2x77x768",
    }


def graph(folder: Path, rows: int | str) -> Path:
    ends = [tensor(name, TensorProto.FLOAT, [rows, 2]) for name in "xy"]  # type: ignore[list-item]
    return saved([helper.make_node("Add", ["x", "x"], ["y"])], ends[:1], ends[1:], {}, folder / "model.onnx")


def test_a_static_graph_needs_no_profile(tmp_path: Path) -> None:
    assert profile_for(graph(tmp_path, 3)) == {"x": Shapes((3, 2), (3, 2), (3, 2))}
    assert static_profile([Port("x", F32, (3, 2))]) == {"x": Shapes((3, 2), (3, 2), (3, 2))}


def test_a_profile_lies_beside_its_graph(tmp_path: Path) -> None:
    path, profile = graph(tmp_path, "n"), {"x": Shapes((1, 2), (2, 2), (4, 2))}
    with pytest.raises(EngineError, match=r"leaves shapes open and has no profile\.json"):
        profile_for(path)
    write_profile(tmp_path, profile)
    assert profile_for(path) == profile


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"x": {"min": [1, 2], "opt": [1, 2]}}',
        '{"x": {"min": [1, 3], "opt": [1, 3], "max": [1, 3]}}',
        '{"x": {"min": [4, 2], "opt": [2, 2], "max": [1, 2]}}',
        '{"x": {"min": [0, 2], "opt": [2, 2], "max": [4, 2]}}',
        '{"x": {"min": [1], "opt": [1], "max": [1]}}',
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, content: str) -> None:
    path = graph(tmp_path, "n")
    (tmp_path / PROFILE_FILE).write_text(content)
    with pytest.raises(EngineError, match=r"profile\.json"):
        profile_for(path)
