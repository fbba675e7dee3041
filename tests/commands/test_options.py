"""Every number on the command line is finite and bounded, in every command."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.commands import SCHEDULERS, Number, Whole, find_commands, load_command
from qdeploy.sampling import CLASS_NAMES

ENDLESS = ("nan", "inf", "-inf", "1e400", "1e39")


def list_options() -> Iterator[tuple[str, click.Option]]:
    for name in find_commands():
        command = load_command(name)
        assert command is not None
        yield from ((name, option) for option in command.params if isinstance(option, click.Option))


NUMBERS = [
    pytest.param(name, option, id=f"{name} {option.opts[0]}")
    for name, option in list_options()
    if isinstance(option.type, click.types.FloatParamType | click.types.IntParamType)
]


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_every_number_has_bounds(name: str, option: click.Option) -> None:
    assert isinstance(option.type, Number | Whole)
    assert option.type.min is not None
    assert option.type.max is not None
    values = ENDLESS if isinstance(option.type, Number) else (*ENDLESS, "1.5", str(10**30), str(-(10**30)))
    arguments = ["x" for parameter in load_command(name).params if isinstance(parameter, click.Argument)]  # type: ignore[union-attr]
    for value in values:
        given = [value] * option.nargs
        result = CliRunner().invoke(main, [name, *arguments, option.opts[0], *given], catch_exceptions=False)
        assert result.exit_code == 2, f"{value}: {result.output}"
        assert f"Invalid value for '{option.opts[0]}'" in result.output.replace("\n", " "), result.output


def test_the_ones_of_the_issue() -> None:
    """NaN passes all comparisons of a range; a hang was the result."""
    for option in ("--cache-gb", "--max-mb"):
        arguments = ["quantize", "builtin:emoji", "--calib", "c", "-o", "x", option, "nan"]
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert "got nan, expected a finite number, 0<x<=1000000" in result.output


def test_help_names_every_scheduler() -> None:
    assert SCHEDULERS.replace(" or ", ", ").split(", ") == list(CLASS_NAMES)
    helped = [option for _, option in list_options() if option.name == "scheduler"]
    assert len(helped) == 4
    assert all((option.help or "").startswith(SCHEDULERS) for option in helped)
