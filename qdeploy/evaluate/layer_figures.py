"""What quantizing did to each layer alone, and which table belongs to which bundle. No torch; ``layers`` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdeploy.bundle import Manifest, open_bundle
from qdeploy.errors import UsageError
from qdeploy.table import QuantTable, load_table


@dataclass(frozen=True)
class Histogram:
    """Counts of values before and after quantization, between equal ``edges float[bins + 1]``."""

    edges: NDArray[np.floating]
    before: NDArray[np.integer]
    after: NDArray[np.integer]


@dataclass(frozen=True)
class LayerFigures:
    """One layer by itself: its float input and weight against what the integers make of them.

    weight_db: SQNR of the weight, in the model's own units. input_db: of the input.
    output_db: of the quantized layer's output on the very input that the float layer reads.
    """

    component: str
    name: str
    weight_bits: int
    act_bits: int
    weight_db: float
    input_db: float
    output_db: float
    weight: Histogram
    input: Histogram


@dataclass(frozen=True)
class Layers:
    """All layers of one bundle, by component in order of computation; ``bundle`` is the contender's name."""

    bundle: str
    figures: Sequence[LayerFigures]

    def worst(self, count: int) -> list[LayerFigures]:
        """Those with the least SQNR of their output."""
        return sorted(self.figures, key=lambda one: one.output_db)[:count]


@dataclass(frozen=True)
class TableOfBundle:
    """A bundle's place among the command's, its manifest and its table."""

    number: int
    manifest: Manifest
    path: Path
    table: QuantTable


def tables_of(texts: Sequence[str], bundles: Sequence[Path]) -> list[TableOfBundle]:
    """The bundle of each ``TABLE`` (by what both record of their making) or ``BUNDLE=TABLE``.

    UsageError where a table has none, TableError for a file that is no table.
    """
    manifests = [open_bundle(path).manifest for path in bundles]
    found: dict[int, TableOfBundle] = {}
    for text in texts:
        named, _, rest = text.partition("=")
        given = [number for number, path in enumerate(bundles) if rest and path == Path(named)]
        path = Path(rest if given else text)
        table = load_table(path)
        matching = given or [number for number, manifest in enumerate(manifests) if made_of(manifest, table)]
        if not matching:
            raise UsageError(
                f"--table {text}: no bundle given says that it was made from this table; give --table BUNDLE=TABLE "
                "with BUNDLE as it stands on the command line"
            )
        found |= {number: TableOfBundle(number, manifests[number], path, table) for number in matching}
    return [found[number] for number in sorted(found)]


def made_of(manifest: Manifest, table: QuantTable) -> bool:
    """Whether model, calibration and settings that ``manifest`` records are the table's."""
    recorded = manifest.provenance
    return (recorded.get("model_sha256"), recorded.get("quantization")) == (table.model_sha256, table.provenance)
