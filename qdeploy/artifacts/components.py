"""Names of a model's components, and the batch that a component's graph is exported at."""

from __future__ import annotations

COMPONENTS = ("text_encoder", "unet", "vae_decoder")


def choose_graph_batch(component: str, reads_text: bool) -> int:
    """Static batch of a component's graph: 2 for a UNet that reads text, its CFG halves, else 1."""
    return 2 if component == "unet" and reads_text else 1
