"""Load float models; needs the ``quantize`` extra (torch, diffusers, transformers)."""
