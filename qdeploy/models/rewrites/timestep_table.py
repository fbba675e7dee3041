"""The timestep path as a table: every resnet's embedding projection depends only on t, so it is looked up by t.

``time_emb_proj(SiLU(time_embedding(time_proj(t))))`` is computed once in float32 and stored in
float16; no error of it is left to quantization (the temporal-information block of TFMQ-DM, Huang et
al. 2024, arXiv 2311.16503, kept instead of calibrated). Diffusers hands the embedding from module to
module, so a row number is passed instead and each resnet gathers its own row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from qdeploy.base.errors import ModelError
from qdeploy.models.components import TorchComponent
from qdeploy.models.rewrites.surgery import replace_module

# Attributes of diffusers' UNets that mix something else than t into the embedding
OTHER_EMBEDDINGS = ("class_embedding", "add_embedding")


class TimestepRow(nn.Module):
    """Replaces ``time_proj``: ``timesteps int64[B]`` -> ``row int64[B]`` of the tables.

    An unknown t gets a row after the last one, which eager PyTorch refuses with IndexError and ONNX
    Runtime's Gather with an error of its own. ONNX's Gather counts negative indices from the end, so
    a negative t is sent out of range as well.
    """

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__()
        row_of_t = torch.full((int(timesteps.max()) + 1,), len(timesteps))
        row_of_t[timesteps] = torch.arange(len(timesteps))
        self.register_buffer("row_of_t", row_of_t)

    def forward(self, timesteps: Tensor) -> Tensor:
        """``int64[B]`` -> ``int64[B]``; ModelError for timesteps that are not integers."""
        if timesteps.is_floating_point():
            raise ModelError(f"timestep: got {timesteps.dtype}, expected torch.int64; a table has whole timesteps only")
        checked = torch.where(timesteps < 0, len(self.row_of_t), timesteps)  # type: ignore[arg-type]
        return self.row_of_t.index_select(0, checked)  # type: ignore[operator]


class RowAsEmbedding(nn.Module):
    """Replaces ``time_embedding``: passes the row number on as ``int64[B]``.

    Diffusers casts it to the sample's float32 in between, which is exact below 2**24.
    """

    def forward(self, row: Tensor, condition: Tensor | None = None) -> Tensor:
        """``[B]`` of any dtype -> ``int64[B]``; ModelError for a condition, of which the table knows nothing."""
        if condition is not None:
            raise ModelError("timestep_cond was given, but a timestep table depends only on t; keep the time embedding")
        return row.to(torch.int64)


class TimestepTable(nn.Module):
    """Replaces ``time_emb_proj``: ``row int64[B]`` -> ``float32[B, C]``, from ``float16[rows, C]``."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, row: Tensor) -> Tensor:
        """``int64[B]`` -> ``float32[B, C]``."""
        return self.table.index_select(0, row).to(torch.float32)  # type: ignore[operator]


def timestep_table(component: TorchComponent, timesteps: int | Sequence[int] = 1000) -> list[str]:
    """Replace the timestep path of ``component`` (a UNet) by tables, in place; the replaced projections' names.

    ``timesteps`` are those that have a row: 0..N-1 for an int (the scheduler's num_train_timesteps), or
    the scheduler's own, which makes the tables smaller; the component then runs at no other t. Outputs
    change by the tables' float16 rounding. Raises ModelError where the embedding holds more than t.
    """
    unet = component.inner
    steps = check_timesteps(timesteps)
    resnets = find_time_readers(unet)
    with torch.no_grad():
        emb = compute_time_embeddings(unet, steps)
        tables = {name: half_from_table(name, project(resnet, emb)) for name, resnet in resnets.items()}
    for name, resnet in resnets.items():
        replace_module(unet, f"{name}.time_emb_proj", TimestepTable(tables[name]))
        resnet.skip_time_act = True  # its SiLU is in the table
    replace_module(unet, "time_proj", TimestepRow(steps))
    replace_module(unet, "time_embedding", RowAsEmbedding())
    if getattr(unet, "time_embed_act", None) is not None:
        unet.time_embed_act = nn.Identity()  # in the table too
    return [f"{name}.time_emb_proj" for name in resnets]


def check_timesteps(timesteps: int | Sequence[int]) -> Tensor:
    """``int64[rows]``, each t once; ModelError when there is none, or one is negative or not whole."""
    values = np.unique(np.arange(timesteps) if isinstance(timesteps, int) else np.asarray(timesteps))
    if len(values) == 0 or not np.issubdtype(values.dtype, np.integer) or values[0] < 0:
        raise ModelError(f"timestep table: got timesteps {timesteps}, expected whole numbers from 0 up, at least one")
    return torch.from_numpy(values.astype(np.int64))


def find_time_readers(unet: nn.Module) -> dict[str, ResnetBlock2D]:
    """Every resnet that adds the time embedding, by name; ModelError unless only they read it."""
    for name in OTHER_EMBEDDINGS:
        if getattr(unet, name, None) is not None:
            raise ModelError(f"the UNet's {name} mixes more than t into the time embedding; keep the time embedding")
    if unet.config.time_embedding_type == "fourier":  # type: ignore[union-attr]
        raise ModelError("the UNet takes continuous timesteps (time_embedding_type 'fourier'), which no table can list")
    if isinstance(unet.time_proj, TimestepRow):
        raise ModelError("the UNet already has a timestep table; rewrite a fresh copy of the model, once")
    readers = {}
    for name, module in unet.named_modules():
        if getattr(module, "time_emb_proj", None) is None:
            continue
        if not isinstance(module, ResnetBlock2D):
            raise ModelError(f"{name} is a {type(module).__name__}, whose use of t is unknown; keep the time embedding")
        readers[name] = module
    return readers


def compute_time_embeddings(unet: nn.Module, timesteps: Tensor) -> Tensor:
    """``float32[rows, D]``: what diffusers' UNets compute from t before their first block."""
    weight = next(unet.time_embedding.parameters())  # type: ignore[union-attr]
    emb = unet.time_embedding(unet.time_proj(timesteps.to(weight.device)).to(weight.dtype))  # type: ignore[operator]
    act = getattr(unet, "time_embed_act", None)
    embedded: Tensor = emb if act is None else act(emb)
    return embedded


def project(resnet: ResnetBlock2D, emb: Tensor) -> Tensor:
    """``float32[rows, C]``: what ``ResnetBlock2D.forward`` makes of the embedding (2C for scale and shift)."""
    projected: Tensor = resnet.time_emb_proj(emb if resnet.skip_time_act else resnet.nonlinearity(emb))
    return projected


def half_from_table(name: str, table: Tensor) -> Tensor:
    """The table in float16; ModelError when a value is beyond its range."""
    half = table.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ModelError(
            f"{name}: time embedding reaches {table.abs().max():.3g}, float16 holds 65504; keep the time embedding"
        )
    return half
