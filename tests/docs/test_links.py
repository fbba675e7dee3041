"""Links, paths and variables named in README, CONTRIBUTING and the documentation exist; the first two stay short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.docs.dark import FIGURES, dark_figure
from tests.docs import ahead
from tests.docs.blocks import PAGES, ROOT

OUTSIDE_SITE = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md")
LINK = re.compile(r"(?:\]\(|src=\"|srcset=\")([^)\s\"]+)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
ANCHOR = re.compile(r"<a id=\"([^\"]+)\"")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(
    r"(?:qdeploy|tests|scripts|recipes|examples|benchmarks|training|engines|runtime|export|checkpoints|simulate|sample)"
    r"/[\w/.-]*"
)
VARIABLE = re.compile(r"\bQDEPLOY_[A-Z_]+")


def list_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them, and those it sets itself."""
    text = page.read_text(encoding="utf-8")
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in HEADING.findall(text)}
    return slugs | set(ANCHOR.findall(text))


@pytest.mark.parametrize("page", OUTSIDE_SITE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """mkdocs checks those within the site."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in list_anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        for path in PATH.findall(code) if PATH.match(code) else []:
            homes = (ROOT / path, ROOT / "qdeploy" / path, ROOT / "qdeploy" / "models" / path)
            known = path in ahead.PATHS or "NAME" in path or any(home.exists() for home in homes)
            assert known, f"{page.name} names {path}, which is not there"


def test_variables_are_read() -> None:
    sources = [*(ROOT / "qdeploy").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    read = set(VARIABLE.findall("".join(path.read_text(encoding="utf-8") for path in sources)))
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    named = set(VARIABLE.findall(page))
    assert named - ahead.VARIABLES <= read
    package = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "qdeploy").rglob("*.py"))
    assert set(VARIABLE.findall(package)) <= named, "environment.md names every variable that the package reads"


def test_readme_and_contributing_stay_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8_000
    assert len((ROOT / "CONTRIBUTING.md").read_bytes()) <= 10_000
    assert "<!-- demo table -->" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_dark_figure_is_the_light_one() -> None:
    light = (FIGURES / "way.svg").read_text(encoding="utf-8")
    dark = (FIGURES / "way-dark.svg").read_text(encoding="utf-8")
    assert dark == dark_figure(light), "run `python scripts/docs/dark.py way`"
    assert dark.count("#e8ecf1") == 1
