"""How the service loads a bundle, and what it calls it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qdeploy.base.errors import UsageError
from qdeploy.runtime.pipeline import load
from qdeploy.serve.rendering import PipelineRenderer
from qdeploy.serve.shelf import Load

NAME = re.compile(r"[\w.:@+-]+")  # what goes into a URL, a log line and a metric's label as it is


def make_loader(engine: str | None = None, threads: int | None = None) -> Load:
    """A function that loads a bundle's folder; ``engine`` and ``threads`` as ``runtime.pipeline.load`` takes them."""

    def load_folder(name: str, folder: Path, low_memory: bool) -> PipelineRenderer:
        return PipelineRenderer(load(folder, engine=engine, threads=threads, low_memory=low_memory))

    return load_folder


def name_bundles(texts: Iterable[str]) -> dict[str, Path]:
    """Folders by the names of ``NAME=FOLDER``, or by their own; UsageError for a name twice or of other characters."""
    folders: dict[str, Path] = {}
    for text in texts:
        given, equals, place = text.partition("=")
        is_named = bool(equals) and not Path(text).exists()
        folder, name = (Path(place), given) if is_named else (Path(text), Path(text).resolve().name)
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{text}: got the name {name!r}, expected letters, digits and any of . : @ + - _; give NAME={folder}"
            )
        if name in folders:
            raise UsageError(f"{text}: {folders[name]} is called {name!r} too; give one of them as NAME={folder}")
        folders[name] = folder
    return folders
