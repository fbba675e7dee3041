"""qdeploy quantizes latent-diffusion models and deploys them; importing it never loads torch.

>>> import qdeploy
>>> pipe = qdeploy.load("bundle")                                   # doctest: +SKIP
>>> pipe("a cat wearing a hat", seed=0).images[0].save("cat.png")   # doctest: +SKIP
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

__all__ = ["Pipeline", "Result", "Step", "__version__", "load"]

try:
    __version__ = metadata.version("qdeploy")
except metadata.PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+source"

if TYPE_CHECKING:
    from qdeploy.runtime.pipeline import Pipeline, Result, Step, load


def __getattr__(name: str) -> Any:
    if name in {"Pipeline", "Result", "Step", "load"}:
        from qdeploy.runtime import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'qdeploy' has no attribute {name!r}")
