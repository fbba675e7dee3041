"""The files that the runtime reads besides graphs: checked before the work, written, and opened as it opens them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qdeploy.artifacts.bundle import SCHEDULER, open_bundle, tokenizer_file
from qdeploy.base.errors import BundleError, ExportError
from qdeploy.models.source import LatentDiffusion
from qdeploy.models.tokenizing import PromptTokenizer
from qdeploy.runtime.model import open_runtime_files
from qdeploy.runtime.tokenizer_file import open_backend
from qdeploy.sampling import check_scheduler

TOKENIZER_REMEDY = "a bundle runs the rules of CLIP's and BERT's tokenizers only; give the model such a tokenizer"


def build_runtime_files(model: LatentDiffusion) -> Mapping[str, str]:
    """Path in the bundle -> text of each; SchedulerError or ExportError for what the runtime would refuse."""
    check_scheduler(model.scheduler_config)
    files = {SCHEDULER: json.dumps(dict(model.scheduler_config), indent=1) + "\n"}
    for name, encoder in model.text_encoders.items():
        text, what = build_tokenizer_json(encoder.tokenizer), f"the tokenizer of {name} of {model.source}"
        try:
            open_backend(text.encode(), what, encoder.tokenizer.length, TOKENIZER_REMEDY)
        except BundleError as exc:
            raise ExportError(str(exc)) from exc
        files[tokenizer_file(name)] = text
    return files


def build_tokenizer_json(tokenizer: PromptTokenizer) -> str:
    """``tokenizer.json`` that pads and truncates by itself to the text encoder's length."""
    pad, backend = tokenizer.backend, tokenizer.backend.backend_tokenizer
    length = tokenizer.length
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=pad.pad_token_id, pad_token=pad.pad_token)
    text: str = backend.to_str(pretty=True)
    backend.no_truncation()
    backend.no_padding()
    return text


def write_runtime_files(files: Mapping[str, str], folder: Path) -> None:
    """Write them to the bundle in ``folder``."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def check_opens(folder: Path, out: Path) -> None:
    """ExportError unless the runtime takes the finished bundle in ``folder``, which is to become ``out``."""
    try:
        open_runtime_files(open_bundle(folder, verify=False), remedy="")  # it was hashed a moment ago
    except BundleError as exc:
        reason = str(exc).replace(str(folder), str(out))
        raise ExportError(
            f"the runtime would refuse what was made of this model, so it is not kept: {reason}; report this as a bug "
            "with the output of `qdeploy inspect` of the model"
        ) from exc
