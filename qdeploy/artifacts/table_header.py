"""The JSON document in a table's header, as types with ranges: everything but the arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from qdeploy.artifacts.decibels import Decibels
from qdeploy.artifacts.table_layers import Affine, AttentionQuant, FloatLayer, Scale
from qdeploy.base.documents import Count, Natural, ShortText, parse_json
from qdeploy.base.errors import TableError

SCHEMA_VERSION = 2
HALF_WEIGHT = "half_weight"
MAX_LAYERS, MAX_PROBES = 2**14, 1024  # of a component; Stable Diffusion XL's UNet has under 1000 layers


@dataclass(frozen=True)
class LayerHeader:
    """One quantized layer."""

    shape: Annotated[tuple[Count, ...], Meta(min_length=2, max_length=5)]
    weight_bits: Annotated[int, Meta(ge=2, le=8)]
    input: Affine
    output: Affine | None
    arrays: tuple[Literal["input_ratio", "output_ratio", "output_zero_point", "bias"], ...]
    passes: Annotated[int, Meta(ge=1, le=2)]
    symmetric_scale: Scale | None
    macs: Natural
    first_token_float: bool = False
    half_weight: bool = False


@dataclass(frozen=True)
class ComponentHeader:
    """One component."""

    layers: Annotated[Mapping[str, LayerHeader], Meta(max_length=MAX_LAYERS)]
    float_layers: Annotated[Mapping[str, FloatLayer], Meta(max_length=MAX_LAYERS)]
    rewrites: Annotated[tuple[ShortText, ...], Meta(max_length=16)]
    sensitivity_db: Mapping[str, Decibels]
    attention: Mapping[str, AttentionQuant] = field(default_factory=dict)
    simulator_sqnr_db: Decibels | None = None


@dataclass(frozen=True)
class TableHeader:
    """The whole document."""

    schema_version: int
    model: ShortText
    model_sha256: ShortText
    provenance: Mapping[str, Any]
    components: Mapping[str, ComponentHeader]
    probes: Mapping[str, Annotated[int, Meta(ge=0, le=MAX_PROBES)]]
    noise_correction: bool


@dataclass(frozen=True)
class TableVersion:
    """What is read first: of another version nothing else need fit."""

    schema_version: int


def parse_header(text: str | None, name: str, remedy: str) -> TableHeader:
    """The header in the file ``name``; TableError when it has none, of another version, or an impossible one."""
    if text is None:
        raise TableError(f"{name} is not a readable qdeploy table (no header of one); {remedy}")
    data = text.encode()
    version = parse_json(data, name, TableVersion, error=TableError, remedy=remedy, allow_unknown=True).schema_version
    if version != SCHEMA_VERSION:
        raise TableError(f"{name} has table schema {version}, this qdeploy reads {SCHEMA_VERSION}")
    return parse_json(data, name, TableHeader, error=TableError, remedy=remedy)
