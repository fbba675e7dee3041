"""LoRA files that make a few-step model: diffusers' pictures with the scheduler that each wants, and its recording."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import ModelError, UsageError
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.cli import main
from qdeploy.models.few_step_loras import advise_loras
from qdeploy.models.lora import fuse_lora
from qdeploy.models.options import LoraFile, ModelOptions
from qdeploy.models.original_names import find_original_name
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.sampling import make_scheduler, replace_scheduler
from qdeploy.sampling.few_steps import recognise_few_steps
from qdeploy.sampling.loop import PictureStreams, denoise
from tests.models.pictures import PROMPT, assert_same, first_latents, load_diffusers, load_diffusers_xl, same_draws
from tests.tiny import SCHEDULER

RANK, ALPHA = 4, 8.0
# What LCM-LoRA has updates for; Lightning's and Hyper-SD's files have them too.
DOWN = r"unet\.(?P<layer>.+?)(?P<joint>[._]lora|\.lora_A)(\.down)?\.weight"
TRAINED = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "conv_shortcut", "conv", "time_emb_proj")  # fmt: skip


@dataclass(frozen=True)
class Published:
    """As a family's files come: on which base, named how, run by which scheduler for how many steps."""

    base: str
    name_layer: Callable[[str, Any], tuple[str, str, str | None]]  # -> keys of down, up and alpha
    scheduler: str
    steps: int
    theirs: Callable[[Mapping[str, Any]], Any]


def name_kohya(layer: str, _: Any) -> tuple[str, str, str]:
    root = f"lora_unet_{layer.replace('.', '_')}"
    return f"{root}.lora_down.weight", f"{root}.lora_up.weight", f"{root}.alpha"


def name_kohya_xl(layer: str, config: Any) -> tuple[str, str, str]:
    """Transformers under the original's names, as trainers of Stable Diffusion XL write them."""
    original = find_original_name(layer, config)
    assert original is not None
    return name_kohya(original if ".transformer_blocks." in layer else layer, config)


def name_diffusers(layer: str, _: Any) -> tuple[str, str, None]:
    return f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight", None


def name_peft(layer: str, _: Any) -> tuple[str, str, None]:
    return f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight", None


def make_lcm(config: Mapping[str, Any]) -> Any:
    return diffusers.LCMScheduler.from_config(config)


def make_trailing(class_name: str) -> Callable[[Mapping[str, Any]], Any]:
    """Latents are never clipped to one: the published folders say so, in Euler's settings too."""
    settings = dict(timestep_spacing="trailing", clip_sample=False)
    return lambda config: getattr(diffusers, class_name).from_config(config, **settings)


FAMILIES = {
    "lcm-lora-sdv1-5": Published("tiny_folder", name_kohya, "lcm", 4, make_lcm),
    "lcm-lora-sdxl": Published("sdxl_folder", name_kohya, "lcm", 4, make_lcm),
    "sdxl_lightning_4step_lora": Published(
        "sdxl_folder", name_diffusers, "euler:trailing", 4, make_trailing("EulerDiscreteScheduler")
    ),
    "Hyper-SD15-8steps-lora": Published(
        "tiny_folder", name_peft, "ddim:trailing", 8, make_trailing("DDIMScheduler")
    ),
    "Hyper-SDXL-2steps-lora": Published(
        "sdxl_folder", name_kohya_xl, "ddim:trailing", 2, make_trailing("DDIMScheduler")
    ),
}  # fmt: skip


def write_lora(model: LatentDiffusion, family: Published, path: Path) -> Path:
    inner = model.unet.inner
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(11)
    for layer, module in inner.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or not f".{layer}".endswith(tuple(f".{x}" for x in TRAINED)):
            continue
        if family.name_layer is name_kohya_xl and ".transformer_blocks." not in layer:
            continue  # diffusers reads only those of the original's names
        down, up, alpha = family.name_layer(layer, inner.config)
        shape = module.weight.shape
        tensors[down] = 0.05 * torch.randn(RANK, *shape[1:], generator=generator)
        tensors[up] = 0.3 * torch.randn(shape[0], RANK, *([1, 1] if len(shape) == 4 else []), generator=generator)
        if alpha is not None:
            tensors[alpha] = torch.tensor(ALPHA)
    assert len(tensors) > 40
    save_file(tensors, path)
    return path


def open_theirs(family: Published, folder: Path, lora: Path) -> Any:
    """diffusers' pipeline with the family's scheduler and the LoRA."""
    if family.base == "sdxl_folder":
        pipeline = load_diffusers_xl(folder)
    else:
        pipeline = load_diffusers(folder, diffusers.PNDMScheduler.from_pretrained(folder / "scheduler"))
    pipeline.scheduler = family.theirs(pipeline.scheduler.config)
    load_theirs(pipeline, lora)
    return pipeline


