"""Settings of every scheduler test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """More threads only slow such small arrays down."""
    torch = pytest.importorskip("torch", reason="the references are diffusers' schedulers, which need torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
