"""Train the built-in text encoder and UNet together on cached latents (v-prediction, CFG dropout).

    python -m training.diffusion --work DIR --samples 400000

Needs ``DIR/vae`` (training.vae). Resumes from ``DIR/diffusion.ckpt``; writes the
whole StableDiffusionPipeline folder, with averaged weights in fp16, to ``DIR/model``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.data import Emoji, captions_of, load
from training.loop import LoopState, learning_rate, say
from training.tokenizer import tokenizer_from_captions
from training.vae import pictures

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
AVERAGE_DECAY = 0.999


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
        self.unet = UNet2DConditionModel(**UNET)
        self.unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slow on CPU
        for name, module in self.unet.named_modules():  # residual branches start at zero (ADM)
            if name.endswith(("conv2", "proj_out", "conv_out")):
                torch.nn.init.zeros_(module.weight)
                torch.nn.init.zeros_(module.bias)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, t, self.text_encoder(tokens).last_hidden_state).sample


def latents_of(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """Scaled latent means ``float32[N, 8, 16, 16]``."""
    with torch.no_grad():
        means = [vae.encode(chunk).latent_dist.mode() for chunk in x.split(64)]
    return torch.cat(means) * vae.config.scaling_factor


def draw_timesteps(count: int) -> torch.Tensor:
    """Stratified t with density rising from 0.5 (clean) to 1.5 (noise), where text decides the picture."""
    u = (torch.arange(count) + torch.rand(count)) / count
    share = (torch.sqrt(1 + 8 * u) - 1) / 2  # inverse of F(s) = (s + s^2) / 2
    return (share * 1000).long().clamp(max=999)[torch.randperm(count)]


def velocity_loss(
    model: TextToLatent, scheduler: PNDMScheduler, latents: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of v = alpha * noise - sigma * x0 (Salimans & Ho 2022, appendix D)."""
    t = draw_timesteps(len(latents))
    noise = torch.randn_like(latents)
    alpha = scheduler.alphas_cumprod[t].sqrt()[:, None, None, None]
    sigma = (1 - scheduler.alphas_cumprod[t]).sqrt()[:, None, None, None]
    v = model(alpha * latents + sigma * noise, t, tokens)
    return (v - (alpha * noise - sigma * latents)).square().mean()


def first_guess_hits(model: TextToLatent, latents: torch.Tensor, tokens: torch.Tensor) -> float:
    """Share of captions whose one-step guess from pure noise is among the 10 % nearest to its own latents."""
    with torch.no_grad():
        torch.manual_seed(7)
        guess = -model(torch.randn(len(tokens), *latents.shape[1:]), torch.full((len(tokens),), 999), tokens)
    chosen = torch.linspace(0, len(latents) - 1, len(tokens)).long()
    distance = torch.cdist(guess.flatten(1), latents.flatten(1))
    own = distance.gather(1, chosen[:, None])
    return float(((distance < own).float().mean(1) < 0.1).float().mean())


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """``int64[B, 32]``, padded and cut."""
    options = dict(padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return tokenizer(captions, **options).input_ids


def training_captions(emoji: list[Emoji], chosen: np.ndarray, rng: np.random.Generator) -> list[str]:
    return ["" if rng.random() < CAPTION_DROPOUT else captions_of(emoji[i], rng) for i in chosen]


def save_pipeline(folder: Path, vae: AutoencoderKL, model: TextToLatent, tokenizer: CLIPTokenizer) -> None:
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
    edit_json(folder / "vae" / "config.json", {}, drop="_name_or_path")  # where it lay on this machine


def edit_json(path: Path, changes: dict[str, object], drop: str = "") -> None:
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != drop}
    path.write_text(json.dumps(kept | changes, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--samples", type=int, default=400_000, help="samples to train on in all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--save-only", action="store_true", help="write the pipeline from the checkpoint and stop")
    args = parser.parse_args()

    emoji = load(args.work / "data")
    tokenizer = tokenizer_from_captions(emoji, args.work / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.work / "vae")
    latents = latents_of(vae, pictures(args.work / "data"))
    torch.manual_seed(0)
    model = TextToLatent(tokenizer)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE_DECAY)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"model": model, "averaged": averaged}
    state = LoopState.resume(args.work / "diffusion.ckpt", parts, optimizer)
    scheduler = PNDMScheduler(**SCHEDULER)
    probe = torch.linspace(0, len(emoji) - 1, 200).long()
    probe_tokens = tokens_of(tokenizer, [emoji[i].label for i in probe])
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"latents {tuple(latents.shape)} std {latents.std():.3f}; {millions:.2f} M parameters")
    started, first = time.monotonic(), state.seen
    while state.seen < args.samples and not args.save_only:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, state.seen, args.samples)
        chosen = state.batch(len(emoji), args.batch)
        tokens = tokens_of(tokenizer, training_captions(emoji, chosen, state.rng))
        loss = velocity_loss(model, scheduler, latents[chosen], tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if state.step >= 500:
            averaged.update_parameters(model)
        state.note(loss.item(), args.batch)
        if state.step % 50 == 0:
            say(state, args.samples, started, first)
        if state.step % 300 == 0:
            kept = torch.get_rng_state()
            print(
                f"  first guess among the 10 % nearest: {first_guess_hits(averaged.module, latents, probe_tokens):.1%}",
                flush=True,
            )
            torch.set_rng_state(kept)
            state.save(args.work / "diffusion.ckpt", parts, optimizer)
    state.save(args.work / "diffusion.ckpt", parts, optimizer)
    state.record(args.work / "training.json", "diffusion", args.batch)
    save_pipeline(args.work / "model", vae, averaged.module, tokenizer)


if __name__ == "__main__":
    main()
