"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1 on AlexNet: perceptual distance of two pictures.

AlexNet's weights are torchvision's file, the five linear heads torchmetrics'. torchmetrics' own network needs
torchvision, so its few layers are written down here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import UsageError
from qdeploy.evaluate.metrics.pairs import tensor_from_pixels
from qdeploy.evaluate.weights import load_state_dict

if TYPE_CHECKING:
    from torch import Tensor

URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
REMEDY = f"give --lpips FILE, torchvision's AlexNet from {URL}, or --allow-download to fetch it"
LAYERS = {0: (4, 2, False), 3: (1, 2, True), 6: (1, 1, True), 8: (1, 1, False), 10: (1, 1, False)}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for [-1, 1]
EPS = 1e-8
MIN_SIDE = 32  # pixels a side, for which the last layer has anything left


class Lpips:
    """The networks."""

    def __init__(self, file: Path | None, allow_download: bool) -> None:
        if file is None and not allow_download:
            raise UsageError(f"the metric lpips needs AlexNet's weights, which are not here; {REMEDY}")
        import torchmetrics

        heads = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
        self._alexnet, path = load_state_dict(file, URL)
        self._heads, _ = load_state_dict(heads, URL)
        if any(f"features.{layer}.weight" not in self._alexnet for layer in LAYERS):
            raise UsageError(f"{path} does not hold torchvision's AlexNet; {REMEDY}")

    def __call__(self, reference: NDArray[np.uint8], candidate: NDArray[np.uint8]) -> list[float]:
        """Of each picture ``uint8[B, H, W, 3]``; 0 for equal ones."""
        import torch

        if min(reference.shape[1:3]) < MIN_SIDE:
            raise UsageError(
                f"lpips: pictures of {reference.shape[2]}x{reference.shape[1]} pixels are too small; expected "
                f"at least {MIN_SIDE}"
            )
        with torch.inference_mode():
            total = torch.zeros(len(reference))
            for number, (a, b) in enumerate(
                zip(self._activations(reference), self._activations(candidate), strict=True)
            ):
                head = self._heads[f"lin{number}.model.1.weight"]
                total += torch.nn.functional.conv2d((a - b) ** 2, head).mean(dim=(1, 2, 3))
        return total.tolist()

    def _activations(self, pixels: NDArray[np.uint8]) -> list[Tensor]:
        """Of unit length along the channels, after each of the five ReLUs."""
        import torch
        from torch.nn import functional as nn

        shift, scale = (torch.tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x = (tensor_from_pixels(pixels) / 127.5 - 1 - shift) / scale
        activations = []
        for layer, (stride, padding, pools) in LAYERS.items():
            x = nn.max_pool2d(x, 3, stride=2) if pools else x
            weight, bias = (self._alexnet[f"features.{layer}.{part}"] for part in ("weight", "bias"))
            x = nn.relu(nn.conv2d(x, weight, bias, stride, padding))
            activations.append(x / (EPS + x.square().sum(dim=1, keepdim=True)).sqrt())
        return activations
