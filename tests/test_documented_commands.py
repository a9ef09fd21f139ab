# SPDX-License-Identifier: Apache-2.0
"""Every command that a page names can be written so: the command exists, and so do its keys and groups."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from affect.commands.benchmark import BENCHMARKS, OF_CHECKPOINTS
from affect.commands.configuration import compose, config_directory
from affect.commands.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    pytest.param("README.md", marks=pytest.mark.slow),  # a hundred of them
    "docs/shipping.md",
    "docs/predictions.md",
    "affect/quantization/README.md",
    "conf/experiment/cpu_small.yaml",
)


def commands(page: str) -> Iterator[str]:
    """Yield the commands of blocks and of lines of text, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(affect [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    if page.endswith(".yaml"):
        lines += re.findall(r"affect [a-z]+(?: [a-z_]+=\S+)+", text)
    yield from (re.sub(r"\s#.*", "", line) for line in lines if line.startswith("affect "))


def overrides(line: str) -> tuple[str, list[str]]:
    """Return command and overrides; a placeholder is a name, and what a page leaves open is left out."""
    line = re.sub(r"<[^<>]*>", "some", line).rstrip(",")
    _, command, *words = shlex.split(line.replace("$LABELS", "").replace('"$RUN"', "some"))
    named = ["dataset=faces"] if "…" in words and not any(word.startswith("dataset=") for word in words) else []
    return command, [*named, *(word for word in words if "…" not in word and "$" not in word and word != "-m")]


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_exist_word_for_word(page: str) -> None:
    found = list(commands(page))
    assert found
    for line in found:
        command, words = overrides(line)
        if command.startswith("-") or "--help" in words:
            continue
        assert command in {known.name for known in COMMANDS}, line
        if command == "benchmark":
            name, *words = words
            assert name in {*BENCHMARKS, *OF_CHECKPOINTS}, line
            words = [f"what={name}", *words]
        if " -m " in line:  # one job of several
            words = [word if "[" in word else word.split(",")[0] for word in words]
        if words:  # else a command's name alone
            compose(command, words)


def test_options_that_tables_name_exist() -> None:
    """Shipped adapters and packaged networks are those that the page on other people's checkpoints names."""
    from affect.foreign import PACKAGED, adapter_names

    text = (ROOT / "docs" / "shipping.md").read_text(encoding="utf-8")
    assert set(re.findall(r"packaged:(\w+)", text)) == set(PACKAGED)
    named = re.findall(r"adapter=(\w+)", text)
    assert set(itertools.filterfalse(lambda name: name == "theirs", named)) <= set(adapter_names(config_directory()))
