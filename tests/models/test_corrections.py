"""What diffusers corrects in old folders when it loads them, is corrected here: whole pictures are the same."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from qdeploy.base.errors import ModelError, UsageError
from qdeploy.cli import main
from qdeploy.inspection.describe import describe
from qdeploy.models.corrections import correct_scheduler
from qdeploy.models.source import load_model
from qdeploy.sampling import CLASS_NAMES, replace_scheduler
from tests.models.pictures import assert_same, edit_json, first_latents, load_diffusers, paint, paint_diffusers
from tests.tiny import SCHEDULER, UNET

BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
OLD: dict[str, dict[str, Any]] = {
    "ddim-silent": {"_class_name": "DDIMScheduler", "_diffusers_version": "0.2.2"},
    "ddim-clips": {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 0},
    "ddim-alpha": {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 3},
    "ddim-limits": {"_class_name": "DDIMScheduler", "thresholding": True, "sample_max_value": 1.5},
    "pndm-silent": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "pndm-prk": {"_class_name": "PNDMScheduler"},
    "pndm-clips": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": True},
    "euler-leading": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "dpm-null": {"_class_name": "DPMSolverMultistepScheduler", "steps_offset": None, "timestep_spacing": "leading"},
    "lcm-clips": {"_class_name": "LCMScheduler", "clip_sample": True},
}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def write_scheduler(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(BETAS | settings))
    return folder


@pytest.mark.parametrize("name", OLD)
def test_old_schedulers_make_diffusers_pictures(folder: Path, name: str) -> None:
    write_scheduler(folder, OLD[name])
    model = load_model(str(folder))
    scheduler = getattr(diffusers, OLD[name]["_class_name"]).from_pretrained(folder / "scheduler")
    assert_same(paint(model), paint_diffusers(load_diffusers(folder, scheduler), first_latents(model)))


@pytest.mark.parametrize("target", CLASS_NAMES)
@pytest.mark.parametrize("source", ["pndm-silent", "ddim-silent", "euler-leading"])
def test_a_swap_brings_no_default_that_changes_the_latents(folder: Path, source: str, target: str) -> None:
    write_scheduler(folder, OLD[source])
    model = load_model(str(folder))
    scheduler = getattr(diffusers, CLASS_NAMES[target]).from_config(BETAS | OLD[source])
    expected = paint_diffusers(load_diffusers(folder, scheduler), first_latents(model))
    assert_same(paint(model, replace_scheduler(model.scheduler_config, target)), expected)


def test_a_ddim_in_place_of_an_original_files_pndm_does_not_clip() -> None:
    from qdeploy.models.checkpoints.schedule import read_scheduler_config

    config = read_scheduler_config("sd1", {}, None)
    assert "clip_sample" not in config
    assert replace_scheduler(config, "ddim")["clip_sample"] is False
    assert replace_scheduler(config | {"clip_sample": True}, "ddim")["clip_sample"] is True


def test_the_latents_size_of_files_before_0_9(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", lambda config: config.update(_diffusers_version="0.8.1"))
    model = load_model(str(folder))
    assert (model.latents.height, model.latents.image_width) == (64, 128)
    scheduler = diffusers.PNDMScheduler.from_pretrained(folder / "scheduler")
    assert load_diffusers(folder, scheduler).unet.config.sample_size == 64
    facts = [text for label, text in describe(str(folder)) if label == "corrected"]
    assert len(facts) == 1
    assert "unet/config.json `sample_size`: 8 -> 64" in facts[0]
    for version in ("0.9.0", "0.10.2", "0.42.1", "not a version", None):
        edit_json(folder / "unet" / "config.json", lambda config, v=version: config.update(_diffusers_version=v))
        assert load_model(str(folder)).latents.height == 8


def test_inspect_prints_each_correction(folder: Path) -> None:
    write_scheduler(folder, {"_class_name": "DDIMScheduler", "clip_sample": True, "predict_epsilon": True})
    edit_json(folder / "model_index.json", lambda index: index.update(safety_checker=["diffusers", "Checker"]))
    facts = [text for label, text in describe(str(folder)) if label == "corrected"]
    assert [text.split(",")[0] for text in facts] == [
        "scheduler_config.json `predict_epsilon`: True -> left out",
        "scheduler_config.json `steps_offset`: missing -> 1",
        "scheduler_config.json `clip_sample`: True -> False",
        "model_index.json `safety_checker`: left out",
    ]
    write_scheduler(folder, {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1})
    edit_json(folder / "model_index.json", lambda index: index.pop("safety_checker"))
    assert [label for label, _ in describe(str(folder)) if label == "corrected"] == []


def test_inspect_prints_what_else_is_read_otherwise(folder: Path, unconditional_folder: Path, tmp_path: Path) -> None:
    """Variants, old names of the attention, tokens of several vectors, guidance that is fed, a silent VQ model."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    tokenizer.save_pretrained(folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    text.resize_token_embeddings(len(tokenizer))
    text.save_pretrained(folder / "text_encoder")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(vae).items():
        for new_leaf, old_leaf in names.items():
            name = name.replace(new_leaf, old_leaf)
        old[name] = tensor
    save_file(old, vae, metadata={"format": "pt"})
    diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=8).save_pretrained(folder / "unet", variant="fp16")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    facts = [text for label, text in describe(str(folder)) if label == "corrected"]
    assert facts == [
        "vae: attention named `query`, `proj_attn` -> `to_q`, `to_out.0`, as diffusers renames it",
        "unet: the weights' variant 'fp16' -> float32, since there is no diffusion_pytorch_model.safetensors",
        "unet/config.json `time_cond_proj_dim` 8: the guidance scale is fed as an embedding, and the UNet runs once a "
        "step, without classifier-free guidance",
        "text_encoder: the token '<cat>' stands for its 3 vectors",
    ]
    silent = shutil.copytree(unconditional_folder, tmp_path / "silent")
    edit_json(silent / "vqvae" / "config.json", lambda config: config.pop("scaling_factor"))
    facts = [text for label, text in describe(str(silent)) if label == "corrected"]
    assert facts == ["vqvae/config.json `scaling_factor`: missing -> 1, as CompVis trained VQ models"]


