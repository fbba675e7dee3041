"""One lowering per target: the passes that turn the exported graph into the form its engine runs fastest.

A module has ``lower(model)`` and, where its engine has rules of its own, ``check(path, component) -> str``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import onnx_ir as ir

from qdeploy.export.passes.strip_metadata import strip_metadata


def lower(model: ir.Model, target: str) -> None:
    """Run the passes of ``target`` (module ``qdeploy.export.targets.TARGET``) on ``model`` in place."""
    load_lowering(target).lower(model)
    strip_metadata(model)


def check_file(path: Path, component: str, target: str) -> str:
    """Check the written graph against the target's own rules; a phrase on what was checked, "" when it has none.

    Raises AuditError.
    """
    check = getattr(load_lowering(target), "check", None)
    return "" if check is None else check(path, component)


def load_lowering(target: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{target.replace('-', '_')}")
