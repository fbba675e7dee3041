"""Train the built-in text encoder and UNet together on cached latents (v-prediction, CFG dropout).

    python -m training.diffusion --work DIR --samples 400000

Needs ``DIR/vae`` (training.vae), or ``--start`` and a pipeline folder to begin with. Resumes from
``DIR/diffusion.ckpt``; writes the whole StableDiffusionPipeline folder, with averaged weights in fp16, to
``DIR/model``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.data import Emoji, draw_caption, load_for
from training.denoising import (
    AVERAGE_DECAY,
    AVERAGE_FROM,
    draw_timesteps,
    edit_json,
    make_averaged_copy,
    make_optimizer,
    start_branches_at_zero,
    velocity_loss,
)
from training.layout import run_script
from training.loop import Training, make_parser
from training.tokenizer import tokenizer_from_captions
from training.vae import pixels_from_emoji

TOKENS = 32
UNET = dict(
    sample_size=16,
    in_channels=8,
    out_channels=8,
    block_out_channels=(64, 128, 192),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(1, 2, 3),  # diffusers' name for the number of heads: 64 channels each
    cross_attention_dim=160,
)
TEXT = dict(
    hidden_size=160,
    intermediate_size=640,
    num_hidden_layers=3,
    num_attention_heads=5,
    max_position_embeddings=TOKENS,
    hidden_act="quick_gelu",
    projection_dim=160,
)
SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    prediction_type="v_prediction",
    skip_prk_steps=True,
    set_alpha_to_one=False,
    steps_offset=1,
)
CAPTION_DROPOUT = 0.1  # share of empty captions, which classifier-free guidance needs


class TextToLatent(torch.nn.Module):
    """Text encoder and UNet as one trainable unit."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        special = dict(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **special))
        self.text_encoder.set_attn_implementation("eager")  # SDPA's backward is slow on CPU
        self.unet = UNet2DConditionModel(**UNET)
        self.unet.set_attn_processor(AttnProcessor())  # likewise
        start_branches_at_zero(self.unet, ("conv2", "proj_out", "conv_out"))

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """``float32[B, 8, 16, 16]``, ``int64[B]``, ``int64[B, T]`` -> v, ``float32[B, 8, 16, 16]``."""
        return self.unet(noisy, t, self.text_encoder(tokens).last_hidden_state).sample


def encode_latents(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """Scaled latent means ``float32[N, 8, 16, 16]``."""
    with torch.no_grad():
        means = [vae.encode(chunk).latent_dist.mode() for chunk in x.split(64)]
    return torch.cat(means) * vae.config.scaling_factor


def first_guess_hits(model: TextToLatent, latents: torch.Tensor, tokens: torch.Tensor) -> float:
    """Share of captions whose one-step guess from pure noise is nearest to its own latents of all."""
    torch.manual_seed(7)
    guess = -model(torch.randn(len(tokens), *latents.shape[1:]), torch.full((len(tokens),), 999), tokens)
    chosen = torch.linspace(0, len(latents) - 1, len(tokens)).long()
    distance = torch.cdist(guess.flatten(1), latents.flatten(1))
    return float((distance.argmin(1) == chosen).float().mean())


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """``int64[B, 32]``, padded and cut."""
    options = dict(padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return tokenizer(captions, **options).input_ids


def draw_training_captions(emoji: list[Emoji], chosen: np.ndarray, rng: np.random.Generator) -> list[str]:
    """One for each chosen emoji; empty ones, by CAPTION_DROPOUT, teach the unconditional half of guidance."""
    return ["" if rng.random() < CAPTION_DROPOUT else draw_caption(emoji[i], rng) for i in chosen]


def save_pipeline(folder: Path, vae: AutoencoderKL, model: TextToLatent, tokenizer: CLIPTokenizer) -> None:
    """Write a diffusers ``StableDiffusionPipeline`` folder with float32 safetensors."""
    model.unet.set_default_attn_processor()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    # As Stable Diffusion's file does: other schedulers' default is to clip x0 to [-1, 1], wrong for latents.
    edit_json(folder / "scheduler" / "scheduler_config.json", {"clip_sample": False})
    edit_json(folder / "vae" / "config.json", {}, drop="_name_or_path")  # its path on this machine


def start_fresh(work: Path, emoji: list[Emoji]) -> tuple[AutoencoderKL, CLIPTokenizer, TextToLatent]:
    """The autoencoder of ``training.vae``, the captions' tokenizer, and weights that know nothing."""
    tokenizer = tokenizer_from_captions(emoji, work / "tokenizer")
    torch.manual_seed(0)
    return AutoencoderKL.from_pretrained(work / "vae"), tokenizer, TextToLatent(tokenizer)


def start_from(folder: Path) -> tuple[AutoencoderKL, CLIPTokenizer, TextToLatent]:
    """All parts of a pipeline folder, such as a built-in model's, in float32."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    model = TextToLatent(pipe.tokenizer)
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    model.unet.load_state_dict(pipe.unet.state_dict())
    return pipe.vae, pipe.tokenizer, model


def main() -> None:
    """Train text encoder and UNet until samples, minutes or the clock end, then write the pipeline."""
    parser = make_parser(__doc__, samples=400_000, batch=32, lr=6e-4)
    parser.add_argument("--start", type=Path, help="pipeline folder whose weights to begin with")
    parser.add_argument("--average", type=float, default=AVERAGE_DECAY, help="decay of the averaged weights, a step")
    parser.add_argument("--save-only", action="store_true", help="write the pipeline from the checkpoint and stop")
    args = parser.parse_args()

    emoji = load_for(args.work)
    vae, tokenizer, model = start_fresh(args.work, emoji) if args.start is None else start_from(args.start)
    latents = encode_latents(vae, pixels_from_emoji(emoji))
    averaged = make_averaged_copy(model, args.average)
    modules = {"model": model, "averaged": averaged}
    training = Training(args.work / "diffusion.ckpt", modules, make_optimizer(model, args.lr), args)
    alphas_cumprod = PNDMScheduler(**SCHEDULER).alphas_cumprod
    probe_tokens = tokenize(tokenizer, [emoji[i].label for i in torch.linspace(0, len(emoji) - 1, 200).long()])
    average_from = AVERAGE_FROM if args.start is None else 0

    def compute_loss(replica: torch.nn.Module, chosen: np.ndarray) -> torch.Tensor:
        tokens = tokenize(tokenizer, draw_training_captions(emoji, chosen, training.state.rng))
        t = draw_timesteps(len(chosen), rising=True)  # text decides the picture where there is most noise
        with torch.autocast("cpu", torch.bfloat16):
            return velocity_loss(lambda noisy, t: replica(noisy, t, tokens), alphas_cumprod, latents[chosen], t)

    def average() -> None:
        if training.state.step >= average_from:
            averaged.update_parameters(model)

    def report() -> str:
        return f"first guess nearest to its own: {first_guess_hits(averaged.module, latents, probe_tokens):.1%}"

    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"latents {tuple(latents.shape)} std {latents.std():.3f}; {millions:.2f} M parameters")
    if not args.save_only:
        training.run_in_threads(model, len(emoji), compute_loss, average, report)
        training.state.record(args.work / "training.json", "diffusion", args.batch)
    save_pipeline(args.work / "model", vae, averaged.module, tokenizer)


if __name__ == "__main__":
    run_script(main)
