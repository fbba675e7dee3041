"""Inception-v3 as FID and IS have it: TensorFlow's network of 2015-12-05, 2,048 features and 1,008 logits.

The weights are those that pytorch-fid and torch-fidelity converted, a PyTorch state dict. The network is written down
here because the libraries that have it need torchvision. It differs from torchvision's own: average pooling leaves
out the padding, the last block pools by maximum (github.com/mseitzer/pytorch-fid, ``inception.py``), and the logits
leave out the bias, as OpenAI's Inception Score has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from qdeploy.base.errors import UsageError
from qdeploy.base.files import hash_file
from qdeploy.evaluate.extractors import Array, ExtractorInfo, ExtractorOptions
from qdeploy.evaluate.extractors.resize import BICUBIC, resize_picture
from qdeploy.evaluate.weights import load_state_dict

if TYPE_CHECKING:
    from torch import Tensor

DIM, CLASSES, SIDE = 2048, 1008, 299
SHA256_BEGINS = "6726825d"  # of the standard weights, as their name says
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
REMEDY = f"give --inception FILE, the weights from {URL}, or --allow-download to fetch them"
RESIZE = f"PIL bicubic, antialiased, float, to {SIDE}x{SIDE}, as clean-fid"


class Inception:
    """The network on torch; comparable only with the standard weights."""

    def __init__(self, weights: dict[str, Tensor], sha256: str) -> None:
        is_standard = sha256.startswith(SHA256_BEGINS)
        name = "inception-2015-12-05" if is_standard else "inception of other weights"
        self.info = ExtractorInfo(name, DIM, CLASSES, RESIZE, sha256, comparable=is_standard)
        self._weights = weights

    def __call__(self, pictures: Sequence[Image.Image]) -> Array:
        """``float32[B, 2048 + 1008]`` of RGB pictures."""
        import torch

        rgb = np.stack([resize_picture(picture, SIDE, SIDE, BICUBIC) for picture in pictures]).transpose(0, 3, 1, 2)
        with torch.inference_mode():
            return run_network((torch.from_numpy(rgb) - 128) / 128, self._weights).numpy()


def open_extractor(options: ExtractorOptions) -> Inception:
    """Inception with the user's file, or with the standard one where it may be fetched; UsageError otherwise."""
    if options.inception is None and not options.allow_download:
        raise UsageError(f"the extractor inception needs its weights, which are not here; {REMEDY}")
    weights, path = load_state_dict(options.inception, URL)
    try:
        extractor = Inception(weights, hash_file(path))
        shape = extractor([Image.new("RGB", (8, 8))]).shape
    except (KeyError, RuntimeError, AttributeError, TypeError) as exc:
        raise UsageError(f"{path} does not hold FID's Inception-v3 ({exc}); {REMEDY}") from exc
    if shape != (1, DIM + CLASSES):
        raise UsageError(f"{path} holds another network than FID's Inception-v3; {REMEDY}")
    return extractor


def run_network(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """``float32[B, 2048 + 1008]`` of ``float32[B, 3, 299, 299]`` in [-1, 1]."""
    import torch
    from torch.nn import functional as nn

    def conv(x: Tensor, name: str, stride: int = 1, pads: bool = True) -> Tensor:
        kernel = weights[f"{name}.conv.weight"]
        padding = [side // 2 for side in kernel.shape[2:]] if pads and stride == 1 else 0
        mean, var, scale, bias = (weights[f"{name}.bn.{part}"] for part in BATCH_NORM)
        out = nn.conv2d(x, kernel, stride=stride, padding=padding)
        return nn.relu(nn.batch_norm(out, mean, var, scale, bias, eps=0.001))

    def chain(x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = conv(x, name)
        return x

    def average_pool(x: Tensor) -> Tensor:
        return nn.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def list_names(name: str, parts: str) -> list[str]:
        return [f"{name}_{part}" for part in parts]

    def block_a(x: Tensor, prefix: str) -> Tensor:
        branches = [conv(x, f"{prefix}.branch1x1"), chain(x, *list_names(f"{prefix}.branch5x5", "12"))]
        branches += [
            chain(x, *list_names(f"{prefix}.branch3x3dbl", "123")),
            conv(average_pool(x), f"{prefix}.branch_pool"),
        ]
        return torch.cat(branches, 1)

    def block_b(x: Tensor, prefix: str) -> Tensor:
        double = conv(chain(x, *list_names(f"{prefix}.branch3x3dbl", "12")), f"{prefix}.branch3x3dbl_3", stride=2)
        return torch.cat([conv(x, f"{prefix}.branch3x3", stride=2), double, nn.max_pool2d(x, 3, stride=2)], 1)

    def block_c(x: Tensor, prefix: str) -> Tensor:
        branches = [conv(x, f"{prefix}.branch1x1"), chain(x, *list_names(f"{prefix}.branch7x7", "123"))]
        branches += [
            chain(x, *list_names(f"{prefix}.branch7x7dbl", "12345")),
            conv(average_pool(x), f"{prefix}.branch_pool"),
        ]
        return torch.cat(branches, 1)

    def block_d(x: Tensor, prefix: str) -> Tensor:
        small = conv(conv(x, f"{prefix}.branch3x3_1"), f"{prefix}.branch3x3_2", stride=2)
        large = conv(chain(x, *list_names(f"{prefix}.branch7x7x3", "123")), f"{prefix}.branch7x7x3_4", stride=2)
        return torch.cat([small, large, nn.max_pool2d(x, 3, stride=2)], 1)

    def block_e(x: Tensor, prefix: str, pooled: Tensor) -> Tensor:
        small = conv(x, f"{prefix}.branch3x3_1")
        double = chain(x, *list_names(f"{prefix}.branch3x3dbl", "12"))
        branches = [conv(x, f"{prefix}.branch1x1")]
        branches += [conv(small, f"{prefix}.branch3x3_{half}") for half in ("2a", "2b")]
        branches += [conv(double, f"{prefix}.branch3x3dbl_{half}") for half in ("3a", "3b")]
        return torch.cat([*branches, conv(pooled, f"{prefix}.branch_pool")], 1)

    x = conv(x, "Conv2d_1a_3x3", stride=2)
    x = conv(x, "Conv2d_2a_3x3", pads=False)
    x = nn.max_pool2d(conv(x, "Conv2d_2b_3x3"), 3, stride=2)
    x = conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", pads=False)
    x = nn.max_pool2d(x, 3, stride=2)  # [B, 192, 35, 35]
    for letter in "bcd":
        x = block_a(x, f"Mixed_5{letter}")
    x = block_b(x, "Mixed_6a")  # [B, 768, 17, 17]
    for letter in "bcde":
        x = block_c(x, f"Mixed_6{letter}")
    x = block_d(x, "Mixed_7a")  # [B, 1280, 8, 8]
    x = block_e(x, "Mixed_7b", average_pool(x))
    x = block_e(x, "Mixed_7c", nn.max_pool2d(x, 3, stride=1, padding=1))
    features = x.mean(dim=(2, 3))
    return torch.cat([features, features @ weights["fc.weight"].T], 1)


BATCH_NORM = ("running_mean", "running_var", "weight", "bias")
