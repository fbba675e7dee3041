"""``tokenizer.json`` as our exports write it: BPE or WordPiece with the rules that CLIP's and BERT's tokenizers have.

The file holds rules that a native library runs: regular expressions, templates, paddings. Only known rules, with
bounded lengths, are let through to it; everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

from qdeploy.base.documents import parse_json
from qdeploy.base.errors import BundleError

MAX_LENGTH, MAX_WORDS, MAX_ADDED = 4096, 2**20, 2**14
REMEDY = "export the bundle again"
SPACES = r"\s+"
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_WORDS = (_PIECES, rf"<\|startoftext\|>|<\|endoftext\|>|{_PIECES}")

Text: TypeAlias = Annotated[str, Meta(max_length=256)]
Length: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_LENGTH)]
Id: TypeAlias = Annotated[int, Meta(ge=0, lt=MAX_WORDS)]
Flag: TypeAlias = bool | None


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the file: what it does not declare is refused."""


class Tagged(Strict, frozen=True, tag_field="type", tag=True):
    """A part whose ``type`` is the name of its class."""


class Truncation(Strict, frozen=True):
    direction: Literal["Right"]
    max_length: Length
    strategy: Literal["LongestFirst"]
    stride: Literal[0]


class Fixed(Strict, frozen=True):
    Fixed: Length


class Padding(Strict, frozen=True):
    strategy: Fixed
    direction: Literal["Right"]
    pad_to_multiple_of: None
    pad_id: Id
    pad_type_id: Literal[0]
    pad_token: Text


class AddedToken(Strict, frozen=True):
    id: Id
    content: Annotated[str, Meta(min_length=1, max_length=256)]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class Regex(Strict, frozen=True):
    Regex: str


class NFC(Tagged, frozen=True):
    pass


class Lowercase(Tagged, frozen=True):
    pass


class Replace(Tagged, frozen=True):
    pattern: Regex
    content: Literal[" "]

    def __post_init__(self) -> None:
        _check_regex(self.pattern.Regex, (SPACES,))


class BertNormalizer(Tagged, frozen=True):
    clean_text: bool
    handle_chinese_chars: bool
    strip_accents: Flag
    lowercase: bool


Normalizer: TypeAlias = NFC | Lowercase | Replace | BertNormalizer


class NormalizerSequence(Tagged, frozen=True, tag="Sequence"):
    normalizers: Annotated[tuple[Normalizer, ...], Meta(max_length=8)]


class ByteLevel(Tagged, frozen=True):
    add_prefix_space: bool
    trim_offsets: bool
    use_regex: bool = True


class Split(Tagged, frozen=True):
    pattern: Regex
    behavior: Literal["Removed"]
    invert: bool

    def __post_init__(self) -> None:
        _check_regex(self.pattern.Regex, CLIP_WORDS)


class BertPreTokenizer(Tagged, frozen=True):
    pass


PreTokenizer: TypeAlias = ByteLevel | Split | BertPreTokenizer


class PreTokenizerSequence(Tagged, frozen=True, tag="Sequence"):
    pretokenizers: Annotated[tuple[PreTokenizer, ...], Meta(max_length=8)]


class RobertaProcessing(Tagged, frozen=True):
    sep: tuple[Text, Id]
    cls: tuple[Text, Id]
    trim_offsets: bool
    add_prefix_space: bool


class BertProcessing(Tagged, frozen=True):
    sep: tuple[Text, Id]
    cls: tuple[Text, Id]


class Piece(Strict, frozen=True):
    id: Text
    type_id: Annotated[int, Meta(ge=0, le=1)]


class TemplatePart(Strict, frozen=True):
    SpecialToken: Piece | None = None
    Sequence: Piece | None = None

    def __post_init__(self) -> None:
        if (self.SpecialToken is None) == (self.Sequence is None):
            raise ValueError("a part of the template is one of SpecialToken and Sequence")
        if self.Sequence is not None and self.Sequence.id not in ("A", "B"):
            raise ValueError(f"a template's sequence is A or B, not {self.Sequence.id!r}")


