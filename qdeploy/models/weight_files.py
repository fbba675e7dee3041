"""Check that the weight files of a model folder are complete before anything is read."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from qdeploy.base.errors import ModelError
from qdeploy.models.pipelines import read_pipeline_spec


def check_weight_files(folder: Path, remedy: str) -> None:
    """ModelError that names the first weight file of the pipeline that is shorter or longer than its header says.

    Only headers are read. Not all libraries that load the weights would name the file.
    """
    for part in read_pipeline_spec(folder).folders:
        for path in sorted((folder / part).glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy"):
                    pass
            except SafetensorError as exc:
                raise ModelError(
                    f"{path} is cut or damaged: it has {path.stat().st_size:,} bytes, which is not what its header "
                    f"says ({exc}); {remedy}"
                ) from exc
