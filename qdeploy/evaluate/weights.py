"""Weights of measuring networks: a state dict from the user's file, or a published one where it may be fetched."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from qdeploy.base.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 2**30


def load_state_dict(path: Path | None, url: str) -> tuple[dict[str, Tensor], Path]:
    """The tensors in the file at ``path`` and that path; without one, of ``url``, fetched once by ``torch.hub``.

    Nothing in the file is executed. What is fetched must have the SHA-256 that its name ends in.
    """
    import torch

    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
        try:
            torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as exc:
            raise UsageError(f"{url} could not be fetched ({exc}); fetch it elsewhere and give it as a file") from exc
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no such weights are")
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as exc:
        raise UsageError(f"{path} is not a readable PyTorch state dict ({exc}); fetch {url} again") from exc
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise UsageError(f"{path} holds no state dict; fetch {url} again")
    return state_dict, path
