"""What every target promises, checked on each one that is there; a new target passes this file unedited."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import qdeploy.passes
from qdeploy.base.errors import UsageError
from qdeploy.engines.base import list_engines
from qdeploy.targets import base
from qdeploy.targets.base import (
    FLOAT_BITS,
    LAST_PASS,
    OPENABLE,
    PRECISIONS,
    Target,
    list_targets,
    load_pass,
    load_target,
)
from tests.test_imports import run_blocked

PASSES = [path.stem for path in Path(qdeploy.passes.__path__[0]).glob("*.py") if path.stem not in ("__init__", "edit")]
BETWEEN_FLOAT_AND_INTEGER_DB = (30, 100)  # a graph in int8 is below, one in float32 that was not changed above


@pytest.fixture(params=list_targets())
def target(request: pytest.FixtureRequest) -> Target:
    return load_target(request.param)


def test_its_settings_are_json_values_and_tell_it_from_every_other(target: Target) -> None:
    """A recipe's receipt is keyed by them, in another process than the one that reads it."""
    written = json.dumps(target.settings)
    others = [json.dumps(load_target(name).settings) for name in list_targets() if name != target.name]
    assert written not in [*others, json.dumps(replace(target, opset=1).settings)]
    assert (json.dumps(target.in_full_range().settings) == written) == (not target.numerics.half_range_weights)


def test_its_name_is_its_files(target: Target) -> None:
    file = Path(base.__file__).parent / f"{target.name.replace('-', '_')}.py"
    assert file.is_file()
    assert load_target(target.name) is target


def test_its_engines_exist(target: Target) -> None:
    assert target.engine in list_engines()
    if target.stand_in is not None:
        assert target.stand_in.engine in set(list_engines()) - {target.engine}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_is_taken_or_refused_with_a_reason(target: Target, precision: str) -> None:
    assert (precision in target.precisions) == (precision not in target.missing_precisions)
    if precision in target.precisions:
        target.check_precision(precision)
        return
    with pytest.raises(UsageError, match=f"--target {target.name} has no --precision {precision}: .+; it exports as"):
        target.check_precision(precision)
    assert len(target.missing_precisions[precision].split()) > 3


def test_it_has_one_float_precision_which_is_its_numerics(target: Target) -> None:
    assert set(target.missing_precisions) <= set(PRECISIONS)
    assert [name for name in target.precisions if name in FLOAT_BITS] == [target.numerics.float_type]
    assert target.choose_precision(is_quantized=False) == target.numerics.float_type
    assert target.choose_precision(is_quantized=True) == "int8"


def test_its_full_range_differs_in_the_weights_only(target: Target) -> None:
    wide = target.in_full_range()
    assert not wide.numerics.half_range_weights
    assert replace(wide, numerics=target.numerics) == target
    assert replace(wide.numerics, half_range_weights=target.numerics.half_range_weights) == target.numerics


def test_an_unknown_precision_is_refused(target: Target) -> None:
    with pytest.raises(UsageError, match="unknown --precision 'fp8'; known: fp32, fp16, int8"):
        target.check_precision("fp8")


def test_its_passes_exist_and_each_runs_once(target: Target) -> None:
    assert target.passes
    assert len(set(target.passes)) == len(target.passes)
    assert LAST_PASS not in target.passes
    assert all(callable(load_pass(name)) for name in target.passes)


def test_its_opset_is_one_that_onnx_knows(target: Target) -> None:
    assert 19 <= target.opset <= onnx.defs.onnx_opset_version()


def test_its_parity_limits_are_between_float_and_integers(target: Target) -> None:
    low, high = BETWEEN_FLOAT_AND_INTEGER_DB
    assert low < target.parity.float_min_db < high
    assert 0 < target.parity.engine_loss_db < target.parity.between_slack_db


def test_it_fixes_known_dimensions_with_a_reason(target: Target) -> None:
    assert set(target.fixed_dims) <= set(OPENABLE)
    assert all(len(reason.split()) > 3 for reason in target.fixed_dims.values())
    target.check_open_dims(name for name in OPENABLE if name not in target.fixed_dims)


def test_a_dimension_that_cannot_be_open_is_refused_with_the_reason(target: Target) -> None:
    fixed = replace(target, fixed_dims={"size": "the engine plans memory for one size"})
    fixed.check_open_dims(["batch"])
    with pytest.raises(UsageError, match=f"{target.name} cannot leave size open: the engine plans memory for one"):
        fixed.check_open_dims(["batch", "size"])


def test_every_pass_is_one_function_of_its_files_name() -> None:
    """Also those that no target names: ``simplify`` follows every trace."""
    assert PASSES
    for name in PASSES:
        assert load_pass(name).__module__ == f"qdeploy.passes.{name}"


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=f"unknown --target 'abacus'; known targets: {', '.join(list_targets())}"):
        load_target("abacus")


def test_a_new_file_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file next to the others, here by way of a second folder of the package, and no other edit."""
    (tmp_path / "abacus_1.py").write_text(
        "from dataclasses import replace\n"
        "from qdeploy.targets.openvino import TARGET as OPENVINO\n"
        "TARGET = replace(OPENVINO, name='abacus-1')\n"
    )
    import qdeploy.targets

    monkeypatch.setattr(qdeploy.targets, "__path__", [*qdeploy.targets.__path__, str(tmp_path)])
    assert "abacus-1" in list_targets()
    assert load_target("abacus-1").engine == "openvino"
    assert "abacus-1 (fp32, int8)" in base.describe_targets()
    sys.modules.pop("qdeploy.targets.abacus_1")


def test_what_an_engine_computes_is_read_without_torch_and_onnx() -> None:
    code = "from qdeploy.targets.base import list_targets, load_target\nfor name in list_targets(): load_target(name)"
    run_blocked(code + "\nassert not [name for name in sys.modules if name.startswith('qdeploy.passes')]")
