"""``model.ports.json``: names, element types and shapes of a graph's inputs and outputs, which ncnn's files lack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from qdeploy.artifacts.formats.ncnn_files.param import NAME
from qdeploy.artifacts.graph_format import Signature
from qdeploy.base.documents import read_json_as
from qdeploy.base.errors import BundleError

MAX_BYTES = 2**16
DTYPES = ("float32", "int64", "int32")

Side = Annotated[int, Meta(ge=1, le=2**20)]


@dataclass(frozen=True)
class Port:
    """Element type by NumPy's name, and the shape, batch included."""

    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[tuple[Side, ...], Meta(max_length=5)]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"got {self.dtype}, expected one of {', '.join(DTYPES)}")

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of one row, as ncnn has it: without the batch; a number is a vector of one."""
        return self.shape[1:] or (1,)


@dataclass(frozen=True)
class Ports:
    """Inputs and outputs by name; ``rows`` is the batch, of which ncnn computes one row after another."""

    inputs: Annotated[Mapping[str, Port], Meta(min_length=1, max_length=64)]
    outputs: Annotated[Mapping[str, Port], Meta(min_length=1, max_length=64)]

    def __post_init__(self) -> None:
        for name, port in {**self.inputs, **self.outputs}.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r:.60} is no name of a blob")
            if port.shape and port.shape[0] not in (1, self.rows):
                raise ValueError(f"{name} has {port.shape[0]} rows where the first output has {self.rows}")
        if not all(port.shape and port.dtype == "float32" for port in self.outputs.values()):
            raise ValueError("an output is no float32 with a batch")

    @property
    def rows(self) -> int:
        """Rows of a call."""
        shape = next(iter(self.outputs.values())).shape
        return shape[0] if shape else 1


def ports_from_signatures(inputs: Signature, outputs: Signature) -> Ports:
    """The same as a declared type; ValueError where ncnn's session could not feed them."""
    groups = ({name: Port(dtype, shape) for name, (dtype, shape) in group.items()} for group in (inputs, outputs))
    return Ports(*groups)


def signature_from_ports(ports: Mapping[str, Port]) -> Signature:
    """Inputs or outputs as a graph's file says them."""
    return {name: (port.dtype, port.shape) for name, port in ports.items()}


def format_ports(ports: Ports) -> str:
    """The text of the file."""
    groups = {"inputs": ports.inputs, "outputs": ports.outputs}
    document = {
        group: {name: {"dtype": port.dtype, "shape": list(port.shape)} for name, port in of_group.items()}
        for group, of_group in groups.items()
    }
    return json.dumps(document, indent=1) + "\n"


def read_ports(path: Path) -> Ports:
    """The file at ``path``; ValueError where it is none."""
    try:
        return read_json_as(path, Ports, error=BundleError, max_bytes=MAX_BYTES)
    except BundleError as exc:
        raise ValueError(str(exc)) from exc
