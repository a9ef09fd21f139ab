# SPDX-License-Identifier: Apache-2.0
"""Completion of command lines in bash, zsh and fish: commands, groups, their options, keys, folders and files.

The shells' scripts hand the line up to the cursor to ``affect --complete`` and show what comes back, one candidate for
the last word per line. A candidate that ends in ``=``, ``.`` or ``/`` goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect.commands import configuration
from affect.commands.main import COMMANDS, SHELLS, Command
from affect.errors import AffectError, ConfigError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra

_FLAGS = ("--cfg", "--config-dir", "--help", "--multirun", "--traceback")

_BASH = r"""
_affect_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" word done_already="" candidate
    word="${line##*[[:space:]]}"
    # bash splits a word at = and :, and replaces only what stands behind the last of them.
    if [[ "$COMP_WORDBREAKS" == *=* && "$word" == *=* ]]; then done_already="${word%"${word##*=}"}"; fi
    if [[ "$COMP_WORDBREAKS" == *:* && "${word#"$done_already"}" == *:* ]]; then
        done_already="${word%"${word##*:}"}"
    fi
    COMPREPLY=()
    while IFS= read -r candidate; do
        [[ -n "$candidate" ]] || continue
        case "$candidate" in *[=./,]) compopt -o nospace 2>/dev/null ;; esac
        COMPREPLY+=("${candidate#"$done_already"}")
    done < <("${COMP_WORDS[0]}" --complete "$line" 2>/dev/null)
}
complete -o nosort -F _affect_complete affect
"""

_ZSH = r"""
_affect() {
    local -a candidates open closed
    candidates=("${(@f)$("${words[1]}" --complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    open=(${(M)candidates:#*[=./,]})
    closed=(${candidates:#*[=./,]})
    if (( ${#open} )); then compadd -S '' -- $open; fi
    if (( ${#closed} )); then compadd -- $closed; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
compdef _affect affect
"""

_FISH = r"""
complete -c affect -e
complete -c affect -f -a '(affect --complete (commandline -cp) 2>/dev/null)'
"""


def script(shell: str) -> str:
    """Return the script that a shell evaluates to complete ``affect``.

    Raises:
        ConfigError: Unknown shell.
    """
    scripts = dict(zip(SHELLS, (_BASH, _ZSH, _FISH), strict=True))
    if shell not in scripts:
        raise ConfigError(f"no completion for {shell!r}; known: {', '.join(SHELLS)}")
    return scripts[shell].strip()


def complete(line: str) -> list[str]:
    """Return the candidates for the last word of a command line, the program's name included; nothing on any error.

    Args:
        line: The line up to the cursor. If it ends with a space, a new word begins.
    """
    words = line.split()
    last = "" if not words or line[-1].isspace() else words.pop()
    if not words:
        return []
    if len(words) == 1:
        options = [*(command.name for command in COMMANDS), "--completion", "--help", "--version"]
        return [option for option in options if option.startswith(last) and (last or option[0] != "-")]
    if words[1] == "--completion":
        return [shell for shell in SHELLS if shell.startswith(last)]
    command = next((known for known in COMMANDS if known.name == words[1]), None)
    if command is None:
        return []
    try:
        return _complete_word(command, words[2:], last)
    except Exception:
        # Whatever is wrong with the line is said when it is run; a shell's prompt is no place for it.
        return []


def _complete_word(command: Command, words: Sequence[str], last: str) -> list[str]:
    if words and words[-1] in ("--config-dir", "-cd"):
        return _files(last, folders_only=True)
    if last.startswith("--config-dir="):
        return ["--config-dir=" + name for name in _files(last.partition("=")[2], folders_only=True)]
    if last.startswith("-"):
        return [flag for flag in _FLAGS if flag.startswith(last)]
    overrides, config_dir = _settings(command, words)
    key, equals, value = last.partition("=")
    prefix = key[: len(key) - len(key.lstrip("+~"))]
    key = key[len(prefix) :]
    if equals and configuration.is_path_key(key):
        return [f"{prefix}{key}={name}" for name in _files(value)]
    first = list(command.words) if not words and not prefix else []
    with configuration.open_hydra(command.name, config_dir) as hydra:
        if equals:
            return [f"{prefix}{key}={option}" for option in _values(hydra, command, overrides, key, value)]
        candidates = _keys(hydra, command, overrides, key)
    return [word for word in first if word.startswith(key)] + [prefix + candidate for candidate in candidates]


def _settings(command: Command, words: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the settings so far and the user's folder of configurations; words that cannot be read are left out."""
    from affect.commands.main import read_line

    flags = [word for word in words if not word.startswith("-") or word in ("--config-dir", "-cd", "-m")]
    try:
        line = read_line(command, flags)
    except AffectError:
        return [word for word in flags if "=" in word], None
    return line.overrides, line.config_dir


def _values(hydra: Hydra, command: Command, overrides: Sequence[str], key: str, value: str) -> list[str]:
    """Return completions of a value: options of a group (each item of a list), true or false, or the present value."""
    group = key.partition("@")[0]
    if configuration.is_group(hydra, group):
        begun = max(value.rfind(","), value.rfind("[")) + 1
        chosen = value[:begun].strip("[").split(",")
        options = [name for name in configuration.group_options(hydra, group) if name not in chosen]
        return [value[:begun] + option for option in options if option.startswith(value[begun:])]
    present = _node(_config(hydra, command, overrides), key)
    if isinstance(present, bool):
        shown = ["true", "false"]
    elif present is None:
        shown = ["null"]
    else:
        shown = [] if isinstance(present, (dict, list)) or present == "???" else [str(present)]
    return [text for text in shown if text.startswith(value) and " " not in text]


def _keys(hydra: Hydra, command: Command, overrides: Sequence[str], begun: str) -> list[str]:
    """Return groups (``dataset=``), nodes (``dataset.``) and keys (``seed=``) that begin as typed."""
    groups = [
        f"{name}="
        for name in configuration.command_groups(hydra, command.name)
        if configuration.group_options(hydra, name.partition("@")[0])
    ]
    parent, dot, last = begun.rpartition(".")
    config = _config(hydra, command, overrides)
    node = _node(config, parent) if dot else config
    keys = []
    if isinstance(node, Mapping):
        for key, value in node.items():
            hidden = not last and (str(key).startswith("_") or (key == "hydra" and not dot))
            if str(key).startswith(last) and not hidden:
                keys.append(f"{parent}{dot}{key}" + ("." if isinstance(value, dict) and value else "="))
    return sorted({*(group for group in groups if group.startswith(begun)), *keys})


def _config(hydra: Hydra, command: Command, overrides: Sequence[str]) -> Mapping[str, Any]:
    return configuration.plain_config(hydra, command.name, overrides)


def _node(config: Any, key: str) -> Any:  # noqa: ANN401
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return None
        config = config[part]
    return config


def _files(begun: str, folders_only: bool = False) -> list[str]:
    """Return files and folders (with a final slash) whose path begins as typed."""
    folder, slash, name = begun.rpartition("/")
    place = Path(folder + slash or ".").expanduser()
    if not place.is_dir():
        return []
    found = []
    for path in sorted(place.iterdir()):
        hidden = path.name.startswith(".") and not name.startswith(".")
        if path.name.startswith(name) and not hidden and (path.is_dir() or not folders_only):
            found.append(folder + slash + path.name + ("/" if path.is_dir() else ""))
    return found
