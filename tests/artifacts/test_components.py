"""The registry of component kinds, against the torch classes that have their signatures."""

from __future__ import annotations

import inspect

import pytest

from qdeploy.artifacts.components import (
    COMPONENTS,
    TEXT_ENCODER,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    choose_graph_batch,
    get_kind,
    list_text_encoders,
    name_component,
    name_tokenizer,
)
from qdeploy.models.components import UnconditionalUNet, UNet, VaeDecoder, VaeEncoder
from qdeploy.models.source import LatentDiffusion
from qdeploy.models.text_encoders import BertTextEncoder, PenultimateTextEncoder, PooledTextEncoder, TextEncoder

CLASSES = [
    (TextEncoder, TEXT_ENCODER), (BertTextEncoder, TEXT_ENCODER), (PenultimateTextEncoder, TEXT_ENCODER),
    (PooledTextEncoder, TEXT_ENCODER), (UNet, UNET), (UnconditionalUNet, UNET),
    (VaeDecoder, VAE_DECODER), (VaeEncoder, VAE_ENCODER),
]  # fmt: skip


@pytest.mark.parametrize(("component", "kind"), CLASSES, ids=lambda value: getattr(value, "__name__", None))
def test_classes_have_their_kinds_signature(component: type, kind: object) -> None:
    parameters = tuple(inspect.signature(component.forward).parameters)[1:]
    assert parameters == (*kind.inputs, *kind.more_inputs)[: len(parameters)]
    assert component.outputs == (kind.output, *kind.more_outputs)[: len(component.outputs)]


def test_examples_have_the_kinds_inputs(tiny_model: LatentDiffusion) -> None:
    for name in (*COMPONENTS, "vae_encoder"):
        feeds = tiny_model.make_example(name, 3)
        assert tuple(feeds) == get_kind(name).inputs
        assert feeds[get_kind(name).input].shape[0] == 3


def test_names() -> None:
    assert COMPONENTS == ("text_encoder", "unet", "vae_decoder")
    assert [name_component(TEXT_ENCODER, number) for number in range(2)] == ["text_encoder", "text_encoder_2"]
    assert get_kind("text_encoder_2") is TEXT_ENCODER
    assert list_text_encoders(["text_encoder", "text_encoder_2", "unet"]) == ("text_encoder", "text_encoder_2")
    assert [name_tokenizer(name) for name in ("text_encoder", "text_encoder_2")] == ["tokenizer", "tokenizer_2"]
    assert [choose_graph_batch("unet", reads_text) for reads_text in (True, False)] == [2, 1]


@pytest.mark.parametrize("name", ["unet_2", "text_encoder_1", "text_encoder_10", "safety_checker", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(KeyError):
        get_kind(name)
