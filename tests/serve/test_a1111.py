"""What tools that speak the web UI's API ask of it."""

# ruff: noqa: E501 - a table of requests is read by line
from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serve.running import Running, borrow_pipe, run_stand_in
from tests.serve.stand_in import WAIT_S, StandInMaker, wait_until

TXT2IMG, IMG2IMG, PROGRESS = "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/progress"
# What a web UI's client really sends: much of it changes no picture here.
SENT = {
    "prompt": "a (red:1.3) cat", "negative_prompt": "blue", "seed": 7, "steps": 2, "cfg_scale": 3, "sampler_name": "Euler a",
    "width": 16, "height": 16, "batch_size": 1, "n_iter": 1, "restore_faces": False, "tiling": False, "enable_hr": False,
    "alwayson_scripts": {}, "script_args": [], "override_settings": {"sd_model_checkpoint": "tiny"}, "save_images": True,
    "override_settings_restore_afterwards": True, "eta": None, "s_noise": 1, "styles": [], "scheduler": "Automatic",
}  # fmt: skip


def post(service: Running, path: str, **body: object) -> httpx.Response:
    return service.client.post(path, json=body)


def open_picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def encode(pixels: np.ndarray, head: str = "") -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return head + base64.b64encode(file.getvalue()).decode()


def test_a_picture_with_its_settings_in_it(service: Running) -> None:
    answer = post(service, TXT2IMG, **SENT).json()
    picture = open_picture(answer["images"][0])
    with borrow_pipe(service, "tiny") as pipe:
        expected = pipe(
            "a (red:1.3) cat", negative_prompt="blue", steps=2, seed=7, guidance_scale=3.0, weighting=True,
            scheduler="euler-a",
        )  # fmt: skip
    assert np.array_equal(np.asarray(picture), expected.pixels[0])
    text = picture.info["parameters"].splitlines()
    assert text[:2] == ["a (red:1.3) cat", "Negative prompt: blue"]
    assert text[2] == "Steps: 2, Sampler: Euler a, CFG scale: 3, Seed: 7, Size: 16x16, Model: tiny"
    info = json.loads(answer["info"])
    assert (info["seed"], info["all_seeds"], info["sampler_name"]) == (7, [7], "Euler a")
    assert answer["parameters"]["steps"] == 2


def test_fewer_calls_are_taken(service: Running) -> None:
    body = {"prompt": "a cat", "seed": 7, "steps": 20, "speed": "fast", "guidance_interval": [0.2, 0.8]}
    made = service.client.post("/sdapi/v1/txt2img", json=body).json()
    with borrow_pipe(service, "tiny") as pipe:
        expected = pipe("a cat", seed=7, steps=20, weighting=True, speed="fast", guidance_interval=(0.2, 0.8))
    assert np.array_equal(np.asarray(open_picture(made["images"][0])), expected.pixels[0])
    refused = service.client.post("/sdapi/v1/txt2img", json=body | {"speed": "slow"})
    assert refused.status_code == 400
    assert "speed: got 'slow', expected exact, balanced, fast" in refused.json()["detail"]


def test_a_text_that_is_not_latin(service: Running) -> None:
    answer = post(service, TXT2IMG, **SENT | {"prompt": "猫 🐈"}).json()
    assert open_picture(answer["images"][0]).info["parameters"].startswith("猫 🐈\n")


def test_several_pictures_count_their_seeds_up(service: Running) -> None:
    several = post(service, TXT2IMG, **SENT | {"batch_size": 2, "n_iter": 2}).json()
    assert json.loads(several["info"])["all_seeds"] == [7, 8, 9, 10]
    single = post(service, TXT2IMG, **SENT | {"seed": 9}).json()
    assert np.array_equal(*(np.asarray(open_picture(made)) for made in (several["images"][2], single["images"][0])))
    drawn = post(service, TXT2IMG, **SENT | {"seed": -1, "send_images": False}).json()
    assert drawn["images"] == []
    assert json.loads(drawn["info"])["seed"] >= 0


