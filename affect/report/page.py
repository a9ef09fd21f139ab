# SPDX-License-Identifier: Apache-2.0
"""A finished run or a release as one HTML page: numbers, figures, model card, without script, server or another file.

Pictures are part of the page, so that it can be mailed or attached. Everything that comes from a run is escaped, and
the page's policy forbids scripts and every address: a page of a stranger's run only shows.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from affect.errors import DataError
from affect.report.provenance import provenance
from affect.report.results import read_json
from affect.report.tables import results_table, subgroup_tables

_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 0.6rem 0; } caption { text-align: left; font-weight: 600; }
th { text-align: left; border-bottom: 1px solid #999; } th, td { padding: 0.15rem 0.9rem 0.15rem 0; }
.right { text-align: right; font-variant-numeric: tabular-nums; } .good { color: #00734f; font-weight: 600; }
.poor { color: #b84a00; } .note { color: #666; font-size: 0.85rem; white-space: pre-line; }
figure { margin: 1.2rem 0; } img { max-width: 100%; } figcaption { color: #666; font-size: 0.85rem; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; white-space: pre-wrap; }
.drop { display: block; position: relative;
  border: 2px dashed #999; border-radius: 8px; padding: 2rem; text-align: center; cursor: pointer; }
.drop input { position: absolute; opacity: 0; } .drop:focus-within { outline: 2px solid; }
.drop[data-state=reading] { opacity: 0.5; cursor: wait; }
@media (prefers-color-scheme: dark) { img { background: #fff; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a page that only shows may do."""


def html_table(table: Table) -> str:
    """Return a table of ``affect.report.tables`` as HTML."""
    classes = ["right" if column.justify == "right" else "" for column in table.columns]
    caption = f"<caption>{escape(_plain(table.title))}</caption>" if table.title else ""
    head = "".join(_cell("th", column.header, kind) for column, kind in zip(table.columns, classes, strict=True))
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "\n".join(
        f"<tr>{''.join(_cell('td', cell, kind) for cell, kind in zip(row, classes, strict=True))}</tr>" for row in rows
    )
    note = f'<p class="note">{escape(_plain(table.caption))}</p>' if table.caption else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}\n"


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _cell(tag: str, cell: object, kind: str) -> str:
    style = str(cell.style) + " ".join(str(span.style) for span in cell.spans) if isinstance(cell, Text) else ""
    kinds = [kind, "good" if "green" in style else "", "poor" if "red" in style else ""]
    named = " ".join(name for name in kinds if name)
    return f"<{tag}{f' class={chr(34)}{named}{chr(34)}' if named else ''}>{escape(_plain(cell))}</{tag}>"


def run_page(folder: Path, section: str = "", policy: str = POLICY) -> str:
    """Return the page of a finished run, or of a release, which has no numbers but those of its card.

    Args:
        folder: Folder of ``affect train`` or ``affect evaluate``, or a release.
        section: HTML below the run's facts.
        policy: What the page may do (``Content-Security-Policy``).

    Raises:
        DataError: If it is neither.
    """
    finished = (folder / "results.json").is_file()
    if not finished and not (folder / "labels.json").is_file():
        raise DataError(f"run={folder}: no results.json in it; give the folder of a finished run, or a release")
    results = read_json(folder / "results.json") if finished else {}
    title = str(results.get("name") or folder.absolute().name)
    parts = [f"<h1>{escape(title)}</h1>", _facts(results), *([section] if section else [])]
    headline = results.get("headline") or []
    if headline:
        parts.append(html_table(results_table(headline, "headline", note=provenance(results))))
    for part, records in (results.get("metrics") or {}).items():
        parts.append(f"<h2>{escape(str(part))}</h2>")
        note = provenance(results, str(part))
        parts.append(html_table(results_table(records, note=note)))
        if any(record.get("subgroup") for record in records):
            parts += [html_table(table) for table in subgroup_tables(records, note=note)]
    parts += _figures(sorted(path for path in (folder / "figures").rglob("*") if path.suffix in _TYPES), folder)
    card = "release/README.md" if finished else "README.md"
    for name, heading in ((card, "Model card"), ("config.yaml", "Configuration")):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            parts.append(f"<h2>{heading}</h2><pre>{escape(text)}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _facts(results: Mapping[str, Any]) -> str:
    timing = results.get("timing") or {}
    sources = results.get("label_source") or []
    seconds = timing.get("training_seconds")
    facts = {
        "dataset": results.get("dataset"),
        "labels from": ", ".join(map(str, sources)) if isinstance(sources, Sequence) else sources,
        "seed": results.get("seed"),
        "trained for": None if seconds is None else f"{seconds:.0f} s",
        "hash": results.get("hash"),
    }
    rows = "".join(f"<tr><td>{k}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items() if v not in (None, ""))
    return f"<table><tbody>{rows}</tbody></table>"


def _figures(paths: Sequence[Path], folder: Path) -> list[str]:
    if not paths:
        return []
    shown = ["<h2>Figures</h2>"]
    for path in paths:
        data = base64.b64encode(path.read_bytes()).decode()
        name = escape(str(path.relative_to(folder)))
        shown.append(
            f'<figure><img alt="{name}" src="data:{_TYPES[path.suffix]};base64,{data}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    return shown
