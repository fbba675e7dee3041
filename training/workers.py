"""Threads that train one model without waiting for each other (Hogwild, arXiv:1106.5730), one core each.

Operators of this size share their work badly between two cores, and not at all when other programs want the
cores too: a thread a core, each with a batch of its own, keeps both busy.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def mirror(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares ``module``'s parameters, and has gradients of its own."""
    replica = copy.deepcopy(module)
    for own, other in zip(replica.parameters(), module.parameters(), strict=True):
        own.data = other.data
    return replica


def take_gradients(module: torch.nn.Module, replica: torch.nn.Module) -> None:
    """Move the gradients of a mirror to the module that the optimizer knows."""
    for own, other in zip(module.parameters(), replica.parameters(), strict=True):
        own.grad, other.grad = other.grad, None


def train_in_threads(
    module: torch.nn.Module,
    count: int,
    step: Callable[[torch.nn.Module], torch.Tensor],
    apply: Callable[[float], bool],
) -> None:
    """Call ``step(mirror)`` for a loss in each of ``count`` threads until ``apply(loss)`` says False.

    apply: takes the gradients that ``module`` then holds; one thread at a time. A thread's error ends all.
    """
    lock, stopped = threading.Lock(), threading.Event()

    def work() -> None:
        torch.set_num_threads(1)
        replica = mirror(module)
        try:
            while not stopped.is_set():
                loss = step(replica)
                loss.backward()
                with lock:
                    if not stopped.is_set():
                        take_gradients(module, replica)
                        if not apply(loss.item()):
                            stopped.set()
        finally:
            stopped.set()

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work) for _ in range(count)]:
            future.result()
