"""UNets whose transformers differ within a level, on the way up, or in the middle: SSD-1B, Segmind Vega, BK-SDM, KOALA.

They are Stable Diffusion's with blocks taken out before training went on, under the original names of those left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from qdeploy.base.errors import ModelError

Depths = tuple[int, ...]  # transformer blocks of each block of a level; 0 where it has no transformer


@dataclass(frozen=True)
class UnevenBlocks:
    """Depths of all transformers.

    down, up: by level; the first is finest first, the second coarsest first.
    middle: of the middle's transformer; 0 where one residual block is left of it, None where nothing is.
    """

    down: tuple[Depths, ...]
    up: tuple[Depths, ...]
    middle: int | None

    @property
    def is_even(self) -> bool:
        """Whether every level has one depth, down and up, and the middle its transformer, as Stable Diffusion has."""
        levels = [set(level) for level in self.down]
        mirrored = [set(level) for level in reversed(self.up)]
        return all(len(level) == 1 for level in levels) and levels == mirrored and bool(self.middle)


def read_uneven_blocks(weights: Mapping[str, Tensor], stride: int) -> UnevenBlocks | None:
    """From the weights' names below ``model.diffusion_model.``; None for a UNet that is even.

    stride: output blocks of a level.
    """
    blocks = len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")})
    starts = range(0, blocks, stride)
    has_middle = any(name.startswith("middle_block.") for name in weights)
    uneven = UnevenBlocks(
        down=tuple(_list_depths(weights, "input", range(1 + start, start + stride)) for start in starts),
        up=tuple(_list_depths(weights, "output", range(start, start + stride)) for start in starts),
        middle=count_depth(weights, "middle_block.1") if has_middle else None,
    )
    return None if uneven.is_even else uneven


def build_uneven_config(blocks: UnevenBlocks) -> dict[str, Any]:
    """The settings of diffusers' ``UNet2DConditionModel`` that say so; ModelError for what none of them can say."""
    for level in (*blocks.down, *blocks.up):
        if 0 in level and any(level):
            raise ModelError(
                f"a level with transformers of {list(level)} blocks has some and lacks some: not converted"
            )
    last = blocks.down[-1][0]
    if blocks.middle and last not in (0, blocks.middle):
        raise ModelError(
            f"a middle with a transformer of {blocks.middle} blocks after a level with {last} is not converted"
        )
    depths = [_format_depths(level) for level in blocks.down]
    if blocks.middle:
        depths[-1] = blocks.middle if last == 0 else depths[-1]
    return dict(
        down_block_types=tuple("CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in blocks.down),
        up_block_types=tuple("CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in blocks.up),
        mid_block_type=_choose_middle(blocks.middle),
        transformer_layers_per_block=depths,
        reverse_transformer_layers_per_block=[_format_depths(level) for level in blocks.up],
    )


def count_depth(weights: Mapping[str, Tensor], transformer: str) -> int:
    """Blocks of a transformer; 0 where there is none."""
    return next(i for i in count() if f"{transformer}.transformer_blocks.{i}.norm1.weight" not in weights)


def _list_depths(weights: Mapping[str, Tensor], side: str, numbers: Sequence[int]) -> Depths:
    return tuple(count_depth(weights, f"{side}_blocks.{number}.1") for number in numbers)


def _choose_middle(depth: int | None) -> str | None:
    if depth is None:
        return None
    return "UNetMidBlock2DCrossAttn" if depth else "UNetMidBlock2D"


def _format_depths(level: Depths) -> int | list[int]:
    """A number where all are equal; 1 without transformers, for diffusers wants a number there too."""
    if not any(level):
        return 1
    return level[0] if len(set(level)) == 1 else list(level)
