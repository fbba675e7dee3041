"""Outside documents are bounded before they are parsed, and errors name file, field, what came and was expected."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from qdeploy.base.documents import Count, Share, parse_json, parse_toml, parse_yaml, read_bytes, read_json_as
from qdeploy.base.errors import BundleError


@dataclass(frozen=True)
class Part:
    bits: Annotated[int, Meta(ge=2, le=8)]
    share: Share = 0.0
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Document:
    kind: Literal["text", "picture"]
    parts: Mapping[str, Part]
    count: Count | None = None


GOOD = b'{"kind": "text", "parts": {"unet": {"bits": 8, "share": 1, "shape": [1, 2]}}}'


def parse(text: str | bytes, **options: Any) -> Document:
    data = text if isinstance(text, bytes) else text.encode()
    return parse_json(data, "m.json", Document, error=BundleError, remedy="export it again", **options)


def test_a_good_document_gets_its_types() -> None:
    expected = Document("text", {"unet": Part(8, 1.0, (1, 2))})
    assert parse(GOOD) == expected
    assert isinstance(parse(GOOD).parts["unet"].share, float)
    yaml = b"kind: text\nparts:\n  unet: {bits: 8, share: 1, shape: [1, 2]}\n"
    toml = b'kind = "text"\n[parts.unet]\nbits = 8\nshare = 1\nshape = [1, 2]\n'
    assert parse_yaml(yaml, "m.yaml", Document, error=BundleError) == expected
    assert parse_toml(toml, "m.toml", Document, error=BundleError) == expected


@pytest.mark.parametrize(
    "text",
    [
        "kind = 'text' # it's [[[[",
        'kind = "text" # a quote " and then\n[parts.unet]\nbits = 8',
        "kind = 'text'\n[parts.'{{{{{']\nbits = 8",
        "kind = 'te' # \"\n".replace("te", "text"),
        'kind = """\\\n  text"""\n[parts."""a"b]]"""]'.replace('"""a"b]]"""', '"a\'b]]"') + "\nbits = 8",
    ],
)
def test_brackets_in_toml_texts_and_comments_do_not_count(text: str) -> None:
    assert parse_toml(text.encode() + b"\n", "m.toml", dict[str, Any], error=BundleError, max_depth=2)["kind"] == "text"


def test_brackets_of_toml_count_after_any_quote() -> None:
    text = "# it's\nkind = [[[[[1]]]]]\n# it's\n"
    with pytest.raises(BundleError, match="nests 5 deep, more than the 2 allowed"):
        parse_toml(text.encode(), "m.toml", dict[str, Any], error=BundleError, max_depth=2)


def test_more_bytes_allow_more_values() -> None:
    numbers = b'{"a": [' + b"1," * 2_200_000 + b"1]}"
    with pytest.raises(BundleError, match="more than the 2,097,152 values"):
        parse_json(numbers, "m.json", dict[str, Any], error=BundleError)
    read = parse_json(numbers, "m.json", dict[str, Any], error=BundleError, max_bytes=64 * 2**20)
    assert len(read["a"]) == 2_200_001


