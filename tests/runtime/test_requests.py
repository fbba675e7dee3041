"""Every bad request is one clear error of ours, and the pipeline goes on; batches and guidance mean what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import MANIFEST, write_manifest
from qdeploy.base.errors import BundleError, EngineError, NonFiniteError, RequestError, UsageError
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.sampling.guidance import rescale_guidance

GREY = np.full((16, 16, 3), 128, np.uint8)
WHITE = np.full((16, 16), 255, np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "no prompt"),
        ({"prompt": "x" * 10_001}, "too long"),
        ({"prompt": "x", "negative_prompt": "x" * 10_001}, "too long"),
        ({"prompt": ["x", 3]}, "got int, expected a string"),
        ({"prompt": 3}, "got int, expected a string"),
        ({"prompt": "\ud800"}, "valid Unicode"),
        ({"prompt": ["x", "y"], "negative_prompt": ["a"] * 3}, "got 3, expected one or 2"),
        ({"prompt": "x", "width": 61}, "multiple of 2"),
        ({"prompt": "x", "height": 15}, "multiple of 2"),
        ({"prompt": "x", "height": 64}, "expected 16"),
        ({"prompt": "x", "steps": 0}, "steps"),
        ({"prompt": "x", "steps": 5000}, "steps"),
        ({"prompt": "x", "steps": 2.5}, "whole number"),
        ({"prompt": "x", "steps": True}, "whole number"),
        ({"prompt": "x", "count": 0}, "count"),
        ({"prompt": "x", "first": -1}, "first"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "guidance_scale": np.nan}, "guidance_scale: got nan, expected a number"),
        ({"prompt": "x", "guidance_scale": "high"}, "guidance_scale.*from -1000 to 1000"),
        ({"prompt": "x", "guidance_scale": np.inf}, "guidance_scale.*from -1000 to 1000"),
        ({"prompt": "x", "guidance_scale": 1e39}, "guidance_scale: got 1e.39, expected a number from -1000 to 1000"),
        ({"prompt": "x", "guidance_scale": 10**400}, "got a whole number of 1329 bits, expected a number from"),
        ({"prompt": "x", "guidance_scale": 10**5000}, "guidance_scale: got .*from -1000 to 1000"),
        ({"prompt": "x", "count": 10**5000}, "count: got a whole number of 16610 bits, expected at most 100 digits"),
        ({"prompt": "x", "seed": -(10**5000)}, "seed: got .*expected 0 or more"),
        ({"prompt": "x", "steps": 10**30}, "steps: got 10+, expected 1 to 1000"),
        ({"prompt": "x", "count": 10**30}, "count: got 10+ pictures of 16x16, expected at most 1048576 in one"),
        ({"prompt": ["x"] * 3, "count": 10**6}, "count: got 3000000 .* 27.6 GB of memory and more.*first=, count="),
        ({"prompt": "x", "width": np.nan}, "width.*whole number"),
        ({"prompt": "x", "height": np.inf}, "height.*whole number"),
        ({"prompt": "x", "guidance_rescale": 1.5}, "guidance_rescale.*0 to 1"),
        ({"prompt": "x", "deadline_s": 0}, "deadline_s"),
        ({"prompt": "x", "latents": np.zeros((1, 1, 1, 1), np.float32)}, "expected float32"),
        ({"prompt": "x", "latents": np.zeros((1, 4, 8, 8))}, "expected float32"),
        ({"prompt": "x", "latents": np.full((1, 4, 8, 8), np.nan, np.float32)}, "NaN"),
        ({"prompt": "x", "image": np.zeros((8, 8, 3), np.uint8)}, "got 8x8 pixels, expected 16x16"),
        ({"prompt": "x", "image": GREY.astype(np.float32)}, "expected a PIL image or uint8"),
        ({"prompt": "x", "image": GREY[..., 0]}, "expected a PIL image or uint8"),
        ({"prompt": "x", "image": "cat.png"}, "expected a PIL image or uint8"),
        ({"prompt": "x", "image": [GREY, GREY]}, "got 2, expected one"),
        ({"prompt": "x", "image": [GREY, GREY[:8]]}, "got 2, expected one"),
        ({"prompt": ["x", "y"], "image": [GREY, GREY[:8]]}, "got 16x8 pixels"),
        ({"prompt": "x", "image": GREY, "strength": 0}, "strength"),
        ({"prompt": "x", "image": GREY, "strength": 1.1}, "strength"),
        ({"prompt": "x", "image": GREY, "strength": 0.1, "steps": 5}, "leaves none"),
        ({"prompt": "x", "image": GREY, "mask": WHITE[:8]}, "mask: got 16x8 pixels, expected 16x16"),
        ({"prompt": "x", "image": GREY, "mask": WHITE.astype(float)}, "mask: got float64"),
        ({"prompt": "x", "mask": WHITE}, "without image"),
        ({"prompt": "x", "strength": 0.5}, "without image"),
        ({"prompt": "(x:999)", "weighting": True}, "weight"),
        ({"prompt": "(x:1.2.3)", "weighting": True}, "weight"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_and_the_pipeline_goes_on(pipe: Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises((RequestError, UsageError), match=message):
        pipe(**{"steps": 2} | arguments)
    assert pipe("a cat", steps=1).pixels.dtype == np.uint8


def test_a_longest_prompt_is_served(pipe: Pipeline) -> None:
    actual = pipe("x" * 10_000, steps=1)
    assert actual.truncated == {"x" * 10_000: "x" * (10_000 - 14)}


def test_a_picture_file_cut_short(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with Image.open(path) as cut, pytest.raises(RequestError, match="cannot be read"):
        pipe("a cat", image=cut)


def test_a_bundle_without_encoder_names_the_remedy(float_bundle: Path) -> None:
    with qdeploy.load(float_bundle) as plain:
        with pytest.raises(BundleError, match="--with-encoder"):
            plain("a cat", image=GREY)
        assert plain("a cat", steps=1).pixels.shape[0] == 1


def test_non_finite_output_names_component_and_step(float_bundle: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    bundle = Path(shutil.copytree(float_bundle, tmp_path / "broken"))
    manifest = open_bundle(bundle).manifest
    path = bundle / "unet" / "model.onnx"
    graph = onnx.load(path)
    (output,) = (value.name for value in graph.graph.output)
    for node in graph.graph.node:
        node.output[:] = ["finite" if name == output else name for name in node.output]
    limit = helper.make_tensor("limit", onnx.TensorProto.INT64, [], [600])  # the output is NaN below this timestep
    graph.graph.initializer.extend(
        [limit, *(helper.make_tensor(n, onnx.TensorProto.FLOAT, [], [v]) for n, v in (("nan", np.nan), ("one", 1.0)))]
    )
    graph.graph.node.extend(
        [
            helper.make_node("Less", ["timestep", "limit"], ["late"]),
            helper.make_node("Where", ["late", "nan", "one"], ["factor"]),
            helper.make_node("Mul", ["finite", "factor"], [output]),
        ]
    )
    (bundle / "unet" / "model.onnx.data").unlink()
    onnx.save(graph, path)
    write_manifest(bundle, manifest)
    with qdeploy.load(bundle) as broken:
        with pytest.raises(
            NonFiniteError, match=r"the output of unet holds NaN or infinity in step 5 of 10 \(timestep 501\)"
        ):
            broken("a cat", steps=10, scheduler="ddim", guidance_scale=2)
        assert np.isfinite(broken.encode(["a cat"])).all()


def test_a_batch_of_prompts_with_their_own_negatives_and_pictures(
    pipe: Pipeline, picture: np.ndarray, mask: np.ndarray
) -> None:
    pictures, masks, negatives = np.stack([picture, GREY]), np.stack([mask, ~mask]), ["blue", "green"]
    settings = dict(steps=4, seed=2, strength=0.75)
    both = pipe(["a cat", "a dog"], negative_prompt=negatives, image=pictures, mask=masks, count=2, **settings)
    for row, prompt in enumerate(["a cat", "a dog"]):
        single = pipe(
            prompt, negative_prompt=negatives[row], image=Image.fromarray(pictures[row]),
            mask=Image.fromarray(masks[row]), count=2, **settings,
        )  # fmt: skip
        assert np.array_equal(both.latents[2 * row : 2 * row + 2], single.latents)


def test_black_is_kept(pipe: Pipeline, picture: np.ndarray, mask: np.ndarray) -> None:
    kept = ~mask[::2, ::2]
    actual = pipe("a cat", image=picture, mask=mask, steps=4).latents[0]
    assert np.array_equal(actual[:, kept], pipe.encode_image(picture[None])[0][:, kept])
    assert not np.allclose(actual[:, ~kept], pipe.encode_image(picture[None])[0][:, ~kept])


def test_with_guidance_one_two_pictures_share_a_call(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from qdeploy.engines.ort_cpu import OrtSession

    calls: list[set[str]] = []
    whole_run = OrtSession.run
    monkeypatch.setattr(OrtSession, "run", lambda self, feeds: calls.append(set(feeds)) or whole_run(self, feeds))

    def unet_calls(guidance_scale: float) -> int:
        calls.clear()
        pipe("a cat", count=4, steps=3, scheduler="ddim", guidance_scale=guidance_scale)
        return sum("sample" in feeds for feeds in calls)

    assert (unet_calls(5.0), unet_calls(1.0)) == (12, 6)


@pytest.mark.parametrize("bundle", ["float_bundle", "int8_bundle"])
def test_latents_that_are_not_finite_are_named_on_every_engine(bundle: str, request: pytest.FixtureRequest) -> None:
    """The Q of an int8 graph makes numbers of NaN, so its pictures would come without an error."""
    with qdeploy.load(request.getfixturevalue(bundle)) as loaded:
        with pytest.raises(NonFiniteError, match=r"NaN or infinity (in|after) step 1 of \d .*guidance_scale 7\.5"):
            loaded("a cat", steps=3, latents=np.full((1, 4, 8, 8), 3e38, np.float32))
        assert loaded("a cat", steps=1).pixels.shape[0] == 1


@pytest.mark.parametrize(
    ("put_out", "words"),
    [
        (np.array(1, np.float32), r"float32\[\]"),
        (np.ones((2, 1, 8, 8), np.float32), r"float32\[2, 1, 8, 8\]"),
        (np.ones((1, 4, 8, 8), np.float32), r"float32\[1, 4, 8, 8\]"),
        (np.ones((2, 4, 8, 8), bool), r"bool\[2, 4, 8, 8\]"),
        (np.full((2, 4, 8, 8), "x"), r"<U1\[2, 4, 8, 8\]"),
        (None, "no array 'noise_pred'"),
    ],
)
def test_an_output_that_is_not_the_manifests_is_an_engine_error(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, put_out: object, words: str
) -> None:
    """A graph may say one shape and compute another; one channel would be broadcast."""
    from qdeploy.engines.ort_cpu import OrtSession

    whole_run = OrtSession.run

    def run(self: OrtSession, feeds: dict) -> dict:
        return {"noise_pred": put_out} if "sample" in feeds else whole_run(self, feeds)

    monkeypatch.setattr(OrtSession, "run", run)
    with pytest.raises(EngineError, match=words):
        pipe("a cat", steps=1)


def test_a_graph_with_open_batch_runs_at_one_without_guidance(pipe: Pipeline) -> None:
    """What an exporter that leaves the UNet's batch open gets: one row a call with guidance 1, else two."""
    from dataclasses import replace

    from qdeploy.artifacts.manifest import TensorInfo
    from qdeploy.runtime.components import BundleComponent, Turn

    info = pipe.components["unet"].info
    output = {name: TensorInfo(tensor.dtype, (-1, *tensor.shape[1:])) for name, tensor in info.outputs.items()}
    rows: list[int] = []

    class Recorder:
        def run(self, feeds: dict) -> dict:
            rows.append(len(feeds["sample"]))
            return {"noise_pred": feeds["sample"]}

        def close(self) -> None:
            pass

    component = BundleComponent("unet", replace(info, outputs=output), Recorder, Turn(exclusive=False))
    x = np.random.default_rng(0).standard_normal((3, 4, 8, 8), np.float32)
    feeds = {"sample": x, "timestep": np.array(1), "encoder_hidden_states": np.zeros((3, 16, 32), np.float32)}
    assert np.array_equal(component.run(feeds), x)
    assert np.array_equal(component.run(feeds, at_once=2), x)
    assert rows == [1, 1, 1, 2, 1]