@pytest.mark.parametrize("inverted", [False, True])
def test_image_to_image_with_a_mask(service: Running, inverted: bool) -> None:
    photo = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :8] = 255
    answer = post(
        service, IMG2IMG, **SENT | {"steps": 4, "init_images": [encode(photo, "data:image/png;base64,")]},
        mask=encode(mask), denoising_strength=0.5, inpainting_mask_invert=int(inverted),
    ).json()  # fmt: skip
    with borrow_pipe(service, "tiny") as pipe:
        expected = pipe(
            "a (red:1.3) cat", negative_prompt="blue", steps=4, seed=7, guidance_scale=3.0, weighting=True,
            scheduler="euler-a", image=photo, mask=(mask == 0) if inverted else (mask > 0), strength=0.5,
        )  # fmt: skip
    picture = open_picture(answer["images"][0])
    assert np.array_equal(np.asarray(picture), expected.pixels[0])
    assert "Denoising strength: 0.5" in picture.info["parameters"]


def test_what_there_is_to_choose(service: Running) -> None:
    get = lambda name: service.client.get(f"/sdapi/v1/{name}").json()  # noqa: E731
    assert "Euler a" in [entry["name"] for entry in get("samplers")]
    assert [entry["name"] for entry in get("schedulers")] == ["automatic"]
    assert [entry["title"] for entry in get("sd-models")] == ["tiny", "fp32"]
    assert get("options")["sd_model_checkpoint"] == "tiny"
    assert post(service, "/sdapi/v1/options", sd_model_checkpoint="fp32").status_code == 200
    try:
        without = {name: value for name, value in SENT.items() if name != "override_settings"}
        assert "Model: fp32" in open_picture(post(service, TXT2IMG, **without).json()["images"][0]).info["parameters"]
    finally:
        post(service, "/sdapi/v1/options", sd_model_checkpoint="tiny")
    assert post(service, "/sdapi/v1/options", sd_model_checkpoint="none").status_code == 404


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"steps": 151}, "steps"), ({"steps": "many"}, "steps"), ({"cfg_scale": 5000}, "cfg_scale"), ({"width": 15}, "width"),
        ({"sampler_name": "Heun"}, "sampler_name"), ({"sampler_name": "euler:fast"}, "sampler_name"), ({"scheduler": "Karras"}, "scheduler"), ({"enable_hr": True}, "enable_hr"),
        ({"alwayson_scripts": {"controlnet": {}}}, "alwayson_scripts"), ({"batch_size": 11}, "batch_size"), ({"seed": -2}, "seed"),
        ({"init_images": []}, "init_images"), ({"init_images": ["no base64!"]}, "init_images"), ({"init_images": ["aGVsbG8="]}, "init_images"),
        ({"mask": "aGVsbG8="}, "mask"), ({"denoising_strength": 1.5}, "denoising_strength"), ({"denoising_strength": 0.1}, "denoising_strength"),
        ({"override_settings": {"sd_model_checkpoint": 5}}, "override_settings"), ({"prompt": 5}, "prompt"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named(service: Running, body: dict, name: str) -> None:
    photo = {"init_images": [encode(np.zeros((16, 16, 3), np.uint8))]}
    refused = post(service, IMG2IMG, **{**SENT, **photo, **body})
    assert refused.status_code == 400, refused.text
    assert refused.json()["detail"].startswith(name), refused.text


def test_progress_and_interrupt(float_bundle: Path) -> None:
    maker = StandInMaker()
    with run_stand_in(float_bundle, maker) as running, ThreadPoolExecutor(1) as pool:
        assert running.client.get(PROGRESS).json()["progress"] == 0
        answer = pool.submit(post, running, TXT2IMG, prompt="a cat", steps=40, seed=9)
        wait_until(lambda: len(running.room.list_running()) == 1)
        maker.steps.release(20)  # type: ignore[union-attr]
        wait_until(lambda: running.client.get(PROGRESS).json()["progress"] == 0.5)
        wait_until(lambda: running.client.get(PROGRESS).json()["current_image"] is not None)
        shown = running.client.get(PROGRESS).json()
        assert (shown["state"]["sampling_step"], shown["state"]["sampling_steps"]) == (20, 40)
        assert shown["eta_relative"] > 0
        assert (np.asarray(open_picture(shown["current_image"])) == 9).all()
        assert running.client.get(PROGRESS, params={"skip_current_image": True}).json()["current_image"] is None
        assert running.client.post("/sdapi/v1/interrupt").json() == {}
        made = answer.result(WAIT_S).json()
        assert (np.asarray(open_picture(made["images"][0])) == 9).all()  # what the last preview showed
        maker.steps.release()  # type: ignore[union-attr]
        wait_until(lambda: not running.room.list_running())
        assert maker.made <= 21
        assert running.client.get(PROGRESS).json()["state"]["job_count"] == 0
