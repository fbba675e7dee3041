"""A figure in its dark colours, for the README: `python scripts/docs/dark.py way` writes way-dark.svg next to way.svg.

The site needs no such copy, for its style sheet recolours the figures inside the page.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FIGURES = ROOT / "docs" / "assets" / "figures"
STYLE = ROOT / "docs" / "assets" / "extra.css"
RULE = re.compile(r'\[data-md-color-scheme="slate"\] (\.fig \.\w+)\s*\{\s*([^}]*?)\s*\}')


def dark_rules() -> str:
    """The site's own dark colours of figures, as a style sheet that needs no page around it."""
    return "".join(f"{selector}{{{body}}}" for selector, body in RULE.findall(STYLE.read_text(encoding="utf-8")))


def dark_figure(svg: str) -> str:
    """``svg`` with the dark colours after its own ones, which they override."""
    return svg.replace("</style>", f"{dark_rules()}\n</style>", 1)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        source = FIGURES / f"{name}.svg"
        source.with_stem(f"{name}-dark").write_text(dark_figure(source.read_text(encoding="utf-8")), encoding="utf-8")
