# SPDX-License-Identifier: Apache-2.0
"""``affect show``: a finished run as one HTML page."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from affect.files import replacing
from affect.report.page import run_page


def run(config: DictConfig) -> None:
    """Write the page of a run and open it in a browser where ``open`` asks for that.

    Raises:
        DataError: If there is no finished run.
    """
    folder = Path(config.run).expanduser()
    page = run_page(folder)
    out = Path(config.out).expanduser() if config.out else folder / "report.html"
    with replacing(out) as part:
        part.write_text(page, encoding="utf-8")
    Console().print(f"[bold]{out}[/bold]", soft_wrap=True)
    if config.open and not webbrowser.open(out.absolute().as_uri()):
        Console().print("no browser was found; open the file by hand")
