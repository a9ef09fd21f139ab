# SPDX-License-Identifier: Apache-2.0
"""Freezes the public names and signatures, because users' extensions and released checkpoints rely on them.

After a change on purpose: ``python tests/test_api_surface.py --update``, and a line in CHANGELOG.md.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path

SURFACE = Path(__file__).with_name("api_surface.json")

PUBLIC = (
    "affect.callbacks",
    "affect.data",
    "affect.data.batch",
    "affect.data.faces",
    "affect.data.images",
    "affect.data.layouts.faces",
    "affect.data.protocol",
    "affect.data.table",
    "affect.encoders",
    "affect.errors",
    "affect.geometry",
    "affect.labels",
    "affect.losses",
    "affect.losses.base",
    "affect.metrics",
    "affect.metrics.base",
    "affect.models",
    "affect.models.base",
    "affect.models.baseline",
    "affect.release",
    "affect.report",
    "affect.tasks",
    "affect.tasks.base",
)
"""Modules that extensions import from. One that does not exist yet, or a package without ``__all__``, is left out."""


def public_names(module):
    """Names that a module offers: its ``__all__``, or for a plain module whatever it defines without underscore."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    if hasattr(module, "__path__"):
        return []
    imported = {name for name, value in vars(module).items() if inspect.ismodule(value)}
    names = [name for name in vars(module) if not name.startswith("_") and name not in imported]
    return sorted(
        name for name in names if getattr(vars(module)[name], "__module__", module.__name__) == module.__name__
    )


def signature(function, skip_first=False):
    """Parameters with their kinds and defaults; annotations may change without breaking anybody."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return "(…)"
    parts, keyword_only = [], False
    for parameter in parameters[1:] if skip_first else parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            keyword_only = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={shown(parameter.default)}"
        parts.append(f"{prefix}{parameter.name}{default}")
    return f"({', '.join(parts)})"


def shown(value):
    """A default as text that is the same in every process."""
    if isinstance(value, enum.Enum):
        return str(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def members(kind):
    """Public methods and properties of a class that come from this package, with their signatures."""
    found = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("affect"):
            continue
        for name, value in vars(base).items():
            if name.startswith("_"):
                continue
            if isinstance(value, (staticmethod, classmethod)):
                found[name] = signature(value.__func__, skip_first=isinstance(value, classmethod))
            elif inspect.isfunction(value):
                found[name] = signature(value, skip_first=True)
            elif isinstance(value, property) or hasattr(value, "func"):
                found[name] = "property"
    return dict(sorted(found.items()))


def describe(value):
    """What is frozen of a public object."""
    if inspect.isclass(value):
        return {"()": signature(value), **members(value)}
    return signature(value) if inspect.isroutine(value) else "constant"


def surface():
    """The public names of all modules that exist."""
    found = {}
    for name in PUBLIC:
        try:
            exists = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            exists = False
        if exists:
            module = importlib.import_module(name)
            names = public_names(module)
            if names:
                found[name] = {public: describe(getattr(module, public)) for public in names}
    return found


def flat(node, prefix=""):
    """Dotted names of a nested dictionary."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        key: value for part, below in node.items() for key, value in flat(below, f"{prefix}.{part}".strip(".")).items()
    }


def differences(before, after):
    """Lines that say what was removed, added and changed."""
    before, after = flat(before), flat(after)
    lines = [f"removed  {name}{before[name]}" for name in sorted(before.keys() - after.keys())]
    lines += [f"added    {name}{after[name]}" for name in sorted(after.keys() - before.keys())]
    both = sorted(before.keys() & after.keys())
    return lines + [f"changed  {name}{before[name]} -> {after[name]}" for name in both if before[name] != after[name]]


def test_public_names_are_frozen():
    changed = differences(json.loads(SURFACE.read_text(encoding="utf-8")), surface())
    assert not changed, (
        "public names changed; if on purpose, run `python tests/test_api_surface.py --update` and say so in "
        "CHANGELOG.md:\n" + "\n".join(changed)
    )


def test_all_lists_are_complete_and_sorted():
    for name in PUBLIC:
        if name in surface_modules():
            module = importlib.import_module(name)
            listed = list(getattr(module, "__all__", []))
            assert len(set(listed)) == len(listed), name
            assert all(hasattr(module, public) for public in listed), name


def surface_modules():
    """Modules in the frozen surface."""
    return json.loads(SURFACE.read_text(encoding="utf-8"))


def test_differences_are_told():
    before = {"a": {"C": {"()": "(x)", "f": "()"}, "g": "(y=1)"}}
    after = {"a": {"C": {"()": "(x)"}, "g": "(y=2)", "h": "constant"}}
    assert differences(before, after) == ["removed  a.C.f()", "added    a.hconstant", "changed  a.g(y=1) -> (y=2)"]


def test_signatures_show_what_callers_rely_on():
    class Base:
        def __init__(self, a, *, b=1, **rest): ...

        def f(self, x, y=None, *args): ...

        @classmethod
        def g(cls, z=print): ...

        @property
        def h(self): ...

    Base.__module__ = "affect.example"
    assert describe(Base) == {"()": "(a, *, b=1, **rest)", "f": "(x, y=None, *args)", "g": "(z=print)", "h": "property"}


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        raise SystemExit("usage: python tests/test_api_surface.py --update")
    SURFACE.write_text(json.dumps(surface(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {SURFACE}")