class SpecialToken(Strict, frozen=True):
    id: Text
    ids: Annotated[tuple[Id, ...], Meta(min_length=1, max_length=4)]
    tokens: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=4)]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.tokens):
            raise ValueError(f"the special token {self.id!r} has {len(self.ids)} ids and {len(self.tokens)} tokens")


Template: TypeAlias = Annotated[tuple[TemplatePart, ...], Meta(min_length=1, max_length=8)]


class TemplateProcessing(Tagged, frozen=True):
    single: Template
    pair: Template
    special_tokens: Mapping[str, SpecialToken]

    def __post_init__(self) -> None:
        used = {part.SpecialToken.id for part in (*self.single, *self.pair) if part.SpecialToken is not None}
        if used != set(self.special_tokens) or any(key != token.id for key, token in self.special_tokens.items()):
            raise ValueError("the template uses other special tokens than `special_tokens` declares")


class WordPieceDecoder(Tagged, frozen=True, tag="WordPiece"):
    prefix: Text
    cleanup: bool


class BPE(Tagged, frozen=True):
    vocab: Annotated[Mapping[Text, Id], Meta(min_length=1, max_length=MAX_WORDS)]
    merges: Annotated[tuple[tuple[Text, Text], ...], Meta(max_length=MAX_WORDS)]
    unk_token: Text | None
    dropout: None = None
    continuing_subword_prefix: Text | None = None
    end_of_word_suffix: Text | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class WordPiece(Tagged, frozen=True):
    vocab: Annotated[Mapping[Text, Id], Meta(min_length=1, max_length=MAX_WORDS)]
    unk_token: Text
    continuing_subword_prefix: Text
    max_input_chars_per_word: Annotated[int, Meta(ge=1, le=MAX_LENGTH)]

    def __post_init__(self) -> None:
        if self.unk_token not in self.vocab:
            raise ValueError(f"its unknown token {self.unk_token!r} is not in the vocabulary")


class TokenizerFile(Strict, frozen=True):
    """The whole file."""

    version: Literal["1.0"]
    truncation: Truncation
    padding: Padding
    added_tokens: Annotated[tuple[AddedToken, ...], Meta(max_length=MAX_ADDED)]
    normalizer: NormalizerSequence | NFC | Lowercase | Replace | BertNormalizer | None
    pre_tokenizer: PreTokenizerSequence | ByteLevel | Split | BertPreTokenizer | None
    post_processor: RobertaProcessing | BertProcessing | TemplateProcessing
    decoder: ByteLevel | WordPieceDecoder | None
    model: BPE | WordPiece

    def __post_init__(self) -> None:
        words = self.model.vocab | {token.content: token.id for token in self.added_tokens}  # type: ignore[operator]
        if len(set(self.model.vocab.values())) < len(self.model.vocab):
            raise ValueError("two words of its vocabulary have one id")
        if self.padding.pad_id not in words.values():
            raise ValueError(f"it pads with the token {self.padding.pad_id}, which no word has")


def parse_tokenizer(data: bytes, name: str, length: int, remedy: str = REMEDY) -> TokenizerFile:
    """The file in ``data``, which pads and truncates to ``length`` tokens; BundleError naming what else it asks for."""
    file = parse_json(data, name, TokenizerFile, error=BundleError, remedy=remedy)
    lengths = {"padding": file.padding.strategy.Fixed, "truncation": file.truncation.max_length}
    for rule, actual in lengths.items():
        if actual != length:
            raise BundleError(f"{name}: its {rule} is to {actual} tokens, the text encoder reads {length}; {remedy}")
    return file


def open_backend(data: bytes, name: str, length: int, remedy: str = REMEDY) -> Any:
    """The library's tokenizer of checked ``data``; BundleError also for what the library panics on."""
    from tokenizers import Tokenizer

    parse_tokenizer(data, name, length, remedy)
    try:
        return Tokenizer.from_str(data.decode())
    except BaseException as exc:  # the library raises bare Exception, and PanicException is no Exception
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise BundleError(f"{name} is not a readable tokenizer ({exc}); {remedy}") from exc


def _check_regex(pattern: str, known: tuple[str, ...]) -> None:
    """ValueError for any other expression: a native engine would run it on every prompt."""
    if pattern not in known:
        raise ValueError(f"the regular expression {pattern[:60]!r} is not one that exports write")
