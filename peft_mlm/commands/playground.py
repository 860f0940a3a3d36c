"""`peft-mlm playground`: a page on this machine where a base and its adapters answer side by side.

A text with masks: what each model predicts there. A text without: each of its tokens masked in turn, with
pseudo-perplexities, coloured by what an adapter changed.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mlm.console import CommandParser
from peft_mlm.errors import ArgumentsError, PeftMlmError
from peft_mlm.model_checks import check_path

if TYPE_CHECKING:
    from peft_mlm.side_by_side import Sides

logger = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "localhost", "::1")
# Of the text that stands in the box at first, words or (where there are no spaces) characters.
EXAMPLE_WORDS, EXAMPLE_LETTERS = 30, 150


def playground(
    names_or_paths: str | Sequence[str] | Mapping[str, str],
    *,
    base: str | None = None,
    any_base: bool = False,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    up: Callable[[str], Any] = lambda address: None,
) -> dict[str, Any]:
    """Serve a page on which a base and its adapters answer side by side, until the process is interrupted.

    The base is loaded once. Nothing is sent to, or fetched from, anywhere else.

    Args:
        names_or_paths: Runs or adapters (folders or hub names) of one base, by name or as a list; among several one may
            be that base; or one model.
        base: The base, if it is not the recorded one.
        any_base: Also adapters that were trained on a base with other weights.
        host: Address to listen at; by default this machine alone can open the page.
        port: Port; the first free one from 7860 on if None, any free one if 0.
        open_browser: Whether to open the page in the browser.
        up: Is told the address when the page can be opened.

    Returns:
        `address`, and `models`: names in the order they are shown, "base" for the base.

    Raises:
        ArgumentsError: Gradio is not installed, or the port or the address cannot be used.
        AdapterError: The adapters do not go together, or do not fit the base.
        ModelError: A model cannot be loaded.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ArgumentsError("The playground needs the package gradio: pip install 'peft-mlm[playground]'.")
    given = [names_or_paths] if isinstance(names_or_paths, str) else names_or_paths
    for path in given.values() if isinstance(given, Mapping) else given:
        check_path(path)

    from peft_mlm.playground_page import build_page, find_port, serve
    from peft_mlm.playground_tables import side_name

    port = find_port(host, port)
    from peft_mlm.side_by_side import load_sides

    sides = load_sides(given, base=base, any_base=any_base)
    for notice in sides.notices:
        logger.info(notice)
    example = example_text(sides, next(iter(given.values())) if isinstance(given, Mapping) else given[0])
    page = build_page(answers(sides), intro=describe_sides(sides), example=example, tokens=len(sides.tokenizer))
    address: list[str] = []

    def started(where: str) -> None:
        address.append(where)
        logger.info(f"the playground is at {where} (Ctrl-C ends it).")
        if host not in LOCAL:
            logger.info(f"whoever reaches this machine at {host} can use it.")
        up(where)

    serve(page, host=host, port=port, open_browser=open_browser, up=started)
    return {"address": address[0], "models": [side_name(name) for name in sides.sides]}


def answers(sides: Sides) -> Callable[[str, int], str]:
    """Make the function behind the page.

    Args:
        sides: The models.

    Returns:
        From a text, and how many tokens to show for each mask, to HTML. A mistake becomes a message on the page.
    """
    from peft_mlm.each_token import each_token
    from peft_mlm.playground_tables import fault, masks_html, tokens_html
    from peft_mlm.predicting import Predictor, Question, with_own_mask

    predictor = Predictor(sides.loaded(next(iter(sides.sides))))
    one_at_a_time = threading.Lock()  # the adapters take turns on one base

    def answer(text: str, top_k: int) -> str:
        text = with_own_mask(sides.tokenizer, text.strip())
        if not text:
            return fault("Write a text first.")
        try:
            with one_at_a_time:
                if str(sides.tokenizer.mask_token) not in text:
                    return tokens_html(each_token(sides, predictor, text))
                question = Question(top_k=int(top_k))
                read = predictor.read([text], question)
                found = {n: predictor.predict(sides.loaded(n).model, read, question)[0] for n in sides.sides}
                return masks_html(found)
        except PeftMlmError as error:
            return fault(str(error))

    return answer


def describe_sides(sides: Sides) -> str:
    """Say in Markdown which models answer, and how masks are written.

    Args:
        sides: The models.

    Returns:
        Markdown.
    """
    names = ", ".join(f"`{name}`" for name in sides.sides if name is not None)
    base = f"Base: `{Path(sides.base).name}`. Beside it: " if None in sides.sides else "Model: "
    return (
        f"{base}{names}. Write a text with `{sides.tokenizer.mask_token}` where a token is to be predicted, or "
        "without, to see each of its tokens masked in turn."
    )


def example_text(sides: Sides, name_or_path: str) -> str:
    """Make a text to begin with: the start of the run's own text, else a sentence, with one token masked.

    Args:
        sides: The models.
        name_or_path: A run, an adapter or a model.

    Returns:
        A text with one mask.
    """
    from peft_mlm.loading import resolve_target

    mask = str(sides.tokenizer.mask_token)
    target = resolve_target(name_or_path)
    data = None if target.arguments is None else target.arguments.data
    text = None if data is None else _first_text(data.validation_file or data.train_file, data.text_column)
    if text is None:
        return f"The answer is {mask}."
    words = text.split()
    if len(words) > 1:
        words = words[:EXAMPLE_WORDS]
        return " ".join([*words[: len(words) // 2], mask, *words[len(words) // 2 + 1 :]])
    letters = text[:EXAMPLE_LETTERS]
    return letters[: len(letters) // 2] + mask + letters[len(letters) // 2 + 1 :]


def _first_text(files: Sequence[str] | None, column: str | None) -> str | None:
    """Read the first text of a run's files, where they are still there."""
    from peft_mlm.text_files import first_text

    try:
        return None if not files else first_text(files, column)
    except PeftMlmError:
        return None


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command with the words of the command line."""
    given = _parser().read(words)
    options = {name: getattr(given, name) for name in ("base", "any_base", "host", "port")}
    return playground(given.model, open_browser=given.open, **options)


def show(record: dict[str, Any]) -> None:
    """Print the result for people."""
    print(f"The playground at {record['address']} is closed.")


def help_text() -> str:
    """Give the text of `peft-mlm playground --help`."""
    return _parser().format_help()


def _parser() -> CommandParser:
    parser = CommandParser("playground", __doc__)
    parser.add_argument(
        "model", nargs="+", help="runs or adapters of one base (among several one may be that base), or one model"
    )
    parser.add_argument("--base", help="base model, if it is not the recorded one")
    parser.add_argument("--any_base", action="store_true", help="even if an adapter was trained on another base")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--json", action="store_true", help="print one JSON object when the page is closed")
    return parser
