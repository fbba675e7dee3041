"""Whether the weight files of a model folder are whole, before anything is read: a cut one is named."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from qdeploy.errors import ModelError
from qdeploy.models.pipelines import kind_of


def check_weight_files(folder: Path, remedy: str) -> None:
    """ModelError that names the first weight file of the pipeline that is shorter or longer than its header says.

    Only headers are read. The libraries that load the weights would not all say which file it was.
    """
    for part in kind_of(folder).folders:
        for path in sorted((folder / part).glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy"):
                    pass
            except SafetensorError as exc:
                raise ModelError(
                    f"{path} is cut or damaged: it has {path.stat().st_size:,} bytes, which is not what its header "
                    f"says ({exc}); {remedy}"
                ) from exc
