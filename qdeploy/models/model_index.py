"""``model_index.json``: the class of each part of a folder, which diffusers builds whatever the part's file says."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.base.errors import ModelError, join_names
from qdeploy.models.config_files import read_config

INDEX_FILE = "model_index.json"
LIBRARIES = ("diffusers", "transformers", "latent_diffusion")  # the last is the module of LDMBertModel
# Parts that no pipeline runs here, and what leaving one out means.
LEFT_OUT: Mapping[str, str] = {
    "safety_checker": "pictures that it would black out are shown",
    "feature_extractor": "only the safety checker reads it",
    "image_encoder": "only IP-Adapters read it",
}


@dataclass(frozen=True)
class ModelIndex:
    """The file's entries by part: ``[library, class]``, null or ``[null, null]``, or a setting of the pipeline."""

    path: Path
    entries: Mapping[str, Any]

    @property
    def pipeline(self) -> object:
        """What it says the pipeline's class is."""
        return self.entries.get("_class_name")

    def read_class(self, part: str, like: str) -> str | None:
        """The class of ``part``; None where the index does not speak of it.

        ModelError for an entry that names no class, such as null, or one of another library; ``like`` is an example.
        """
        if part not in self.entries:
            return None
        entry = self.entries[part]
        if not _is_part(entry) or entry[0] not in LIBRARIES:
            raise ModelError(
                f"{self.path} `{part}`: got {reprlib.repr(entry)}, expected a class of diffusers or transformers, as "
                f'in ["{"diffusers" if part != "tokenizer" else "transformers"}", "{like}"]; write the class that the '
                "part was saved with there. A model's own code is not run"
            )
        name: str = entry[1]
        return name

    def check_parts(self, parts: Mapping[str, tuple[str, ...]]) -> None:
        """ModelError for the first of ``parts`` that is of another class than those given for it."""
        for part, classes in parts.items():
            stated = self.read_class(part, classes[0])
            if stated is not None and stated not in classes:
                raise ModelError(
                    f"{self.path} `{part}`: got the class {reprlib.repr(stated)}, expected {' or '.join(classes)}; a "
                    "part of another class computes something else: give a model with this one, or correct the entry"
                )

    def list_left_out(self, known: Collection[str]) -> tuple[str, ...]:
        """A line for each part that is not run: optional ones, and those that the pipeline does not have."""
        present = [name for name, entry in self.entries.items() if not name.startswith("_") and _is_part(entry)]
        unknown = [name for name in present if name not in LEFT_OUT and name not in known]
        lines = [f"{INDEX_FILE} `{name}`: left out, {LEFT_OUT[name]}" for name in LEFT_OUT if name in present]
        if unknown:
            names = join_names([f"`{name:.60}`" for name in unknown])
            lines.append(f"{INDEX_FILE} {names}: left out, diffusers' {self.pipeline} has no such part")
        return tuple(lines)


def read_model_index(folder: Path) -> ModelIndex:
    """The index of the pipeline in ``folder``; ModelError where it is not readable."""
    path = folder / INDEX_FILE
    return ModelIndex(path, read_config(path))


def _is_part(entry: object) -> bool:
    """Whether an entry names a library and a class."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)
