"""CLIPScore (Hessel et al. 2021, arXiv 2104.08718): how well a picture goes with its caption, by a CLIP of the user's.

100 times the cosine between CLIP's embeddings of both, at least 0, as torchmetrics reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qdeploy.base.errors import UsageError
from qdeploy.base.files import hash_file
from qdeploy.evaluate.extractors.resize import BICUBIC, resize_picture

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
WEIGHTS = "model.safetensors"


class ClipScore:
    """A ``CLIPModel`` folder of transformers with safetensors weights and its tokenizer."""

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            raise UsageError(
                "the metric clip needs a CLIP model, which is not here; give --clip FOLDER, a transformers CLIPModel "
                "folder such as a copy of openai/clip-vit-base-patch16"
            )
        if not (folder / WEIGHTS).is_file():
            raise UsageError(f"--clip: {folder} has no {WEIGHTS}; give a transformers CLIPModel folder")
        from transformers import CLIPModel, CLIPTokenizer

        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as exc:
            raise UsageError(f"--clip: {folder} is not a readable CLIPModel folder ({exc})") from exc
        self._side = self._model.config.vision_config.image_size
        self._tokens = self._model.config.text_config.max_position_embeddings
        self.sha256 = hash_file(folder / WEIGHTS)

    def __call__(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """Of each picture and its caption, 0 to 100."""
        import torch

        text = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=self._tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            out = self._model(
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
                pixel_values=torch.from_numpy(np.stack([self._input(picture) for picture in pictures])),
            )
            cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return (100 * cosine).clamp(min=0).tolist()

    def _input(self, picture: Image.Image) -> np.ndarray:
        """``float32[3, side, side]``: the shorter side scaled, the middle taken, normalized."""
        scale = self._side / min(picture.size)
        width, height = (max(self._side, round(side * scale)) for side in picture.size)
        top, left = (height - self._side) // 2, (width - self._side) // 2
        pixels = resize_picture(picture, width, height, BICUBIC)[top : top + self._side, left : left + self._side]
        return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)
