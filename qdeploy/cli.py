"""The command line's entry point: finds the command, and turns expected errors into one paragraph and an exit code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from qdeploy.base.disk import format_bytes, is_full_disk, measure_free_bytes
from qdeploy.base.errors import QdeployError
from qdeploy.base.extras import format_install
from qdeploy.base.version import read_version
from qdeploy.commands import INTERRUPTED, find_commands, load_command


class Commands(click.Group):
    """The commands of ``qdeploy.commands``, each imported when asked for; exit codes 1 (failed) and 2 (misuse)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of help, found by their files; none is imported."""
        return find_commands()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imported now, with what only this command needs."""
        return load_command(cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what a user can mend ends in one paragraph and an exit code, by ``_fail``."""
        try:
            return super().invoke(ctx)
        except QdeployError as exc:
            self._fail(ctx, "; ".join([str(exc), *list_notes(exc)]), exc.exit_code)
        except KeyboardInterrupt as exc:
            self._fail(ctx, f"interrupted; {'; '.join(list_notes(exc)) or 'nothing was written'}", INTERRUPTED)
        except BrokenPipeError:  # `qdeploy inspect … | head`: click ends quietly
            raise
        except OSError as exc:
            self._fail(ctx, "; ".join([describe_os_error(exc), *list_notes(exc)]), 1)
        except ModuleNotFoundError as exc:
            package = (exc.name or "").partition(".")[0]
            if package == "qdeploy":
                raise
            install = format_install(package, preferred=ctx.invoked_subcommand or "")
            self._fail(ctx, f"this command needs the package {package!r}; run `{install}`", 1)

    @staticmethod
    def _fail(ctx: click.Context, text: str, code: int) -> None:
        if ctx.params.get("debug") and code != INTERRUPTED:  # click would end with 1 and "Aborted!"
            raise  # noqa: PLE0704 - called from an except block: keep the traceback
        click.echo(f"qdeploy: {' '.join(text.split())}", err=True)  # one paragraph, whatever came
        ctx.exit(code)


def list_notes(exc: BaseException) -> list[str]:
    """What code on the way added to the error, such as what is kept of the work."""
    return list(getattr(exc, "__notes__", ()))


def describe_os_error(exc: OSError) -> str:
    """The system's words and the file; where none is named, the temporary folder's room for a full disk."""
    if exc.filename is None and is_full_disk(exc):
        folder = Path(tempfile.gettempdir())
        return (
            f"no room for a temporary file or what is printed ({exc.strerror or exc}): "
            f"{format_bytes(measure_free_bytes(folder / 'x'))} are free in {folder}; make room there"
        )
    return f"{exc.strerror or exc}: {exc.filename or 'no file named'}"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(read_version(), prog_name="qdeploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="Show no progress bars.")
@click.pass_context
def main(ctx: click.Context, debug: bool, quiet: bool) -> None:
    """Quantize latent-diffusion models after training and deploy them.

    The way: MODEL -> calibrate -> quantize -> export -> generate, bench, evaluate. `qdeploy demo` walks it on
    the built-in model. MODEL is a diffusers folder or an original
    .ckpt or .safetensors (Stable Diffusion 1.x, latent diffusion), builtin:emoji or builtin:emoji-uncond.
    """
    ctx.obj = not quiet


if __name__ == "__main__":
    main()
