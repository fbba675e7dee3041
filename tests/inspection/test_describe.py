"""What `inspect` says of a table, in text and as a chart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from qdeploy.artifacts.noise_correction import NoiseCorrection
from qdeploy.artifacts.table import (
    Affine,
    AttentionQuant,
    ComponentQuant,
    FloatLayer,
    LayerQuant,
    QuantTable,
    save_table,
)
from qdeploy.base.errors import UsageError
from qdeploy.cli import main
from qdeploy.inspection.describe import describe
from qdeploy.inspection.plot import COLOURS, compute_bar_lengths, plot_sensitivity

MACS = 1000


def layer(
    bits: int = 8,
    passes: int = 1,
    equalized: bool = True,
    bias: bool = False,
    first_token: bool = False,
    shape: tuple[int, ...] = (100, 200),
) -> LayerQuant:
    return LayerQuant(
        weight=np.ones(shape, np.int8),
        weight_scale=np.ones(100, np.float32),
        weight_bits=bits,
        input=Affine(0.5, 7),
        input_ratio=np.ones(shape[1], np.float32) if equalized else None,
        bias=np.zeros(100, np.float32) if bias else None,
        passes=passes,
        first_token_float=first_token,
    )


@pytest.fixture
def known_table() -> QuantTable:
    """24 layers: 22 plain ones, one at 4 bits and one in two passes; two in float, one of them for its sensitivity."""
    layers = {f"plain.{number}": layer() for number in range(22)}
    layers["plain.1"] = layer(shape=(100, 100, 2, 1))  # a convolution without the range of its output
    layers |= {"narrow": layer(bits=4, bias=True), "short": layer(passes=2, equalized=False, first_token=True)}
    db = {f"plain.{number}": 60.0 + number for number in range(22)}
    db |= {"narrow": 31.25, "short": 25.0, "worst": 11.5}
    quant = ComponentQuant(
        layers,
        {"conv_in": FloatLayer("keep list", MACS), "worst": FloatLayer("sensitive, 11.5 dB by itself", 2 * MACS)},
        dict.fromkeys(layers, MACS),
        rewrites=("split_skips",),
        sensitivity_db=db,
        attention={"attn1": AttentionQuant(*[Affine(0.1, 128)] * 3)},
    )
    correction = NoiseCorrection(np.array([1, 41]), np.zeros(2, np.float32), np.ones((2, 4), np.float32))
    return QuantTable({"unet": quant}, "builtin:emoji", "ab" * 32, noise_correction=correction)


@pytest.fixture
def path(known_table: QuantTable, tmp_path: Path) -> Path:
    save_table(known_table, tmp_path / "q.safetensors")
    return tmp_path / "q.safetensors"


def drop_sensitivity(table: QuantTable) -> QuantTable:
    quant = dataclasses.replace(table.components["unet"], sensitivity_db={})
    return dataclasses.replace(table, components={"unet": quant}, noise_correction=None)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--quiet", *map(str, arguments)])


def test_the_summary_of_a_table(path: Path) -> None:
    facts = {label.strip(): value for label, value in describe(str(path))}
    assert facts["unet"] == "24 layers in W8/W4, 88.9% of MACs"
    assert facts["W8"] == "23 layers, 85.2% of MACs, 0.47 MB"
    assert facts["W4"] == "1 layers, 3.7% of MACs, 0.01 MB"
    assert facts["float"] == "2 layers, 11.1% of MACs"
    assert facts["rewrites"] == "split_skips"
    assert facts["equalized"] == "23 of 24 layers"
    assert facts["two passes"] == "1 of 24 layers"
    assert facts["float output"] == "1 of 24 layers"
    assert facts["corrected biases"] == "1 of 24 layers"
    assert facts["first token in float"] == "1 of 24 layers"
    assert facts["attention"] == "1 at 8 bits"
    assert facts["noise correction"] == "at 2 timesteps"
    assert facts["float: conv_in"] == "1,000 MACs, keep list"


def test_layers_by_sensitivity(path: Path) -> None:
    labels = [label for label, _ in describe(str(path))]
    listed = describe(str(path))[labels.index("  sensitivity") + 1 :]
    assert len(listed) == 20
    assert listed[:3] == [
        ("    worst", " 11.5 dB  float         7.41% of MACs, sensitive, 11.5 dB by itself"),
        ("    short", " 25.0 dB  W8  2 passes   3.70% of MACs"),
        ("    narrow", " 31.2 dB  W4  1 pass     3.70% of MACs"),
    ]
    everything = describe(str(path), show_all=True)
    assert everything[-1][0] == "    plain.21"
    assert len(everything) == len(labels) + 5


def test_a_table_without_sensitivities(known_table: QuantTable, path: Path) -> None:
    save_table(drop_sensitivity(known_table), path)
    facts = {label.strip(): value for label, value in describe(str(path))}
    assert "sensitivity" not in facts
    assert facts["noise correction"] == "none"
    result = run("inspect", path, "--plot", path.with_suffix(".png"))
    assert result.exit_code == 2
    assert "quantize --sensitivity" in result.output
    assert not path.with_suffix(".png").exists()


def test_inspect_draws_and_lists(path: Path) -> None:
    picture = path.with_suffix(".png")
    result = run("inspect", path, "--all", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "plain.21" in result.output
    assert str(picture) in result.output
    assert picture.stat().st_size > 5000
    with Image.open(picture) as image:
        assert image.format == "PNG"
        colours = {
            "#" + bytes(pixel).hex() for pixel in np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
        }
    assert set(COLOURS.values()) <= colours


def test_only_a_table_can_be_drawn() -> None:
    result = run("inspect", "builtin:emoji", "--plot", "never.png")
    assert result.exit_code == 2
    assert "is no table" in result.output


def test_layers_without_any_error_are_drawn(known_table: QuantTable, tmp_path: Path) -> None:
    quant = known_table.components["unet"]
    exact = dataclasses.replace(quant, sensitivity_db={**quant.sensitivity_db, "plain.0": float("inf")})
    plot_sensitivity(dataclasses.replace(known_table, components={"unet": exact}), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert compute_bar_lengths([20.0, float("inf"), 30.0]) == [20.0, 30.0, 30.0]
    with pytest.raises(UsageError, match="--sensitivity"):
        plot_sensitivity(drop_sensitivity(known_table), tmp_path / "none.png")


@pytest.mark.parametrize("content", [b"", b"no graph", b"\xff" * 300, b"\x3a\x02\x08"])
@pytest.mark.parametrize("options", [[], ["--audit"]])
def test_a_garbage_graph_is_named(tmp_path: Path, content: bytes, options: list[str]) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(content)
    result = run("inspect", path, *options)
    assert result.exit_code in (1, 2)
    assert "garbage.onnx" in result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
