"""Small and large files that unfold to gigabytes or hours, each read in this process; one line of JSON for each.

``python -m tests.hostile.bombs MODEL WORK``
"""

from __future__ import annotations

import json
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from qdeploy.models.options import LoraFile
from tests.hostile.cases import Case
from tests.hostile.outside import load, write_goods
from tests.hostile.worker import read_status, reset_peak, run_case

START = b"\x80\x02"
MILLION = 10**6
Read = Callable[[], object]


def reduce_bytes(size: int) -> bytes:
    """``bytearray(size)``, which torch's reader of weights makes."""
    return b"cbuiltins\nbytearray\n(J" + struct.pack("<i", size) + b"tR"


PICKLES: Mapping[str, bytes] = {
    "lists": START + b"]0" * (30 * MILLION) + b".",
    "marks": START + b"(" * (60 * MILLION) + b".",
    "nothing": START + b"N" * (60 * MILLION) + b".",
    "tuples in one another": START + b"(" * 900_000 + b"t" * 900_000 + b".",
    "one text": START + b"X" + struct.pack("<I", 60 * MILLION) + b"a" * (60 * MILLION) + b".",
    "a longer text than the file": START + b"X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "a memo far away": START + b"]r" + struct.pack("<I", 2**31 - 1) + b".",
    "empty bytes of 2 GB": START + b"}(X\x01\x00\x00\x00a" + reduce_bytes(2**31 - 1) + b"u.",
    "empty bytes again and again": START + b"](" + reduce_bytes(10 * MILLION) * 200 + b"e.",
}


def write_pickles(work: Path) -> dict[str, Read]:
    """Each pickle by itself, as torch wrote before 1.6, and in an archive."""
    reads: dict[str, Read] = {}
    for number, (name, code) in enumerate(PICKLES.items()):
        legacy, zipped = work / f"{number}.ckpt", work / f"{number}-zip.ckpt"
        legacy.write_bytes(code)
        with zipfile.ZipFile(zipped, "w") as archive:
            archive.writestr("model/data.pkl", code)
            archive.writestr("model/version", "3")
        reads |= {f"{name}, legacy": partial(load, legacy), f"{name}, archive": partial(load, zipped)}
    return reads


def write_archives(work: Path) -> dict[str, Read]:
    """Archives and files whose sizes lie, or that hold one thing many times."""
    with zipfile.ZipFile(work / "deflated.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", START + bytes(500 * MILLION))
    torch.save({"a": torch.zeros(1).expand(10**10)}, work / "wide.ckpt")
    for name in ("sparse.ckpt", "sparse.safetensors"):
        with (work / name).open("wb") as file:
            file.write(START if name.endswith("ckpt") else (2**40).to_bytes(8, "little"))
            file.truncate(2**40)
    names = ("deflated.ckpt", "wide.ckpt", "sparse.ckpt", "sparse.safetensors")
    return {name: partial(load, work / name) for name in names}


def write_headers(model: Path, work: Path) -> dict[str, Read]:
    """Safetensors headers of 15 MB, as a checkpoint and as a LoRA."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    huge = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    headers = {
        "many tensors": {f"{number}": empty for number in range(220_000)},
        "one huge tensor": {"a": huge},
        "metadata": {"__metadata__": {"a": "[" * (15 * MILLION)}, "a": empty},
        "lora metadata": {"__metadata__": {"lora_adapter_metadata": "[" * (15 * MILLION)}, "a": empty},
    }
    reads: dict[str, Read] = {}
    for name, header in headers.items():
        text, path = json.dumps(header).encode(), work / f"{name}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        reads |= {name: partial(load, path), f"{name}, LoRA": partial(load, model, loras=(LoraFile(path),))}
    return reads


def write_configs(work: Path) -> dict[str, Read]:
    """YAMLs with a whole checkpoint."""
    import yaml

    good = yaml.safe_load((work / "config.yaml").read_text())
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    texts = {"aliases": laughs, "depth": "[" * 100_000, "one line": "a: " + "x" * (20 * MILLION)}
    for key, values in {
        "image_size": (0, 7.5, -8, float("nan"), 10**12), "timesteps": (10**9, 0), "linear_start": (0, float("nan")),
    }.items():  # fmt: skip
        for value in values:
            params = good["model"]["params"] | {key: value}
            texts[f"{key} {value}"] = yaml.safe_dump({"model": good["model"] | {"params": params}})
    reads: dict[str, Read] = {}
    for number, (name, text) in enumerate(texts.items()):
        path = work / f"{number}.yaml"
        path.write_text(text)
        reads[f"yaml: {name}"] = partial(load, work / "model.ckpt", config=path)
    return reads


def main(model: str, work: str) -> None:
    folder = Path(work)
    write_goods(Path(model), folder)
    load(folder / "model.ckpt", config=folder / "config.yaml")
    reads = {**write_pickles(folder), **write_archives(folder), **write_configs(folder)}
    reads |= write_headers(Path(model), folder)
    for name, read in reads.items():
        before, started = reset_peak(), time.process_time()
        result = run_case(Case(name, True, read))
        seconds, grown = time.process_time() - started, read_status("VmHWM") - before
        print(json.dumps({"name": name, "result": result, "seconds": seconds, "grown_bytes": grown}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
