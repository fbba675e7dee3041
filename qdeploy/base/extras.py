"""Which extra of qdeploy holds a module that is missing here, as the installed package's own metadata say."""

from __future__ import annotations

import re
from collections.abc import Iterable

OTHER_NAMES = {
    "cuda": "cuda-python",
    "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "PIL": "pillow",
    "yaml": "pyyaml",
}  # module -> the package that holds it, where the two are not called the same
NAME = re.compile(r"[A-Za-z0-9._-]+")
EXTRA = re.compile(r"""extra\s*==\s*["']([A-Za-z0-9._-]+)["']""")
GROUPS = ("all", "dev", "docs", "peers")  # extras for everybody, or only for who works on qdeploy


def format_install(module: str | None, preferred: str = "") -> str:
    """The command that installs the package of ``module``, such as ``pip install 'qdeploy[quantize]'``.

    preferred: the extra to name where it is one of several that hold the package.
    """
    package = package_from_module(module or "")
    extras = find_extras(package, read_requirements())
    if not extras:
        return f"pip install {package}" if package else "pip install qdeploy"
    return f"pip install 'qdeploy[{preferred if preferred in extras else extras[0]}]'"


def package_from_module(module: str) -> str:
    """The name under which the package that holds ``module`` is installed, normalized."""
    top = module.partition(".")[0]
    return normalize_name(OTHER_NAMES.get(top, top))


def normalize_name(name: str) -> str:
    """``name`` as packages are compared: lower case, and one dash for any run of dashes, dots and underscores."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_extras(package: str, requirements: Iterable[str]) -> list[str]:
    """The extras that hold ``package``, in their order; ``requirements`` are as in a package's metadata."""
    extras = []
    for requirement in requirements:
        name, extra = NAME.match(requirement), EXTRA.search(requirement)
        if name and extra and normalize_name(name.group()) == package and extra.group(1) not in GROUPS:
            extras.append(extra.group(1))
    return list(dict.fromkeys(extras))


def read_requirements() -> list[str]:
    """What the installed qdeploy requires, extras included; nothing of a source tree that was not installed."""
    from importlib import metadata  # it imports email and zipfile, which the runtime does without

    try:
        return metadata.requires("qdeploy") or []
    except metadata.PackageNotFoundError:
        return []
