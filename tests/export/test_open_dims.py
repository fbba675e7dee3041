"""Graphs with open batch and size: they are audited and gated, and give the static graphs' pictures and others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from PIL import Image

import qdeploy
from qdeploy.artifacts.bundle import open_bundle as opened
from qdeploy.base.errors import ExportError, RequestError, UsageError
from qdeploy.cli import main
from qdeploy.export.audit import audit_file
from qdeploy.export.exporter import export_bundle
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import LatentDiffusion
from qdeploy.runtime.request_size import resolve_size
from qdeploy.targets.base import load_target
from qdeploy.targets.onnx_files.traced_sizes import TRACED_WITH, close_dims, evaluate_expression


def test_the_manifest_says_what_is_open(open_bundle: Path, tiny_model: LatentDiffusion) -> None:
    manifest = opened(open_bundle).manifest
    channels = tiny_model.latents.channels
    assert manifest.components["unet"].inputs["sample"].shape == (-1, channels, -1, -1)
    assert manifest.components["text_encoder"].inputs["input_ids"].shape == (-1, tiny_model.latents.tokens)
    assert manifest.components["vae_encoder"].inputs["image"].shape == (-1, 3, -1, -1)
    assert manifest.latents.side_multiple == tiny_model.size_multiple("unet")


def test_it_runs_in_integers_like_the_static_one(open_bundle: Path, int8_bundle: Path) -> None:
    shares = [opened(folder).manifest.components["unet"].integer_mac_share for folder in (open_bundle, int8_bundle)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-9)
    static, free = (audit_file(folder / "unet/model.onnx") for folder in (int8_bundle, open_bundle))
    assert sum(one.macs for one in static.findings) == sum(one.macs for one in free.findings)


def test_every_dimension_is_named_by_the_inputs(open_bundle: Path) -> None:
    model = ir.load(open_bundle / "unet/model.onnx")
    sample = next(value for value in model.graph.inputs if value.name == "sample")
    assert [str(side) for side in sample.shape or ()] == ["batch", "4", "height", "width"]
    symbols = {side.value for value in model.graph.outputs for side in value.shape or () if not isinstance(side, int)}
    assert symbols == {"batch", "height", "width"}


def test_the_static_size_gives_the_static_pictures(open_bundle: Path, int8_bundle: Path) -> None:
    with qdeploy.load(open_bundle) as free, qdeploy.load(int8_bundle) as static:
        asked = dict(steps=3, seed=5, guidance_scale=4.0, count=3)
        ours, theirs = free("a cat", **asked).latents, static("a cat", **asked).latents
    assert np.abs(ours - theirs).max() <= 0.05 * np.abs(theirs).max()  # codes at rounding edges may differ


def test_a_picture_of_another_size(open_bundle: Path, tmp_path: Path) -> None:
    with qdeploy.load(open_bundle) as pipe:
        wide = pipe("a cat", steps=2, width=32, height=24)
        assert wide.images[0].size == (32, 24)
        assert wide.latents.shape[2:] == (12, 16)
        start = Image.new("RGB", (32, 24), (10, 200, 30))
        again = pipe("a cat", image=start, strength=0.5, steps=4, width=32, height=24)
        assert again.images[0].size == (32, 24)
        for side, problem in ((18, "multiple of 4"), (16384, "at most 8192")):
            with pytest.raises(RequestError, match=problem):
                pipe("a cat", steps=2, width=side)
    out = tmp_path / "wide.png"
    asked = ["--quiet", "generate", str(open_bundle), "a cat", "-o", str(out), "--steps", "1", "--width", "24"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    assert Image.open(out).size == (24, 16)


def test_a_huge_picture_is_refused_with_the_memory_that_it_would_take(open_bundle: Path, tmp_path: Path) -> None:
    latents = opened(open_bundle).manifest.latents
    with qdeploy.load(open_bundle) as pipe, pytest.raises(RequestError) as info:
        pipe("a cat", steps=1, width=8192, height=8192)
    assert "got 8192x8192, expected at most 4.2 million pixels; that would take about 274.9 GB of memory" in str(
        info.value
    )
    assert "GB are available; ask for a smaller picture" in str(info.value)
    asked = [
        "generate",
        str(open_bundle),
        "a cat",
        "-o",
        str(tmp_path / "x.png"),
        "--width",
        "8192",
        "--height",
        "8192",
    ]
    refused = CliRunner().invoke(main, asked)
    assert refused.exit_code == 1
    assert "274.9 GB of memory" in refused.output
    assert "--allow-large" in refused.output
    assert list(tmp_path.iterdir()) == []
    assert resolve_size(8192, 8192, latents, allow_large=True).image_width == 8192
    assert resolve_size(2048, 2048, latents).image_width == 2048


def test_a_static_bundle_says_how_to_get_other_sizes(int8_bundle: Path) -> None:
    with qdeploy.load(int8_bundle) as pipe, pytest.raises(RequestError, match="--dynamic size"):
        pipe("a cat", steps=1, width=32)


def test_without_guidance_the_unet_runs_one_row(open_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    with qdeploy.load(open_bundle) as pipe, pipe.component("unet").hold() as session:
        run = session.run
        monkeypatch.setattr(session, "run", lambda feeds: (rows.append(len(feeds["sample"])), run(feeds))[1])
        pipe("a cat", steps=2, guidance_scale=1)
        pipe("a cat", steps=2, guidance_scale=3)
    assert rows == [1, 1, 1, 2, 2, 2]  # PNDM calls the model once more than there are steps


@pytest.mark.parametrize("text", ["", "batch,", "height", "batch;size"])
def test_unknown_dimensions_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--dynamic"):
        OpenDims.from_text(text)


def test_dimensions_from_text() -> None:
    assert OpenDims.from_text(None) == OpenDims()
    assert OpenDims.from_text("batch") == OpenDims(batch=True)
    assert OpenDims.from_text("size, batch") == OpenDims(batch=True, size=True)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("height*width/16", 12),
        ("batch", 2),
        ("2*height + 1", 33),
        ("depth", None),
        ("__import__('os')", None),
        ("height**99", None),
        ("height/0", None),
        ("(" * 500 + "1" + ")" * 500, None),
        (None, None),
    ],
)
def test_expressions_are_computed_and_nothing_else(expression: str | None, expected: int | None) -> None:
    assert evaluate_expression(expression, {"batch": 2, "height": 16, "width": 12}) == expected


def test_alien_metadata_are_refused() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    model.metadata_props[TRACED_WITH] = "[1"
    with pytest.raises(ExportError, match="unreadable"):
        close_dims(model)


def test_a_target_may_refuse_open_dimensions(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    target = replace(load_target("ort-cpu"), fixed_dims={"size": "its engine plans memory for one size"})
    with pytest.raises(UsageError, match="--target ort-cpu cannot leave size open: its engine plans memory"):
        export_bundle(tiny_model, None, target, tmp_path / "b", open_dims=OpenDims(batch=True, size=True))
    assert list(tmp_path.iterdir()) == []
