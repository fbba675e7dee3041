"""The web page in a real browser: clicks and keys go in, and the pictures that come out are looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdeploy.serve.web.page import make_policy, read_page
from qdeploy.serve.web.settings import WebSettings
from tests.serve.browser import CONTROL, Tab, needs_browser, open_tab
from tests.serve.running import Running, borrow_pipe, run_stand_in
from tests.serve.stand_in import StandInMaker, wait_until

DONE = "document.querySelector('#status')?.textContent === 'done'"
READY = "document.querySelector('#status')?.textContent === 'ready'"
FIRST = ".run figure img"
BOX = "(() => { const b = document.querySelector('%s').getBoundingClientRect(); return [b.x, b.y, b.width]; })()"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with open_tab(tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab, service: Running) -> Iterator[Tab]:
    """The page, opened; nothing on it may fail, and nothing may be fetched from elsewhere."""
    browser.errors.clear()
    browser.requests.clear()
    browser.open(service.url + "/")
    browser.wait(READY)
    yield browser
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith((service.url, "data:", "blob:"))] == []


def fill(tab: Tab, **values: object) -> None:
    """Values of fields, typed."""
    for name, value in values.items():
        tab.run(f"document.querySelector('#{name}').focus(); document.querySelector('#{name}').select()")
        tab.type(str(value))


def make(service: Running, model: str, **arguments: object) -> np.ndarray:
    with borrow_pipe(service, model) as pipe:
        return pipe(**arguments).pixels[0]


def test_the_page_is_one_file_that_names_no_other() -> None:
    page = read_page()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page.replace("xmlns='http://www.w3.org/2000/svg'", ""))
    assert not re.search(r"\bimport\b|@import|url\(|<link(?! rel=\"icon\")|innerHTML|eval\(", page)
    policy = make_policy(page)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


@needs_browser
def test_a_picture_by_mouse(tab: Tab, service: Running) -> None:
    tab.click("#prompt")
    tab.type("a cat")
    fill(tab, steps=4, seed=7, guidance=3)
    tab.click("#make")
    tab.wait(DONE)
    shown = np.asarray(tab.read_image(FIRST))
    assert np.array_equal(shown, make(service, "tiny", prompt="a cat", steps=4, seed=7, guidance_scale=3.0))
    caption = tab.run("document.querySelector('.run figcaption').textContent")
    assert re.search(r"tiny · \d+\.\d\d s .* · seed 7 · save", caption)
    x, y, side = tab.run(BOX % FIRST)
    screen = np.asarray(tab.take_picture().crop((round(x), round(y), round(x + side), round(y + side))), np.float32)
    blocks = np.asarray(Image.fromarray(screen.astype(np.uint8)).resize((16, 16), Image.Resampling.BOX), np.float32)
    assert np.corrcoef(blocks.ravel(), shown.astype(np.float32).ravel())[0, 1] > 0.95  # it is really on the screen


@needs_browser
def test_a_picture_by_keyboard(tab: Tab, service: Running) -> None:
    assert tab.run("document.activeElement.id") == "prompt"
    tab.type("a dog")
    fill(tab, steps=3, seed=1)
    tab.press("Enter", CONTROL)
    tab.wait(DONE)
    shown = np.asarray(tab.read_image(FIRST))
    assert np.array_equal(shown, make(service, "tiny", prompt="a dog", steps=3, seed=1))
    order = []
    tab.run("document.querySelector('#prompt').focus()")
    for _ in range(12):
        tab.press("Tab")
        order.append(tab.run("document.activeElement.id || document.activeElement.tagName"))
    assert order[:7] == ["negative", "width", "height", "steps", "guidance", "seed", "count"]
    assert {"live", "make"} <= set(order)


@needs_browser
def test_bundles_side_by_side_with_their_difference(tab: Tab, service: Running) -> None:
    tab.click("[value=fp32]")
    fill(tab, prompt="a cat", steps=3, seed=5)
    tab.click("#make")
    tab.wait(DONE)
    figures = tab.run("[...document.querySelectorAll('.run:first-child figcaption')].map((e) => e.textContent)")
    assert len(figures) == 3
    assert [text.split(" · ")[0] for text in figures[:2]] == ["tiny", "fp32"]
    first, second = (make(service, model, prompt="a cat", steps=3, seed=5) for model in ("tiny", "fp32"))
    mse = ((first.astype(float) - second) ** 2).mean()
    assert f"fp32 − tiny, 8× · {10 * np.log10(255**2 / mse):.1f} dB PSNR" in figures[2]
    shown = tab.run(
        "[...document.querySelector('.difference canvas').getContext('2d').getImageData(0, 0, 16, 16).data].slice(0, 3)"
    )
    assert shown == np.minimum(255, 8 * np.abs(first.astype(int) - second))[0, 0].tolist()


@needs_browser
def test_from_a_picture_with_a_mask_drawn_by_mouse_and_by_keys(tab: Tab, service: Running, tmp_path: Path) -> None:
    photo = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    tab.click("#source summary")
    tab.give_file("#file", tmp_path / "photo.png")
    tab.wait("!document.querySelector('#edit').hidden")
    fill(tab, prompt="a cat", steps=4, seed=2)
    tab.run("document.querySelector('#brush').value = 50")
    tab.run("document.querySelector('#mask').scrollIntoView({block: 'center'})")
    x, y, side = tab.run(BOX % "#mask")
    tab.drag((x + side * 0.2, y + side * 0.2), (x + side * 0.2, y + side * 0.8))
    read_mask = "[...marks.getContext('2d').getImageData(0, 0, 16, 16).data].filter((_, i) => i % 4 === 3)"
    drawn = np.array(tab.run(read_mask)).reshape(16, 16)
    assert drawn[3, 3] == 255
    assert drawn[:, 12:].max() == 0
    tab.run("document.querySelector('#mask').focus()")
    for _ in range(2):
        tab.press("ArrowRight")
    tab.press(" ")
    by_keys = np.array(tab.run(read_mask)).reshape(16, 16)
    assert by_keys[8, 14] == 255
    assert drawn.sum() < by_keys.sum()
    tab.run("document.querySelector('#strength').value = 1")
    tab.click("#make")
    tab.wait(DONE)
    shown = np.asarray(tab.read_image(FIRST))
    repainted = by_keys > 128  # transparent in the mask that is sent
    expected = make(service, "tiny", prompt="a cat", steps=4, seed=2, image=photo, mask=repainted, strength=1.0)
    assert np.array_equal(shown, expected)
    tab.run("document.querySelector('#mask').focus()")
    tab.press("c")
    assert np.array(tab.run(read_mask)).max() == 0


@needs_browser
def test_an_error_is_shown_by_the_field(tab: Tab) -> None:
    fill(tab, prompt="a cat", steps=3)
    tab.run("document.querySelector('#form').noValidate = true")
    fill(tab, steps=1000)
    tab.click("#make")
    tab.wait("document.querySelector('.run .error') !== null")
    assert "num_inference_steps: got 1000, expected at most 150" in tab.run(
        "document.querySelector('.error').textContent"
    )
    assert not tab.run("document.querySelector('#make').disabled")
    tab.errors.clear()  # the browser logs the status 400 itself


@needs_browser
def test_the_history_fills_the_form_again(tab: Tab) -> None:
    tab.run("localStorage.clear()")
    fill(tab, prompt="a <b>red</b> house", steps=3, seed=11, guidance=2)
    tab.click("#make")
    tab.wait(DONE)
    tab.send("Page.reload")
    tab.wait(READY)
    assert tab.run("document.querySelectorAll('#history li').length") == 1
    tab.click("#history button.old")
    assert tab.run("['prompt', 'steps', 'seed', 'guidance'].map((id) => document.getElementById(id).value)") == [
        "a <b>red</b> house", "3", "11", "2",
    ]  # fmt: skip
    tab.click("#forget")
    assert tab.run("document.querySelector('#history').hidden")


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_in_light_and_dark(tab: Tab, service: Running, dark: bool) -> None:
    tab.open(service.url + "/", width=360, height=740, dark=dark)
    tab.wait(READY)
    fill(tab, prompt="a cat", steps=2, seed=1)
    tab.click("#make")
    tab.wait(DONE)
    assert tab.run("document.documentElement.scrollWidth") <= 360
    outside = "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > 361).length"
    assert tab.run(outside) == 0
    ground = np.asarray(tab.take_picture())[-1, 1]
    assert bool(ground.mean() < 60) is dark


@needs_browser
def test_previews_progress_and_cancelling(browser: Tab, float_bundle: Path) -> None:
    """With a stand-in whose steps are released here: the page shows each, and cancelling stops within one."""
    maker = StandInMaker()
    with run_stand_in(float_bundle, maker) as running:
        browser.open(running.url + "/")
        browser.wait(READY)
        fill(browser, prompt="a cat", steps=50, seed=200)
        browser.click("#make")
        maker.steps.release(3)  # type: ignore[union-attr]
        browser.wait("document.querySelector('progress') && document.querySelector('progress').value === 3")
        assert browser.run("document.querySelector('progress').max") == 50
        browser.wait(f"document.querySelector('{FIRST}').src.startsWith('data:')")
        assert (np.asarray(browser.read_image(FIRST)) == 200).all()
        assert browser.run("document.querySelector('#make').disabled")
        (ticket,) = running.room.list_running()
        browser.press("Escape")
        browser.wait("document.querySelector('#status')?.textContent === 'cancelled'")
        wait_until(lambda: ticket.outcome == "cancelled")
        maker.steps.release()  # type: ignore[union-attr]
        wait_until(lambda: not running.room.list_running())
        assert maker.made <= 4
        browser.send("Page.navigate", url="about:blank")


@needs_browser
def test_the_key_is_asked_for(browser: Tab, float_bundle: Path) -> None:
    with run_stand_in(float_bundle, StandInMaker(is_free=True), WebSettings(api_key="s3cret")) as running:
        browser.open(running.url + "/")
        browser.wait("!document.querySelector('#keybox').hidden")
        browser.wait("document.querySelector('#status').textContent.includes('API key is missing')")
        browser.type("s3cret")
        browser.press("Tab")
        browser.wait(READY)
        fill(browser, prompt="a cat", steps=2)
        browser.click("#make")
        browser.wait(DONE)
        browser.run("sessionStorage.clear()")
        browser.send("Page.navigate", url="about:blank")
