"""Every command, option and recipe in the documentation exists, whether the tests can run it or not."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from qdeploy.base.errors import UsageError
from qdeploy.cli import main
from qdeploy.commands import find_commands, load_command
from qdeploy.recipe.read import recipe_from_document
from tests.docs import ahead
from tests.docs.blocks import PAGES, ROOT, Block, Command, all_blocks, all_commands, commands_in

REASONS = {
    "its exit code depends on the machine's load",
    "takes minutes: TensorRT's rules on every graph, at two shapes",
    "needs Inception's weights and LSUN",
    "needs a Ray cluster",
    "needs a published checkpoint",
    "needs an NVIDIA GPU",
    "needs onnxruntime-openvino, which replaces onnxruntime",
    "replaces onnxruntime in the environment",
    "takes a minute; tests/recipe/test_recipes.py runs every recipe",
    "serves until it is stopped; tests/serve asks it",
    "tests/serve/test_openai.py asks with this client",
    "takes hours",
    "takes minutes",
    "tests/test_examples.py runs them",
    "tests/test_unconditional.py takes this way",
}
PROSE_CODE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OTHERS_OPTIONS = {"--help", "--no-deps"}  # not of a command of ours, or of every one
FOREIGN = ("python", "pip", "scripts/gpu_check", "make", "uvicorn", "printf", "twine")  # checked by name


def translate_options(argv: Sequence[str]) -> list[str]:
    """``argv`` of qdeploy with what the code calls options that the documentation already calls otherwise."""
    return [argv[0], *(ahead.OPTIONS.get((argv[0], word), word) for word in argv[1:])]


def parse(argv: Sequence[str]) -> tuple[str, dict[str, object]]:
    """The command's name and its options' values, as click reads them; click's own error where it does not."""
    name, *rest = translate_options([word for word in argv if word not in ("--quiet", "--debug")])
    if name.startswith("-"):
        assert name in {option for parameter in main.params for option in parameter.opts}, name
        return name, {}
    command = load_command(name)
    assert command is not None, f"no command {name!r}; there are {', '.join(find_commands())}"
    with command.make_context(name, list(rest)) as context:
        return name, dict(context.params)


@pytest.mark.parametrize("command", all_commands(), ids=lambda command: command.block.where)
def test_a_command_is_one_that_exists(command: Command) -> None:
    program, *rest = command.argv
    if program == "qdeploy":
        try:
            parse(rest)
        except click.ClickException as exc:
            pytest.fail(f"{command.block.where}: {command.text}: {exc.format_message()}")
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command.text
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"qdeploy\[([\w,-]+)\]", command.text):
            assert set(extra.split(",")) <= set(extras), command.text
    elif program in ("python", ".venv/bin/python"):
        check_python(command.text, rest)
    elif program == "uvicorn":
        assert (ROOT / (rest[0].partition(":")[0].replace(".", "/") + ".py")).is_file(), command.text
    else:
        assert program in FOREIGN, f"{command.block.where}: nobody knows what {program!r} does; add a rule for it"
        assert "/" not in program or (ROOT / program).is_file(), command.text


def check_python(text: str, argv: Sequence[str]) -> None:
    """A script of ours, a module of ours, or a tool of the packaging world."""
    if argv[0] != "-m":
        assert (ROOT / argv[0]).is_file(), text
    elif argv[1] not in ("pytest", "build"):
        path = ROOT / argv[1].replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_an_option_named_in_prose_exists(page: Path) -> None:
    known = set(OTHERS_OPTIONS) | {option for _, option in ahead.OPTIONS}
    for command in (main, *map(load_command, find_commands())):
        assert command is not None
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    codes = [code for code in PROSE_CODE.findall(text) if not code.startswith(("python", "pip", ".venv"))]
    named = {option for code in codes for option in OPTION.findall(code)}
    if page.parent.name == "benchmarks" or page.name in ("benchmarks.md", "changelog.md"):
        named &= known  # other programs' options are named there too
    assert named <= known, f"{page}: no command has {', '.join(sorted(named - known))}"


def test_help_examples_are_commands_that_exist() -> None:
    from scripts.docs.commands import reference

    examples = re.findall(r"```bash\n(.*?)\n```", reference(), flags=re.DOTALL)
    assert len(examples) >= len(find_commands()) - 1  # all but `demo` show one
    for text in examples:
        for command in commands_in(Block(ROOT / "README.md", 0, "bash", "", text)):
            assert command.argv[0] == "qdeploy", command.text
            parse(command.argv[1:])


@pytest.mark.parametrize("block", [b for b in all_blocks() if b.language == "toml"], ids=lambda block: block.where)
def test_a_recipe_is_one_that_would_run(block: Block) -> None:
    document = tomllib.loads(block.text)
    for section in document.values():
        for documented, code in ahead.RECIPE_KEYS.items():
            if documented in section:
                section[code] = section.pop(documented)
    recipe_from_document(block.where, document)


def test_what_is_not_run_says_why() -> None:
    left_out = [block for block in all_blocks() if block.title]
    for block in left_out:
        assert block.reason in REASONS, f"{block.where}: {block.title!r}; a new reason goes into REASONS"
        print(f"not run: {block.where}: {block.reason}")  # pytest -rP shows the list
    assert {block.reason for block in left_out} == REASONS, "a reason that no block has any more"


def test_what_is_ahead_is_still_ahead() -> None:
    for (name, documented), code in ahead.OPTIONS.items():
        command = load_command(name)
        assert command is not None
        options = {option for parameter in command.params for option in parameter.opts}
        assert documented not in options, f"{name} has {documented} now: delete it from ahead.OPTIONS"
        assert code in options
    for documented in ahead.RECIPE_KEYS:
        with pytest.raises(UsageError, match=documented):
            recipe_from_document("x", {"model": {"file": "x"}, "sample": {documented: "ddim"}})
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "qdeploy").rglob("*.py"))
    for variable in ahead.VARIABLES:
        assert variable not in sources, f"{variable} is read now: delete it from ahead.VARIABLES"
    for path in ahead.PATHS:
        assert not (ROOT / path).exists(), f"{path} is there now: delete it from ahead.PATHS"
