"""The commands, one a file: parse, call one function, print. A command is its file's function of the same name.

Heavy imports wait inside the commands, so that `qdeploy --help` and the torch-free ones start at once.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from qdeploy.base.outputs import Output

PATH = click.Path(path_type=Path)
INTERRUPTED = 130  # the exit code that a shell makes of Ctrl-C
MILLION = 10**6
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 1000.0
SCHEDULERS = "pndm, ddim, dpm++, euler, euler-a, unipc or lcm"  # for help; sampling has the classes, and imports NumPy
SPACED = ", or one with its spacing of timesteps, as in euler:trailing"


class Number(click.FloatRange):
    """A finite number within bounds; NaN and infinity, which click's own types take, are refused."""

    name = "number"

    def __init__(self, minimum: float, maximum: float, *, min_open: bool = False) -> None:
        super().__init__(minimum, maximum, min_open)
        self.bounds = minimum, maximum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """``value`` as a float; click's BadParameter with what came and what was expected."""
        number, (minimum, maximum) = click.FLOAT.convert(value, param, ctx), self.bounds
        if not math.isfinite(number):
            self.fail(f"got {value}, expected a finite number, {self._describe_range()}.", param, ctx)
        if number > maximum:
            self.fail(
                f"{value} is not in the range {self._describe_range()}; expected at most {maximum:g}.", param, ctx
            )
        if number < minimum or (number == minimum and self.min_open):
            least = f"more than {minimum:g}" if self.min_open else f"at least {minimum:g}"
            self.fail(f"{value} is not in the range {self._describe_range()}; expected {least}.", param, ctx)
        return number


class Whole(click.IntRange):
    """A whole number within bounds; every option has some, so that a slip of the finger is no day of work."""

    name = "whole number"

    def __init__(self, minimum: int, maximum: int = MILLION) -> None:
        super().__init__(minimum, maximum)
        self.bounds = minimum, maximum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """``value`` as an int; click's BadParameter with what came and what was expected."""
        number, (minimum, maximum) = click.INT.convert(value, param, ctx), self.bounds
        if not minimum <= number <= maximum:
            bound = f"at least {minimum}" if number < minimum else f"at most {maximum}"
            self.fail(f"{value} is not in the range {self._describe_range()}; expected {bound}.", param, ctx)
        return number


class Pair(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """Two whole numbers with a comma between them, as in ``1024,768``; each within bounds."""

    name = "two whole numbers"

    def __init__(self, minimum: int, maximum: int) -> None:
        self.number = Whole(minimum, maximum)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """``value`` as a pair of ints; click's BadParameter with what came and what was expected."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if len(parts) != 2:
            self.fail(
                f"got {value!r:.40}, expected two whole numbers with a comma between, as in 1024,768.", param, ctx
            )
        return tuple(self.number.convert(part.strip(), param, ctx) for part in parts)


GUIDANCE = Number(-MAX_GUIDANCE, MAX_GUIDANCE)
SHARE = Number(0, 1)
STEPS = Whole(1, 10_000)
SEED = Whole(0, MAX_SEED)
THREADS = Whole(1, 100_000)  # the engine's own check knows the machine
PIXELS = Whole(1, 10**5)
MAX_STATED_SIDE = 2**16  # of a size that only describes a picture
SIZE = Pair(1, MAX_STATED_SIDE)
CORNER = Pair(0, MAX_STATED_SIDE)


def find_commands() -> list[str]:
    """All commands, found by their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_command(name: str) -> click.Command | None:
    """The command ``name``, loaded now; None when there is no such command."""
    if name not in find_commands():
        return None
    command: click.Command = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    return command


def add_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how MODEL is loaded, alike in every command that loads one, which gets ``model_options``."""

    @click.option(
        "--lora", "loras", multiple=True, metavar="FILE[:SCALE]",
        help="LoRA in safetensors to fuse into the weights first, times SCALE (1). May be repeated.",
    )  # fmt: skip
    @click.option("--config", type=PATH, help="Original YAML of a checkpoint file, where its tensors say too little.")
    @click.option("--ema", is_flag=True, help="Take the averaged UNet of a checkpoint file.")
    @click.option(
        "--vae", type=PATH, metavar="FOLDER",
        help="VAE in diffusers' format to take in place of MODEL's own: AutoencoderKL, or AutoencoderTiny (TAESD).",
    )  # fmt: skip
    @click.option("--allow-download", is_flag=True, help="Fetch a missing tokenizer from the hub.")
    @functools.wraps(command)
    def wrapper(
        *args: Any, loras: Sequence[str], config: Path | None, ema: bool, vae: Path | None, allow_download: bool,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        from qdeploy.models.options import LoraFile, ModelOptions

        lora_files = tuple(LoraFile.from_text(text) for text in loras)
        command(*args, model_options=ModelOptions(lora_files, config, ema, allow_download, vae), **kwargs)

    return wrapper


GUIDANCE_INTERVAL = click.option(
    "--guidance-interval", type=SHARE, nargs=2, metavar="FROM TO",
    help="Shares of the schedule between which guidance is on, such as 0.2 0.8. Default: everywhere.",
)  # fmt: skip

SPEED = click.option(
    "--speed", default="exact", show_default=True, metavar="NAME",
    help="exact, balanced or fast: half or two fifths of the UNet calls at 25 steps, by DPM-Solver++ and a forecast.",
)  # fmt: skip

FORECAST = click.option(
    "--forecast", metavar="METHOD[:NAME=NUMBER,...]",
    help="Leave UNet calls out and forecast their outputs: reuse, damped, linear, quadratic, taylorseer or spectrum.",
)  # fmt: skip


def add_call_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which model calls are made, alike in every command that samples; it gets ``calls``."""

    @SPEED
    @GUIDANCE_INTERVAL
    @FORECAST
    @functools.wraps(command)
    def wrapper(
        *args: Any, guidance_interval: tuple[float, float] | None, forecast: str | None, speed: str, **kwargs: Any
    ) -> None:
        from qdeploy.sampling.call_schedule import CallSchedule

        command(*args, calls=CallSchedule.from_options(guidance_interval, forecast, speed), **kwargs)

    return wrapper


def prepare_outputs(*outputs: Output, folder: Path | None = None) -> None:
    """Check every place that the command will write to, before any work; name what killed runs left there.

    ``folder``: where the command adds files.
    """
    from qdeploy.base.outputs import check_outputs, check_working_folder
    from qdeploy.base.staging import remove_leftovers_below

    if folder is not None:
        check_working_folder(folder)
    leftovers = check_outputs(outputs)
    for leftover in [*leftovers, *(() if folder is None else remove_leftovers_below(folder))]:
        click.echo(str(leftover), err=True)


def is_typed(name: str) -> bool:
    """Whether the user gave the running command's parameter ``name``, be it with its default value."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT
