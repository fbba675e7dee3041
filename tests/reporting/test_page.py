"""A page shows what it was given, runs nothing of it and fetches nothing."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from qdeploy.base.errors import PackageMissingError
from qdeploy.reporting.page import (
    Chart,
    Facts,
    Page,
    Picture,
    Section,
    Table,
    Text,
    chart_style,
    render_page,
    write_page,
)

HOSTILE = "<script>alert(1)</script>\"'><img src=https://evil.example/x onerror=alert(1)> $x^{$ -->"
VOID = {"meta", "img", "br", "hr", "link", "path", "use", "wbr"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")


def browse(page: Path, *options: str) -> str:
    """What a headless browser prints with ``page`` opened; its profile and other files are next to the page."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"file://{page}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def screenshot(page: Path, *options: str, size: tuple[int, int] = (500, 900), mode: str = "L") -> Image.Image:
    """``page`` as the browser draws it in a window of ``size``."""
    shot = page.with_name("shot.png")
    browse(page, *options, f"--window-size={size[0]},{size[1]}", f"--screenshot={shot}")
    with Image.open(shot) as image:
        return image.convert(mode)


class Read(HTMLParser):
    """Tags, attributes and text of a page; asserts that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def chart(text: str = "a chart") -> Chart:
    from matplotlib.figure import Figure

    with chart_style():
        figure = Figure(figsize=(7, 3), layout="constrained")
        panel = figure.subplots()
        panel.plot([1, 2, 3], [3, 1, 2], "o-", label=text)
        panel.set_title(text)
        panel.legend()
        panel.grid()
    return Chart(figure, text, text)


def page(text: str) -> Page:
    blocks = [
        Text([text, text]),
        Facts({text: text}),
        Table(("", text, "n"), [(text, text, "1.0"), ("b", "fp32", "-")], text),
        chart(text),
        Picture(Image.new("RGB", (4, 3), (200, 30, 30)), text, text),
    ]
    return Page(text, text, [Section(text, blocks, text)], text)


def test_hostile_text_stays_text() -> None:
    parsed = Read(render_page(page(HOSTILE)))
    assert not {"script", "iframe", "link", "object"} & set(parsed.tags)
    assert parsed.tags.count("img") == 1
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert sum(HOSTILE in text for text in parsed.text) >= 12


def test_a_page_fetches_nothing() -> None:
    html = render_page(page("plain"))
    parsed = Read(html)
    targets = [value for _, name, value in parsed.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert targets
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}


def test_names_within_charts_meet_their_own_definitions() -> None:
    html = render_page(Page("two", sections=[Section("charts", [chart("one"), chart("two")])]))
    parsed = Read(html)
    names = [value for _, name, value in parsed.attributes if name == "id"]
    used = {value[1:] for _, name, value in parsed.attributes if name == "xlink:href"}
    used |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert len(names) == len(set(names))
    assert used <= set(names)


def test_charts_take_the_colours_of_the_page() -> None:
    svg = render_page(Page("one", sections=[Section("chart", [chart()])])).partition("<svg")[2]
    assert "#000000" not in svg
    assert "currentColor" in svg
    assert "#4477aa" in svg


def test_a_page_is_the_same_every_time() -> None:
    assert render_page(page("same")) == render_page(page("same"))


def test_columns_of_numbers_stand_at_the_right() -> None:
    rows = [("1", "1.5x (1.4–1.6)", "fp32", "fp32", "-"), ("2", "-", "int8", "+8", "≤ 2"), ("3", "", "", "-9", "")]
    assert Table(("", "n", "t", "n", "n"), rows).numeric == [False, True, False, True, True]


def test_a_page_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_page(tmp_path / "sub" / "page.html", page("plain"))
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["page.html"]


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(PackageMissingError, match=r"jinja2.*pip install 'qdeploy\[report\]'"):
        render_page(Page("none"))


@needs_browser
def test_a_browser_draws_it_light_and_dark(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page("plain"))
    corners = []
    for scheme in ([], ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]):
        with screenshot(tmp_path / "page.html", *scheme) as image:
            assert len(image.getcolors() or []) > 20  # text, lines and the chart: not one empty sheet
            corners.append(image.getpixel((2, 2)))
    assert corners[0] > 240
    assert corners[1] < 40
