"""What the runtime gives a graph and takes of it, as symbols that have one size everywhere."""

from __future__ import annotations

import pytest

from qdeploy.artifacts.graph_contract import find_mismatches

SIZES = {"C": 4, "h": 8, "w": 8, "H": 64, "W": 64, "T": 77}


def make_signatures(batch: int = 2, width: int = 768, text_width: int = 768) -> dict:
    latents = ("float32", (batch, 4, 8, 8))
    text = ("float32", (batch, 77, width))
    return {
        "text_encoder": ({"input_ids": ("int64", (1, 77))}, {"hidden": ("float32", (1, 77, text_width))}),
        "unet": (
            {"sample": latents, "timestep": ("int64", ()), "encoder_hidden_states": text},
            {"noise_pred": latents},
        ),
        "vae_decoder": ({"latents": ("float32", (1, 4, 8, 8))}, {"image": ("float32", (1, 3, 64, 64))}),
    }


def find(signatures: dict) -> list[str]:
    return list(find_mismatches(signatures, SIZES, reads_text=True))


def test_what_fits() -> None:
    assert find(make_signatures()) == []
    assert find(make_signatures(batch=-1)) == []
    inputs, outputs = make_signatures()["unet"]
    inpainting = {**inputs, "sample": ("float32", (2, 9, 8, 8))}
    assert find(make_signatures() | {"unet": (inpainting, outputs)}) == []


def test_several_text_encoders_have_their_widths_one_after_another() -> None:
    two = make_signatures(width=768 + 1280)
    two["text_encoder_2"] = ({"input_ids": ("int64", (1, 77))}, {"hidden": ("float32", (1, 77, 1280))})
    assert find(two) == []
    two["unet"] = make_signatures(width=768)["unet"]
    assert find(two) == ["unet has the input encoder_hidden_states float32[2, 77, 768], expected float32[2, 77, 2048]"]


def test_a_unet_may_read_the_guidance_scale() -> None:
    inputs, outputs = make_signatures()["unet"]
    for shape, count in (((2, 256), 0), ((1, 256), 1), ((2,), 1)):
        guided = {**inputs, "timestep_cond": ("float32", shape)}
        assert len(find(make_signatures() | {"unet": (guided, outputs)})) == count


def make_xl(pooled: int = 1280, read: int = 1280, **more: tuple) -> dict:
    """Two text encoders, the second one's pooled text, and a UNet that reads it with sizes."""
    signatures = make_signatures(width=768 + 1280)
    outputs = {"hidden": ("float32", (1, 77, 1280)), "pooled": ("float32", (1, pooled))}
    inputs = {"text_embeds": ("float32", (2, read)), "time_ids": ("float32", (2, 6))} | more
    unet_inputs, unet_outputs = signatures["unet"]
    return signatures | {
        "text_encoder_2": ({"input_ids": ("int64", (1, 77))}, outputs),
        "unet": (unet_inputs | inputs, unet_outputs),
    }


def test_a_unet_may_read_pooled_text_and_sizes() -> None:
    assert find(make_xl()) == []
    assert find(make_xl(read=768)) == ["unet has the input text_embeds float32[2, 768], expected float32[2, 1280]"]
    assert "time_ids float32[2, 5], expected float32[2, 6]" in find(make_xl(time_ids=("float32", (2, 5))))[0]
    silent = make_xl()
    silent["text_encoder_2"][1].pop("pooled")
    assert find(silent) == ["unet reads text_embeds and no text encoder gives them, expected one"]
    half = make_xl()
    half["unet"][0].pop("time_ids")
    assert find(half) == ["unet has the input text_embeds, expected text_embeds and time_ids together"]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("unet", {"noise_pred": ("float32", (2, 1, 8, 8))}, "unet has the output noise_pred float32[2, 1, 8, 8]"),
        ("unet", {"noise_pred": ("float32", (1, 4, 8, 8))}, "expected float32[2, 4, 8, 8]"),
        ("unet", {"noise_pred": ("float32", (2, 4, -1, 8))}, ""),  # one that is open may have any size
        ("unet", {"out": ("float32", (2, 4, 8, 8))}, "unet has the outputs out, expected noise_pred"),
        ("vae_decoder", {"image": ("float32", (1, 1, 64, 64))}, "expected float32[1, 3, 64, 64]"),
        ("vae_decoder", {"image": ("float16", (1, 3, 64, 64))}, "vae_decoder has the output image float16"),
        ("text_encoder", {"hidden": ("float32", (1, 77))}, "text_encoder has the output hidden float32[1, 77]"),
    ],
)
def test_what_does_not_fit(name: str, change: dict, words: str) -> None:
    signatures = make_signatures()
    signatures[name] = (signatures[name][0], change)
    assert words in " ".join(find(signatures))
    assert bool(find(signatures)) == bool(words)
