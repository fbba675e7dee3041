"""qdeploy quantizes latent-diffusion models and deploys them; importing it never loads torch.

>>> import qdeploy
>>> pipe = qdeploy.load("bundle")                                   # doctest: +SKIP
>>> pipe("a cat wearing a hat", seed=0).images[0].save("cat.png")   # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Pipeline", "Result", "Step", "__version__", "load"]

if TYPE_CHECKING:
    from qdeploy.runtime.pipeline import Pipeline, load
    from qdeploy.runtime.results import Result, Step

    __version__: str


def __getattr__(name: str) -> Any:
    if name in {"Pipeline", "Result", "Step", "load"}:
        from qdeploy.runtime import pipeline

        return getattr(pipeline, name)
    if name == "__version__":
        from qdeploy.base.version import read_version

        return read_version()
    raise AttributeError(f"module 'qdeploy' has no attribute {name!r}")
