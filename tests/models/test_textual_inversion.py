"""Tokens of several vectors: expanded as diffusers expands them, when calibrating and in the runtime."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from qdeploy.base.tokens import list_expansions
from qdeploy.export.runtime_files import build_tokenizer_json
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.runtime.tokenizer import Tokenizer
from qdeploy.runtime.weighting import WeightedText, parse_weights
from tests.models.pictures import assert_same, first_latents, load_diffusers, paint, paint_diffusers

PROMPTS = [
    "a <cat> on a red house",
    "<cat><cat> and <dog>",
    "a cat, <cat>_1",
    "<CAT> <Cat> <cat>",
    "plain",
    "",
    "<cat> " * 9,
]


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with ``<cat>`` of three vectors and ``<dog>`` of one, saved as diffusers' loader leaves it."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("inversion") / "model")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    torch.manual_seed(3)
    text.resize_token_embeddings(len(tokenizer))
    text.get_input_embeddings().weight.data[-4:].normal_()
    tokenizer.save_pretrained(folder / "tokenizer")
    text.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LatentDiffusion:
    return load_model(str(folder))


def test_pictures_are_diffusers(folder: Path, model: LatentDiffusion) -> None:
    reference = load_diffusers(folder, diffusers.PNDMScheduler.from_pretrained(folder / "scheduler"))
    for prompt in PROMPTS[:2]:
        assert_same(paint(model, prompt=prompt), paint_diffusers(reference, first_latents(model), prompt))


def test_ids_are_diffusers_in_calibration_and_in_the_runtime(
    folder: Path, model: LatentDiffusion, tmp_path: Path
) -> None:
    reference = load_diffusers(folder, diffusers.PNDMScheduler.from_pretrained(folder / "scheduler"))
    texts = reference.maybe_convert_prompt(PROMPTS, reference.tokenizer)
    expected = reference.tokenizer(
        texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(model.tokenize(PROMPTS)["text_encoder"], expected)
    runtime = open_runtime_tokenizer(model, tmp_path)
    assert runtime(PROMPTS).tolist() == expected.tolist()
    assert {514, 515, 516} <= set(expected[0].tolist())


def open_runtime_tokenizer(model: LatentDiffusion, folder: Path) -> Tokenizer:
    """The runtime's tokenizer of the file that an export writes."""
    text = build_tokenizer_json(model.text_encoders["text_encoder"].tokenizer)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return Tokenizer(folder / "tokenizer.json", 16)


def test_weights_reach_every_vector(model: LatentDiffusion, tmp_path: Path) -> None:
    tokens = open_runtime_tokenizer(model, tmp_path).encode([parse_weights("a (<cat>:1.5) b")])
    rows = dict(zip(tokens.ids[0].tolist(), tokens.weights[0].tolist(), strict=True))
    assert [rows[number] for number in (514, 515, 516)] == [1.5] * 3
    assert min(tokens.weights[0]) == 1


def test_replacing_keeps_the_other_weights() -> None:
    text = WeightedText("ab<c>d<c>", (1, 2, 3, 4, 5, 6, 7, 8, 9))
    assert text.replace("<c>", "xy") == WeightedText("abxydxy", (1, 2, 3, 3, 6, 7, 7))
    assert text.replace("none", "xy") == text


def test_expansions() -> None:
    added = ["<a>", "<a>_1", "<a>_2", "<a>_4", "<b>", "<c>_1"]
    assert list_expansions(added) == {"<a>": "<a> <a>_1 <a>_2"}
