"""Original CompVis checkpoints (``.ckpt``, ``.pt``, ``.safetensors``) as diffusers and transformers modules, offline.

::

    from qdeploy.models.checkpoints import convert_checkpoint, describe_checkpoint

    facts = describe_checkpoint(path)                 # kind, parameters, latents, whether it has averaged weights
    model = convert_checkpoint(path, ema=facts.ema)   # model.unet, model.vae, model.text_encoders, …

A file is data: it is mapped, and nothing in it is executed (``file.py``). Its kind and sizes are read off its
tensors (``kinds.py`` and the ``read_layout`` of each part); the original YAML is needed only where those cannot
say enough, and must agree with them where they can.
"""

from __future__ import annotations

from qdeploy.models.checkpoints.convert import (
    CheckpointFacts,
    ConvertedCheckpoint,
    convert_checkpoint,
    describe_checkpoint,
)
from qdeploy.models.checkpoints.file import SUFFIXES, read_checkpoint, torch_load
from qdeploy.models.checkpoints.kinds import detect_kind

__all__ = [
    "SUFFIXES",
    "CheckpointFacts",
    "ConvertedCheckpoint",
    "convert_checkpoint",
    "describe_checkpoint",
    "detect_kind",
    "read_checkpoint",
    "torch_load",
]
