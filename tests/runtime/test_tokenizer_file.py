"""``tokenizer.json`` holds only rules that our exports write; a native library never sees the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qdeploy.base.errors import BundleError
from qdeploy.models.source import find_model_folder
from qdeploy.runtime.tokenizer import Tokenizer


def read(source: str) -> dict:
    return json.loads((find_model_folder(source) / "tokenizer" / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def good() -> dict:
    return read("builtin:emoji")


def open_changed(document: dict, tmp_path: Path, length: int = 32) -> Tokenizer:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    return Tokenizer(path, length)


def test_what_exports_write_is_read(good: dict, tmp_path: Path) -> None:
    assert open_changed(good, tmp_path)(["a cat"]).shape == (1, 32)


def test_a_word_piece_file_is_read(tmp_path: Path) -> None:
    assert open_changed(WORD_PIECE, tmp_path, 8)(["a cat"]).tolist() == [[2, 4, 5, 3, 0, 0, 0, 0]]


CHANGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "padding 2^31": (lambda d: d["padding"]["strategy"].update(Fixed=2**31), "`padding.strategy.Fixed` is 2147483648"),
    "padding 2^63": (lambda d: d["padding"]["strategy"].update(Fixed=2**63), "`padding.strategy.Fixed`"),
    "padding to the longest": (lambda d: d["padding"].update(strategy="BatchLongest"), "`padding.strategy`"),
    "padding to 8": (lambda d: d["padding"]["strategy"].update(Fixed=8), "padding is to 8 tokens"),
    "multiple of 0": (lambda d: d["padding"].update(pad_to_multiple_of=0), "`padding.pad_to_multiple_of` is 0"),
    "no truncation": (lambda d: d.update(truncation=None), "`truncation` is None"),
    "stride": (lambda d: d["truncation"].update(stride=2**40), "`truncation.stride` is 1099511627776"),
    "regex bomb": (lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a*)*$"), "(a*)*$"),
    "growing normalizer": (
        lambda d: d.update(normalizer={"type": "Prepend", "prepend": "x" * 10}),
        "type 'Prepend', which is not one",
    ),
    "replacement": (lambda d: d["normalizer"]["normalizers"][1].update(content="x" * 100), "content"),
    "nested sequence": (
        lambda d: d["normalizer"].update(normalizers=[{"type": "Sequence", "normalizers": []}]), "'Sequence'",
    ),
    "unigram": (lambda d: d.update(model={"type": "Unigram", "unk_id": 0, "vocab": []}), "type 'Unigram'"),
    "dropout": (lambda d: d["model"].update(dropout=0.5), "`model.dropout` is 0.5"),
    "huge id": (lambda d: d["model"]["vocab"].update(cat=2**40), "1099511627776"),
    "no post-processor": (lambda d: d.update(post_processor=None), "`post_processor` is None"),
    "bad template": (
        lambda d: d.update(
            post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                            "pair": [{"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}}
        ),
        "other special tokens",
    ),
    "unknown field": (lambda d: d.update(surprise=1), "`surprise` is a field"),
    "list": (lambda d: d.update(model=[]), "`model` is a list of 0"),
    "merges of unknown words": (lambda d: d["model"].update(merges=[["qqq", "zzz"]]), "not a readable tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_everything_else_is_refused_by_name(good: dict, tmp_path: Path, kind: str) -> None:
    change, words = CHANGES[kind]
    document = json.loads(json.dumps(good))
    change(document)
    with pytest.raises(BundleError) as error:
        open_changed(document, tmp_path)
    assert words in str(error.value)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_a_panic_of_the_library_is_a_bundle_error(good: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers

    class PanicException(BaseException):
        pass

    class Panicking:
        @staticmethod
        def from_str(text: str) -> object:
            raise PanicException("capacity overflow")

    monkeypatch.setattr(tokenizers, "Tokenizer", Panicking)
    with pytest.raises(BundleError, match="capacity overflow"):
        open_changed(good, tmp_path)


WORD_PIECE = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "[PAD]"},
    "added_tokens": [],
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                   "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                           "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}},
    },
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
              "max_input_chars_per_word": 100,
              "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "cat": 5}},
}  # fmt: skip
