"""The int8 convolution as Triton kernels, and what launches them; a linear layer is its 1x1 case.

A convolution of NHWC codes is a matrix product of M = N * OH * OW output pixels by OC channels, whose inner dimension
runs over the taps and, in each, over blocks of input channels. No patch matrix is made: a program reads its pixels'
inputs for each tap where they lie. Which tensors are int8, and their scales, is decided elsewhere.
"""
# ruff: noqa: ANN001, ANN202, N803 (Triton reads a kernel's annotations itself; M, OC, … are the names of the formulas)

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from qdeploy.engines.torch_graph.int8_shapes import Pair, check_indices, choose_splits, compute_conv_shape

SMALLEST_BLOCK = 64  # which every axis can be cut into
MAX_PADDING = 1.25  # times the size that an axis has in smallest blocks


class Limits(NamedTuple):
    """What a device has: multiprocessors, and bytes of shared memory for one program."""

    multiprocessors: int
    shared_bytes: int


H100 = Limits(132, 232448)


def count_stage_bytes(tile: triton.Config) -> int:
    """Shared memory of a block of each operand. A Hopper GPU holds as many as there are stages, others one less."""
    return int((tile.kwargs["BLOCK_M"] + tile.kwargs["BLOCK_N"]) * tile.kwargs["BLOCK_K"])


