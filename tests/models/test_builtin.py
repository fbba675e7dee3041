"""The models that ship: whole, small, really trained, and working."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from qdeploy.base.errors import ModelError
from qdeploy.models.builtin import find_builtin_root, list_builtins
from qdeploy.models.source import load_model

MAX_BYTES = {"emoji": 30_000_000, "emoji-uncond": 15_000_000}
NAMES = sorted(MAX_BYTES)
BUILTIN = find_builtin_root()
assert BUILTIN is not None


def list_files(name: str) -> list[Path]:
    return [path for path in (BUILTIN / name).rglob("*") if path.is_file()]


def read_figures(card: str, words: str) -> list[float]:
    """The numbers of the card's table row whose first cell begins with ``words``."""
    row = re.search(rf"^\| {re.escape(words)}[^|]*\|(.+)\|$", card, re.MULTILINE).group(1)
    return [float(number) for number in re.findall(r"[\d.]+", row)]


def test_these_and_no_others() -> None:
    assert list_builtins() == NAMES


def test_without_their_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qdeploy.models.builtin.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"builtin:emoji.*not installed.*pip install qdeploy-builtin-models"):
        load_model("builtin:emoji")
    with pytest.raises(ModelError, match=r"does not exist.*pip install qdeploy-builtin-models"):
        load_model(str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_the_package(name: str) -> None:
    assert sum(path.stat().st_size for path in list_files(name)) <= MAX_BYTES[name]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_fp16_safetensors_and_nothing_else(name: str) -> None:
    from safetensors import safe_open

    assert {path.suffix for path in list_files(name)} <= {".safetensors", ".json", ".txt", ".md"}
    for path in list_files(name):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize(
    "path",
    [path.relative_to(BUILTIN) for name in NAMES for path in list_files(name) if path.suffix == ".safetensors"],
    ids=str,
)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9999])
def test_a_cut_weight_file_is_named(path: Path, kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = path.parts[0]
    shutil.copytree(BUILTIN / name, tmp_path / name)
    monkeypatch.setattr("qdeploy.models.builtin.find_builtin_root", lambda: tmp_path)
    with (tmp_path / path).open("r+b") as file:
        file.truncate(int(kept * (tmp_path / path).stat().st_size))
    with pytest.raises(ModelError, match=re.escape(str(path)) + ".*cut or damaged.*qdeploy-builtin-models"):
        load_model(f"builtin:{name}")


def test_layout_is_a_stable_diffusion_pipeline() -> None:
    index = json.loads((BUILTIN / "emoji" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    unet = json.loads((BUILTIN / "emoji" / "unet" / "config.json").read_text())
    assert sum("CrossAttn" in block for block in unet["up_block_types"]) >= 2


def test_layout_is_an_unconditional_pipeline_with_a_codebook() -> None:
    folder = BUILTIN / "emoji-uncond"
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list)}
    assert index["_class_name"] == "LDMPipeline"
    assert parts == {"scheduler": "DDIMScheduler", "unet": "UNet2DModel", "vqvae": "VQModel"}
    assert json.loads((folder / "vqvae" / "config.json").read_text())["scaling_factor"] == 1
    assert load_model("builtin:emoji-uncond").kind == "unconditional"


def test_model_card_holds_the_figures_the_release_promises() -> None:
    card = (BUILTIN / "emoji" / "README.md").read_text()
    assert read_figures(card, "captions whose own picture is the very nearest")[0] >= 70
    assert read_figures(card, "captions whose own picture is among the 1 % nearest")[0] >= 90
    assert read_figures(card, "autoencoder round trip")[0] >= 30
    now, first = read_figures(card, "KID to the training pictures")
    assert now < first / 2


def test_unconditional_card_shows_that_it_learned() -> None:
    card = (BUILTIN / "emoji-uncond" / "README.md").read_text()
    made, first, real, noise = read_figures(card, "Fréchet distance")
    assert real < made < min(first / 3, noise / 4)
    made, first, _, noise = read_figures(card, "distance to the nearest training picture")
    assert made < min(first, noise) / 2
    made, _, real, _ = read_figures(card, "distance between two of the set")
    assert made > 0.7 * real  # not one picture over and over
    made, _, _, noise = read_figures(card, "pictures with four white corners")
    assert made > max(75, noise)
    assert read_figures(card, "first-stage round trip")[0] >= 24
    used, codes = read_figures(card, "codes used by them")
    assert used > 0.9 * codes


def test_a_picture_differs_by_prompt_and_has_a_white_ground(tmp_path: Path) -> None:
    import torch

    from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories

    model = load_model("builtin:emoji")
    recording = record_trajectories(
        model, ["red apple", "rocket"], TimestepAwareSettings(samples=2, steps=8, guidance_scale=2.0)
    )
    with torch.no_grad():
        images = model.vae_decoder(recording.latents.float()).clamp(-1, 1).numpy()
    assert np.abs(images[0] - images[1]).mean() > 0.1
    assert images[:, :, :3, :3].mean() == pytest.approx(1.0, abs=0.15)  # the corner


def test_unconditional_pictures_differ_and_have_a_white_ground() -> None:
    import torch

    from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories

    model = load_model("builtin:emoji-uncond")
    recording = record_trajectories(model, [], TimestepAwareSettings(samples=4, steps=20))
    with torch.no_grad():
        images = model.vae_decoder(recording.latents.float()).clamp(-1, 1).numpy()
    assert np.abs(images[0] - images[1]).mean() > 0.1
    assert images[:, :, :3, :3].mean() == pytest.approx(1.0, abs=0.15)
