"""The error of each quantized layer, and which table belongs to which bundle. No torch; ``layers`` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import Manifest
from qdeploy.artifacts.table import QuantTable, load_table
from qdeploy.base.errors import UsageError


@dataclass(frozen=True)
class LayerHistogram:
    """Counts of values before and after quantization, between equal ``edges float[bins + 1]``."""

    edges: NDArray[np.floating]
    before: NDArray[np.integer]
    after: NDArray[np.integer]


@dataclass(frozen=True)
class LayerFigures:
    """One layer by itself: its float input and weight compared with the quantized ones.

    weight_db: SQNR of the weight, in the model's own units. input_db: of the input.
    output_db: of the quantized layer's output on the same input as the float layer.
    """

    component: str
    name: str
    weight_bits: int
    act_bits: int
    weight_db: float
    input_db: float
    output_db: float
    weight: LayerHistogram
    input: LayerHistogram


@dataclass(frozen=True)
class BundleLayers:
    """All layers of one bundle, by component in order of computation; ``bundle`` is the contender's name."""

    bundle: str
    figures: Sequence[LayerFigures]

    def worst(self, count: int) -> list[LayerFigures]:
        """Those with the least SQNR of their output."""
        return sorted(self.figures, key=lambda layer: layer.output_db)[:count]


@dataclass(frozen=True)
class BundleTable:
    """A bundle's place among the command's, its manifest and its table."""

    number: int
    manifest: Manifest
    path: Path
    table: QuantTable


def match_tables(texts: Sequence[str], bundles: Sequence[Path]) -> list[BundleTable]:
    """The bundle of each ``TABLE`` (by the provenance of both) or ``BUNDLE=TABLE``.

    UsageError where a table has none, TableError for a file that is no table.
    """
    manifests = [open_bundle(path).manifest for path in bundles]
    matched: dict[int, BundleTable] = {}
    for text in texts:
        bundle, _, rest = text.partition("=")
        named = [number for number, path in enumerate(bundles) if rest and path == Path(bundle)]
        path = Path(rest if named else text)
        table = load_table(path)
        matching = named or [number for number, manifest in enumerate(manifests) if is_made_from(manifest, table)]
        if not matching:
            raise UsageError(
                f"--table {text}: no bundle given says that it was made from this table; give --table BUNDLE=TABLE "
                "with BUNDLE as it stands on the command line"
            )
        matched |= {number: BundleTable(number, manifests[number], path, table) for number in matching}
    return [matched[number] for number in sorted(matched)]


def is_made_from(manifest: Manifest, table: QuantTable) -> bool:
    """Whether model, calibration and settings that ``manifest`` records are the table's."""
    recorded = manifest.provenance
    return (recorded.get("model_sha256"), recorded.get("quantization")) == (table.model_sha256, table.provenance)
