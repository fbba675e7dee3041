"""The folder that the training scripts work in: its layout and the pictures that it is for.

``layout.json`` says both. A folder of another layout, or of other pictures, is refused before anything in it is
read: its checkpoints would fit by their shapes, and mean something else.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qdeploy.base.errors import QdeployError, UsageError
from qdeploy.base.files import read_state, stage_file

LAYOUT = 2  # 1: all 1,911 pictures, no layout.json
MARKER = "layout.json"
OUTPUT_PATTERNS = ("*.ckpt", "training.json", "tokenizer", "vae", "vqvae", "model", "model-uncond")
REMEDY = "give a new folder with --work; its `data` folder may be moved there, which saves fetching it again"


def check_work(folder: Path) -> None:
    """UsageError unless ``folder`` is of this layout, or holds nothing that a training wrote."""
    outputs = sorted(path.name for pattern in OUTPUT_PATTERNS for path in folder.glob(pattern))
    marker = folder / MARKER
    if not marker.exists():
        if outputs:
            raise UsageError(
                f"{folder} is a training folder of an older layout: it holds {', '.join(outputs[:4])} and no {MARKER}, "
                f"expected layout {LAYOUT}; {REMEDY}"
            )
        return
    layout = read_state(marker).get("layout")
    if layout != LAYOUT:
        raise UsageError(f"{marker}: got layout {layout!r}, expected {LAYOUT}; {REMEDY}")


def claim_work(folder: Path, pictures: np.ndarray) -> None:
    """Mark ``folder`` as being about these pictures, ``uint8[N, 64, 64, 3]``; UsageError when it is about others."""
    check_work(folder)
    facts = {"layout": LAYOUT, "pictures": len(pictures), "sha256": hashlib.sha256(pictures.tobytes()).hexdigest()}
    marker = folder / MARKER
    if not marker.exists():
        with stage_file(marker) as scratch:
            scratch.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return
    stored = read_state(marker)
    if stored != facts:
        raise UsageError(
            f"{folder} was trained on {stored.get('pictures')} pictures (sha256 {str(stored.get('sha256'))[:12]}), "
            f"these scripts choose {len(pictures)} ({facts['sha256'][:12]}); {REMEDY}"
        )


def run_script(main: Callable[[], None]) -> None:
    """Call ``main``; an error that is the user's is one paragraph on stderr."""
    try:
        main()
    except QdeployError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
