"""The runtime makes diffusers' pictures, serves what it promises and refuses what it cannot serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import qdeploy
from qdeploy.base.errors import CancelledError, EngineError, RequestError, UsageError
from qdeploy.runtime.pipeline import Pipeline, Step
from qdeploy.sampling import CLASS_NAMES


@pytest.fixture(scope="module")
def pipe(float_bundle: Path) -> Iterator[Pipeline]:
    with qdeploy.load(float_bundle) as pipeline:
        yield pipeline


def unit_noise(pipe: Pipeline, count: int = 1) -> np.ndarray:
    latents = pipe.latents
    shape = (count, latents.channels, latents.height, latents.width)
    return np.random.default_rng(3).standard_normal(shape, np.float32)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_same_picture_as_diffusers_within_one_grey_level(
    pipe: Pipeline, tiny_folder: Path, guidance_scale: float
) -> None:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    reference = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(tiny_folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(tiny_folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(tiny_folder / "unet"),
        scheduler=PNDMScheduler.from_pretrained(tiny_folder / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    reference.set_progress_bar_config(disable=True)
    noise = unit_noise(pipe)
    expected = reference(
        "a red house", negative_prompt="blue", num_inference_steps=8, guidance_scale=guidance_scale,
        latents=torch.from_numpy(noise), output_type="np",
    ).images  # fmt: skip
    actual = pipe("a red house", negative_prompt="blue", steps=8, guidance_scale=guidance_scale, latents=noise)
    assert np.abs(actual.pixels[0].astype(int) - np.rint(expected[0] * 255)).max() <= 1


def test_equal_seed_equal_picture_whatever_else_is_in_the_batch(pipe: Pipeline) -> None:
    single = pipe("a cat", steps=4, seed=9)
    among = pipe(["a dog", "a cat"], steps=4, seed=9, count=2)
    assert among.pixels.shape[0] == 4
    assert np.array_equal(single.pixels[0], among.pixels[2])
    assert not np.array_equal(among.pixels[2], among.pixels[3])
    assert not np.array_equal(single.pixels, pipe("a cat", steps=4, seed=10).pixels)


def test_a_seed_for_each_prompt(encoder_bundle: Path, picture: np.ndarray) -> None:
    """What a service joins into one call gives each the picture that it had been given by itself."""
    prompts, seeds, images = ["a cat", "a dog", "a cat"], [3, 8, 4], [picture, picture[::-1], picture[:, ::-1]]
    with qdeploy.load(encoder_bundle) as pipe:
        for more in ({}, {"scheduler": "euler-a"}, {"guidance_scale": 1.0}):
            together = pipe(prompts, seed=seeds, steps=3, image=images, count=2, **more)
            assert together.seeds == ((3, 0), (3, 1), (8, 0), (8, 1), (4, 0), (4, 1))
            for row, (prompt, seed, image) in enumerate(zip(prompts, seeds, images, strict=True)):
                by_itself = pipe(prompt, seed=seed, steps=3, image=image, count=2, **more)
                assert np.array_equal(together.latents[2 * row : 2 * row + 2], by_itself.latents)
        with pytest.raises(RequestError, match="seed: got 2, expected one, or 3, one a prompt"):
            pipe(prompts, seed=[1, 2])
        with pytest.raises(RequestError, match="seed: got -1"):
            pipe(prompts, seed=[1, -1, 2])


def test_an_open_graph_takes_several_pictures_a_call(open_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qdeploy.engines.ort_cpu import OrtSession

    rows: list[int] = []
    whole_run = OrtSession.run

    def run(session: OrtSession, feeds: dict) -> dict:
        rows.append(max(len(value) for value in feeds.values() if np.ndim(value)))
        return whole_run(session, feeds)

    with qdeploy.load(open_bundle) as opened:
        expected = opened(["a cat", "a dog"], seed=[1, 2], steps=2, scheduler="ddim")
        monkeypatch.setattr(OrtSession, "run", run)
        together = opened(["a cat", "a dog"], seed=[1, 2], steps=2, scheduler="ddim", pictures_at_once=2)
        assert max(rows) == 4  # two pictures, two guidance halves
        assert np.abs(together.pixels.astype(int) - expected.pixels).max() <= 2  # rounding differs with the batch
        with pytest.raises(RequestError, match="pictures_at_once: got 0"):
            opened("a cat", pictures_at_once=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"scheduler": "ddim", "eta": 1.0}, *({"scheduler": name} for name in ("dpm++", "euler-a", "unipc", "lcm"))],
    ids=str,
)
def test_a_picture_is_the_same_in_any_batch(pipe: Pipeline, options: dict) -> None:
    settings = dict(steps=4, seed=9, **options)
    together = pipe("a cat", count=4, **settings)
    later = pipe("a cat", first=1, count=3, **settings)
    assert later.seeds == ((9, 1), (9, 2), (9, 3))
    assert np.array_equal(together.latents[1:], later.latents)
    assert np.array_equal(together.pixels[3:], pipe("a cat", first=3, **settings).pixels)


def test_eta_adds_noise_of_each_pictures_own(pipe: Pipeline) -> None:
    start = np.repeat(unit_noise(pipe), 2, axis=0)
    noisy = pipe("a cat", count=2, steps=3, scheduler="ddim", eta=1.0, latents=start)
    quiet = pipe("a cat", count=2, steps=3, scheduler="ddim", latents=start)
    assert np.array_equal(quiet.latents[0], quiet.latents[1])
    assert not np.allclose(noisy.latents[0], noisy.latents[1])


def test_threads_share_one_pipeline(pipe: Pipeline) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = [pipe("a cat", steps=3, seed=seed).pixels for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda seed: pipe("a cat", steps=3, seed=seed).pixels, range(4)))
    assert all(np.array_equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_callback_sees_every_step_and_can_cancel(pipe: Pipeline) -> None:
    seen: list[Step] = []
    pipe("a cat", steps=5, callback=lambda step: seen.append(step))
    assert [step.index for step in seen] == list(range(seen[0].count))
    with pytest.raises(CancelledError, match="after step 2"):
        pipe("a cat", steps=5, callback=lambda step: step.index < 1)
    assert pipe("a cat", steps=2).pixels.shape[0] == 1


@pytest.mark.parametrize("scheduler", CLASS_NAMES)
def test_schedulers_can_be_swapped(pipe: Pipeline, scheduler: str) -> None:
    assert np.isfinite(pipe("a cat", steps=4, scheduler=scheduler).latents).all()


def test_timings_name_the_components(pipe: Pipeline) -> None:
    assert set(pipe("a cat", steps=2).timings_ms) == {"text_encoder", "unet", "vae_decoder"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "no prompt"),
        ({"prompt": "x" * 10_001}, "too long"),
        ({"prompt": "x", "steps": 0}, "steps"),
        ({"prompt": "x", "steps": 5000}, "steps"),
        ({"prompt": "x", "count": 0}, "count"),
        ({"prompt": "x", "first": -1}, "first"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "eta": 0.5}, "only ddim takes noise"),
        ({"prompt": "x", "eta": 2.0, "scheduler": "ddim"}, "eta"),
        ({"prompt": "x", "latents": np.zeros((1, 1, 1, 1), np.float32)}, "expected float32"),
        ({"prompt": "x", "latents": np.full((1, 4, 8, 8), np.nan, np.float32)}, "NaN"),
    ],
)
def test_bad_requests_are_refused_and_the_pipeline_goes_on(pipe: Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe(**arguments)
    assert pipe("a cat", steps=1).pixels.dtype == np.uint8


def test_unknown_scheduler_and_engine(pipe: Pipeline, float_bundle: Path) -> None:
    with pytest.raises(UsageError, match="pndm"):
        pipe("a cat", scheduler="none such")
    with pytest.raises(UsageError, match="ort-cpu"):
        qdeploy.load(float_bundle, engine="none-such")


def test_a_cut_prompt_is_reported(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe("word " * 50, steps=1)
    assert "cut to 16 tokens" in caplog.text


def test_a_closed_pipeline_says_so(float_bundle: Path) -> None:
    pipeline = qdeploy.load(float_bundle)
    pipeline.close()
    pipeline.close()
    with pytest.raises(EngineError, match="closed"):
        pipeline("a cat", steps=1)


def test_tokens_equal_transformers(pipe: Pipeline, tiny_folder: Path) -> None:
    from transformers import CLIPTokenizer

    reference = CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")
    prompts = ["", "a cat", "Café  Ünïcode", "漢字 🙂", "it's  (odd) 1234!", "long " * 40]
    expected = reference(prompts, padding="max_length", truncation=True, max_length=16, return_tensors="np").input_ids
    assert np.array_equal(pipe.model.tokenizers["text_encoder"](prompts), expected)


def test_int8_is_near_its_float_reference(pipe: Pipeline, int8_bundle: Path) -> None:
    from qdeploy.reporting.fidelity import measure_fidelity

    with qdeploy.load(int8_bundle) as int8:
        fidelity = measure_fidelity(pipe, int8, ["a cat"], steps=4)
    assert min(fidelity.step_sqnr_db) > 15
    assert len(fidelity.step_sqnr_db) == len(fidelity.timesteps) == 5
