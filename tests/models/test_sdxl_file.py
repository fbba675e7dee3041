"""Stable Diffusion XL in one original file: every part computes what the original does, and the gaps are named."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qdeploy.base.errors import ModelError
from qdeploy.inspection.describe import describe
from qdeploy.models.checkpoints import describe_checkpoint, heads
from qdeploy.models.source import load_model
from tests.models.original_sgm import DiffusionEngine, list_state, make_tiny_xl

ROUND_OFF = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def original() -> DiffusionEngine:
    return make_tiny_xl()


@pytest.fixture(autouse=True)
def the_tiny_one_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heads have 64 channels as the published one's, so that it needs no YAML either."""
    known = {("sdxl", 64, (1, 2, 4)): heads.PUBLISHED["sdxl", 320, (1, 2, 4)]}
    monkeypatch.setattr(heads, "PUBLISHED", {**heads.PUBLISHED, **known})


@pytest.fixture(autouse=True)
def no_file_is_left(tmp_path: Path) -> Iterator[None]:
    """Each has 150 MB."""
    yield
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "xl.safetensors")
    return folder / "xl.safetensors"


@torch.no_grad()
def test_every_part_computes_what_the_original_does(
    original: DiffusionEngine, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tokenizer")
    model = load_model(str(write(tmp_path, list_state(original))))
    torch.manual_seed(1)
    ids = {name: torch.randint(2, 500, (2, 77)) for name in model.text_encoders}
    for row, end in enumerate((5, 40)):
        ids["text_encoder_2"][row, end] = 513  # ends the text
    sizes = torch.tensor([[1024.0, 768.0, 0.0, 32.0, 512.0, 640.0], [8.0, 8.0, 0.0, 0.0, 8.0, 8.0]])
    crossattn, vector = original.condition(*ids.values(), sizes)
    context = model.embed_all(ids)
    torch.testing.assert_close(context["encoder_hidden_states"], crossattn, **ROUND_OFF)
    torch.testing.assert_close(context["text_embeds"], vector[:, :96], **ROUND_OFF)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor(481)
    expected = original.model.diffusion_model(x, t.expand(2), crossattn, vector)
    actual = model.unet(x, t, **context, time_ids=sizes)
    torch.testing.assert_close(actual, expected, **ROUND_OFF)
    assert expected.std() > 0.01
    latents = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(model.vae_decoder(latents), original.first_stage_model.decode(latents), **ROUND_OFF)


def test_what_no_tensor_says(original: DiffusionEngine, tiny_folder: Path, tmp_path: Path) -> None:
    """As the published folders have it: Euler, 0.13025, zeros for an empty negative prompt, the VAE in float32."""
    path = write(tmp_path, list_state(original))
    with pytest.raises(ModelError, match=r"tokenizer holds no tokenizer: put vocab\.json"):
        load_model(str(path))
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tokenizer")
    model = load_model(str(path))
    config = model.scheduler_config
    assert (config["_class_name"], config["timestep_spacing"], config["prediction_type"]) == (
        "EulerDiscreteScheduler", "leading", "epsilon",
    )  # fmt: skip
    assert (config["beta_start"], config["beta_end"], config["steps_offset"]) == (0.00085, 0.012, 1)
    assert (model.latents.scaling_factor, model.latents.image_width) == (0.13025, 1024)
    assert (model.zero_negative, model.vae_decoder.stays_float32, model.pooled_width) == (True, True, 96)
    pads = [model.component(name).tokenizer.backend.pad_token for name in model.text_encoders]  # type: ignore[attr-defined]
    assert pads == ["<|endoftext|>", "!"]
    second = shutil.copytree(tmp_path / "tokenizer", tmp_path / "tokenizer_2")
    for name in ("tokenizer.json", "vocab.json"):
        (second / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"tokenizer_2 holds no tokenizer: put vocab\.json"):
        load_model(str(path))


def test_facts_without_building(original: DiffusionEngine, tmp_path: Path) -> None:
    path = write(tmp_path, list_state(original))
    facts = describe_checkpoint(path)
    assert (facts.kind, facts.latents, facts.image_side) == ("sdxl", (4, 128, 128), 1024)
    assert set(facts.parameters) == {"text_encoder", "text_encoder_2", "unet", "vae"}
    assert {("kind", "sdxl"), ("architecture", "Stable Diffusion XL")} <= set(describe(str(path)))
    assert "tokenizer_2" in facts.missing[0]


def test_an_inpainting_file(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tokenizer")
    model = load_model(str(write(tmp_path, list_state(make_tiny_xl(channels=9)))))
    assert model.unet.in_channels == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conditioner.embedders.0.model.ln_final.weight": torch.zeros(2)}, "is the refiner of Stable Diffusion XL"),
        ({"denoiser.sigmas": torch.linspace(0.002, 80, 1000)}, "noise levels of another schedule"),
        ({"edm_mean": torch.zeros(4)}, "is Playground 2.5"),
        ({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(256, 97)}, "reads 97 channels, expected 96"),
        ({"conditioner.embedders.1.model.visual.proj": torch.zeros(2)}, "text encoder has .*visual.proj"),
        ({"conditioner.embedders.2.weight": torch.zeros(2)}, "belong to no known part.*embedders.2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_something_else(
    original: DiffusionEngine, tmp_path: Path, changes: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        describe_checkpoint(write(tmp_path, list_state(original) | changes))


def test_one_text_encoder_of_two(original: DiffusionEngine, tmp_path: Path) -> None:
    state = {name: value for name, value in list_state(original).items() if ".embedders.1." not in name}
    with pytest.raises(ModelError, match=r"one of Stable Diffusion XL's two text encoders.*embedders\.1"):
        describe_checkpoint(write(tmp_path, state))


def test_its_yaml_is_not_read(original: DiffusionEngine, tmp_path: Path) -> None:
    path = write(tmp_path, list_state(original))
    path.with_suffix(".yaml").write_text("model:\n  params:\n    network_config: {}\n")
    options: Any = "in the layout of sgm.*rename the YAML"
    with pytest.raises(ModelError, match=options):
        describe_checkpoint(path)