def select_tiles(tiles: Sequence[triton.Config], m: int, oc: int, c: int, shared_bytes: int) -> list[triton.Config]:
    """The tiles that the device has shared memory for and that compute little beyond the edges of the problem."""
    sizes = {"BLOCK_M": m, "BLOCK_N": oc, "BLOCK_K": c}

    def round_up(size: int, block: int) -> int:
        return -(-size // block) * block

    def fits(tile: triton.Config) -> bool:
        return count_stage_bytes(tile) * tile.num_stages <= shared_bytes and all(
            round_up(size, tile.kwargs[axis]) <= MAX_PADDING * round_up(size, SMALLEST_BLOCK)
            for axis, size in sizes.items()
        )

    return [tile for tile in tiles if fits(tile)]


def _make_tile(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> triton.Config:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


# Triton 3.6 and 3.9 wait for every int8 `wgmma` before they go on (dots run asynchronously only for float32 sums), so
# what keeps a Hopper GPU's matrix units busy meanwhile is another program on the same multiprocessor. Registers and
# shared memory of all but the last three have room for two.
TILES = [
    _make_tile(64, 64, 64, 4, 4),
    _make_tile(64, 64, 128, 4, 4),
    _make_tile(64, 64, 256, 4, 3),
    _make_tile(128, 64, 64, 4, 4),
    _make_tile(128, 64, 128, 4, 3),
    _make_tile(64, 128, 128, 4, 3),
    _make_tile(128, 128, 64, 4, 4),
    _make_tile(128, 128, 128, 4, 3),
    _make_tile(128, 128, 128, 8, 3),
    _make_tile(128, 256, 128, 8, 4),
    _make_tile(256, 128, 128, 8, 4),
]


@cache
def _read_limits(device: int) -> Limits:
    properties = driver.active.utils.get_device_properties(device)
    return Limits(properties["multiprocessor_count"], properties["max_shared_mem"])


def get_device_limits() -> Limits:
    """Of the current device; in Triton's interpreter, which runs on none, of an H100."""
    return H100 if triton.knobs.runtime.interpret else _read_limits(driver.active.get_current_device())


def _prune(tiles: list[triton.Config], arguments: dict[str, Any], **others: Any) -> list[triton.Config]:
    args = arguments | others
    return select_tiles(tiles, args["M"], args["OC"], args["C"], get_device_limits().shared_bytes)


@triton.jit
def _scale_sums(sums, scale_ptr, bias_ptr, cols, OC):
    """float32[rows, cols] of int32 sums: times the scale of each channel, plus its bias."""
    is_channel = cols < OC
    scaled = sums.to(tl.float32) * tl.load(scale_ptr + cols, mask=is_channel, other=0.0)[None, :]
    if bias_ptr is not None:
        scaled += tl.load(bias_ptr + cols, mask=is_channel, other=0.0)[None, :]
    return scaled


@triton.autotune(
    configs=TILES[:1] if triton.knobs.runtime.interpret else TILES,  # the interpreter has nothing to measure
    key=["M", "OC", "C", "KH", "KW", "PARTIAL"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=partial(triton.testing.do_bench, warmup=5, rep=20),
    cache_results=True,
)
@triton.heuristics({"EVEN_C": lambda args: args["C"] % args["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "stride_h", "stride_w", "pad_h", "pad_w"])
def conv_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, M, H, W, OH, OW, OC, C, stride_h, stride_w, pad_h, pad_w,
    KH: tl.constexpr, KW: tl.constexpr, DENSE: tl.constexpr, PADDED: tl.constexpr, PARTIAL: tl.constexpr,
    EVEN_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr = 8,
) -> None:  # fmt: skip
    """One tile of the outputs or, where PARTIAL, of the int32 sums [splits, M, OC] over one range of the blocks.

    DENSE: output pixels are input pixels. PADDED: taps may lie outside. EVEN_C: channels are whole blocks. Rows and
    channels past the end repeat the last, so that only the store masks them. GROUP_M rows of tiles share an L2 cache.
    """
    tiles_n = tl.cdiv(OC, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_K)

    pixels = tl.minimum(rows, M - 1)
    if not DENSE:
        top = pixels // OW % OH * stride_h - pad_h
        left = pixels % OW * stride_w - pad_w
        pixels = (pixels // (OH * OW) * H + top) * W + left
        if PADDED:
            inside = tl.zeros((BLOCK_M,), tl.int32)  # a bit for each row, then for each column of taps
            for row in tl.static_range(KH):
                inside |= ((top + row >= 0) & (top + row < H)).to(tl.int32) << row
            for col in tl.static_range(KW):
                inside |= ((left + col >= 0) & (left + col < W)).to(tl.int32) << (KH + col)
    x_ptrs = x_ptr + (pixels * C)[:, None] + channels[None, :]
    w_ptrs = w_ptr + (tl.minimum(cols, OC - 1) * (KH * KW * C))[None, :] + channels[:, None]

    c_blocks = tl.cdiv(C, BLOCK_K)
    blocks = KH * KW * c_blocks
    first = tl.program_id(1) * blocks // tl.num_programs(1)
    last = (tl.program_id(1) + 1) * blocks // tl.num_programs(1)
    kh, kw, c = first // c_blocks // KW, first // c_blocks % KW, first % c_blocks * BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(first, last):
        x_at = x_ptrs + ((kh * W + kw) * C + c)
        w_at = w_ptrs + ((kh * KW + kw) * C + c)
        is_channel = channels < C - c
        if PADDED:
            tap = (1 << kh) | (1 << (KH + kw))
            is_code = ((inside & tap) == tap)[:, None]
            x_block = tl.load(x_at, mask=is_code if EVEN_C else is_code & is_channel[None, :], other=0)
        else:
            x_block = tl.load(x_at) if EVEN_C else tl.load(x_at, mask=is_channel[None, :], other=0)
        w_block = tl.load(w_at) if EVEN_C else tl.load(w_at, mask=is_channel[:, None], other=0)
        sums = tl.dot(x_block, w_block, sums, out_dtype=tl.int32)
        c += BLOCK_K
        if KH * KW > 1:  # no division: the loop has to be short, see TILES
            is_done = c >= C
            c = tl.where(is_done, 0, c)
            kw += is_done.to(tl.int32)
            kh += (kw == KW).to(tl.int32)
            kw = tl.where(kw == KW, 0, kw)

    offsets = rows[:, None] * OC + cols[None, :]
    is_output = (rows[:, None] < M) & (cols[None, :] < OC)
    if PARTIAL:
        tl.store(out_ptr + tl.program_id(1) * M * OC + offsets, sums, mask=is_output)
    else:
        scaled = _scale_sums(sums, scale_ptr, bias_ptr, cols, OC)
        tl.store(out_ptr + offsets, scaled.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["M", "splits"])
def sum_kernel(
    sums_ptr, scale_ptr, bias_ptr, out_ptr, M, OC, splits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> None:
    """Adds the int32 sums [splits, M, OC] of all ranges, and scales them."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = rows[:, None] * OC + cols[None, :]
    is_output = (rows[:, None] < M) & (cols[None, :] < OC)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for split in range(splits):
        sums += tl.load(sums_ptr + split * M * OC + offsets, mask=is_output, other=0)
    scaled = _scale_sums(sums, scale_ptr, bias_ptr, cols, OC)
    tl.store(out_ptr + offsets, scaled.to(out_ptr.dtype.element_ty), mask=is_output)


def int8_conv(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, stride: Pair, padding: Pair,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """``float(sum of x * weight) * scale + bias`` in float32, then ``out_dtype``: ``[N, OH, OW, OC]``, contiguous.

    x: int8 ``[N, H, W, C]``; weight: int8 ``[OC, KH, KW, C]``; scale, bias: float32 ``[OC]``; all contiguous, on the
    current device. The sums are int32 and exact; zero points are 0, and padding has code 0. The first call of a shape
    measures which tile suits it, so a CUDA graph can record only later ones. EngineError when the kernels cannot
    compute these shapes.
    """
    assert all(operand is None or operand.is_contiguous() for operand in (x, weight, scale, bias))
    shape = compute_conv_shape(x.shape, weight.shape, stride, padding)
    m, oc = shape.m, shape.oc
    splits = choose_splits(m, oc, shape.k, get_device_limits().multiprocessors)
    check_indices(shape, splits)
    out = x.new_empty((shape.n, shape.oh, shape.ow, oc), dtype=out_dtype)
    sums = x.new_empty((splits, m, oc), dtype=torch.int32) if splits > 1 else out
    # without fusion a product is rounded before the bias is added, as torch does
    conv_kernel[lambda tile: (triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(oc, tile["BLOCK_N"]), splits)](
        x, weight, scale, bias, sums, m, shape.h, shape.w, shape.oh, shape.ow, oc, shape.c, *stride, *padding,
        KH=shape.kh, KW=shape.kw, DENSE=(shape.kh, shape.kw, *stride, *padding) == (1, 1, 1, 1, 0, 0),
        PADDED=any(padding), PARTIAL=splits > 1, enable_fp_fusion=False,
    )  # fmt: skip
    if splits > 1:
        sum_kernel[(triton.cdiv(m, 4), triton.cdiv(oc, 256))](
            sums, scale, bias, out, m, oc, splits, BLOCK_M=4, BLOCK_N=256, enable_fp_fusion=False
        )
    return out
