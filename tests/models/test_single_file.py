"""An original checkpoint file as a MODEL: loaded with its tokenizer, described, and walked the whole way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qdeploy.base.errors import ModelError, UsageError
from qdeploy.cli import main
from qdeploy.inspection.describe import describe
from qdeploy.models.components import UnconditionalUNet, VaeDecoder, VqDecoder
from qdeploy.models.options import ModelOptions
from qdeploy.models.source import load_model
from qdeploy.models.text_encoders import BertTextEncoder, TextEncoder
from tests.models.original_files import original_state, write_ckpt, write_yaml
from tests.models.original_ldm import LatentDiffusion, tiny


def write(name: str, folder: Path, ema: bool = False) -> Path:
    """The tiny file of the layout ``name`` and its YAML."""
    model = LatentDiffusion(tiny(name))
    write_yaml(model.sizes, folder / "config.yaml")
    return write_ckpt(original_state(model, ema), folder / f"{name}.ckpt")


@pytest.fixture(scope="module")
def churches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("lsun_churches256", tmp_path_factory.mktemp("churches"), ema=True)


def options(path: Path, **more: Any) -> ModelOptions:
    return ModelOptions(config=path.with_name("config.yaml"), **more)


@pytest.mark.parametrize(
    ("name", "decoder", "latents"),
    [("lsun_beds256", VqDecoder, (3, 64, 64)), ("lsun_churches256", VaeDecoder, (4, 32, 32))],
)
def test_unconditional_files(name: str, decoder: type, latents: tuple[int, ...], tmp_path: Path) -> None:
    path = write(name, tmp_path)
    model = load_model(str(path), options(path))
    assert isinstance(model.unet, UnconditionalUNet)
    assert type(model.vae_decoder) is decoder
    assert (model.latents.shape, model.latents.image_height) == (latents, 256)
    assert not model.text_encoders


@pytest.mark.parametrize(
    ("name", "encoder", "lender"),
    [("sd-v1-4", TextEncoder, "tiny_folder"), ("text2img256", BertTextEncoder, "ldm_text_folder")],
)
def test_files_with_text_take_the_tokenizer_next_to_them(
    name: str, encoder: type, lender: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = write(name, tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer holds no tokenizer: put vocab\.\w+.*--allow-download"):
        load_model(str(path), options(path))
    shutil.copytree(request.getfixturevalue(lender) / "tokenizer", tmp_path / "tokenizer")
    model = load_model(str(path), options(path))
    assert type(model.text_encoders["text_encoder"]) is encoder
    assert model.tokenize(["a", ""])["text_encoder"].shape == (2, model.latents.tokens)


def test_a_tokenizer_is_fetched_only_where_that_is_allowed(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    asked = []

    def fetch(name: str, **more: Any) -> Any:
        asked.append((name, more))
        return tiny_model.text_encoders["text_encoder"].tokenizer.backend

    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", fetch)
    path = write("sd-v1-4", tmp_path)
    load_model(str(path), options(path, allow_download=True))
    assert asked == [("openai/clip-vit-large-patch14", {})]


def test_averaged_weights_are_another_model(churches: Path) -> None:
    last, averaged = (load_model(str(churches), options(churches, ema=ema)) for ema in (False, True))
    assert last.sha256 != averaged.sha256
    feeds = last.make_example("unet", 1)
    with torch.no_grad():
        assert not torch.equal(last.unet(**feeds), averaged.unet(**feeds))


def test_options_of_files_are_refused_for_folders(tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match="--ema and --config are for checkpoint files"):
        load_model(str(tiny_folder), ModelOptions(ema=True))


def test_a_yaml_that_is_not_there(churches: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.yaml"):
        load_model(str(churches), ModelOptions(config=churches.with_name("absent.yaml")))


def test_inspect_says_what_a_file_holds(churches: Path) -> None:
    facts = dict(describe(str(churches)))
    assert (facts["kind"], facts["latents"], facts["picture"]) == ("ldm-uncond", "4x32x32", "256x256")
    assert facts["averaged weights"].startswith("of the UNet")
    assert facts["unet"].endswith("M parameters")
    assert "text_encoder" not in facts
    assert "attention heads" in facts["missing"]  # its YAML is not next to it under its name


@pytest.mark.exports
def test_the_whole_way(churches: Path, tmp_path: Path) -> None:
    def passed(*arguments: object) -> None:
        result = CliRunner().invoke(main, ["--quiet", *map(str, arguments)])
        assert result.exit_code == 0, result.output

    loading = ("--config", churches.with_name("config.yaml"), "--ema")
    calib, table, bundle = tmp_path / "c.safetensors", tmp_path / "q.safetensors", tmp_path / "bundle"
    passed("calibrate", churches, "-o", calib, "--samples", 1, "--steps", 2, "--record", 2, *loading)
    passed("quantize", churches, "--calib", calib, "-o", table, *loading)
    passed("export", table, "-o", bundle, *loading)
    passed("generate", bundle, "-o", tmp_path / "out.png", "--steps", 2, "--count", 2)
    assert len(list(tmp_path.glob("out*.png"))) == 2
