"""Reading one checkpoint file as data: ``torch.save`` archives and safetensors, memory-mapped, never executed.

Training frameworks store objects next to the weights: Lightning's callback states under their classes, NumPy
scalars, settings. Those in real files are named below and become ``Inert`` placeholders, so
that no such library is imported; a file that names anything else is refused before it is unpickled.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints.foreign import refuse_foreign
from qdeploy.models.weight_files import MAX_TENSORS, check_safetensors

SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")  # usual ones; a file is read by its content
REMEDY = "get the original file again, or save its weights as .safetensors"
MAX_FILE_BYTES = 64 * 2**30
MAX_PICKLE_BYTES = 64 * 2**20  # the tree of names and shapes; Stable Diffusion's with EMA and optimizer has 2 MiB
MAX_OPCODES = 2_000_000  # Stable Diffusion's file with EMA and optimizer has 400,000
ZIP_MAGIC = b"PK\x03\x04"  # how torch.load tells its two formats apart
PICKLE_MAGIC = b"\x80"  # of protocol 2 and later
LEGACY_PICKLES = 5  # before torch 1.6: magic number, protocol, system, the object, storage keys

PLAIN = re.compile(  # what tensors and containers are made of; torch's own, narrower list has the last word
    r"torch\.\w+|torch\.(cuda|storage)\.\w+|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout|collections\.(OrderedDict|Counter)"
    r"|_codecs\.encode|builtins\.(set|complex)"  # no bytearray, which takes a size and no content
)
INERT_PACKAGES = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "ldm.",
    "taming.",
    "torch.optim.",
)
INERT_NUMPY = ("dtype", "ndarray", "float32", "float64", "int32", "int64", "bool_")
INERT = (
    *(f"numpy.{name}" for name in INERT_NUMPY),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")),
    "argparse.Namespace",
    "copyreg._reconstructor",
    "typing.Any",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)
INERT_DICTS = (
    "collections.defaultdict",
    *(f"{package}.utilities.parsing.AttributeDict" for package in ("pytorch_lightning", "lightning.pytorch")),
    "lightning_fabric.utilities.data.AttributeDict",
)


class Inert:
    """A placeholder for an object that is not weights: it accepts any arguments and does nothing."""

    def __new__(cls, *_: Any) -> Any:
        """Without calling anything of the class that the file names."""
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        """Whatever the file holds of it is left out."""
        pass


class InertDict(Inert):
    """A placeholder for a kind of dict; unpickled items need a plain one."""

    def __new__(cls, *_: Any) -> Any:
        """A plain, empty dict."""
        return {}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every weight of a ``.ckpt``, ``.pt`` or ``.safetensors`` by its name, left in the file until it is used.

    Lightning's ``state_dict`` is unwrapped; its ``global_step``, which tells some files apart, goes with it. Files of
    torch before 1.6 cannot be mapped and are read whole.
    ModelError for files that are truncated, hostile, no checkpoint or hold no plain tensors.
    """
    _check_file(path)
    try:
        loaded = _load_safetensors(path) if is_safetensors(path) else torch_load(path)
    except ValueError as exc:
        raise ModelError(f"{path} is not a checkpoint of plain weights ({exc}); {REMEDY}") from exc
    nested = isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict)
    tensors = _filter_tensors(loaded["state_dict"] if nested else loaded)
    step = loaded.get("global_step") if nested else None
    if type(step) is int and 0 <= step < 2**63 and tensors:
        tensors.setdefault("global_step", torch.tensor(step))
    if not tensors:
        refuse_foreign(_list_nested_names(loaded))
        raise ModelError(f"{path} holds no tensors by name, neither directly nor in a `state_dict`; {REMEDY}")
    _check_sizes(tensors, path)
    _refuse_complex(dict(loaded["state_dict"] if nested else loaded), path)
    return tensors


def torch_load(path: Path) -> Any:
    """What ``torch.save`` wrote, its tensors left on disk (``mmap``); nothing that it names is run or imported.

    ValueError says what is wrong with the file, without its name.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == ZIP_MAGIC
        names = _read_zip_globals(path) if zipped else _read_legacy_globals(path)
        with torch.serialization.safe_globals(_make_placeholders(names)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as exc:  # a hostile or cut file may fail anywhere in zipfile, pickletools or torch
        raise ValueError(_explain(exc)) from exc


def _make_placeholders(names: set[str]) -> list[Any]:
    """A placeholder for each known name, as ``safe_globals`` takes them; ValueError for an unknown one."""
    placeholders = {name: _choose_placeholder(name) for name in sorted(names)}
    return [(placeholder, name) for name, placeholder in placeholders.items() if placeholder is not None]


def _choose_placeholder(name: str) -> type[Inert] | None:
    if name in INERT_DICTS:
        return InertDict
    if name in INERT or name.startswith(INERT_PACKAGES):
        return Inert
    if not PLAIN.fullmatch(name):
        raise ValueError(f"it asks for `{name}`, which is not weights and could run code")
    return None


def _read_zip_globals(path: Path) -> set[str]:
    """Names in the pickle of a ``torch.save`` archive, whose entries must be stored and lie in the file."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries overlap, which torch.save's never do")
        trees = [entry for entry in entries if entry.filename.endswith("/data.pkl") or entry.filename == "data.pkl"]
        if len(trees) != 1 or trees[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"expected one data.pkl of at most {MAX_PICKLE_BYTES >> 20} MiB in it")
        with archive.open(trees[0]) as tree:
            return set(_iter_globals(BoundedReader(tree)))


