# SPDX-License-Identifier: Apache-2.0
"""Completion: the candidates, and what a real shell makes of them."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest

from affect.commands.completion import complete, script
from affect.commands.main import COMMANDS, main
from affect.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("affect tr", ["train"]),
        ("affect ", [command.name for command in COMMANDS]),
        ("affect --v", ["--version"]),
        ("affect --completion ", ["bash", "zsh", "fish"]),
        ("affect nope ", []),
        ("affect benchmark l", ["loader", "landmarks"]),
        ("affect train da", ["dataset.", "dataset="]),
        ("affect train dataset=", ["dataset=faces", "dataset=table"]),
        ("affect train dataset=faces,", ["dataset=faces,table"]),
        ("affect train task=[au,p", ["task=[au,pose"]),
        ("affect train trainer.", ["trainer.devices=", "trainer.max_epochs="]),
        ("affect train debug=fast trainer.max_epochs=", ["trainer.max_epochs=1"]),
        ("affect train experiment=nope trainer.d", ["trainer.devices="]),
        ("affect train ~dataset.c", ["~dataset.count="]),
        ("affect train init=", ["init=folder/", "init=weights.pt"]),
        ("affect train dataset.root=fol", ["dataset.root=folder/"]),
        ("affect train dataset.root=folder/", ["dataset.root=folder/below/"]),
        ("affect train --m", ["--multirun"]),
        ("affect train --config-dir ", ["folder/"]),
        ("affect benchmark step quick=", ["quick=true", "quick=false"]),
        ("affect train nope=", ["nope=null"]),
        ("", []),
    ],
)
def test_candidates(tree, line, candidates):
    os.makedirs("folder/below")  # noqa: PTH103
    for name in ("weights.pt", ".hidden"):
        with open(name, "w"):  # noqa: PTH123
            pass
    assert complete(line) == candidates


def test_candidates_of_the_users_folder(tree, tmp_path):
    (tmp_path / "user" / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "user" / "conf" / "dataset" / "mine.yaml").write_text("name: mine\n")
    assert complete("affect train --config-dir conf dataset=m") == ["dataset=mine"]


def test_a_broken_configuration_completes_to_nothing(tree, capsys):
    (tree / "train.yaml").write_text("a: [\n")
    assert complete("affect train dat") == []
    assert main(["--complete", "affect train dat"]) == 0
    assert capsys.readouterr().err == ""


def test_unknown_shell():
    with pytest.raises(ConfigError, match="known: bash, zsh, fish"):
        script("tcsh")


@pytest.fixture
def environment(tmp_path):
    """An environment in which ``affect`` is on the path."""
    program = tmp_path / "bin" / "affect"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m affect.commands.main "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    return dict(os.environ, PATH=path, TERM="dumb", HOME=str(tmp_path), PS1="> ", INPUTRC="/dev/null")


def shell(environment, *command):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_bash_function(environment):
    code = """
        eval "$(affect --completion bash)"
        try() {
            COMP_LINE="$1"; COMP_POINT=${#1}; COMP_WORDS=(affect)
            _affect_complete
            printf '%s|' "${COMPREPLY[@]}"; echo
        }
        COMP_WORDBREAKS=' "=:'
        try 'affect tr'
        try 'affect train dataset='
        COMP_WORDBREAKS=' '
        try 'affect train dataset=fa'
    """
    shown = shell(environment, "bash", "--norc", "-c", code).splitlines()
    assert shown[0] == "train|"
    # bash has split the word at "=" and replaces what stands behind it.
    assert {"faces", "orl", "table"} <= set(shown[1].strip("|").split("|"))
    assert shown[2] == "dataset=faces|"


def typed(environment, keys, waits_for):
    """Type into an interactive bash and return what it shows, once that holds the text."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
    shown = ""
    try:
        os.write(terminal, b'eval "$(affect --completion bash)"; echo rea""dy\n')
        for text, wanted in ((None, "ready"), (keys, waits_for)):
            if text is not None:
                shown = ""
                os.write(terminal, text)
            deadline = time.monotonic() + 30
            while wanted not in shown and time.monotonic() < deadline:
                if select.select([terminal], [], [], 0.2)[0]:
                    shown += os.read(terminal, 4096).decode(errors="replace")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return shown


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (b"affect tra\t", "affect train "),
        (b"affect train dataset=fac\ttrainer.max_e\t3", "affect train dataset=faces trainer.max_epochs=3"),
    ],
)
def test_the_tab_key_in_bash(environment, keys, shown):
    assert shown in typed(environment, keys, shown)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_function(environment):
    code = """
        compdef() { : }
        eval "$(affect --completion zsh)"
        compadd() { print -r -- "$@" }
        words=(affect train dataset=fa); CURRENT=3; _affect
        words=(affect train trainer.max_e); CURRENT=3; _affect
    """
    assert shell(environment, "zsh", "-f", "-c", code).splitlines() == [
        "-- dataset=faces",
        "-S  -- trainer.max_epochs=",
    ]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(environment):
    code = "affect --completion fish | source; complete -C 'affect train dataset=fa'; complete -C 'affect tr'"
    assert shell(environment, "fish", "--no-config", "-c", code).split() == ["dataset=faces", "train"]
