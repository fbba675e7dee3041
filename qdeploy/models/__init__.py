"""Where float models come from; needs the ``quantize`` extra (torch, diffusers, transformers)."""
