# SPDX-License-Identifier: Apache-2.0
"""What a number is worth, in one line beside it: protocol, test part, selection rule, missing faces, crop, leaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ON_TEST = "SELECTED ON THE TEST PART"
"""What stands beside every number of weights that the test part selected."""


def provenance(results: Mapping[str, Any], part: str = "test") -> str:
    """Return the line that stands beside the numbers of a results file.

    Args:
        results: Content of a ``results.json`` of ``affect train`` or ``affect evaluate``.
        part: Part that the numbers are of.

    Example:
        >>> provenance({
        ...     "protocol": {"name": "bp4d", "test": "P3", "missing_faces": "drop"},
        ...     "selection": {"rule": "best_val", "epoch": 3},
        ...     "data": {"parts": {"test": {"rows": 90, "without_face": 2}}},
        ...     "preprocess": {"recipe": {"name": "similarity68_299"}},
        ... })
        'protocol bp4d, test P3 · weights of best_val (epoch 4) · no face found: 2, drop · crop similarity68_299'
    """
    protocol = results.get("protocol") or {}
    said = [f"protocol {protocol.get('name', 'default')}, {rows_text(protocol.get('test'), part)}"]
    selection = results.get("selection")
    if selection:
        said.append(f"weights of {selection_text(selection)}")
    numbers = ((results.get("data") or {}).get("parts") or {}).get(part) or {}
    missing = int(numbers.get("without_face") or 0)
    rule = protocol.get("missing_faces", "fallback")
    if missing or rule != "fallback":
        said.append(f"no face found: {missing:,}, {rule}")
    recipe = (results.get("preprocess") or {}).get("recipe")
    said.append(f"crop {recipe.get('name') or recipe.get('kind')}" if recipe else "crop none")
    lengths = list(dict.fromkeys((results.get("error_lengths") or {}).values()))
    said += [f"landmark error in % of {' or '.join(lengths)}"] if lengths else []
    said += decision_texts(results)
    return " · ".join([*said, *marks(results)])


def decision_texts(results: Mapping[str, Any]) -> list[str]:
    """Return at which thresholds numbers were decided, and over how many frames predictions were averaged.

    Example:
        >>> decision_texts({"thresholds": {"rule": "tuned", "rows": 90}, "smoothing": 5})
        ['thresholds tuned per output on 90 validation rows', 'moving average of 5 frames']
    """
    said = []
    thresholds = results.get("thresholds") or {}
    values = {value for each in (thresholds.get("values") or {}).values() for value in each.values()}
    if thresholds.get("rule") == "tuned":
        rows, note = thresholds.get("rows"), thresholds.get("note")
        said.append(f"thresholds tuned per output on {rows or 0:,} validation rows{f' {note}' if note else ''}")
    elif len(values) == 1:
        said.append(f"threshold {next(iter(values)):g}")
    elif values:
        said.append("thresholds of the config")
    window = results.get("smoothing") or 0
    return [*said, f"moving average of {window} frames"] if window > 1 else said


def rows_text(test: Any, part: str) -> str:  # noqa: ANN401
    """Return which rows the numbers are of.

    Example:
        >>> rows_text(["common", "challenge"], "test"), rows_text(2, "test"), rows_text(None, "validation")
        ('test common+challenge', 'test fold 2', 'validation part')
    """
    if part != "test" or test is None:
        return "all rows" if part == "all" else f"{part} part"
    if isinstance(test, int):
        return f"test fold {test}"
    several = isinstance(test, Sequence) and not isinstance(test, str)
    return f"test {'+'.join(str(name) for name in test) if several else test}"


def selection_text(selection: Mapping[str, Any]) -> str:
    """Return the rule that chose the weights, with its epoch.

    Example:
        >>> selection_text({"rule": "refit", "epochs": 7, "epoch": 6})
        'refit (7 epochs on all training groups, as best_val chose)'
    """
    rule, epoch = str(selection.get("rule")), selection.get("epoch")
    if rule == "refit" and selection.get("epochs"):
        plural = "" if selection["epochs"] == 1 else "s"
        return f"refit ({selection['epochs']} epoch{plural} on all training groups, as best_val chose)"
    return rule if epoch is None else f"{rule} (epoch {int(epoch) + 1})"


def marks(results: Mapping[str, Any]) -> list[str]:
    """Return warnings that stand beside every number: weights that the test part selected, people in two parts."""
    on_test = (results.get("selection") or {}).get("rule") == "best_on_test"
    leaks = [f"LEAK: {leak}" for leak in (results.get("data") or {}).get("leaks") or ()]
    return [ON_TEST] * on_test + leaks
