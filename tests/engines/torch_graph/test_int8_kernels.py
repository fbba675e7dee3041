"""The int8 kernels: exact in Triton's interpreter, and compiled ahead of time for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from benchmarks.gpu_rows import make_feeds  # noqa: E402 - the imports below need triton
from qdeploy.base.errors import EngineError  # noqa: E402
from qdeploy.engines.torch_graph import int8  # noqa: E402
from qdeploy.engines.torch_graph import int8_kernels as kernels  # noqa: E402
from qdeploy.engines.torch_graph.module import read_module  # noqa: E402

ROOT = Path(__file__).parents[3]
SHARED_BYTES = {
    80: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}  # that one program can have, by compute capability
FEW_BYTES = 32  # of stack, a few registers, let pass on older GPUs
CROWDED = 128  # sums in each thread, with which older GPUs spill: their operands pass through registers too
PRODUCTS = {80: r"mma\.sync\S*\.s32\.s8\.s8\.s32", 90: r"wgmma\.mma_async\S*\.s32\.s8\.s8"}
LARGE = (8192, 10240, 1280)  # M, OC, C that every tile divides


class Case(NamedTuple):
    """A convolution to compare; ``tile`` indexes TILES, ``splits`` is None for what the arithmetic says."""

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    splits: int | None = None
    has_bias: bool = True
    dtype: torch.dtype = torch.float16
    tile: int = 0
    is_extreme: bool = False


CASES = {
    "3x3": Case((2, 5, 7, 32), (70, 3, 3, 32), padding=(1, 1)),
    "3x3 to float32": Case((1, 4, 4, 64), (24, 3, 3, 64), padding=(1, 1), dtype=torch.float32),
    "3x3 at stride 2": Case((1, 8, 9, 48), (16, 3, 3, 48), stride=(2, 2), padding=(1, 1)),
    "3x3 without padding": Case((1, 6, 5, 20), (8, 3, 3, 20), has_bias=False),
    "3x3 at stride 2 without padding": Case((1, 7, 9, 16), (8, 3, 3, 16), stride=(2, 2)),
    "1x3": Case((1, 5, 6, 40), (12, 1, 3, 40), stride=(1, 2), padding=(0, 1), dtype=torch.float32),
    "3x1 padded more than it reaches": Case((1, 3, 3, 4), (3, 3, 1, 4), padding=(2, 1), dtype=torch.float32),
    "1x1 at stride 2": Case((1, 5, 5, 16), (8, 1, 1, 16), stride=(2, 2)),
    "1x1 padded": Case((1, 3, 3, 16), (8, 1, 1, 16), padding=(1, 1)),
    "linear": Case((1, 1, 77, 96), (130, 1, 1, 96)),
    "linear of several blocks": Case((1, 1, 65, 320), (64, 1, 1, 320), has_bias=False, dtype=torch.float32),
    "one pixel, four channels": Case((1, 1, 1, 4), (1, 1, 1, 4), dtype=torch.float32),
    "many rows of tiles": Case((1, 1, 520, 16), (65, 1, 1, 16)),
    "wide blocks": Case((1, 5, 5, 160), (16, 3, 3, 160), padding=(1, 1), tile=2),
    "tall blocks": Case((1, 9, 15, 32), (16, 3, 3, 32), padding=(1, 1), tile=4),
    "split as computed": Case((1, 3, 3, 256), (8, 3, 3, 256), padding=(1, 1), is_extreme=True),
    "split within taps": Case((1, 4, 4, 80), (8, 3, 3, 80), padding=(1, 1), splits=4, dtype=torch.float32),
    "split, not even": Case((1, 3, 5, 20), (257, 1, 3, 20), padding=(1, 1), splits=2, has_bias=False),
    "more ranges than blocks": Case((1, 1, 9, 64), (8, 1, 1, 64), splits=3),
    "extremes": Case((1, 2, 2, 256), (8, 3, 3, 256), padding=(1, 1), splits=1, dtype=torch.float32, is_extreme=True),
}  # fmt: skip


def disagreement(case: Case) -> str:
    """What differs from float64's convolution, which is exact for such sums; empty when nothing does."""
    codes = torch.Generator().manual_seed(0)
    pick = torch.tensor([-128, -127, 127] if case.is_extreme else range(-128, 128), dtype=torch.int8)
    x, weight = (pick[torch.randint(len(pick), shape, generator=codes)] for shape in (case.x, case.weight))
    if case.is_extreme:
        x[0], weight[0] = -128, -128  # whose sum is the largest there can be
    scale = torch.rand(case.weight[0], generator=codes) * 1e-3
    bias = torch.randn(case.weight[0], generator=codes) if case.has_bias else None
    real = F.conv2d(
        x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(), None, case.stride, case.padding
    )
    sums = real.permute(0, 2, 3, 1).to(torch.int32)
    expected = sums.float() * scale if bias is None else sums.float() * scale + bias

    kernels.conv_kernel.configs = [kernels.TILES[case.tile]]
    if case.splits is not None:
        kernels.choose_splits = lambda *_: case.splits
    out = kernels.int8_conv(x, weight, scale, bias, case.stride, case.padding, case.dtype)
    partial = partial_sums(case, x, weight, splits=case.splits or 2)
    differences = {
        "shape": out.shape == expected.shape and out.is_contiguous(),
        "dtype": out.dtype == case.dtype,
        "outputs": out.shape == expected.shape and torch.equal(out, expected.to(case.dtype)),
        "int32 sums": torch.equal(partial.sum(0, dtype=torch.int32), sums.flatten(0, 2)),
        "16 bits exceeded": not case.is_extreme or sums.abs().max() > 2**15,
    }
    return ", ".join(name for name, is_right in differences.items() if not is_right)


