"""Tokens equal transformers' CLIPTokenizer's on a corpus, and what is cut off is reported."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from qdeploy.export.runtime_files import build_tokenizer_json
from qdeploy.models.source import find_model_folder, load_model
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.runtime.tokenizer import Tokenizer

WRITTEN = [
    "",
    " ",
    "\n\t ",
    "a cat",
    "A CAT",
    "Café  Ünïcode naïve façade",
    "cafe\u0301 composed and de\u0301composed",
    "漢字",
    "一只戴帽子的猫，坐在红色的房子前面。",
    "ひらがな カタカナ 한국어",
    "Ελληνικά Кириллица עברית العربية हिन्दी ไทย",
    "🙂",
    "👩\u200d👩\u200d👧 family, 🏳️\u200d🌈 flag, 👍🏽 skin",
    "it's we're I'll don't THEY'VE",
    "1234 3.14 ½ ² ⅷ",
    "(odd) [brackets] {x} <y>",
    "punctuation!!! ... --- ??? @#$%^&*",
    "tabs\tand\nnew\r\nlines",
    "zero\u200bwidth \ufeffmark",
    "ﬁ ligature ① Ⅳ",
    "<|startoftext|>",
    "<|endoftext|> in the middle <|endoftext|>",
    "long " * 200,
    "x" * 10_000,
    "漢" * 500,
    "🙂" * 300,
    "\u0000 nul",
    "İstanbul ß ẞ ǅ",
    "a\u0301\u0302\u0303 stacked",
]


def corpus(size: int = 1500) -> list[str]:
    """The written prompts, and random ones over all scripts; no surrogates and nothing unassigned."""
    rng = random.Random(0)
    ranges = [(0x20, 0x7E), (0xA0, 0x17F), (0x300, 0x36F), (0x370, 0x5FF), (0x900, 0x97F), (0x2000, 0x206F),
              (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]  # fmt: skip
    letters = "abcdefghijklmnopqrstuvwxyz   '.,-"

    def character() -> str:
        if rng.random() < 0.6:
            return rng.choice(letters)
        letter = chr(rng.randint(*rng.choice(ranges)))
        return " " if unicodedata.category(letter) in ("Cn", "Cs") else letter

    return WRITTEN + ["".join(character() for _ in range(rng.randint(0, 120))) for _ in range(size)]


@pytest.mark.parametrize("source", ["tiny", "builtin:emoji"])
def test_tokens_equal_transformers(source: str, tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    folder = tiny_folder if source == "tiny" else find_model_folder(source)
    model = load_model(str(folder))
    (tmp_path / "tokenizer").mkdir()
    text = build_tokenizer_json(model.text_encoders["text_encoder"].tokenizer)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(text, encoding="utf-8")
    length = model.latents.tokens
    prompts = corpus()
    reference = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    expected = reference(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    actual = Tokenizer(tmp_path / "tokenizer" / "tokenizer.json", length)(prompts)
    different = [prompts[row] for row in np.flatnonzero((actual != expected.input_ids).any(axis=1))]
    assert not different, different[:5]


def test_what_is_cut_off_is_reported(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    result = pipe(["word word word word", "a cat"], negative_prompt="blue " * 5, steps=1)
    for prompt, lost in result.truncated.items():
        assert prompt.endswith(lost)
        assert len(prompt[: -len(lost)].replace(" ", "")) == 14  # this tokenizer has a token a letter
    assert set(result.truncated) == {"word word word word", "blue " * 5}
    assert caplog.text.count("cut to 16 tokens") == 2
    assert not pipe("a cat", steps=1).truncated
