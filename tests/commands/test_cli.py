"""The commands as a user types them: the whole way on a tiny model, and one paragraph for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdeploy.cli import main
from qdeploy.commands import find_commands

QUICK = ("--rounds", 3, "--pictures", 1, "--steps", 2, "--fresh-starts", 1, "--concurrency", "none")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--quiet", *map(str, arguments)])


@pytest.mark.exports
def test_the_whole_way(tiny_folder: Path, tmp_path: Path) -> None:
    calib, quant, bundle = tmp_path / "c.safetensors", tmp_path / "q.safetensors", tmp_path / "bundle"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    steps = [
        ("calibrate", tiny_folder, "-o", calib, "--samples", 2, "--steps", 3, "--prompts", prompts),
        ("quantize", tiny_folder, "--calib", calib, "-o", quant),
        ("export", quant, "-o", bundle),
        ("generate", bundle, "a cat", "-o", tmp_path / "cat.png", "--steps", 2, "--count", 2),
        ("bench", bundle, *QUICK, "--json", tmp_path / "bench.json"),
    ]
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "cat-0.png").stat().st_size > 0
    assert (tmp_path / "cat-1.png").stat().st_size > 0
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert len(figures["contenders"][0]["samples"]["unet step"]["steady_ms"]) == 3
    for path, words in (
        (calib, "timesteps"),
        (quant, "conv_in"),
        (bundle, "hashes verified"),
        (tiny_folder, "latents"),
    ):
        shown = run("inspect", path)
        assert shown.exit_code == 0, shown.output
        assert words in shown.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("export", "no/such/folder", "-o", "x"), 1, "does not exist"),
        (("export", "builtin:none", "-o", "x"), 1, "no built-in model"),
        (
            ("export", "builtin:emoji", "-o", "x", "--target", "abacus"),
            2,
            "known targets: ",
        ),
        (("export", "builtin:emoji", "-o", "x", "--precision", "int3"), 2, "unknown --precision"),
        (("export", "builtin:emoji", "-o", "x", "--precision", "int8"), 2, "exports as fp32"),
        (("export", "builtin:emoji", "-o", "x", "--precision", "fp16"), 2, "has no fp16 kernels for CPUs"),
        (("export", "builtin:emoji", "-o", "x", "--target", "ort-cuda", "--precision", "int8"), 2, "--target tensorrt"),
        (("export", "none.safetensors", "-o", "x"), 1, "not a readable qdeploy table"),
        (("generate", "no/such/bundle", "a cat"), 1, "not a qdeploy bundle"),
        (("quantize", "builtin:emoji"), 2, "--calib"),
        (("quantize", "builtin:emoji", "--calib", "c", "-o", "x", "--learn-act-scales"), 2, "add --adaround"),
        (("quantize", "builtin:emoji", "--calib", "none", "-o", "x"), 1, "qdeploy calibrate"),
        (("calibrate", "builtin:emoji", "-o", "x", "--samples", "0"), 2, "at least 1"),
        (("inspect", "pyproject.toml"), 2, "neither a model folder"),
        (("no-such-command",), 2, "No such command"),
    ],
)
def test_mistakes_are_one_paragraph(arguments: tuple[str, ...], code: int, words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_pictures_in(tiny_folder: Path, float_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture, mask, broken = (tmp_path / name for name in ("cat.jpg", "mask.png", "broken.png"))
    Image.new("RGB", (40, 24)).save(picture)
    Image.new("L", (24, 40)).save(mask)
    broken.write_bytes(b"\x89PNG no more")
    for arguments, code, words in (
        (["--image", picture], 1, "--with-encoder"),
        (["--image", picture, "--mask", mask], 2, "as large as the picture"),
        (["--mask", mask], 2, "without image"),
        (["--image", broken], 1, "cannot be read as PNG"),
        (["--image", tmp_path / "none.png"], 1, "none.png"),
    ):
        result = run("generate", float_bundle, "a cat", "-o", tmp_path / "out.png", *arguments)
        assert (result.exit_code, words in result.output) == (code, True), result.output
    bundle = tmp_path / "bundle"
    assert run("export", tiny_folder, "-o", bundle, "--with-encoder").exit_code == 0
    assert "vae_encoder" in run("inspect", bundle).output
    result = run("generate", bundle, "a red cat", "--image", picture, "-o", tmp_path / "out.png", "--steps", 3)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out.png").size == (16, 16)


@pytest.mark.parametrize("part", ["unet", "tokenizer", "scheduler"])
def test_a_folder_with_a_part_missing(tiny_folder: Path, tmp_path: Path, part: str) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.rmtree(model / part)
    result = run("export", model, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert f"no folder {part}" in result.output


def test_a_half_written_weight_file(tiny_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = run("export", model, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "is cut or damaged" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(main, ["--debug", "generate", "no/such/bundle", "a cat"])
    assert result.exception is not None
    assert "not a qdeploy bundle" in str(result.exception)


@pytest.mark.parametrize("command", [(), *((name,) for name in find_commands())])
def test_help_teaches(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


def test_doctor_names_the_engine() -> None:
    assert "ort-cpu: onnxruntime" in run("doctor").output