def test_rescaling_restores_the_deviation() -> None:
    rng = np.random.default_rng(0)
    guided, text = (rng.standard_normal((2, 4, 8, 8), np.float32) * scale for scale in (9, 1))
    assert np.allclose(rescale_guidance(guided, text, 1.0).std(axis=(1, 2, 3)), text.std(axis=(1, 2, 3)), rtol=1e-5)
    assert np.array_equal(rescale_guidance(guided, text, 0.5)[1:], rescale_guidance(guided[1:], text[1:], 0.5))
    assert np.isfinite(rescale_guidance(np.zeros_like(text), text, 1.0)).all()


def test_old_bundles_still_load(encoder_bundle: Path, tmp_path: Path) -> None:
    """A manifest of before the encoder, and one of a newer writer with it, have the same schema."""
    bundle = Path(shutil.copytree(encoder_bundle, tmp_path / "old"))
    document = json.loads((bundle / MANIFEST).read_text())
    assert document["schema_version"] == 1
    del document["components"]["vae_encoder"]
    document["files"] = [one for one in document["files"] if not one["path"].startswith("vae_encoder/")]
    (bundle / MANIFEST).write_text(json.dumps(document))
    shutil.rmtree(bundle / "vae_encoder")
    with qdeploy.load(bundle) as old:
        assert old("a cat", steps=1).pixels.shape[0] == 1
