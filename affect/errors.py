# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on: the command line prints their text as one line and exits with a non-zero code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class AffectError(Exception):
    """Base of every error whose message says what is wrong, where, and what to do."""


class ConfigError(AffectError):
    """A configuration that cannot run: unknown name, missing key, parts that do not fit together."""


class DataError(AffectError):
    """Data that cannot be used as it is: missing file, wrong column, label outside its range."""


class CheckpointError(AffectError):
    """A checkpoint or release that cannot be used as asked."""


def near(name: str, options: Iterable[str], count: int = 3) -> str:
    """Return a clause that names the options nearest to ``name``, or all of them if none is near.

    Example:
        >>> near("hapiness", ["happiness", "sadness"])
        'did you mean happiness?'
    """
    known = sorted(set(options))
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    listed = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"known: {listed}" if known else "there are none"


def write_list(key: str, values: Iterable[str]) -> str:
    """Return the override ``key=[…]`` as Hydra reads it back, with quotes around values that need them.

    A shell needs more: ``shlex.quote`` it.

    Example:
        >>> write_list("accept", ["rows", "rows/part=train"])
        'accept=[rows,"rows/part=train"]'
    """
    return f"{key}=[{','.join(map(_quoted, values))}]"


def _quoted(value: str) -> str:
    if re.fullmatch(r"[A-Za-z][\w/.*-]*", value, re.ASCII) and value.lower() not in (
        "null",
        "true",
        "false",
        "nan",
        "inf",
    ):
        return value
    # Only a quote, and backslashes in front of one, mean something else inside of quotes.
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + (found[2] and '\\"'), value) + '"'
