# SPDX-License-Identifier: Apache-2.0
"""``affect show``: a finished run as one HTML page, or served as a page that reads photographs."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from affect.errors import ConfigError
from affect.files import replacing, require_writable
from affect.report.page import run_page


def run(config: DictConfig) -> None:
    """Write the page of a run, or serve it (``demo``), and open it in a browser where ``open`` asks for that.

    Raises:
        DataError: If the folder is neither a finished run nor a release.
        KeyboardInterrupt: After Ctrl-C, which ends a server.
    """
    folder = Path(config.run).expanduser()
    console = Console()
    if config.demo:
        if config.out:
            raise ConfigError(f"out={config.out}: demo=true serves the page and writes none; leave one of them out")
        serve(config, folder, console)
        return
    page = run_page(folder)
    out = Path(config.out).expanduser() if config.out else folder / "report.html"
    require_writable(out.parent)
    with replacing(out) as part:
        part.write_text(page, encoding="utf-8")
    console.print(f"[bold]{out}[/bold]", soft_wrap=True)
    _open(config, console, out.absolute().as_uri(), "the file")


def serve(config: DictConfig, folder: Path, console: Console) -> None:
    """Serve the page of a run with its model until Ctrl-C."""
    # Only the demo needs the model and torch.
    from affect.commands import assembly, demo
    from affect.commands.predict import points_scheme, require_points
    from affect.commands.predictor import open_predictor

    demo.require_port(config.port)
    page = run_page(folder, demo.SECTION, demo.demo_policy())
    predictor = open_predictor(folder, list(config.trust))
    finder = assembly.make(config.finder, "finder")
    require_points(predictor.recipe, finder)
    reader = demo.PhotographReader(predictor, finder, points_scheme(finder))
    with demo.make_server(page, reader, config.port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        console.print(f"[bold]{address}[/bold] (Ctrl-C ends it)", soft_wrap=True)
        # A browser in the terminal, as webbrowser starts on a machine without a screen, ends only when it is left.
        threading.Thread(target=_open, args=(config, console, address, "the address"), daemon=True).start()
        server.serve_forever()


def _open(config: DictConfig, console: Console, address: str, what: str) -> None:
    if config.open and not webbrowser.open(address):
        console.print(f"no browser was found; open {what} by hand")
