"""OpenAI's own client, unmodified, against a service."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serve.running import Running, borrow_pipe

FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def open_picture(encoded: str | None) -> Image.Image:
    assert encoded is not None
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def encode_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8))


def test_a_picture_is_the_runtimes(client: openai.OpenAI, service: Running) -> None:
    made = client.images.generate(
        prompt="a cat", model="tiny", extra_body={**FAST, "seed": 7, "guidance_scale": 3.0, "negative_prompt": "blue"}
    )
    with borrow_pipe(service, "tiny") as pipe:
        expected = pipe("a cat", negative_prompt="blue", steps=2, seed=7, guidance_scale=3.0)
    assert np.array_equal(np.asarray(open_picture(made.data[0].b64_json)), expected.pixels[0])
    assert (made.size, made.output_format, made.background) == ("16x16", "png", "opaque")
    assert made.model_extra["seed"] == 7
    assert made.created > 1_600_000_000


def test_fewer_calls_are_the_runtimes(client: openai.OpenAI, service: Running) -> None:
    """And each of them makes another picture, so none is passed over."""
    pictures = []
    for fields in ({}, {"speed": "fast"}, {"forecast": "linear:window=3"}, {"guidance_interval": [0.2, 0.6]}):
        body = {"num_inference_steps": 20, "seed": 7, "guidance_scale": 3.0, **fields}
        made = client.images.generate(model="tiny", prompt="a cat", extra_body=body)
        pictures.append(np.asarray(open_picture(made.data[0].b64_json)))
        with borrow_pipe(service, "tiny") as pipe:
            expected = pipe("a cat", steps=20, seed=7, guidance_scale=3.0, **fields)
        assert np.array_equal(pictures[-1], expected.pixels[0])
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_fewer_calls_in_a_form(client: openai.OpenAI, service: Running, photo: Image.Image) -> None:
    more = {"num_inference_steps": 20, "seed": 2, "strength": 0.9, "guidance_interval": "0.2,0.8", "speed": "balanced"}
    made = client.images.edit(
        model="tiny", image=("a.png", encode_png(photo), "image/png"), prompt="a cat", extra_body=more
    )
    with borrow_pipe(service, "tiny") as pipe:
        expected = pipe(
            "a cat", image=photo, strength=0.9, steps=20, seed=2, guidance_interval=(0.2, 0.8), speed="balanced"
        )
    assert np.array_equal(np.asarray(open_picture(made.data[0].b64_json)), expected.pixels[0])


def test_each_of_several_pictures_can_be_asked_for_again(client: openai.OpenAI) -> None:
    several = client.images.generate(prompt="a cat", n=3, extra_body={**FAST, "seed": 5})
    seeds = [picture.model_extra["seed"] for picture in several.data]
    assert seeds == [5, 6, 7]
    again = client.images.generate(prompt="a cat", extra_body={**FAST, "seed": 6})
    assert again.data[0].b64_json == several.data[1].b64_json


def test_a_seed_is_drawn_and_comes_back(client: openai.OpenAI) -> None:
    first, second = (client.images.generate(prompt="a cat", extra_body=FAST) for _ in range(2))
    assert first.model_extra["seed"] != second.model_extra["seed"]
    again = client.images.generate(prompt="a cat", extra_body={**FAST, "seed": first.model_extra["seed"]})
    assert again.data[0].b64_json == first.data[0].b64_json


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(client: openai.OpenAI, kind: str) -> None:
    made = client.images.generate(prompt="a cat", output_format=kind, extra_body=FAST)  # type: ignore[call-overload]
    assert open_picture(made.data[0].b64_json).format == kind.upper()


def test_compression_makes_it_smaller(client: openai.OpenAI) -> None:
    sizes = [
        len(
            client.images.generate(
                prompt="a cat", size="64x64", output_format="jpeg", output_compression=quality,  # type: ignore[call-overload]
                extra_body={**FAST, "seed": 1},
            ).data[0].b64_json
        )
        for quality in (5, 95)
    ]  # fmt: skip
    assert sizes[0] < sizes[1]


def test_a_url_is_fetched_without_a_key(client: openai.OpenAI, service: Running) -> None:
    made = client.images.generate(prompt="a cat", response_format="url", extra_body={**FAST, "seed": 7})
    assert made.data[0].b64_json is None
    url = made.data[0].url
    assert url is not None
    assert url.startswith(service.url)
    fetched = httpx.get(url)
    assert fetched.headers["content-type"] == "image/png"
    plain = client.images.generate(prompt="a cat", extra_body={**FAST, "seed": 7})
    assert fetched.content == base64.b64decode(plain.data[0].b64_json)
    assert httpx.get(f"{service.url}/pictures/other.png").status_code == 404


def test_streaming_shows_previews_and_then_the_picture(client: openai.OpenAI) -> None:
    body = {"num_inference_steps": 8, "seed": 7}
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body=body))
    assert [event.type for event in events] == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    assert all(open_picture(event.b64_json).size == (16, 16) for event in events)
    plain = client.images.generate(prompt="a cat", extra_body=body)
    assert events[-1].b64_json == plain.data[0].b64_json
    assert events[-1].model_extra["seed"] == 7
    assert events[0].b64_json != events[-1].b64_json


def test_streaming_without_previews_and_with_several_pictures(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="a cat", stream=True, n=2, extra_body=FAST))
    assert [event.type for event in events] == ["image_generation.completed"] * 2


def test_image_to_image(client: openai.OpenAI, service: Running, photo: Image.Image) -> None:
    made = client.images.edit(
        image=("photo.png", encode_png(photo), "image/png"), prompt="a cat", model="tiny",
        extra_body={"num_inference_steps": 4, "strength": 0.5, "seed": 2},
    )  # fmt: skip
    with borrow_pipe(service, "tiny") as pipe:
        expected = pipe("a cat", image=photo, strength=0.5, steps=4, seed=2)
    assert np.array_equal(np.asarray(open_picture(made.data[0].b64_json)), expected.pixels[0])


@pytest.mark.parametrize("where", ["mask", "image"])
def test_what_is_transparent_is_repainted(
    client: openai.OpenAI, service: Running, photo: Image.Image, where: str
) -> None:
    """As OpenAI has it: in the mask, or in the picture itself where there is no mask."""
    alpha = Image.new("L", photo.size, 255)
    alpha.paste(0, (0, 0, 8, 16))
    mask = photo.copy()
    mask.putalpha(alpha)
    files: dict = {"image": encode_png(photo), "mask": encode_png(mask)} if where == "mask" else {}
    files = files or {"image": encode_png(mask)}
    body = {"num_inference_steps": 4, "seed": 2}
    made = client.images.edit(prompt="a cat", extra_body=body, **files)
    repainted = np.zeros((16, 16), bool)
    repainted[:, :8] = True
    with borrow_pipe(service, "tiny") as pipe:
        expected = pipe("a cat", image=photo, mask=repainted, steps=4, seed=2)
    assert np.array_equal(np.asarray(open_picture(made.data[0].b64_json)), expected.pixels[0])


def test_an_edit_of_another_size_streams(client: openai.OpenAI, photo: Image.Image) -> None:
    events = list(
        client.images.edit(
            image=[("a.png", encode_png(photo.resize((90, 40))))], prompt="a cat", size="32x16", stream=True,  # type: ignore[call-overload]
            partial_images=1, extra_body={"num_inference_steps": 4},
        )
    )  # fmt: skip
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert open_picture(events[-1].b64_json).size == (32, 16)


def test_models(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["tiny", "fp32"]
    assert models["tiny"].model_extra["qdeploy"]["takes_pictures"]
    assert client.models.retrieve("fp32").model_extra["qdeploy"]["precision"] == "fp32"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a cat", size="15x17", extra_body=FAST)
    assert (refused.value.param, refused.value.type) == ("size", "invalid_request_error")
    assert "size: got 15, expected a multiple of" in refused.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="a cat", model="dall-e-3")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"there is no such field") as misspelled:
        client.images.generate(prompt="a cat", extra_body={"num_inference_step": 2})
    assert misspelled.value.param == "num_inference_step"


def test_a_long_prompt_is_told(client: openai.OpenAI) -> None:
    made = client.images.generate(prompt="word " * 50, extra_body=FAST)
    assert "not read" in made.model_extra["warnings"][0]
