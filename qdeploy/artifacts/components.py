"""The kinds of component that models are made of: one instance each, with what the steps of all rooms must know of it.

What needs torch (example inputs, size multiples) is in the classes of ``qdeploy.models.components``, one a kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_PER_KIND = 9  # name, name_2 ... name_9


@dataclass(frozen=True)
class ComponentKind:
    """One kind of component.

    name: of a model's component of this kind; where a model has several, the others are ``name_2``, ``name_3``.
    inputs, output: names in its graph, in the order of its forward.
    for_text: only models that read text have it, and a model may have several.
    in_loop: called at every step of the denoising loop, with both guidance halves where the model reads text.
    on_demand: only image-to-image and inpainting need it: exported in float if asked for, opened when first used.
    row_cost: memory of a row in calibration, compared with a UNet's.
    more_inputs, more_outputs: those that only some models have.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    for_text: bool = False
    in_loop: bool = False
    on_demand: bool = False
    row_cost: int = 1
    more_inputs: tuple[str, ...] = ()
    more_outputs: tuple[str, ...] = ()

    @property
    def input(self) -> str:
        """The input that holds the rows."""
        return self.inputs[0]


# A UNet may read the guidance scale; Stable Diffusion XL's reads sizes, and pooled text that a text encoder returns.
GUIDANCE_INPUT, POOLED_INPUT, SIZES_INPUT = "timestep_cond", "text_embeds", "time_ids"
POOLED_OUTPUT = "pooled"
SIZES = 6  # numbers in `time_ids`: height and width of the original, top and left of the crop, height and width wanted

TEXT_ENCODER = ComponentKind("text_encoder", ("input_ids",), "hidden", for_text=True, more_outputs=(POOLED_OUTPUT,))
UNET = ComponentKind(
    "unet", ("sample", "timestep", "encoder_hidden_states"), "noise_pred", in_loop=True,
    more_inputs=(GUIDANCE_INPUT, POOLED_INPUT, SIZES_INPUT),
)  # fmt: skip
CONTEXT_INPUT = UNET.inputs[2]
VAE_DECODER = ComponentKind("vae_decoder", ("latents",), "image", row_cost=2)
VAE_ENCODER = ComponentKind("vae_encoder", ("image",), "latents", on_demand=True)

KINDS = {kind.name: kind for kind in (TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER)}
COMPONENTS = tuple(kind.name for kind in KINDS.values() if not kind.on_demand)  # what most models have, in order


def get_kind(component: str) -> ComponentKind:
    """The kind of the component called ``component``; KeyError for a name that no model has."""
    kind = KINDS[re.sub(rf"_[2-{MAX_PER_KIND}]$", "", component)]
    if component != kind.name and not kind.for_text:
        raise KeyError(component)
    return kind


def name_component(kind: ComponentKind, number: int) -> str:
    """Name of a model's component ``number`` of its kind, from 0."""
    return kind.name if number == 0 else f"{kind.name}_{number + 1}"


def list_text_encoders(components: Iterable[str]) -> tuple[str, ...]:
    """The text encoders among ``components``, in their order."""
    return tuple(name for name in components if get_kind(name).for_text)


def name_tokenizer(text_encoder: str) -> str:
    """Name of a text encoder's tokenizer, and of its folder: ``tokenizer``, ``tokenizer_2`` as diffusers has them."""
    return "tokenizer" + text_encoder.removeprefix(TEXT_ENCODER.name)


def choose_graph_batch(component: str, is_guided: bool) -> int:
    """Static batch of a component's graph: 2 in the denoising loop with classifier-free guidance, else 1."""
    return 2 if get_kind(component).in_loop and is_guided else 1
