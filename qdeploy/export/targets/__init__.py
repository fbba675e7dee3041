"""One lowering per target: the passes that turn the exported graph into the form its engine runs fastest.

A module has ``lower(model)`` and, where its engine has rules of its own, ``check(path, component) -> str``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import onnx_ir as ir

from qdeploy.export.passes.forget_origin import forget_origin


def lower(model: ir.Model, target: str) -> None:
    """Run the passes of ``target`` (module ``qdeploy.export.targets.TARGET``) on ``model`` in place."""
    module_of(target).lower(model)
    forget_origin(model)


def check_file(path: Path, component: str, target: str) -> str:
    """Hold the written graph against the target's own rules; what was checked in a phrase, "" when it has none.

    Raises AuditError.
    """
    check = getattr(module_of(target), "check", None)
    return "" if check is None else check(path, component)


def module_of(target: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{target.replace('-', '_')}")