def test_inpainting_folders_skip_the_runge_kutta_start(inpainting_folder: Path, tmp_path: Path) -> None:
    folder = write_scheduler(shutil.copytree(inpainting_folder, tmp_path / "model"), {"_class_name": "PNDMScheduler"})
    reference = load_diffusers(
        folder, diffusers.PNDMScheduler.from_pretrained(folder / "scheduler"), "StableDiffusionInpaintPipeline"
    )
    config = load_model(str(folder)).scheduler_config
    assert (config["skip_prk_steps"], config["steps_offset"]) == (True, 1)
    assert (reference.scheduler.config.skip_prk_steps, reference.scheduler.config.steps_offset) == (True, 1)


def test_other_pipelines_are_corrected_in_nothing(unconditional_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unconditional_folder, tmp_path / "model")
    write_scheduler(folder, {"_class_name": "DDIMScheduler"})
    model = load_model(str(folder))
    assert model.corrections == ()
    pipeline = diffusers.LDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = first_latents(model)
    with pytest.MonkeyPatch.context() as patched:
        home = "diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond"
        patched.setattr(f"{home}.randn_tensor", lambda *_, **__: torch.from_numpy(noise))
        expected = pipeline(num_inference_steps=6, output_type="np").images
    assert_same(paint(model), np.rint(expected[0] * 255.0))


@pytest.mark.exports
@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "PNDMScheduler", "LCMScheduler", "HeunDiscreteScheduler"]
)
def test_a_scheduler_as_diffusers_saves_it_goes_the_whole_way(folder: Path, tmp_path: Path, name: str) -> None:
    """diffusers writes DPM-Solver's default bound as -Infinity, which is no JSON."""
    import qdeploy

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    getattr(diffusers, name)(**betas).save_pretrained(folder / "scheduler")
    saved = (folder / "scheduler" / "scheduler_config.json").read_text()
    assert ("-Infinity" in saved) == (name == "DPMSolverMultistepScheduler")
    scheduler = ["--scheduler", "ddim"] if name == "HeunDiscreteScheduler" else []
    done = CliRunner().invoke(main, ["export", str(folder), "-o", str(tmp_path / "bundle"), *scheduler])
    assert done.exit_code == 0, done.output
    assert "Infinity" not in (tmp_path / "bundle" / "scheduler" / "scheduler_config.json").read_text()
    with qdeploy.load(tmp_path / "bundle") as pipe:
        assert pipe("a cat", steps=2, scheduler="dpm++").pixels.shape == (1, 16, 16, 3)
        assert pipe("a cat", steps=4).pixels.shape == (1, 16, 16, 3)


