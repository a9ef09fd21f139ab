# SPDX-License-Identifier: Apache-2.0
"""What the READMEs of methods say of commands and settings is so: commands compose, keys exist with these defaults."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from affect.commands.configuration import compose, config_directory

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "pal": ("objectives.pal.", ["objective=privileged_attribution", "objectives.pal.layer=encoder.model.layer3"]),
    "thin": ("", ["model=thin"]),
    "task_token_transformer": ("", ["model=task_token_transformer"]),
    "decafa": ("", ["model=decafa", "encoder=pixels", "task=[landmarks_98,landmarks_68]"]),
}
"""By method: what precedes the keys of its table, and how it is chosen."""


def text_of(method: str) -> str:
    return (ROOT / "affect" / "models" / method / "README.md").read_text(encoding="utf-8")


def commands(method: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", text_of(method), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def settings(method: str) -> Iterator[tuple[str, str]]:
    """Yield keys of the table of settings and their defaults, ``–`` where there is none."""
    table = text_of(method).partition("| key | default | meaning |")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        keys, defaults = (cell.strip() for cell in line.strip("|").split("|")[:2])
        names = re.findall(r"`([^`]+)`", keys)
        given = [value.strip("` ") for value in re.split(r",\s(?![^\[]*\])", defaults)]
        given = given * len(names) if len(given) == 1 else given
        parent = ""
        for name, default in zip(names, given, strict=True):
            whole = parent + name if name.startswith(".") else name
            parent = whole.rpartition(".")[0]
            yield whole, default


def plain(value: object) -> object:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def same(value: object, written: str) -> bool:
    given = yaml.safe_load(written)
    return value == given or str(value) == written


@pytest.mark.parametrize("method", METHODS)
def test_its_commands_compose(method: str) -> None:
    found = commands(method)
    assert found
    for program, command, *overrides in found:
        assert program == "affect"
        config = compose(command, overrides)
        for override in overrides:
            key, _, value = override.partition("=")
            if "." in key:
                assert same(plain(OmegaConf.select(config, key)), value), key
        if command == "reproduce":
            assert config.controlled.arms


@pytest.mark.parametrize("method", METHODS)
def test_its_settings_exist_with_the_defaults_that_it_names(method: str) -> None:
    prefix, chosen = METHODS[method]
    config = compose("train", chosen)
    found = list(settings(method))
    assert len(found) >= 5
    for key, default in found:
        group, _, option = key.partition("=")
        if option:
            compose("train", [*chosen, key])
        elif (config_directory() / key).is_dir():
            assert (config_directory() / group / f"{default}.yaml").is_file()
        else:
            parent = OmegaConf.select(config, (prefix + key).rpartition(".")[0])
            assert isinstance(parent, DictConfig), key
            assert key.rpartition(".")[2] in parent, key
            assert default == "–" or same(plain(OmegaConf.select(config, prefix + key)), default), key
