"""`--profile`'s arithmetic: text to ranges, ranges to each input's shapes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdeploy.base.errors import EngineError, UsageError
from qdeploy.engines.base import OPEN_DIM, Port
from qdeploy.engines.nvidia.profiles import (
    PROFILE_FILE,
    LatentGrid,
    ProfileSizes,
    Range,
    Shapes,
    build_static_profile,
    format_provider_shapes,
    read_profile,
    shapes_from_sizes,
    sizes_from_text,
    write_profile,
)
from tests.engines.test_contract import TensorProto, helper, save_model, tensor

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
UNET = [
    Port("sample", F32, (OPEN_DIM, 4, OPEN_DIM, OPEN_DIM)),
    Port("timestep", I64, ()),
    Port("encoder_hidden_states", F32, (OPEN_DIM, 77, 768)),
]
SD15 = LatentGrid(factor=8, multiple=8)


def test_text_to_ranges() -> None:
    sizes = sizes_from_text("batch=1:2:4, height=512:512:768,width=512")
    assert sizes == ProfileSizes(Range(1, 2, 4), Range(512, 512, 768), Range(512, 512, 512))
    assert sizes_from_text("batch=2") == ProfileSizes(batch=Range(2, 2, 2))


@pytest.mark.parametrize(
    "text", ["", "batch", "depth=1", "batch=a", "batch=0", "batch=1:2", "batch=4:2:1", "batch=1:5:4", "batch=1,batch=2"]
)
def test_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--profile"):
        sizes_from_text(text)


def test_each_inputs_shapes() -> None:
    shapes = shapes_from_sizes(sizes_from_text("batch=1:2:2,height=512:512:768,width=512:640:768"), UNET, SD15)
    assert shapes == {
        "sample": Shapes((1, 4, 64, 64), (2, 4, 64, 80), (2, 4, 96, 96)),
        "timestep": Shapes((), (), ()),
        "encoder_hidden_states": Shapes((1, 77, 768), (2, 77, 768), (2, 77, 768)),
    }


def test_other_components_are_called_with_one_row_too() -> None:
    sizes = sizes_from_text("batch=2:2:4,height=512,width=512")
    tokens = shapes_from_sizes(sizes, [Port("input_ids", I64, (OPEN_DIM, 77))], SD15)["input_ids"]
    image = shapes_from_sizes(sizes, [Port("image", F32, (OPEN_DIM, 3, OPEN_DIM, OPEN_DIM))], SD15)["image"]
    latents = shapes_from_sizes(sizes, [Port("latents", F32, (OPEN_DIM, 4, OPEN_DIM, OPEN_DIM))], SD15)["latents"]
    assert tokens == Shapes((1, 77), (1, 77), (4, 77))
    assert image.max == (4, 3, 512, 512)
    assert latents.max == (4, 4, 64, 64)


def test_what_is_fixed_stays() -> None:
    fixed = [Port("sample", F32, (2, 4, OPEN_DIM, OPEN_DIM)), Port("timestep", I64, ())]
    shapes = shapes_from_sizes(sizes_from_text("height=512:512:768,width=512"), fixed, SD15)
    assert shapes["sample"] == Shapes((2, 4, 64, 64), (2, 4, 64, 64), (2, 4, 96, 64))


def test_an_open_side_that_nobody_asked_for_is_refused() -> None:
    with pytest.raises(UsageError, match="dimension 2 of 'sample' is open"):
        shapes_from_sizes(sizes_from_text("batch=1:2:2"), UNET, SD15)


def test_a_side_that_the_unet_cannot_halve_is_refused() -> None:
    with pytest.raises(UsageError, match="--profile height: got 520, expected a multiple of 64"):
        shapes_from_sizes(sizes_from_text("batch=2,height=512:520:576,width=512"), UNET, SD15)


def test_onnx_runtimes_words() -> None:
    """Scalars and static inputs are left out: they would be ``timestep:``, which does not parse."""
    shapes = format_provider_shapes(
        shapes_from_sizes(sizes_from_text("batch=1:2:2,height=512,width=512"), UNET, SD15), UNET, "trt_profile"
    )
    assert shapes == {
        "trt_profile_min_shapes": "sample:1x4x64x64,encoder_hidden_states:1x77x768",
        "trt_profile_opt_shapes": "sample:2x4x64x64,encoder_hidden_states:2x77x768",
        "trt_profile_max_shapes": "sample:2x4x64x64,encoder_hidden_states:2x77x768",
    }


def graph(folder: Path, rows: int | str) -> Path:
    ends = [tensor(name, TensorProto.FLOAT, [rows, 2]) for name in "xy"]  # type: ignore[list-item]
    return save_model([helper.make_node("Add", ["x", "x"], ["y"])], ends[:1], ends[1:], {}, folder / "model.onnx")


def test_a_static_graph_needs_no_profile(tmp_path: Path) -> None:
    assert read_profile(graph(tmp_path, 3)) == {"x": Shapes((3, 2), (3, 2), (3, 2))}
    assert build_static_profile([Port("x", F32, (3, 2))]) == {"x": Shapes((3, 2), (3, 2), (3, 2))}


def test_a_profile_is_stored_next_to_its_graph(tmp_path: Path) -> None:
    path, profile = graph(tmp_path, "n"), {"x": Shapes((1, 2), (2, 2), (4, 2))}
    with pytest.raises(EngineError, match=r"has open shapes and no profile\.json"):
        read_profile(path)
    write_profile(tmp_path, profile)
    assert read_profile(path) == profile


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
        read_profile(path)
