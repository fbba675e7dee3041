"""One lowering per target: the passes that turn the exported graph into the form its engine runs fastest."""

from __future__ import annotations

import importlib

import onnx_ir as ir


def lower(model: ir.Model, target: str) -> None:
    """Run the passes of ``target`` (module ``qdeploy.export.targets.TARGET``) on ``model`` in place."""
    importlib.import_module(f"{__name__}.{target.replace('-', '_')}").lower(model)