def test_a_saved_bound_of_minus_infinity_clips_nothing(tmp_path: Path) -> None:
    from qdeploy.sampling import make_scheduler
    from qdeploy.sampling.config_file import read_scheduler_file

    theirs = diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2")
    theirs.save_pretrained(tmp_path)
    config = read_scheduler_file(tmp_path / "scheduler_config.json", error=ModelError, remedy="")
    theirs.set_timesteps(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_scheduler(config, 20).timesteps.tolist() == theirs.timesteps.tolist()
        assert make_scheduler(config | {"lambda_min_clipped": float("-inf")}, 20).timesteps[0] == theirs.timesteps[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"predict_epsilon": False}, "`predict_epsilon`: got False .*`prediction_type` 'sample'"),
        ({"steps_offset": 10**18}, "`steps_offset`: got 1000+.*at most 10000"),
        ({"steps_offset": 10**30}, "an integer of more than 64 bits"),
        ({"num_train_timesteps": 10**9}, "`num_train_timesteps`: got 1000000000"),
        ({"num_train_timesteps": 10**18}, "`num_train_timesteps`"),
        ({"beta_start": "0.1"}, "`beta_start`: got '0.1', supported: a number"),
        ({"clip_sample": 1}, "`clip_sample`: got 1"),
        ({"trained_betas": "all"}, "`trained_betas`: got 'all', supported: a list"),
        ({"prediction_type": ["epsilon"]}, r"`prediction_type`: got \['epsilon'\], supported: a word"),
        ({"solver_order": 10**400}, "an integer of more than 64 bits"),
        ({"sigma_max": 10**400}, "an integer of more than 64 bits"),
        ({"magic": 1}, "`magic`: got 1, supported: no setting of that name"),
    ],
)
def test_settings_that_are_refused_by_name(folder: Path, settings: dict[str, Any], words: str) -> None:
    write_scheduler(folder, {"_class_name": "PNDMScheduler", "steps_offset": 1} | settings)
    with pytest.raises(ModelError, match=words):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta_start": 0.02, "beta_end": 0.01}, "`beta_start`: got 0.02, supported: at most beta_end"),
        ({"beta_start": 1e-320, "beta_end": 1e-310}, "`beta_start, beta_end`"),
        ({"beta_start": 0.9, "beta_end": 0.99999}, "`beta_start, beta_end`"),
        ({"trained_betas": [1e-12] * 1000}, "`trained_betas`"),
        ({"trained_betas": [0.1] * 999}, "`trained_betas`"),
        ({"_class_name": "HeunDiscreteScheduler"}, "`_class_name`: got 'HeunDiscreteScheduler'"),
        ({"timestep_spacing": "log"}, "`timestep_spacing`"),
    ],
)
def test_what_no_request_could_run_is_refused_at_export(
    folder: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    from qdeploy.export.exporter import export_bundle
    from qdeploy.targets.base import load_target

    write_scheduler(folder, {"_class_name": "PNDMScheduler"} | settings)
    model = load_model(str(folder))
    with pytest.raises(UsageError, match=words):
        export_bundle(model, None, load_target("ort-cpu"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_predict_epsilon_with_what_it_meant() -> None:
    for settings in ({"predict_epsilon": True}, {"predict_epsilon": False, "prediction_type": "sample"}):
        corrected, corrections = correct_scheduler({"_class_name": "DDIMScheduler"} | settings, "LDMPipeline")
        assert "predict_epsilon" not in corrected
        assert len(corrections) == 1
