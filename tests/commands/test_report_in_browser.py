"""The page of a report in Chromium: no request, no complaint, nothing beyond the edge; light, dark, large, small."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import peft_mlm
from tests.run_folders import figures, save_run

pytestmark = pytest.mark.browser
LONG = "a_run_with_a_very_long_name_that_no_line_of_a_phone_holds_" + "x" * 60
# Of each text that is shown: its colour and that of the ground it stands on.
COLOURS_OF_TEXTS = """
() => [
  ...document.querySelectorAll("p, td, th, dt, dd, h1, h2, summary, figcaption, li, code, svg text"),
].map(element => {
  const style = getComputedStyle(element);
  let ground = element;
  while (ground && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  return [element.tagName === "text" ? style.fill : style.color, getComputedStyle(ground).backgroundColor];
})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The Chromium of this machine."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of one run with everything, and of three runs."""
    folder = tmp_path_factory.mktemp("pages")
    full = {
        "base": figures(2.0, loss_standard_error=0.1, accuracy_standard_error=0.01),
        "change": {"loss": {"difference": -0.8, "low": -0.9, "high": -0.7, "level": 0.95}},
        "memory": {"device": "cpu", "predicted_bytes": 2_000_000, "measured_bytes": 1_900_000, "parts": {"weights": 5}},
    }
    runs = [
        save_run(folder / "runs" / "one", more=full),
        save_run(folder / "runs" / LONG, use_lora=True, learning_rate=1e-4, more={"method": "lora"}),
        save_run(folder / "runs" / "<script>document.title='x'</script>", losses={4: 1.4}),
    ]
    written = {"one": folder / "one.html", "three": folder / "three.html"}
    peft_mlm.report(runs[0], output_file=written["one"])
    peft_mlm.report(*runs, output_file=written["three"])
    return written


def channels(colour: str) -> list[float]:
    """Red, green and blue of rgb(...)."""
    return [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours (WCAG), 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [part / 255 for part in channels(colour)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "three"])
def test_a_page_stands_alone_and_fits(
    name: str, scheme: str, width: int, browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 844})
    page, requests, complaints = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(pages[name].as_uri())
    for opened in page.locator("summary").all():
        opened.click()
    assert requests == [pages[name].as_uri()]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() != "x"
    pictures = page.locator("figure > div > svg").all()
    assert len(pictures) >= 6
    for picture in pictures:
        box = picture.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 120
    texts = page.evaluate(COLOURS_OF_TEXTS)
    assert len(texts) > 100
    assert min(contrast(text, ground) for text, ground in texts) >= 4.5
    ground = channels(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (sum(ground) > 600) == (scheme == "light")
    # What is too wide scrolls in its own box.
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll')].every(box => getComputedStyle(box).overflowX === 'auto')"
    )
    context.close()


def test_a_picture_tells_its_values_in_words_and_a_table_has_its_name(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["one"].as_uri())
    loss = page.get_by_role("img", name="Loss (nats per masked token) over steps")
    assert "base 2.0000" in loss.get_attribute("aria-label")
    assert page.get_by_role("table", name="Model and adapter").count() == 1
    assert page.get_by_role("heading", level=1).inner_text() == "one"
    page.close()


def test_on_paper_it_is_dark_on_white(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(pages["three"].as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert channels(page.evaluate("getComputedStyle(document.body).backgroundColor")) == [255, 255, 255]
    assert min(contrast(text, ground) for text, ground in page.evaluate(COLOURS_OF_TEXTS)) >= 4.5
    context.close()
