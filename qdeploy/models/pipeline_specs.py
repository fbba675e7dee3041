"""The diffusers pipelines whose folders are read: what each class is made of; and those that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qdeploy.artifacts.components import TEXT_ENCODER, name_component, name_tokenizer

SCHEDULER = "scheduler"


@dataclass(frozen=True)
class TextEncoderSpec:
    """A text encoder's folder and class; its tokenizer's class, files (or a tokenizer.json) and place on the hub.

    pad: the token that pads, where an original file's tokenizer must have another one than its class's.
    penultimate: the last layer but one is read, without the final norm.
    """

    folder: str
    encoder: str
    tokenizer: str
    vocabulary: tuple[str, ...]
    hub: str
    pad: str | None = None
    penultimate: bool = False


@dataclass(frozen=True)
class PipelineSpec:
    """What a pipeline class is made of: folders and classes."""

    vae_folder: str
    vae: tuple[str, ...]
    unet: str
    text: tuple[TextEncoderSpec, ...] = ()

    @property
    def text_encoders(self) -> dict[str, TextEncoderSpec]:
        """By component name."""
        return {name_component(TEXT_ENCODER, number): text for number, text in enumerate(self.text)}

    @property
    def folders(self) -> tuple[str, ...]:
        """Every folder that the pipeline needs."""
        text = [folder for name, spec in self.text_encoders.items() for folder in (spec.folder, name_tokenizer(name))]
        return (*text, "unet", self.vae_folder, SCHEDULER)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Classes that each part may have, but for the scheduler; transformers has two names for a tokenizer."""
        parts: dict[str, tuple[str, ...]] = {"unet": (self.unet,), self.vae_folder: self.vae}
        for name, text in self.text_encoders.items():
            parts[text.folder] = (text.encoder,)
            parts[name_tokenizer(name)] = (text.tokenizer, f"{text.tokenizer}Fast")
        return parts


CLIP = TextEncoderSpec(
    "text_encoder", "CLIPTextModel", "CLIPTokenizer", ("vocab.json", "merges.txt"), "openai/clip-vit-large-patch14"
)
OPEN_CLIP = replace(CLIP, pad="!")  # an original file's: the same vocabulary, padded with its token 0
CLIP_XL = replace(CLIP, penultimate=True)
OPEN_CLIP_XL = replace(CLIP_XL, folder="text_encoder_2", encoder="CLIPTextModelWithProjection")
XL_FILE = (CLIP_XL, replace(OPEN_CLIP_XL, pad=OPEN_CLIP.pad))  # of an original file
BERT = TextEncoderSpec("bert", "LDMBertModel", "BertTokenizer", ("vocab.txt",), "google-bert/bert-base-uncased")
XL = PipelineSpec("vae", ("AutoencoderKL",), "UNet2DConditionModel", (CLIP_XL, OPEN_CLIP_XL))
PIPELINES: Mapping[str, PipelineSpec] = {
    "StableDiffusionPipeline": PipelineSpec("vae", ("AutoencoderKL",), "UNet2DConditionModel", (CLIP,)),
    "StableDiffusionInpaintPipeline": PipelineSpec("vae", ("AutoencoderKL",), "UNet2DConditionModel", (CLIP,)),
    "LatentConsistencyModelPipeline": PipelineSpec("vae", ("AutoencoderKL",), "UNet2DConditionModel", (CLIP,)),
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL,
    "LDMTextToImagePipeline": PipelineSpec("vqvae", ("AutoencoderKL", "VQModel"), "UNet2DConditionModel", (BERT,)),
    "LDMPipeline": PipelineSpec("vqvae", ("AutoencoderKL", "VQModel"), "UNet2DModel"),
}
# Pipelines that are refused by name, by the start of their classes' names, and what they read that is not fed.
REFUSED: Mapping[str, str] = {
    "StableDiffusionDepth2Img": "its UNet reads a depth map",
    "StableDiffusionUpscale": "its UNet reads the small picture that it enlarges",
    "StableDiffusionLatentUpscale": "its UNet reads the small picture that it enlarges",
    "StableUnCLIP": "its UNet reads a picture's embedding",
    "StableDiffusionImageVariation": "its UNet reads a picture's embedding",
    "StableDiffusionInstructPix2Pix": "its UNet reads the picture that it edits",
    "StableDiffusionXLInstructPix2Pix": "its UNet reads the picture that it edits",
    "StableDiffusionControlNet": "its ControlNet reads a picture of control",
    "StableDiffusionXLControlNet": "its ControlNet reads a picture of control",
    "StableDiffusionAdapter": "its T2I-Adapter reads a picture of control",
    "StableDiffusionXLAdapter": "its T2I-Adapter reads a picture of control",
    "StableDiffusion3": "Stable Diffusion 3 is a transformer and no UNet",
    "Flux": "FLUX is a transformer and no UNet",
    "PixArt": "PixArt is a transformer and no UNet",
    "StableVideoDiffusion": "its UNet makes films",
    "AnimateDiff": "its UNet makes films",
}
