"""x86-64 without VNNI: where its integer products saturate, and that no bundle's do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qdeploy.targets.base import load_target
from tests.emulated.conftest import EmulatedBundle, Factory
from tests.emulated.graphs import COLUMNS, DEPTH, ROWS, exact_product, saturated_product, write_product
from tests.emulated.machines import Machine, MachineMissingError, emulate_haswell, mask_machine

pytestmark = pytest.mark.slow

LIMITS = load_target("ort-cpu").parity  # openvino's are the same

MACHINES: dict[str, Callable[[Path], AbstractContextManager[Machine]]] = {
    "haswell": emulate_haswell,
    "without-vnni": partial(mask_machine, without=["vnni"]),
    "without-vnni-avx512": partial(mask_machine, without=["vnni", "avx512"]),
}
ENGINES = ("onnxruntime", "onnxruntime-precise", "openvino")
SATURATING = ("onnxruntime", "openvino")
NEVER = 64  # the largest code that cannot saturate: 2 * 255 * 64 < 2**15 <= 2 * 255 * 65
EXTREMES = [code * sign for code in (NEVER, NEVER + 1, 100, 127) for sign in (1, -1)]


@pytest.fixture(scope="module", params=MACHINES)
def machine(request: pytest.FixtureRequest, tmp_path_factory: Factory) -> Iterator[Machine]:
    try:
        with MACHINES[request.param](tmp_path_factory.mktemp("machine")) as machine_here:
            yield machine_here
    except MachineMissingError as exc:
        pytest.skip(str(exc))


def make_constant(code: int) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """Codes all alike, and the largest activations: every pair is the worst."""
    return np.full((DEPTH, COLUMNS), code, np.int8), np.full((ROWS, DEPTH), 255, np.uint8)


def make_mixed(largest: int) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    noise = np.random.default_rng(0)
    codes = noise.integers(-largest, largest + 1, (DEPTH, COLUMNS)).astype(np.int8)
    return codes, noise.integers(0, 256, (ROWS, DEPTH)).astype(np.uint8)


PRODUCTS = {str(code): make_constant(code) for code in EXTREMES} | {
    f"mixed-{top}": make_mixed(top) for top in (NEVER, 127)
}


@pytest.fixture(scope="module")
def products(machine: Machine, tmp_path_factory: Factory) -> Mapping[str, NDArray]:
    """Every product on the machine, by ``NAME/ENGINE``."""
    pytest.importorskip("openvino", reason="OpenVINO's kernels are held to the same; run `pip install openvino`")
    folder = tmp_path_factory.mktemp("products")
    for name, (codes, x) in PRODUCTS.items():
        write_product(codes, x, folder / f"{name}.onnx")
    machine.run("-m", "tests.emulated.compute", "graphs", folder, folder / "out.npz", *ENGINES)
    return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize("name", PRODUCTS)
def test_kernels_add_pairs_in_16_bits(products: Mapping[str, NDArray], name: str) -> None:
    """Silently: no engine says a word, whatever it outputs."""
    for engine in SATURATING:
        np.testing.assert_array_equal(products[f"{name}/{engine}"], saturated_product(*PRODUCTS[name]), engine)


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_option_makes_onnxruntime_exact(products: Mapping[str, NDArray], name: str) -> None:
    np.testing.assert_array_equal(products[f"{name}/onnxruntime-precise"], exact_product(*PRODUCTS[name]))


def test_codes_within_64_are_exact_and_others_are_not(products: Mapping[str, NDArray]) -> None:
    for name, (codes, x) in PRODUCTS.items():
        is_small = np.abs(codes.astype(int)).max() <= NEVER
        for engine in SATURATING:
            assert np.array_equal(products[f"{name}/{engine}"], exact_product(codes, x)) == is_small, (name, engine)


@pytest.mark.parametrize("made", ["tiny", "emoji_ort_cpu", "emoji_openvino"])
def test_a_default_bundle_passes_parity(
    machine: Machine, made: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The gate that it passed where it was exported, with this machine's outputs."""
    bundle: EmulatedBundle = request.getfixturevalue(made)
    computed = bundle.compute(machine, tmp_path)
    assert computed.flags == machine.flags
    for component, expected in bundle.expected.items():
        computed.parity(expected, component).check(component, LIMITS)
