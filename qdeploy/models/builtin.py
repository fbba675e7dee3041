"""Where the built-in models are: in a package of their own, which services that only run bundles leave out."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qdeploy.base.errors import ModelError

PACKAGE = "qdeploy_builtin_models"
REMEDY = "install them: pip install qdeploy-builtin-models (the extra quantize brings them)"
REINSTALL = "install them again: pip install --force-reinstall qdeploy-builtin-models"
PREFIX = "builtin:"


def find_builtin_root() -> Path | None:
    """The folder that holds a folder for each built-in model; None where their package is not installed."""
    spec = find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def list_builtins() -> list[str]:
    """Names of the built-in models that are installed; empty where their package is not."""
    root = find_builtin_root()
    return [] if root is None else sorted(path.parent.name for path in root.glob("*/model_index.json"))


def find_builtin_folder(name: str) -> Path:
    """The pipeline folder of the built-in model; ModelError with the remedy where it or all of them are missing."""
    root, names = find_builtin_root(), list_builtins()
    if root is None or not names:
        raise ModelError(f"{PREFIX}{name}: the built-in models are not installed; {REMEDY}")
    if name not in names:
        raise ModelError(f"no built-in model {name!r}; there are: {', '.join(names)}")
    return root / name


def describe_builtins() -> str:
    """``builtin:NAME`` with what NAME can be, for an error that lists what to give."""
    return f"{PREFIX}NAME ({', '.join(list_builtins()) or REMEDY})"
