"""Files that are no model in an original layout, by their tensors' names: what each is, and what to do with it."""

from __future__ import annotations

from collections.abc import Collection

from qdeploy.base.errors import ModelError

SUPPORTED = (
    "supported: Stable Diffusion 1.x, 2.x and XL, and CompVis' unconditional (LSUN, FFHQ, CelebA-HQ) and text-to-image "
    "LDMs"
)
# A tensor's name or its start, and what to say.
UNSUPPORTED = (
    ("conditioner.embedders.0.model.", "is the refiner of Stable Diffusion XL, which no base model here needs"),
    (
        "conditioner.embedders.1.model.text_model.",
        "has its second text encoder under transformers' names, as SSD-1B.safetensors does; give the file in the "
        "original's (SSD-1B-A1111.safetensors) or the diffusers folder",
    ),
    ("edm_mean", "is Playground 2.5, whose latents are shifted and whose noise levels are EDM's"),
    ("model.diffusion_model.joint_blocks.", "is Stable Diffusion 3, a transformer and no UNet"),
    ("joint_blocks.", "is Stable Diffusion 3, a transformer and no UNet"),
    ("model.diffusion_model.double_blocks.", "is FLUX, a transformer and no UNet"),
    ("double_blocks.", "is FLUX, a transformer and no UNet"),
    ("depth_model.", "is Stable Diffusion 2's depth model, whose depth map is not fed; give the base model"),
    ("low_scale_model.", "is Stable Diffusion's upscaler, whose small picture is not fed; give the base model"),
    ("noise_augmentor.", "is Stable unCLIP, whose picture's embedding is not fed; give the base model"),
    ("transformer_blocks.", "is a transformer in diffusers' names, as Stable Diffusion 3 and FLUX are, and no UNet"),
    ("single_transformer_blocks.", "is FLUX in diffusers' names, a transformer and no UNet"),
    ("image_proj.", "is an IP-Adapter, whose picture is not fed; give the model that it is for"),
    ("ip_adapter.", "is an IP-Adapter, whose picture is not fed; give the model that it is for"),
    ("control_model.", "is a ControlNet, whose picture of control is not fed; give the model that it controls"),
    ("input_hint_block.", "is a ControlNet, whose picture of control is not fed; give the model that it controls"),
    ("lllite_", "is a ControlNet-LLLite, whose picture of control is not fed; give the model that it controls"),
    ("lora_controlnet", "is a Control-LoRA, whose picture of control is not fed; give the model that it controls"),
    ("controlnet_", "is a ControlNet, whose picture of control is not fed; give the model that it controls"),
    ("cond_stage_model.embedding.", "is a class-conditional LDM"),
    ("encoder.down.", "is a VAE; give the model, and a folder with this VAE in diffusers' format to --vae"),
    ("down_blocks.", "holds one module in diffusers' names; give the diffusers folder that it belongs to"),
    ("lora_", "is a LoRA, not a model; give it to --lora"),
    ("embedding_manager.", "holds a textual inversion in training; put its embedding into a diffusers folder"),
)
LORA = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.", ".lora_down.", ".lora_up.")


def refuse_foreign(names: Collection[str]) -> None:
    """ModelError where one of a file's ``names`` tells that it is no model, or one that is not converted."""
    for start, what in UNSUPPORTED:
        if any(name.startswith(start) for name in names):
            raise ModelError(f"the file {what}, which is not converted; {SUPPORTED}")
    if any(mark in name for name in names for mark in LORA):
        raise ModelError(
            f"the file is a LoRA, not a model; give it to --lora, and the model that it is for; {SUPPORTED}"
        )
