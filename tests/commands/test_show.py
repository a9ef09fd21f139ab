# SPDX-License-Identifier: Apache-2.0
"""The page of a run holds what the run holds, in one file that reaches for nothing else and runs nothing."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from omegaconf import DictConfig

from affect.commands import show
from affect.errors import DataError
from affect.report import results_table
from affect.report.page import html_table
from tests.report.sample_records import AU

ATTACK = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>'


class Reader(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    (folder / "figures").mkdir(parents=True)
    (folder / "release").mkdir()
    cv2.imwrite(str(folder / "figures" / "curves.png"), np.full((4, 6, 3), 99, np.uint8))
    (folder / "release" / "README.md").write_text(f"# Card {ATTACK}")
    results = {
        "name": f"run {ATTACK}",
        "dataset": "orl",
        "seed": 3,
        "label_source": ["a teacher"],
        "metrics": {"test": AU},
        "selection": {"rule": "best_val", "epoch": 3},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_a_page_shows_numbers_figures_and_card(compose: Callable[..., DictConfig], run_folder: Path) -> None:
    show.run(compose("show", f"run={run_folder}"))
    page = Reader((run_folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == [], "every element is closed"
    table = results_table(AU)
    for column in table.columns:
        for cell in column.cells:
            assert str(cell) in page.text
    assert "weights of best_val (epoch 4)" in page.text
    [image] = [attributes for tag, attributes in page.tags if tag == "img"]
    kind, _, data = str(image["src"]).partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (run_folder / "figures" / "curves.png").read_bytes()
    assert f"# Card {ATTACK}" in page.text


def test_a_strangers_run_cannot_run_or_reach_anything(compose: Callable[..., DictConfig], run_folder: Path) -> None:
    out = run_folder / "page.html"
    show.run(compose("show", f"run={run_folder}", f"out={out}"))
    page = Reader(out.read_text(encoding="utf-8"))
    assert not {"script", "iframe", "link", "object", "a"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert str(attributes.get("src", "data:")).startswith("data:")
    policies = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_marks_of_a_table_are_classes() -> None:
    page = Reader(html_table(results_table(AU)))
    assert {attributes.get("class") for tag, attributes in page.tags if tag == "th"} == {None, "right"}
    kinds = {name for _, attributes in page.tags for name in str(attributes.get("class") or "").split()}
    assert kinds >= {"right", "good"}


def test_a_folder_without_results_is_an_error_of_one_line(compose: Callable[..., DictConfig], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no results\.json in it") as error:
        show.run(compose("show", f"run={tmp_path}"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_browser_shows_the_figures(compose: Callable[..., DictConfig], run_folder: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    cv2.imwrite(str(run_folder / "figures" / "curves.png"), np.full((100, 200, 3), (255, 0, 255), np.uint8))
    show.run(compose("show", f"run={run_folder}"))
    picture = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,4000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    subprocess.run([*command, (run_folder / "report.html").as_uri()], check=True, capture_output=True, timeout=120)
    pixels = cv2.imread(str(picture)).astype(int)
    assert (np.abs(pixels - (255, 0, 255)).max(-1) < 8).sum() > 15_000, "the page shows its own pictures"
