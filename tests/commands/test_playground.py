"""`playground`: what the page answers, mistakes, and the page itself in a real browser."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import peft_mlm
from peft_mlm.commands.fill_mask import fill_mask_side_by_side
from peft_mlm.commands.playground import answers, describe_sides, example_text
from peft_mlm.console import probability_text
from peft_mlm.each_token import each_token
from peft_mlm.errors import ArgumentsError
from peft_mlm.playground_page import find_port
from peft_mlm.playground_tables import masks_html, tokens_html
from peft_mlm.predicting import Predictor
from peft_mlm.side_by_side import Sides, load_sides
from tests.adapters import save_random_adapter
from tests.commands.conftest import Answer
from tests.tiny import save_base

MASKED, PLAIN = "ABC<mask>EFG<mask>", "ABCDEFGHIKLA"
# The command, with every address that the process asks for beyond this machine noted.
SERVE = """
import signal, socket, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
asked, connect, look_up = [], socket.socket.connect, socket.getaddrinfo

def watched(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        asked.append(address)
    return connect(self, address)

def watched_name(host, *args, **options):
    if host not in ("127.0.0.1", "localhost", "::1", None):
        asked.append(host)
    return look_up(host, *args, **options)

socket.socket.connect, socket.getaddrinfo = watched, watched_name
from peft_mlm.cli import main
code = main(sys.argv[1:])
print(f"asked for: {asked}", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_random_adapter(base_folder, folder / name, seed) for seed, name in enumerate(("one", "two"), 1)]


@pytest.fixture(scope="module")
def sides(adapters: list[Path]) -> Sides:
    return load_sides([str(path) for path in adapters])


def test_a_text_with_masks_shows_what_fill_mask_predicts(sides: Sides, adapters: list[Path]) -> None:
    found = fill_mask_side_by_side(MASKED, [str(path) for path in adapters], top_k=3)
    expected = masks_html({name: results[0] for name, results in found.items()})
    assert answers(sides)(MASKED, 3) == expected
    assert answers(sides)(f"\n {MASKED.replace('<mask>', '[MASK]')} ", 3) == expected


def test_a_text_without_masks_shows_each_token(sides: Sides) -> None:
    assert answers(sides)(PLAIN, 3) == tokens_html(each_token(sides, Predictor(sides.loaded(None)), PLAIN))


def test_answers_at_the_same_time_are_those_of_one_after_another(sides: Sides) -> None:
    answer = answers(sides)
    texts = [MASKED, PLAIN, "A<mask>", "TSR"] * 4
    alone = [answer(text, 3) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: answer(text, 3), texts)) == alone


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "Write a text first"), (" \n", "Write a text"), ("A" * 70, "holds 62"), ("A" * 70 + "<mask>", "holds 62"),
     ("zz", "no token to predict")],
)  # fmt: skip
def test_a_mistake_is_a_message_on_the_page(sides: Sides, text: str, said: str) -> None:
    html = answers(sides)(text, 3)
    assert 'role="alert"' in html
    assert said in html


def test_the_page_says_which_models_answer_and_begins_with_the_runs_own_text(
    trained_run: Path, base_folder: Path, held_out: Path, sides: Sides, tmp_path: Path
) -> None:
    run = load_sides([str(trained_run)])
    first = held_out.read_text().splitlines()[0]
    middle = len(first) // 2
    assert example_text(run, str(trained_run)) == f"{first[:middle]}<mask>{first[middle + 1 :]}"
    intro = describe_sides(run)
    assert f"Base: `{base_folder.name}`. Beside it: `{trained_run.name}`." in intro
    assert "`<mask>`" in intro
    assert str(base_folder.parent) not in intro
    alone = load_sides([str(base_folder)])
    assert describe_sides(alone).startswith(f"Model: `{base_folder.name}`.")
    assert example_text(alone, str(base_folder)).count("<mask>") == 1


def test_a_run_whose_text_is_gone_begins_with_another(trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    file = run / "arguments.yaml"
    file.write_text(re.sub(r"\S+held_out\.txt", "gone.txt", file.read_text()))
    assert example_text(load_sides([str(run)]), str(run)) == "The answer is <mask>."


def test_a_port_in_use_is_refused_and_without_one_the_next_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ArgumentsError, match=f"port {port} at 127.0.0.1: Address already in use"):
            find_port("127.0.0.1", port)
        assert find_port("127.0.0.1", 0) not in (0, port)
    assert find_port("127.0.0.1", port) == port
    assert find_port("127.0.0.1", None) >= 7860


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: model"),
        (["/no/such/folder"], "no folder"),
        (["ONE", "/no/such/folder"], "no folder"),
        (["ONE", "--port", "PORT"], "Address already in use"),
        (["ONE", "--port", "70000"], "port is 70000; it must be 0 to 65535"),
        (["ONE", "--port", "-1"], "port is -1; it must be"),
        (["ONE", "--port", "many"], "'many'"),
        (["ONE", "--host", "no.such.host.invalid"], "no address 'no.such.host.invalid'"),
        (["ONE", "OTHER"], "is a whole model"),
        (["ONE", "--share"], "no such argument"),
    ],
)
def test_mistakes_end_in_one_sentence(
    command: Callable[..., Answer], adapters: list[Path], tmp_path: Path, words: list[str], said: str
) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"ONE": adapters[0], "PORT": taken.getsockname()[1]}
        if "OTHER" in words:
            names["OTHER"] = save_base(tmp_path / "other", seed=5)
            words = [*words, "--base", str(names["OTHER"])]
        assert said in command("playground", *(names.get(word, word) for word in words)).fault