def _read_legacy_globals(path: Path) -> set[str]:
    with path.open("rb") as file:
        if file.read(64).startswith(b"version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer, not the file itself")
        file.seek(0)
        reader = BoundedReader(file)
        return {name for _ in range(LEGACY_PICKLES) for name in _iter_globals(reader)}


class BoundedReader:
    """A file for ``pickletools``, which ends after ``MAX_PICKLE_BYTES``; a line or string may claim to be endless."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = MAX_PICKLE_BYTES
        self.opcodes = 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes."""
        return self._count(self._file.read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        """Up to the end of a line."""
        return self._count(self._file.readline(self._left + 1))

    def _count(self, piece: bytes) -> bytes:
        self._left -= len(piece)
        if self._left < 0:
            raise ValueError(f"its pickle is longer than {MAX_PICKLE_BYTES >> 20} MiB, of names and shapes only")
        return piece

    def count_opcode(self) -> None:
        """ValueError for more instructions than any checkpoint has."""
        self.opcodes += 1
        if self.opcodes > MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES:,} instructions")


def _iter_globals(pickle: BoundedReader) -> Iterator[str]:
    """Dotted names that one pickle asks for, read without running it, in Python 3's spelling."""
    recent, memo = ["", ""], dict[Any, str]()
    for opcode, argument, _ in pickletools.genops(pickle):  # type: ignore[arg-type]
        pickle.count_opcode()
        if opcode.name in ("GLOBAL", "INST"):
            yield _modernize_name(*str(argument).split(" ", 1))
        elif opcode.name == "STACK_GLOBAL":
            yield _modernize_name(*recent)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = recent[-1]
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = recent[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            recent = [recent[-1], memo.get(argument, "")]
        elif isinstance(argument, str):
            recent = [recent[-1], argument]


def _modernize_name(module: str, name: str) -> str:
    """Protocol 2 and below spell modules and names as Python 2 did."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _explain(exc: Exception) -> str:
    """One line, without torch's own advice (to load unsafely)."""
    text = str(exc) or type(exc).__name__
    match = re.search(r"GLOBAL (\S+)", text)
    if match:
        return f"it asks for `{match[1]}`, which is not weights and could run code"
    if "Unsupported operand" in text:
        return "its pickle is of protocol 3 or later or of 1, which torch reads only by executing it"
    detail = re.search(r"WeightsUnpickler error: (.*)", text)
    return detail[1] if detail else text.splitlines()[0]


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_safetensors(path)
        return load_file(path)
    except (ModelError, SafetensorError, OSError, KeyError) as exc:
        raise ValueError(_explain(exc)) from exc


def may_be_checkpoint(path: Path) -> bool:
    """Whether the file begins as an archive, a pickle or safetensors, or has the name of a checkpoint."""
    start = _read_start(path)
    return (
        path.suffix.lower() in SUFFIXES
        or _begins_as_pickle(start)
        or _begins_as_safetensors(start, path.stat().st_size)
    )


def is_safetensors(path: Path) -> bool:
    """Whether the content begins as a safetensors file's; a cut one is known by its suffix."""
    start = _read_start(path)
    if _begins_as_safetensors(start, path.stat().st_size):
        return True
    if path.suffix == ".safetensors" and _begins_as_pickle(start):
        raise ModelError(f"{path} is not a checkpoint in safetensors but a torch.save file; rename it to .ckpt")
    return path.suffix.lower() == ".safetensors" and not _begins_as_pickle(start)


def _read_start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)


def _begins_as_safetensors(start: bytes, size_bytes: int) -> bool:
    """Length of the header, then the header's first character."""
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size_bytes - 8


def _begins_as_pickle(start: bytes) -> bool:
    """An archive, or a pickle of protocol 2 to 5; a length in eight bytes begins so too, but ends in zeros."""
    is_pickle = start[:1] == PICKLE_MAGIC and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return start.startswith(ZIP_MAGIC) or (is_pickle and start[4:8] != bytes(4))


def _check_file(path: Path) -> None:
    if not path.is_file() or not 0 < path.stat().st_size <= MAX_FILE_BYTES:
        raise ModelError(f"{path} is not a file of 1 byte to {MAX_FILE_BYTES >> 30} GiB; {REMEDY}")


def _filter_tensors(loaded: Any) -> dict[str, Tensor]:
    """Those entries that are dense tensors of real numbers, under a name."""
    if not isinstance(loaded, Mapping):
        return {}
    return {name: value.detach() for name, value in loaded.items() if isinstance(name, str) and _is_plain(value)}


def _list_nested_names(loaded: Any) -> list[str]:
    """Names in a dict of dicts, as an IP-Adapter's pickle is one."""
    groups = loaded.items() if isinstance(loaded, Mapping) else ()
    return [f"{outer}.{name}" for outer, group in groups if isinstance(group, Mapping) for name in group]


def _refuse_complex(loaded: Mapping[str, Any], path: Path) -> None:
    """No model here has complex weights, and leaving one out would look like a missing tensor."""
    names = [str(name) for name, value in loaded.items() if isinstance(value, Tensor) and value.is_complex()]
    if names:
        raise ModelError(f"{path}: `{names[0]:.100}` holds complex numbers, expected real ones; {REMEDY}")
    if len(loaded) > MAX_TENSORS:
        raise ModelError(f"{path} holds {len(loaded)} entries, expected at most {MAX_TENSORS} tensors; {REMEDY}")


def _is_plain(value: Any) -> bool:
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not (value.is_nested or value.is_quantized or value.is_complex())


def _check_sizes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A small file can describe huge tensors (strides of 0, one storage under many names)."""
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if total_bytes > 2 * path.stat().st_size:  # twice: tied weights are real
        raise ModelError(f"{path} describes {total_bytes} bytes of weights, far more than it holds; {REMEDY}")
