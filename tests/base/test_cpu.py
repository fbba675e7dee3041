"""What the processor's flags mean for integer products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.base import cpu
from qdeploy.base.cpu import (
    Arithmetic,
    detect_arithmetic,
    explain_slow_weights,
    list_bundle_advice,
    read_integer_flags,
)
from qdeploy.base.errors import UsageError
from qdeploy.base.numerics import HALF_RANGE_MAX, pair_sum_bounds
from tests.processors import every_processor, pretend_processor, without_vnni

EXPECTED = {"vnni": Arithmetic.EXACT, "no-vnni": Arithmetic.SATURATING, "untold": Arithmetic.UNKNOWN}
INT16 = np.iinfo(np.int16)


def cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str | None, machine: str) -> None:
    """A processor whose /proc/cpuinfo has this ``line``; None: there is no such file."""
    monkeypatch.delenv(cpu.FLAGS_VARIABLE, raising=False)
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "cpuinfo")
    if line is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : Test 1\n{line}\n")


@every_processor
def test_the_variable_overrules_the_machine(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    pretend_processor(monkeypatch, processor)
    arithmetic = detect_arithmetic()
    assert arithmetic is EXPECTED[processor]
    assert arithmetic.is_exact_for(HALF_RANGE_MAX)
    assert arithmetic.is_exact_for(HALF_RANGE_MAX + 1) == (processor == "vnni")
    assert arithmetic.is_exact_for(None) == (processor == "vnni")


@pytest.mark.parametrize(
    ("line", "machine", "expected"),
    [
        ("flags : sse4_2 avx2 avx512f", "x86_64", Arithmetic.SATURATING),
        ("flags : sse4_2", "x86_64", Arithmetic.SATURATING),
        ("flags : avx2 avx512f avx512_vnni", "x86_64", Arithmetic.EXACT),
        ("flags : avx2 avx_vnni", "x86_64", Arithmetic.EXACT),
        ("Features : fp asimd asimddp", "aarch64", Arithmetic.EXACT),
        ("Features : fp asimd", "aarch64", Arithmetic.EXACT),
        (None, "AMD64", Arithmetic.UNKNOWN),
        (None, "x86_64", Arithmetic.UNKNOWN),
        (None, "arm64", Arithmetic.EXACT),
        ("no flags here", "x86_64", Arithmetic.UNKNOWN),
    ],
)
def test_flags_are_read_off_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str | None, machine: str, expected: Arithmetic
) -> None:
    cpuinfo(monkeypatch, tmp_path, line, machine)
    assert detect_arithmetic() is expected


def test_an_unknown_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.FLAGS_VARIABLE, "avx2,avx512vnni")
    with pytest.raises(UsageError, match="got avx512vnni, expected unknown or a list of avx2"):
        detect_arithmetic()


def test_an_empty_list_is_a_processor_with_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.FLAGS_VARIABLE, "")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    assert (detect_arithmetic(), read_integer_flags()) == (Arithmetic.SATURATING, [])


@without_vnni
def test_a_slow_bundle_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    pretend_processor(monkeypatch, processor)
    assert explain_slow_weights("ort-cpu", [64, 0]) is None
    assert "qdeploy export" in (explain_slow_weights("ort-cpu", [64, 127]) or "")
    assert "qdeploy export" in (explain_slow_weights("ort-cpu", [None]) or "")
    assert explain_slow_weights("openvino", [127]) is None  # that engine refuses to load it
    assert any("refused" in consequence for _, consequence in list_bundle_advice())


def test_where_everything_is_fast_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_processor(monkeypatch, "vnni")
    assert explain_slow_weights("ort-cpu", [127, None]) is None
    assert not any("refused" in consequence for _, consequence in list_bundle_advice())


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=12))
def test_pair_sums_are_those_of_the_worst_pair(codes: list[int]) -> None:
    weight = np.array([codes], np.int8)
    pairs = [(a, b) for i, a in enumerate(codes) for b in codes[i + 1 :]] or [(codes[0], 0)]
    acts = (0, 255)
    sums = [x * a + y * b for a, b in pairs for x in acts for y in acts]
    assert pair_sum_bounds(weight) == (min(sums), max(sums))


def test_half_the_range_is_what_fits_16_bits() -> None:
    for sign in (-1, 1):
        low, high = pair_sum_bounds(np.full((1, 2), sign * HALF_RANGE_MAX, np.int8))
        assert INT16.min <= low <= high <= INT16.max
        low, high = pair_sum_bounds(np.full((1, 2), sign * (HALF_RANGE_MAX + 1), np.int8))
        assert low < INT16.min or high > INT16.max