def load_theirs(pipeline: Any, path: Path) -> None:
    """Add ``alpha / r up down`` of what diffusers makes of the file's keys; its `load_lora_weights` needs peft."""
    state, alphas = type(pipeline).lora_state_dict(path, unet_config=pipeline.unet.config)[:2]
    downs = {key: re.fullmatch(DOWN, key) for key in state if re.fullmatch(DOWN, key)}
    assert 2 * len(downs) == len(state)
    for key, match in downs.items():
        assert match is not None
        up = state[key.replace("lora_A", "lora_B") if key.endswith("lora_A.weight") else f"{key[:-12]}.up.weight"]
        layer = match["layer"].replace(".processor", "")
        module = pipeline.unet.get_submodule(f"{layer}.0" if layer.endswith(".to_out") else layer)
        names = (f"unet.{match['layer']}.alpha", f"{key}.alpha")
        (alpha,) = {alphas[name] for name in names if name in alphas} if alphas else {float(RANK)}
        strength = alpha / RANK
        module.weight.data += strength * (up.flatten(1) @ state[key].flatten(1)).view(module.weight.shape)


def record_theirs(pipeline: Any, steps: int, latents: NDArray[np.float32]) -> tuple[list[int], NDArray[np.float32]]:
    """The timesteps that the UNet was called with, once a step, and the final latents."""
    timesteps: list[int] = []
    forward = pipeline.unet.forward

    def call(sample: Tensor, t: Tensor, *rest: Any, **named: Any) -> Any:
        assert len(sample) == 1  # without guidance
        timesteps.append(int(t.round()))
        return forward(sample, t, *rest, **named)

    pipeline.unet.forward = call
    with same_draws(pipeline.scheduler):
        final = pipeline(
            PROMPT, num_inference_steps=steps, guidance_scale=0.0, latents=torch.from_numpy(latents), height=16,
            width=16, output_type="latent",
        ).images  # fmt: skip
    return timesteps, final.numpy()