def partial_sums(case: Case, x: torch.Tensor, weight: torch.Tensor, splits: int) -> torch.Tensor:
    """int32[splits, M, OC] as the kernel leaves them for the second one."""
    shape = kernels.compute_conv_shape(x.shape, weight.shape, case.stride, case.padding)
    sums = torch.full((splits, shape.m, shape.oc), 2**30, dtype=torch.int32)
    blocks = kernels.TILES[case.tile].kwargs
    tiles = -(-shape.m // blocks["BLOCK_M"]) * -(-shape.oc // blocks["BLOCK_N"])
    kernels.conv_kernel[(tiles, splits)](
        x, weight, None, None, sums, shape.m, shape.h, shape.w, shape.oh, shape.ow, shape.oc, shape.c,
        *case.stride, *case.padding, KH=shape.kh, KW=shape.kw, DENSE=False, PADDED=any(case.padding), PARTIAL=True,
    )  # fmt: skip
    return sums


def same_by_kernels(graph: Path) -> bool:
    """Whether a graph's first output is the same when the kernels take the place of their operator's meaning."""
    given = [torch.from_numpy(np.array(feed)) for feed in make_feeds(graph).values()]
    module = read_module(graph)
    products = [step for step in module.steps if step.integer]
    launches = 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal launches
        launches += 1
        return int8.launch_int8_conv(*arguments)

    with torch.inference_mode():
        expected = module(*given)[0]
        int8.int8_conv.register_kernel("cpu")(counted)
        actual = module(*given)[0]
    return torch.equal(expected, actual) and launches == len(products) > 0


def run_interpreted(*arguments: object) -> Any:
    """What this file says when it is run with Triton's interpreter, which is chosen as Triton is imported."""
    command = [sys.executable, "-m", "tests.engines.torch_graph.test_int8_kernels", *map(str, arguments)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_interpreted_kernels_equal_the_exact_convolution() -> None:
    assert run_interpreted() == dict.fromkeys(CASES, "")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_interpreted_kernels_compute_a_whole_graph(int8_tensorrt: Path, part: str) -> None:
    assert run_interpreted(int8_tensorrt / part / "model.onnx") is True


@pytest.mark.parametrize(
    ("m", "oc", "k", "multiprocessors", "expected"),
    [
        (8192, 320, 2880, 132, 1),
        (2048, 640, 5760, 132, 1),
        (512, 1280, 11520, 132, 1),
        (128, 1280, 11520, 132, 6),
        (128, 1280, 23040, 132, 6),
        (128, 1280, 5120, 132, 5),  # as much as the inner dimension allows
        (128, 1280, 1280, 132, 1),
        (154, 320, 768, 132, 1),
        (128, 1280, 11520, 20, 1),
        (1, 1, 2047, 132, 1),
        (1, 1, 2048, 132, 2),
    ],
)
def test_only_grids_that_leave_multiprocessors_idle_are_split(
    m: int, oc: int, k: int, multiprocessors: int, expected: int
) -> None:
    assert kernels.choose_splits(m, oc, k, multiprocessors) == expected


def test_split_programs_fill_the_device_at_most_once() -> None:
    for m, oc, k in [(1, 1, 10**6), (128, 1280, 10**6), (300, 700, 10**6)]:
        for tile in [(64, 64), (128, 128)]:
            tiles = -(-m // tile[0]) * -(-oc // tile[1])
            splits = kernels.choose_splits(m, oc, k, 132, tile)
            assert tiles * splits <= 132 < tiles * (splits + 1)


def test_an_h100_has_room_for_every_tile() -> None:
    assert kernels.select_tiles(kernels.TILES, *LARGE, kernels.H100.shared_bytes) == kernels.TILES


@pytest.mark.parametrize(
    ("m", "oc", "c", "largest"),
    [
        (1, 1, 4, (64, 64, 64)),
        (154, 768, 768, (64, 256, 256)),
        (128, 1280, 1280, (128, 256, 256)),
        (8192, 320, 320, (256, 128, 128)),
    ],
)
def test_tiles_that_compute_mostly_padding_are_dropped(m: int, oc: int, c: int, largest: tuple[int, int, int]) -> None:
    tiles = kernels.select_tiles(kernels.TILES, m, oc, c, kernels.H100.shared_bytes)
    actual = tuple(max(tile.kwargs[axis] for tile in tiles) for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    assert actual <= largest
    assert all(one <= most for one, most in zip(actual, largest, strict=True))


@pytest.mark.parametrize("shared_bytes", SHARED_BYTES.values())
def test_some_tile_is_left_for_every_device_and_shape(shared_bytes: int) -> None:
    for shape in [(1, 1, 1), (154, 320, 768), LARGE]:
        tiles = kernels.select_tiles(kernels.TILES, *shape, shared_bytes)
        assert kernels.TILES[0] in tiles
        assert all(kernels.count_stage_bytes(tile) * tile.num_stages <= shared_bytes for tile in tiles)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        ((1, 8, 8, 16), (8, 3, 3, 32)),  # other channels
        ((1, 2, 8, 16), (8, 3, 3, 16)),  # no output
        ((0, 8, 8, 16), (8, 3, 3, 16)),
        ((1, 99, 99, 16), (8, 16, 15, 16)),  # too many taps
        ((1, 1, 1, 2**17), (8, 1, 1, 2**17)),  # sums beyond int32
    ],
)
def test_a_convolution_that_the_kernels_cannot_compute_is_refused(x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"expected \[N, H, W, C\]"):
        kernels.compute_conv_shape(x, weight, (1, 1), (0, 0))


@pytest.mark.parametrize(
    ("x", "oc", "splits", "culprit"),
    [
        ((2, 512, 512, 512), 512, 1, None),  # a VAE decoder's largest
        ((2, 1024, 1024, 1024), 8, 1, "x"),
        ((1, 1024, 1024, 16), 2048, 1, "sums"),
        ((1, 256, 256, 16), 4096, 8, "sums"),
        ((1, 1, 1, 2**16), 2**15, 1, "weight"),
    ],
)
def test_tensors_that_int32_cannot_count_are_refused(
    x: tuple[int, ...], oc: int, splits: int, culprit: str | None
) -> None:
    shape = kernels.compute_conv_shape(x, (oc, 1, 1, x[3]), (1, 1), (0, 0))
    if culprit is None:
        kernels.check_indices(shape, splits)
        return
    with pytest.raises(EngineError, match=f"elements of {culprit} .*fewer than 2147483648"):
        kernels.check_indices(shape, splits)


class Compiled(NamedTuple):
    ptx: str
    shared_bytes: int
    stack_bytes: int  # more than 0 where registers are spilled


def compile_kernel(
    kernel: Any, capability: int, constants: dict[str, Any], out: str, aligned: str, **options: int
) -> Compiled:
    """``kernel`` for a GPU; pointers and the arguments named in ``aligned`` are divisible by 16, as launches are.

    out: type of the output's pointer. What is in ``constants`` is no argument.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"x_ptr": "*i8", "w_ptr": "*i8", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "sums_ptr": "*i32"}
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else {**types, "out_ptr": out}.get(name, "i32") for name in names
    }
    divisible = [name for name in names if signature[name][0] == "*" or name in aligned.split()]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    return Compiled(binary.asm["ptx"], binary.metadata.shared, stack_bytes(binary.asm["cubin"]))


def stack_bytes(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = [int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)]
    assert len(sizes) == 2, usage
    return sum(sizes)


CONV = {"KH": 3, "KW": 3, "DENSE": False, "PADDED": True, "PARTIAL": False, "EVEN_C": True, "GROUP_M": 8}
LINEAR = CONV | {"KH": 1, "KW": 1, "DENSE": True, "PADDED": False}
VARIANTS = {
    "conv": CONV,
    "conv, rest of channels": CONV | {"EVEN_C": False},
    "conv, partial": CONV | {"PARTIAL": True},
    "downsampler": CONV | {"PADDED": False},
    "linear": LINEAR,
    "linear, rest of channels": LINEAR | {"EVEN_C": False},
    "linear, no bias": LINEAR | {"bias_ptr": None},
    "linear, partial, no bias": LINEAR | {"PARTIAL": True, "bias_ptr": None},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check_main_loop(variant: dict[str, Any], tile: triton.Config, capability: int) -> None:
    """Integer products of the tensor cores, operands copied to shared memory 16 bytes at a time, and no spills.

    Spills are let pass where there is no room for registers before Hopper: measuring finds a better tile there.
    """
    kernel = kernels.conv_kernel.fn.fn  # below autotune and heuristics
    out = "*i32" if variant["PARTIAL"] else "*fp16"
    stages = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = compile_kernel(kernel, capability, variant | tile.kwargs, out, "OC C", **stages)
    assert set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S*", compiled.ptx))
    products = PRODUCTS[90 if capability == 90 else 80]
    assert all(re.fullmatch(products, name) for name in re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S*", compiled.ptx))
    copies = re.findall(r"cp\.async\.c[ag]\.\S+ .*?\], .*?\], (\w+)", compiled.ptx)
    assert set(copies) == {"0x10"}
    assert not re.findall(r"ld\.global\S*\.[bsu]8\b", compiled.ptx)
    sums = tile.kwargs["BLOCK_M"] * tile.kwargs["BLOCK_N"] // (32 * tile.num_warps)
    assert compiled.stack_bytes <= (0 if capability == 90 else FEW_BYTES) or (capability != 90 and sums >= CROWDED)
    assert compiled.shared_bytes <= kernels.count_stage_bytes(tile) * tile.num_stages


@pytest.mark.parametrize("variant", ["conv", "linear"])
def test_the_kernel_compiles_to_hopper_products(variant: str) -> None:
    check_main_loop(VARIANTS[variant], kernels.TILES[3], 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tile_compiles_for_every_device_that_has_room(variant: str, capability: int) -> None:
    for tile in kernels.select_tiles(kernels.TILES, *LARGE, SHARED_BYTES[capability]):
        check_main_loop(VARIANTS[variant], tile, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_compiles_without_alignment(variant: str, capability: int) -> None:
    """As for 20 channels: bytes are loaded one by one, and the products stay the same."""
    kernel, tile = kernels.conv_kernel.fn.fn, kernels.TILES[0]
    stages = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = compile_kernel(kernel, capability, VARIANTS[variant] | tile.kwargs, "*fp32", "", **stages)
    assert re.search(PRODUCTS[capability], compiled.ptx)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_second_kernel_reads_16_bytes_at_a_time(capability: int) -> None:
    compiled = compile_kernel(kernels.sum_kernel, capability, {"BLOCK_M": 4, "BLOCK_N": 256}, "*fp16", "OC")
    assert "ld.global.v4.b32" in compiled.ptx
    assert compiled.stack_bytes == 0


def let_scalars_be_indices() -> None:
    """In the interpreter of Triton 3.6, which takes arrays of one element for Python numbers; NumPy 2.4 does not."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def disagreements() -> dict[str, str]:
    computed = kernels.choose_splits
    answers = {}
    for name, case in CASES.items():
        kernels.choose_splits = computed
        answers[name] = disagreement(case)
    return answers


if __name__ == "__main__":
    let_scalars_be_indices()
    print(json.dumps(same_by_kernels(Path(sys.argv[1])) if len(sys.argv) > 1 else disagreements()))
