"""The playground's page, by Gradio, on an address of this machine; it works without network, and asks for none.

Gradio counts its uses at a server of its own unless told not to, and looks for a newer version: both are off.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft_mlm.errors import ArgumentsError
from peft_mlm.playground_tables import CSS

if TYPE_CHECKING:
    import gradio

FIRST_PORT, PORTS, LAST_PORT = 7860, 100, 65535
# Read when Gradio is imported, and when it starts: it then asks its own address whether it is up, by no proxy.
OFF = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*", "NO_PROXY": "*"}
# Fonts of the machine: none is fetched.
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")


def find_port(host: str, port: int | None) -> int:
    """Find a port that is free, before anything heavy is loaded.

    Args:
        host: Address to listen at.
        port: The port that is wanted; None for the first free one from 7860 on.

    Returns:
        The port.

    Raises:
        ArgumentsError: It is taken or not allowed, or the address is not one of this machine.
    """
    if port is not None and not 0 <= port <= LAST_PORT:
        raise ArgumentsError(f"port is {port}; it must be 0 to {LAST_PORT}.")
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        try:
            family = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind((host, candidate))
                return int(tried.getsockname()[1])
        except socket.gaierror as error:
            raise ArgumentsError(f"host: there is no address {host!r}. The default is 127.0.0.1.") from error
        except OSError as error:
            reason = error.strerror
    where = f"port {port}" if port is not None else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise ArgumentsError(f"{where} at {host}: {reason}. Give another --port, or leave it out, or another --host.")


def build_page(answer: Callable[[str, int], str], *, intro: str, example: str, tokens: int) -> gradio.Blocks:
    """Lay the page out.

    Args:
        answer: Takes the text and how many tokens to show for each mask; gives HTML.
        intro: Markdown under the title.
        example: Text that stands in the box at first.
        tokens: Largest number of tokens to show for each mask.

    Returns:
        The page; it is not served yet.
    """
    with _settings():
        import gradio

        with gradio.Blocks(title="peft-mlm playground", analytics_enabled=False) as page:
            gradio.Markdown(f"# peft-mlm playground\n\n{intro}")
            text = gradio.Textbox(example, label="Text", lines=4, max_lines=12, autofocus=True, elem_id="text")
            with gradio.Row():
                top_k = gradio.Slider(
                    1, min(20, tokens), min(5, tokens), step=1, label="Tokens for each mask", elem_id="top_k"
                )
                button = gradio.Button("Predict", variant="primary", elem_id="predict")
            shown = gradio.HTML(elem_id="shown")
            gradio.on(
                [button.click, text.submit],
                answer,
                [text, top_k],
                shown,
                show_progress="minimal",
                api_visibility="private",
            )
    return page


def serve(page: gradio.Blocks, *, host: str, port: int, open_browser: bool, up: Callable[[str], Any]) -> None:
    """Serve the page until the process is interrupted.

    Args:
        page: From `build_page`.
        host: Address to listen at.
        port: From `find_port`.
        open_browser: Whether the page is opened in the user's browser.
        up: Is told the address when the page can be opened.

    Raises:
        ArgumentsError: The port was taken meanwhile.
    """
    with _settings():
        import gradio

        theme = gradio.themes.Default(font=FONTS, font_mono=MONO)
        try:
            page.launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                share=False,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                theme=theme,
                css=CSS,
            )
        except OSError as error:
            raise ArgumentsError(f"port {port} at {host} was taken meanwhile: give another --port.") from error
        try:
            up(str(page.local_url).rstrip("/"))
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def _settings() -> Any:
    """Set the environment that Gradio reads, and leave it as it was."""
    before = {name: os.environ.get(name) for name in OFF}
    os.environ.update(OFF)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