@pytest.mark.parametrize(
    ("text", "parts"),
    {
        "type": ('{"kind": "text", "parts": {"unet": {"bits": "8"}}}', ["`parts.unet.bits`", "'8'", "an integer"]),
        "bool": ('{"kind": "text", "parts": {"unet": {"bits": true}}}', ["`parts.unet.bits`", "True", "an integer"]),
        "range": ('{"kind": "text", "parts": {"unet": {"bits": 99}}}', ["`parts.unet.bits`", "99", "<= 8"]),
        "list": ('{"kind": "text", "parts": []}', ["`parts`", "a list of 0", "an object"]),
        "item": ('{"kind": "text", "parts": {"u": {"bits": 8, "shape": [1, 0.5]}}}', ["`parts.u.shape[1]`", "0.5"]),
        "union": ('{"kind": "text", "parts": {}, "count": "x"}', ["`count`", "'x'", "an integer or null"]),
        "choice": ('{"kind": "song", "parts": {}}', ["`kind`", "'song'", "text, picture"]),
        "missing": ('{"kind": "text"}', ["the document has no field `parts`"]),
        "unknown": ('{"kind": "text", "parts": {"u": {"bits": 8, "bitz": 4}}}', ["`parts.u.bitz`", "does not know"]),
        "null": ("null", ["the document is None", "an object"]),
        "huge": (
            '{"kind": "text", "parts": {}, "count": ' + "9" * 400 + "}",
            ["999999999999999999999999…, an integer of more than 64 bits"],
        ),
        "infinite": ('{"kind": "text", "parts": {"u": {"bits": 8, "share": 1e999}}}', ["out of range"]),
        "nan": ('{"kind": NaN}', ["not readable as JSON"]),
        "cut": ('{"kind": "te', ["not readable as JSON", "truncated"]),
        "surrogate": ('{"kind": "\\ud800"}', ["not readable as JSON"]),
        "utf-8": (b'{"kind": "\xff"}', ["byte 10 is not UTF-8"]),
        "deep": ("[" * 10**6, ["it nests 1000000 deep", "32"]),
        "unterminated": ('"' + '\\"' * 10**6, ["not readable as JSON"]),
        "many": ('{"kind": [' + "[]," * 10**6, ["more than the 2,097,152 values"]),
        "digits": ("9" * 10**6, ["more than 64 bits"]),
        "empty": ("", ["not readable as JSON"]),
    }.values(),
)
def test_what_does_not_fit_is_named(text: str | bytes, parts: list[str]) -> None:
    with pytest.raises(BundleError) as error:
        parse(text)
    message = str(error.value)
    assert message.startswith("m.json")
    assert message.endswith("; export it again")
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert len(message) < 300


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse(b"\xef\xbb\xbf" + GOOD) == parse(GOOD)


def test_brackets_in_text_are_no_depth_and_fields_of_others_may_be_allowed() -> None:
    assert parse_json(b'{"a": "[[[[{{"}', "x", dict[str, str], error=BundleError, max_depth=1) == {"a": "[[[[{{"}
    extra = '{"kind": "text", "parts": {}, "theirs": 1}'
    assert parse(extra, allow_unknown=True) == Document("text", {})


def test_the_size_is_bounded_before_parsing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="more than the 20 bytes"):
        parse(GOOD, max_bytes=20)
    file = tmp_path / "m.json"
    file.write_bytes(GOOD)
    assert read_json_as(file, Document, error=BundleError) == parse(GOOD)
    with pytest.raises(BundleError, match=r"m\.json.*more than the 20 bytes"):
        read_json_as(file, Document, error=BundleError, max_bytes=20)


@pytest.mark.parametrize("kind", ["folder", "missing", "pipe", "device"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = {"device": Path("/dev/zero"), "folder": tmp_path}.get(kind, tmp_path / "x")
    if kind == "pipe":
        os.mkfifo(path)
    before = count_descriptors()
    with pytest.raises(BundleError, match="cannot be read"):
        read_bytes(path, error=BundleError)
    assert count_descriptors() == before


def count_descriptors() -> int:
    """Files that this process has open, where the system says."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.mark.parametrize(
    ("text", "part"),
    {
        "laughs": ("a: &a [x]\nb: [*a, *a]\n", "line 1 has an anchor or alias"),
        "object": ("!!python/object/apply:os.system [true]", "not readable as YAML|could not determine"),
        "nan": ("kind: .nan", "`kind` is nan, expected a finite number"),
        "key": ("1: 2", "the key 1, expected text"),
        "deep": ("[" * 1000, "nests more than the 32"),
        "digits": (f"kind: {'9' * 5000}", "digits"),
        "set": ("kind: !!set {a}", "expected plain values"),
        "open": ("kind: [", "m.yaml"),
    }.values(),
)
def test_yaml_is_plain_data(text: str, part: str) -> None:
    with pytest.raises(BundleError, match=part):
        parse_yaml(text.encode(), "m.yaml", dict[str, Any], error=BundleError)