def test_without_gradio_one_sentence_says_how_to_get_it(
    command: Callable[..., Answer], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else find(name, *a))
    fault = command("playground", adapters[0]).fault
    assert "pip install 'peft-mlm[playground]'" in fault


@pytest.fixture(scope="module")
def served(adapters: list[Path]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command in a process of its own, and the address that it tells."""
    pytest.importorskip("gradio")
    words = [sys.executable, "-c", SERVE, "playground", *map(str, adapters), "--port", "0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        try:
            (address,) = re.findall(r"the playground is at (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\.", line)
            yield address, process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=options)
        yield started
        started.close()


def watched_page(browser: Any, address: str, **options: Any) -> tuple[Any, list[str]]:
    """A page, and what it asks of other addresses or complains about."""
    page = browser.new_context(**options).new_page()
    faults: list[str] = []
    own = (address, address.replace("http:", "ws:"), "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else faults.append(request.url))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#text textarea")
    return page, faults


def predict(page: Any, text: str, awaited: str) -> Any:
    page.fill("#text textarea", text)
    page.click("#predict")
    page.wait_for_selector(f"#shown .play:has-text('{awaited}')", timeout=60_000)
    return page.locator("#shown .play")


@pytest.mark.browser
def test_the_page_answers_offline_in_light_and_dark_and_on_a_phone(
    served: tuple[str, subprocess.Popen[str]], browser: Any, adapters: list[Path]
) -> None:
    address, _ = served
    found = fill_mask_side_by_side(MASKED, [str(path) for path in adapters], top_k=1)
    best = [results[0]["masks"][0]["predictions"][0] for results in found.values()]
    most_probable = [word for one in best for word in (one["token"], probability_text(one["probability"]))]
    for options in (
        {"color_scheme": "light", "viewport": {"width": 1100, "height": 800}},
        {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}},
    ):
        page, faults = watched_page(browser, address, **options)
        shown = predict(page, MASKED, "Mask 2")
        header, first = (row.inner_text().split() for row in shown.locator("table").first.locator("tr").all()[:2])
        assert header == ["base", "one", "two"]
        assert first == ["1", *most_probable]
        shown = predict(page, PLAIN, "Each token masked in turn")
        assert shown.locator(".text").first.inner_text() == PLAIN
        page.click("#shown summary")
        assert shown.locator("details tbody tr").count() == len(PLAIN)
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert contrast(page, "#shown .play p.quiet >> nth=0") >= 4.5
        assert contrast(page, "#shown .play td >> nth=0") >= 4.5
        assert faults == []


@pytest.mark.browser
def test_what_a_user_writes_does_not_become_part_of_the_page(
    served: tuple[str, subprocess.Popen[str]], browser: Any
) -> None:
    page, faults = watched_page(browser, served[0])
    shown = predict(page, "A<img src=x onerror=\"document.title='taken'\">B", "Each token masked in turn")
    assert shown.locator("img").count() == 0
    assert page.title() == "peft-mlm playground"
    assert 'role="alert"' in predict(page, "zz", "no token to predict").inner_html()
    assert faults == []


@pytest.mark.browser
def test_interrupted_it_ends_well_and_has_asked_nobody(served: tuple[str, subprocess.Popen[str]]) -> None:
    address, process = served
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == f'{{"address": "{address}", "models": ["base", "one", "two"]}}\n'
    assert err == "asked for: []\n"
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=2):
        pass


def contrast(page: Any, selector: str) -> float:
    """Contrast of a text with the page behind it, as WCAG 2 defines it; opacity counts."""
    text, opacity, behind = page.locator(selector).evaluate(
        """node => {
            const style = getComputedStyle(node);
            let behind = "rgba(0, 0, 0, 0)";
            for (let at = node; at && behind === "rgba(0, 0, 0, 0)"; at = at.parentElement)
                behind = getComputedStyle(at).backgroundColor;
            return [style.color, Number(style.opacity), behind];
        }"""
    )
    front, back = ([float(number) for number in re.findall(r"[\d.]+", one)[:3]] for one in (text, behind))
    mixed = [opacity * one + (1 - opacity) * other for one, other in zip(front, back, strict=True)]
    lighter, darker = sorted((luminance(mixed), luminance(back)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(rgb: list[float]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_function_is_part_of_the_package() -> None:
    assert peft_mlm.playground.__name__ == "playground"