@torch.no_grad()
def sample_ours(model: LatentDiffusion, scheduler: str, steps: int) -> NDArray[np.float32]:
    """Final latents by the model's own modules, without guidance."""
    config = replace_scheduler(model.scheduler_config, scheduler)
    context = {name: values.numpy() for name, values in model.embed_all(model.tokenize([PROMPT])).items()}
    if model.pooled_width is not None:
        context["time_ids"] = np.array([model.latents.default_sizes], np.float32)

    def predict(x: NDArray[np.float32], t: int, text: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        tensors = {name: torch.from_numpy(values) for name, values in text.items()}
        return model.unet(torch.from_numpy(x), torch.tensor(t), **tensors).numpy()

    made = make_scheduler(config, steps, rng=PictureStreams([(0, 0)]))
    return denoise(predict, made, first_latents(model), context, None, 1.0)


@torch.no_grad()
def decode(model: LatentDiffusion, latents: NDArray[np.float32]) -> NDArray[np.float64]:
    image = model.vae_decoder(torch.from_numpy(latents / np.float32(model.latents.scaling_factor)))[0]
    return np.rint((image.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1) * 255.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_diffusers(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    family = FAMILIES[name]
    folder = request.getfixturevalue(family.base)
    own = load_model(str(folder))
    path = write_lora(own, family, tmp_path / f"{name}.safetensors")
    model = load_model(str(folder), ModelOptions((LoraFile(path),)))
    pipeline = open_theirs(family, folder, path)
    noise = first_latents(model)
    timesteps, expected = record_theirs(pipeline, family.steps, noise)
    actual = sample_ours(model, family.scheduler, family.steps)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(actual - sample_ours(own, family.scheduler, family.steps)).max() > 0.05  # the LoRA counts
    assert_same(decode(model, actual), decode(model, expected))
    assert len(timesteps) == family.steps
    config = replace_scheduler(model.scheduler_config, family.scheduler)
    assert recognise_few_steps(config) is not None
    (note,) = advise_loras([LoraFile(path)], model.scheduler_config)
    assert f"--scheduler {family.scheduler}, and run {family.steps} steps at --guidance 1" in note
    assert advise_loras([LoraFile(path)], config) == ()


@pytest.mark.exports
@pytest.mark.parametrize("name", ["lcm-lora-sdv1-5", pytest.param("sdxl_lightning_4step_lora", marks=pytest.mark.slow)])
def test_the_commands_take_what_the_lora_wants(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The recording is that very schedule, one row a step; the bundle has its scheduler and one row."""
    family = FAMILIES[name]
    folder = request.getfixturevalue(family.base)
    path = write_lora(load_model(str(folder)), family, tmp_path / f"{name}.safetensors")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPT)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["--quiet", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    calib, table, bundle = (tmp_path / part for part in ("c.safetensors", "q.safetensors", "bundle"))
    settings = ("--lora", path, "--scheduler", family.scheduler)
    said = run(
        "calibrate", folder, "-o", calib, *settings, "--steps", family.steps, "--guidance", 1, "--samples", 2,
        "--prompts", prompts,
    )  # fmt: skip
    assert "note:" not in said
    recording = load_calibration(calib)
    pipeline = open_theirs(family, folder, path)
    model = load_model(str(folder), ModelOptions((LoraFile(path),)))
    timesteps, final = record_theirs(pipeline, family.steps, first_latents(model))
    assert recording.timestep.tolist() == [t for t in timesteps for _ in range(2)]
    assert (recording.is_guided, recording.count("unet")) == (False, 2 * family.steps)
    assert recording.latents is not None
    theirs = torch.from_numpy(final[0] / model.latents.scaling_factor)
    torch.testing.assert_close(recording.latents[0].float(), theirs, rtol=5e-3, atol=5e-3 * float(theirs.abs().max()))
    run("quantize", folder, "--calib", calib, "-o", table, "--lora", path)
    assert f"a LoRA of {'LCM-LoRA' if 'lcm' in name else 'SDXL-Lightning'}" not in run(
        "export", table, "-o", bundle, *settings
    )
    manifest = open_bundle(bundle).manifest
    assert manifest.unet.inputs["sample"].shape[0] == 1
    assert manifest.unet.integer_mac_share > 0.5
    assert "note: the scheduler is that of a few-step model" in run(
        "generate", bundle, PROMPT, "-o", tmp_path / "a.png"
    )
    quiet = run("generate", bundle, PROMPT, "-o", tmp_path / "b.png", "--steps", family.steps, "--guidance", 1)
    assert "note:" not in quiet


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_lora_weights.safetensors", None),
        ("lcm-lora-sdxl/pytorch_lora_weights.safetensors", "LCM-LoRA: calibrate .*--scheduler lcm, and run 4 steps"),
        ("sdxl_lightning_2step_lora.safetensors", "SDXL-Lightning: .*euler:trailing, and run 2 steps at --guidance 1"),
        ("Hyper-SD15-12steps-CFG-lora.safetensors", "Hyper-SD: .*ddim:trailing, and run 12 steps at --guidance 5"),
        ("Hyper-SDXL-1step-lora.safetensors", "Hyper-SD for one step, whose timestep is .*not offered here; take one"),
        ("sd_xl_turbo_lora_v1.safetensors", "Turbo: .*euler-a:trailing, and run 4 steps"),
        ("sd-turbo/my_style.safetensors", None),
        ("oilcmart.safetensors", None),
    ],
)
def test_what_a_name_says(tmp_path: Path, file: str, words: str | None) -> None:
    notes = advise_loras([LoraFile(tmp_path / file)], SCHEDULER)
    assert len(notes) == (words is not None)
    if words is not None:
        assert re.search(words, notes[0])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "LCMScheduler"}, "LCMScheduler"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "EulerDiscreteScheduler with tr"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, None),
        ({"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}, None),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, None),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "prediction_type": "v_prediction"}, None),
    ],
    ids=str,
)
def test_which_schedulers_are_of_few_steps(config: dict[str, Any], words: str | None) -> None:
    reason = recognise_few_steps(config)
    assert reason is None if words is None else words in str(reason)


def test_a_scheduler_with_its_spacing() -> None:
    config = replace_scheduler(SCHEDULER, "euler:trailing")
    theirs = diffusers.EulerDiscreteScheduler.from_config(SCHEDULER, timestep_spacing="trailing")
    theirs.set_timesteps(4)
    assert make_scheduler(config, 4).timesteps.tolist() == theirs.timesteps.round().tolist() == [999, 749, 499, 249]
    with pytest.raises(UsageError, match="got the spacing 'tailing', expected linspace, leading, trailing"):
        replace_scheduler(SCHEDULER, "euler:tailing")
    with pytest.raises(UsageError, match="lcm takes the timesteps that it was distilled on; give `lcm`"):
        replace_scheduler(SCHEDULER, "lcm:trailing")
    with pytest.raises(UsageError, match="unknown --scheduler 'heun'"):
        replace_scheduler(SCHEDULER, "heun:trailing")


def test_loras_of_another_base(tiny_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    """Named by the first keys that fit nothing, or by the layer whose weight has another shape."""
    small, large = load_model(str(tiny_folder)), load_model(str(sdxl_folder))
    lightning, lcm = FAMILIES["sdxl_lightning_4step_lora"], FAMILIES["lcm-lora-sdv1-5"]
    with pytest.raises(ModelError, match=r"keys are for no layer of .*transformer_blocks\.1\..*made for this model"):
        fuse_lora(small, write_lora(large, lightning, tmp_path / "xl.safetensors"))
    with pytest.raises(ModelError, match=r"attn2\.to_k: got down .*the LoRA was made for another model"):
        fuse_lora(large, write_lora(small, lcm, tmp_path / "small.safetensors"))
