"""ncnn's ``.param``: a text of one layer a line, parsed strictly and formatted so that ncnn reads the same of it.

The format is that of ncnn's ``Net::load_param`` and ``ParamDict::load_param``: a magic number, the numbers of layers
and blobs, then ``TYPE NAME BOTTOMS TOPS names… key=value…``. An array is ``-23300 - key = count,values``. What more
ncnn reads (strings, another form of arrays, its binary form) is refused: no file of ours has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAGIC = "7767517"
MAX_LAYERS = 2**16
MAX_KEY = 31
MAX_BLOBS = 64  # that one layer reads or writes
MAX_NAME = 255
MAX_ARRAY = 16
MAX_INT = 2**31 - 1
ARRAY_KEY = -23300
NAME = re.compile(r"[!-~]{1,255}")
INTEGER = re.compile(r"-?[0-9]{1,10}")
FLOAT = re.compile(r"-?[0-9]\.[0-9]{8}e[+-][0-9]{2}")  # what ncnn reads exactly, in the 15 characters that it takes
PAIR = re.compile(r"(-?[0-9]{1,6})=(\S+)")

Number = int | float
Value = int | float | tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One line: a layer of ncnn's, the blobs that it reads and writes, and its settings by ncnn's numbers."""

    type: str
    name: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    params: Mapping[int, Value] = field(default_factory=dict)

    def get_int(self, key: int, default: int = 0) -> int:
        """A setting that is a whole number; ValueError for anything else."""
        value = self.params.get(key, default)
        if not isinstance(value, int):
            raise ValueError(f"layer {self.name!r:.80}: setting {key} is {value!r:.40}, expected a whole number")
        return value

    def get_float(self, key: int, default: float = 0.0) -> float:
        """A setting that is a number with a decimal point; ValueError for anything else."""
        value = self.params.get(key, default)
        if not isinstance(value, float):
            raise ValueError(f"layer {self.name!r:.80}: setting {key} is {value!r:.40}, expected a float")
        return value

    def get_array(self, key: int) -> tuple[int, ...]:
        """A setting that is an array, () where it is missing; ValueError for anything else."""
        value = self.params.get(key, ())
        if not isinstance(value, tuple):
            raise ValueError(f"layer {self.name!r:.80}: setting {key} is {value!r:.40}, expected an array")
        return value


def format_param(layers: Sequence[Layer]) -> str:
    """The text of the file."""
    blobs = {name for layer in layers for name in layer.tops}
    return "\n".join([MAGIC, f"{len(layers)} {len(blobs)}", *map(_format_layer, layers), ""])


def parse_param(text: str) -> list[Layer]:
    """The layers in the text of a file; ValueError names the line that is none."""
    lines = text.split("\n")
    if len(lines) < 4 or lines[0] != MAGIC or lines[-1] != "":
        raise ValueError(f"it does not begin with {MAGIC} and end with a line's end")
    counts = lines[1].split(" ")
    if len(counts) != 2 or not all(INTEGER.fullmatch(count) for count in counts):
        raise ValueError(f"line 2 is {lines[1]!r:.40}, expected the numbers of layers and blobs")
    layer_count, blob_count = map(int, counts)
    if layer_count != len(lines) - 3 or not 0 < layer_count <= MAX_LAYERS:
        raise ValueError(f"it has {len(lines) - 3} layers and says {layer_count}; at most {MAX_LAYERS}")
    layers = [_parse_layer(line, number) for number, line in enumerate(lines[2:-1], 3)]
    _check_blobs(layers, blob_count)
    return layers


def _format_layer(layer: Layer) -> str:
    names = [layer.type, layer.name, str(len(layer.bottoms)), str(len(layer.tops)), *layer.bottoms, *layer.tops]
    return " ".join(names + [_format_setting(key, value) for key, value in layer.params.items()])


def _format_setting(key: int, value: Value) -> str:
    if isinstance(value, tuple):
        return f"{ARRAY_KEY - key}={','.join(map(str, (len(value), *value)))}"
    return f"{key}={_format_number(value)}"


def _format_number(value: Number) -> str:
    return f"{value:.8e}" if isinstance(value, float) else str(value)


def _parse_layer(line: str, number: int) -> Layer:
    """One line; every word of it is looked at."""
    words = line.split(" ")
    if len(words) < 4 or not all(NAME.fullmatch(word) for word in words):
        raise ValueError(f"line {number} is {line!r:.60}, expected TYPE NAME BOTTOMS TOPS and more")
    counts = [int(word) if INTEGER.fullmatch(word) else -1 for word in words[2:4]]
    if not all(0 <= count <= MAX_BLOBS for count in counts) or len(words) < 4 + sum(counts):
        raise ValueError(f"line {number} has {words[2]!r:.20} inputs and {words[3]!r:.20} outputs")
    bottoms, tops = tuple(words[4 : 4 + counts[0]]), tuple(words[4 + counts[0] : 4 + sum(counts)])
    params: dict[int, Value] = {}
    for word in words[4 + sum(counts) :]:
        key, value = _parse_setting(word, number)
        if key in params:
            raise ValueError(f"line {number} has setting {key} twice")
        params[key] = value
    return Layer(words[0], words[1], bottoms, tops, params)


def _parse_setting(word: str, number: int) -> tuple[int, Value]:
    match = PAIR.fullmatch(word)
    key = int(match[1]) if match else -1
    is_array = key <= ARRAY_KEY
    key = ARRAY_KEY - key if is_array else key
    if match is None or not 0 <= key <= MAX_KEY:
        raise ValueError(f"line {number}: {word!r:.40} is no setting 0 to {MAX_KEY}")
    if not is_array:
        return key, _parse_number(match[2], number)
    values = [_parse_number(text, number) for text in match[2].split(",")]
    whole = tuple(value for value in values if isinstance(value, int))
    if len(whole) != len(values) or whole[0] != len(whole) - 1 or len(whole) > MAX_ARRAY + 1:
        raise ValueError(f"line {number}: {word!r:.40} is no array of at most {MAX_ARRAY} whole numbers")
    return key, whole[1:]


def _parse_number(text: str, number: int) -> Number:
    if INTEGER.fullmatch(text) and abs(int(text)) <= MAX_INT:
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    raise ValueError(f"line {number}: {text!r:.40} is no number that ncnn reads exactly")


def _check_blobs(layers: Sequence[Layer], blob_count: int) -> None:
    """ValueError unless every blob is written once and then read at most once, and names of layers are unique.

    ncnn frees a blob after its first reader; a Split gives several.
    """
    written: set[str] = set()
    read: set[str] = set()
    for layer in layers:
        for name in layer.bottoms:
            if name not in written or name in read:
                raise ValueError(f"layer {layer.name!r:.80} reads {name!r:.80}, which is not there (any more)")
            read.add(name)
        for name in layer.tops:
            if name in written:
                raise ValueError(f"two layers write {name!r:.80}")
            written.add(name)
    if len(written) != blob_count:
        raise ValueError(f"it has {len(written)} blobs and says {blob_count}")
    if len({layer.name for layer in layers}) != len(layers):
        raise ValueError("two layers have one name")
