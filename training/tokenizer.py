"""A small CLIP-style byte-level BPE, learnt once from the captions and then kept (training is not deterministic)."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import trainers
from transformers import CLIPTokenizer

from training.data import Emoji

VOCABULARY = 4096
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def tokenizer_from_captions(emoji: list[Emoji], folder: Path, max_length: int = 32) -> CLIPTokenizer:
    """Load the tokenizer kept in ``folder``, or train it there the first time."""
    if not (folder / "merges.json").exists():
        train(emoji, folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(pair) for pair in json.loads((folder / "merges.json").read_text())]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def train(emoji: list[Emoji], folder: Path) -> None:
    """Train byte-pair codes on labels and tags; writes a transformers ``CLIPTokenizer`` folder."""
    untrained = CLIPTokenizer().backend_tokenizer  # CLIP's own normalizer and pre-tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    lines = [line for item in emoji for line in (item.label, ", ".join(item.tags), "a an")]
    untrained.train_from_iterator(lines, trainer)
    model = json.loads(untrained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for byte in byte_alphabet():  # a byte must also be able to end a word
        vocab.setdefault(byte + "</w>", len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.json").write_text(json.dumps(model["merges"], ensure_ascii=False))


def byte_alphabet() -> set[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses (GPT-2)."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())
