"""A measurement survives its file, and a file that is none is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdeploy.base.errors import UsageError
from qdeploy.bench.store import read_bench_run, write_bench_run
from qdeploy.reporting.fidelity import Fidelity
from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.sampling.forecast import Forecast
from tests.bench.factories import pair


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = pair(0)
    run.settings = replace(run.settings, calls=CallSchedule((0.2, 0.8), Forecast("linear")))
    run.contenders[0].fidelity = Fidelity((float("inf"), 3.0), (900, 100), float("inf"), float("inf"))
    write_bench_run(tmp_path / "run.json", run)
    assert read_bench_run(tmp_path / "run.json") == run
    assert "Infinity" not in (tmp_path / "run.json").read_text()


def test_a_figure_that_is_no_number_does_not_cost_the_measurement(tmp_path: Path) -> None:
    run = pair(0)
    run.contenders[0].fidelity = Fidelity((float("nan"), 3.0), (900, 100), float("nan"), float("inf"))
    write_bench_run(tmp_path / "run.json", run)
    read = read_bench_run(tmp_path / "run.json").contenders[0].fidelity
    assert read is not None
    assert str(read) == str(run.contenders[0].fidelity)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "`contenders[0]` has no field `samples`": lambda d: d["contenders"][0].pop("samples"),
    "`schema_version` is 99, expected one of 1": lambda d: d.update(schema_version=99),
    "`contenders` is a list of 0": lambda d: d.update(contenders=[]),
    "length <= 100": lambda d: d.update(contenders=d["contenders"][:1] * 101),
    "one bundle on one engine": lambda d: d["contenders"][1].update(bundle="fp32"),
    "steady_ms[4]` is -1, expected a number > 0": lambda d: d["contenders"][0]["samples"]["unet step"].update(
        steady_ms=[1, 2, 3, 4, -1]
    ),
    "not readable as JSON": lambda d: d["contenders"][0]["samples"]["unet step"]["steady_ms"].append(float("nan")),
    "more than 64 bits": lambda d: d["contenders"][0]["samples"]["unet step"]["steady_ms"].append(10**400),
    "is True, expected a number": lambda d: d["contenders"][0]["samples"]["unet step"]["steady_ms"].append(True),
    "`contenders[0].size_bytes` is -4": lambda d: d["contenders"][0].update(size_bytes=-4),
    "`contenders[0].name` is '\\x1b[2J'": lambda d: d["contenders"][0].update(name="\x1b[2J"),
    "length <= 1000": lambda d: d["environment"].update(cpu="x" * 2000),
    "`settings.evil` is a field": lambda d: d["settings"].update(evil=1),
    "guidance_interval: got (0.8, 0.2), which is reversed": lambda d: d["settings"].update(
        calls={"guidance_interval": [0.8, 0.2]}
    ),
    "--rounds": lambda d: d["settings"].update(rounds=0),
    "`environment` is a list of 1, expected an object": lambda d: d.update(environment=[1]),
    "another stage": lambda d: d["contenders"][0]["samples"].update(nap={"warmup_ms": [], "steady_ms": []}),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_changed_file_is_refused(words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_bench_run(path, pair(0))
    document = json.loads(path.read_text())
    CHANGES[words](document)
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"not a measurement.*measure again") as caught:
        read_bench_run(path)
    assert words in str(caught.value) or words == "another stage"
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '{"schema": 3}', "[" * 200_000, "\xff", '{"schema": "qdeploy bench"}']
)
def test_any_other_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=r"run\.json is not a measurement"):
        read_bench_run(path)
