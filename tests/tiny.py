"""Tiny pipeline folders with random weights, one of each kind, for tests that need a model in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import VQModel

UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    cross_attention_dim=32,
    norm_num_groups=8,
)
VAE = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
    up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    sample_size=16,
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    hidden_act="quick_gelu",
    projection_dim=32,
)
SCHEDULER = dict(
    _class_name="PNDMScheduler",
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    skip_prk_steps=True,
    set_alpha_to_one=False,
    steps_offset=1,
    clip_sample=False,
)
LDM_SCHEDULER = dict(
    _class_name="DDIMScheduler",
    beta_start=0.0015,
    beta_end=0.0195,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    clip_sample=False,
)
BERT = dict(
    d_model=32,
    encoder_layers=2,
    encoder_ffn_dim=64,
    encoder_attention_heads=2,
    head_dim=16,
    max_position_embeddings=77,
)


def write_tiny_inpainting(folder: Path) -> Path:
    """Write a folder like :func:`write_tiny_model`'s whose UNet also reads a mask and the masked picture."""
    return write_tiny_model(folder, "StableDiffusionInpaintPipeline", unet_channels=9)


def write_tiny_model(folder: Path, pipeline: str = "StableDiffusionPipeline", unet_channels: int = 4) -> Path:
    """Write the pipeline folder (seeded, about 300 k parameters) and return it."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    symbols = sorted(ByteLevel.alphabet())
    vocab = ["<|startoftext|>", "<|endoftext|>", *symbols, *(s + "</w>" for s in symbols)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=16)
    tokenizer.save_pretrained(folder / "tokenizer")
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    CLIPTextModel(CLIPTextConfig(vocab_size=len(vocab), **TEXT, **special)).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(**UNET | {"in_channels": unet_channels}).save_pretrained(folder / "unet")
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


def write_tiny_sd2(folder: Path) -> Path:
    """Write a folder like :func:`write_tiny_model`'s in the form of Stable Diffusion 2.1's.

    Linear projections, heads of one width, a text encoder with GELU that ends at its last layer but one, "!" as the
    padding token, and v-prediction.
    """
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    write_tiny_model(folder)
    torch.manual_seed(3)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    tokenizer.save_pretrained(folder / "tokenizer")
    text = TEXT | dict(hidden_act="gelu", num_hidden_layers=3, projection_dim=16, vocab_size=len(tokenizer))
    CLIPTextModel(CLIPTextConfig(**text, bos_token_id=0, eos_token_id=1)).save_pretrained(folder / "text_encoder")
    heads = dict(use_linear_projection=True, attention_head_dim=(2, 4), upcast_attention=True)
    UNet2DConditionModel(**UNET | heads).save_pretrained(folder / "unet")
    scheduler = {key: value for key, value in SCHEDULER.items() if key not in ("_class_name", "skip_prk_steps")}
    DDIMScheduler(**scheduler, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return folder


def write_tiny_sdxl(
    folder: Path, pipeline: str = "StableDiffusionXLPipeline", unet_channels: int = 4, **index: bool
) -> Path:
    """Write a Stable Diffusion XL folder (seeded): two text encoders, the second one's pooled text, sizes, Euler.

    The second tokenizer pads with "!", the UNet has other depths of transformers at each level, and the VAE's
    activations leave fp16 (`force_upcast`). ``index``: more settings of ``model_index.json``.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    write_tiny_model(folder, pipeline)
    torch.manual_seed(7)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    tokenizer.save_pretrained(folder / "tokenizer_2")
    common = dict(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, num_hidden_layers=3)
    first = CLIPTextConfig(**TEXT | common)
    second = CLIPTextConfig(**TEXT | common | dict(hidden_size=48, projection_dim=24, hidden_act="gelu"))
    CLIPTextModel(first).save_pretrained(folder / "text_encoder")
    CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    UNet2DConditionModel(
        **UNET | dict(in_channels=unet_channels, cross_attention_dim=80, attention_head_dim=(2, 4)),
        use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(**VAE, scaling_factor=0.13025, force_upcast=True).save_pretrained(folder / "vae")
    scheduler = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    EulerDiscreteScheduler(**scheduler, timestep_spacing="leading").save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline} | index))
    return folder


def write_tiny_unconditional(folder: Path) -> Path:
    """Write an LDMPipeline folder with a VQ first stage (seeded, about 200 k parameters) and return it."""
    import torch
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel

    torch.manual_seed(1)
    unet = UNet2DModel(
        **{key: UNET[key] for key in ("sample_size", "block_out_channels", "norm_num_groups")},
        in_channels=3, out_channels=3, layers_per_block=1, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    LDMPipeline(vqvae=tiny_vq(), unet=unet, scheduler=DDIMScheduler.from_config(LDM_SCHEDULER)).save_pretrained(folder)
    return folder


def write_tiny_ldm_text(folder: Path) -> Path:
    """Write an LDMTextToImagePipeline folder (seeded, LDMBertModel and a KL first stage) and return it."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion import LDMBertModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
    from transformers import BertTokenizer

    torch.manual_seed(2)
    special, letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "abcdefghijklmnopqrstuvwxyz"
    words = [*special, *letters, *(f"##{letter}" for letter in letters), "cat", "house", "red"]
    LDMTextToImagePipeline(
        vqvae=AutoencoderKL(**VAE),
        bert=LDMBertModel(LDMBertConfig(vocab_size=len(words), **BERT)),
        tokenizer=BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77),
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler.from_config(LDM_SCHEDULER),
    ).save_pretrained(folder)
    return folder


def tiny_vq() -> VQModel:
    """A VQ first stage whose codes lie as far apart as unit-variance latents do."""
    from diffusers import VQModel

    sizes = {key: value for key, value in VAE.items() if key != "sample_size"}
    vq = VQModel(**sizes | {"latent_channels": 3}, num_vq_embeddings=64, scaling_factor=1.0)
    vq.quantize.embedding.weight.data.normal_()
    return vq
