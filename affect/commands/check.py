# SPDX-License-Identifier: Apache-2.0
"""``affect check``: whether a dataset is what was published, before anything is trained on it."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

import affect
from affect import labels
from affect.commands import assembly
from affect.commands.prepared import FOR_TRAINING, dataset_words, train_command
from affect.data import check
from affect.data.check import ERROR, LEVELS, NOTE, OK, WARNING, Finding
from affect.data.expected import Expected
from affect.data.headers import UNREADABLE, Headers, decode_headers, read_headers
from affect.data.images import FileImages, ImageReader, Source
from affect.data.protocol import assign, require_parts
from affect.data.table import FaceTable
from affect.errors import AffectError, ConfigError, DataError
from affect.files import replacing
from affect.report import write_json

STYLES = {ERROR: "bold red", WARNING: "yellow", check.ACCEPTED: "magenta", NOTE: "", OK: "green"}
_SHOWN = 320
"""Longest side of a face on the sheet, in pixels."""


def run(config: DictConfig) -> None:
    """Check ``dataset``, print a table of findings, write the report and the sheet.

    Raises:
        ConfigError: If ``accept`` names a key that no finding has; the report is written before.
        DataError: If training would be on the wrong data; the report is written before.
    """
    console = Console()
    node = _dataset(config)
    name = str(node.get("name", "dataset"))
    accept = accepted_keys(config)
    cache = Path(config.paths.cache).expanduser() if config.paths.cache else None
    table = assembly.read_table(_without_image_check(node), cache, fresh=True)
    images = assembly.build_images(node, table)
    group = str(node.get("group") or "image")
    synthetic = check.is_synthetic(table.root)

    expected = expectations(node)
    findings = check.examine_table(table, group, expected)
    headers, looked = look_at_images(config, name, table, images)
    rows, place = check.distinct_images(table)
    findings += check.examine_images(table, headers, len(rows))
    sizes = np.zeros((len(rows), 2), np.int32)
    sizes[np.searchsorted(rows, headers.rows)] = headers.sizes
    known = np.flatnonzero(sizes[place].all(1))
    findings += check.examine_points(table, known, sizes[place][known])
    findings += near_duplicates(config, node, name, table, images, headers)
    findings += protocol_findings(config, name, table, images, group)
    findings += check.compare(table, expected, check.size_counts(headers), synthetic=synthetic)
    findings = check.accepted(findings, accept)

    wrong = check.errors(findings)
    report = report_path(config, name)
    contents = {
        "dataset": name,
        "root": str(table.root),
        "ok": not wrong,
        "rows": len(table),
        "parts": check.part_counts(table, group),
        "group": group,
        "skipped": table.metadata.get("skipped", {}),
        "examples": table.metadata.get("skipped_examples", {}),
        "notes": table.metadata.get("notes", ()),
        "expressions": check.class_counts(table),
        "rates": check.positive_rates(table),
        "images": {**looked, **image_summary(headers)},
        "expected": [dataclasses.asdict(entry) for entry in expected],
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "accepted": [finding.key for finding in findings if finding.level == check.ACCEPTED],
        "synthetic": synthetic,
        "affect": affect.__version__,
        "options": {
            "dataset": OmegaConf.to_container(node, resolve=True),
            **{key: config[key] for key in ("decode", "near_duplicates")},
            "accept": accept,
        },
    }
    write_json(report, _with_text_keys(contents))
    sheet = draw_sheet(config, report, name, table, images, headers)
    unusable = list_unusable(report, node, table, headers)

    console.print(findings_table(name, table, findings, contents))
    written = " and ".join(str(path) for path in (report, sheet, unusable) if path is not None)
    # Without markup: it would swallow the brackets of lists and paths.
    console.print(f"written: {written}", soft_wrap=True, highlight=False, markup=False)
    check.require_known(findings, accept)
    if wrong:
        words = check.accept_words(wrong)
        mending = ["mend the tree", *([f"accept what is meant so: {words}"] if words else [])]
        if any(finding.key in check.UNUSABLE for finding in wrong):
            where = shlex.quote(f"dataset.leave_out={unusable or '<file that lists their names>'}")
            mending.append(f"leave the images out that cannot be used: {where}")
        shown = ", ".join(finding.key for finding in wrong[:6]) + (", …" if len(wrong) > 6 else "")
        raise DataError(
            f"{name}: {len(wrong)} {'errors' if len(wrong) > 1 else 'error'} ({shown}): training would be on the wrong "
            f"data; {', or '.join(mending)}"
        )
    following = next_command(config, node, table, findings, unusable)
    console.print(f"next: {following}", soft_wrap=True, highlight=False, markup=False)


# -------------------------------------------------------------------------------------------------- in training


def verified(config: DictConfig, sources: Sequence[Source], console: Console) -> list[Source]:
    """Return the sources of a training after a fast check of counts and rates, with what was accepted in their notes.

    Args:
        config: Nodes ``dataset`` and ``accept``.
        sources: As built from the config.
        console: Where warnings are printed.

    Raises:
        DataError: If a count is that of other data and its key is not in ``accept``.
        ConfigError: If ``accept`` names a key that no check has.
    """
    accept = accepted_keys(config)
    for key in accept:
        if key in check.UNUSABLE:
            raise ConfigError(
                f"accept={key}: no training can read such images; leave them out with dataset.leave_out=<file that "
                "lists their names>, which affect check writes beside its report"
            )
    everything: list[Finding] = []
    checked = []
    for node, source in zip(assembly.source_nodes(config).values(), sources, strict=True):
        findings = check.require_expected(source.table, expectations(node), accept, source.name, node.get("root"))
        everything += findings
        for finding in findings:
            if finding.level == WARNING:
                line = f"{source.name}: {finding.key}: {finding.sentence}"
                console.print(Text(line, style=STYLES[WARNING]), soft_wrap=True, highlight=False)
        notes = [f"accepted: {f.key}: {f.sentence}" for f in findings if f.level == check.ACCEPTED]
        checked.append(dataclasses.replace(source, notes=(*source.notes, *notes)) if notes else source)
    check.require_known(everything, accept, elsewhere=True)
    return checked


def accepted_keys(config: DictConfig) -> list[str]:
    """Return the keys of ``accept``, which may be one key or a list."""
    given = config.get("accept")
    return [given] if isinstance(given, str) else [str(key) for key in given or ()]


def expectations(node: DictConfig) -> tuple[Expected, ...]:
    """Return the published numbers of a dataset's node; none where it has no node ``expected``."""
    found = assembly.make(node.get("expected"), f"dataset {node.get('name', 'dataset')}.expected")
    return tuple(found or ())


# --------------------------------------------------------------------------------------------------------- parts


def _dataset(config: DictConfig) -> DictConfig:
    nodes = assembly.source_nodes(config)
    if len(nodes) > 1 or "sources" in config.dataset:
        raise ConfigError(f"check one dataset at a time: affect check dataset={next(iter(nodes))} …")
    return config.dataset


def _without_image_check(node: DictConfig) -> DictConfig:
    """Return the dataset's node with a reading that does not stop at a missing image, so that all can be listed."""
    try:
        parameters = inspect.signature(get_object(str(node.read.get("_target_")))).parameters
    except (ImportError, ValueError, AttributeError):
        return node  # Which the reading explains better.
    if "check_images" not in parameters:
        return node
    changed = node.copy()
    OmegaConf.update(changed, "read.check_images", False, force_add=True)
    changed._set_parent(node._get_parent())
    return changed


@contextmanager
def _bar(name: str, what: str, total: int) -> Iterator[tqdm]:
    with tqdm(total=total, desc=f"{name}: {what}", unit="image", unit_scale=total > 100_000) as bar:
        yield bar


def look_at_images(
    config: DictConfig, name: str, table: FaceTable, images: ImageReader
) -> tuple[Headers, dict[str, Any]]:
    """Return what the images say of themselves, and how many were looked at in what way.

    Of plain files every header is read, and a sample is decoded. Images inside archives and videos cannot be looked at
    without decoding, so they are sampled, unless ``decode=all``.
    """
    rows = check.distinct_images(table)[0]
    sample = rows[decoded_sample(config.decode, len(rows))]
    workers = int(config.workers)
    if not isinstance(images, FileImages):
        with _bar(name, "decoding", len(sample)) as bar:
            headers = decode_headers(images, sample, workers, bar.update)
        return headers, {"images": len(rows), "headers": 0, "decoded": len(sample)}
    with _bar(name, "image headers", len(rows)) as bar:
        headers = read_headers(images, rows, workers, bar.update)
    sample = sample[headers.problems[np.searchsorted(rows, sample)] == ""]
    with _bar(name, "decoding", len(sample)) as bar:
        decoded = decode_headers(images, sample, workers, bar.update)
    broken = decoded.rows[decoded.problems != ""]
    headers.problems[np.searchsorted(rows, broken)] = UNREADABLE
    return headers, {"images": len(rows), "headers": len(rows), "decoded": len(sample)}


def decoded_sample(decode: object, count: int, seed: int = 0) -> np.ndarray:
    """Return which of ``count`` images are decoded whole, sorted.

    Args:
        decode: A number, or ``all``.
        count: Number of images.
        seed: Another seed gives another sample.

    Raises:
        ConfigError: If ``decode`` is neither.
    """
    if decode == "all":
        return np.arange(count)
    if not isinstance(decode, int) or isinstance(decode, bool) or decode < 0:
        raise ConfigError(f"decode={decode}: write a number of images, or all")
    chosen = np.random.default_rng(seed).choice(count, min(decode, count), replace=False)
    return np.sort(chosen)


def image_summary(headers: Headers) -> dict[str, Any]:
    """Return sizes, formats, kinds of pixels and problems of the images that were looked at."""
    sizes = check.size_counts(headers)
    common = sorted(sizes, key=lambda size: (-sizes[size], size))
    listed = {f"{w}x{h}": sizes[w, h] for w, h in common[:20]}
    rest = sum(sizes[size] for size in common[20:])
    return {
        "sizes": {**listed, **({"other": rest} if rest else {})},
        "formats": check.value_counts(headers.kinds),
        "pixels": check.value_counts(headers.pixels),
        "problems": check.value_counts(headers.problems),
    }


def near_duplicates(
    config: DictConfig, node: DictConfig, name: str, table: FaceTable, images: ImageReader, headers: Headers
) -> list[Finding]:
    """Return findings on copies of one picture, where they are wanted and every image can be read."""
    wanted = config.near_duplicates
    if wanted is None:
        wanted = node.get("together") == "near_duplicates"
    if not wanted:
        return []
    if (headers.problems != "").any():
        said = "not looked for, since some images cannot be read"
        return [Finding("near_duplicates", NOTE, said)]
    from affect.data.duplicates import near_duplicate_groups

    cache = Path(config.paths.cache).expanduser() / "tables" if config.paths.cache else None
    try:
        with _bar(name, "near-duplicates", len(table)) as bar:
            groups = near_duplicate_groups(images, len(table), cache, bar.update)
    except DataError as error:  # One that the sample did not hold.
        return [Finding("images/unreadable", ERROR, str(error), 1, 0)]
    return check.examine_near_duplicates(table, groups)


def protocol_findings(
    config: DictConfig, name: str, table: FaceTable, images: ImageReader, group: str
) -> list[Finding]:
    """Return how many rows each part of the chosen protocol gets, or why it has none."""
    try:
        whole = assembly.build_protocols(config)[0]
        source = Source(name, table, images, group)
        rows_of = assign(source, whole)
        require_parts([source], [rows_of], whole)
    except AffectError as error:
        return [Finding("protocol", ERROR, str(error))]
    counts = {part: len(rows) for part, rows in rows_of.items()}
    listed = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return [Finding("protocol", OK, f"rows by the protocol {config.protocol.get('name', 'default')}: {listed}", counts)]


# -------------------------------------------------------------------------------------------------------- output


def report_path(config: DictConfig, name: str) -> Path:
    """Return the file of the report."""
    if config.report:
        return Path(config.report).expanduser()
    return Path(config.paths.runs).expanduser() / "check" / name / "check.json"


def list_unusable(report: Path, node: DictConfig, table: FaceTable, headers: Headers) -> Path | None:
    """Write the names of the images that cannot be used beside the report, for ``dataset.leave_out``.

    Names that ``dataset.leave_out`` lists already stay in the list.

    Returns:
        The file; None where all that were looked at can be used.
    """
    rows = headers.rows[headers.problems != ""]
    if not len(rows):
        return None
    before = assembly.listed_images(Path(node.leave_out).expanduser()) if node.get("leave_out") else []
    names = sorted({*before, *(str(name) for name in table.strings("image", rows)[0])})
    path = report.with_name(f"{report.stem}_unusable.txt")
    with replacing(path) as part:
        part.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return path


def _with_text_keys(contents: dict[str, Any]) -> dict[str, Any]:
    """Return the report with the counts of known variants by text, since JSON has no other keys."""
    for entry in contents["expected"]:
        entry["variants"] = {str(count): whose for count, whose in entry["variants"].items()}
    return contents


def findings_table(name: str, table: FaceTable, findings: Sequence[Finding], report: dict[str, Any]) -> Table:
    """Return the table of findings, the gravest first; what is as published shares one row."""
    parts = ", ".join(f"{part} {counts['rows']:,}" for part, counts in report["parts"].items())
    sizes = ", ".join(list(report["images"]["sizes"])[:3])
    title = f"{name}: {len(table):,} rows{f' ({parts})' if parts else ''}; images {sizes or 'not read'}"
    shown = Table(title=Text(title, style="bold"), title_justify="left", show_lines=False, expand=False)
    shown.add_column("level", no_wrap=True)
    shown.add_column("key", overflow="fold")
    shown.add_column("finding", overflow="fold")
    for level in LEVELS[:-1]:
        for finding in findings:
            if finding.level != level:
                continue
            examples = ", ".join(finding.examples[:3])
            sentence = f"{finding.sentence}{f'; e.g. {examples}' if examples else ''}"
            shown.add_row(Text(level, style=STYLES[level]), Text(finding.key), Text(sentence))
    fine = [finding.key for finding in findings if finding.level == OK]
    if fine:
        listed = ", ".join(fine[:8]) + (", …" if len(fine) > 8 else "")
        shown.add_row(Text(OK, style=STYLES[OK]), Text(f"{len(fine)} checks"), Text(listed))
    return shown


def next_command(
    config: DictConfig,
    node: DictConfig,
    table: FaceTable,
    findings: Sequence[Finding],
    unusable: Path | None = None,
) -> str:
    """Return what to run after a check without errors: the preparation of crops where there is one, or training.

    Args:
        config: The config.
        node: Its node ``dataset``.
        table: The dataset as read.
        findings: Of the whole check.
        unusable: List of images that were accepted though no training can read them.
    """
    if unusable is not None:
        node = node.copy()
        OmegaConf.update(node, "leave_out", str(unusable), force_add=True)
    prepare = config.get("prepare") or {}
    stored = not OmegaConf.is_missing(prepare, "stored") and bool(prepare.get("stored")) if prepare else False
    # What only this check finds (sizes, files) need not be accepted again; counts and rates do.
    if not stored:
        words = check.accept_words(finding for finding in findings if finding.level == check.ACCEPTED)
        return train_command(node, table, shlex.split(words))
    chosen, *changed = dataset_words(node, FOR_TRAINING)
    return shlex.join(
        ["affect", "prepare", chosen, *([f"dataset.root={node.root}"] if node.get("root") else []), *changed]
    )


def draw_sheet(
    config: DictConfig, report: Path, name: str, table: FaceTable, images: ImageReader, headers: Headers
) -> Path | None:
    """Write the picture of sample faces and return its path; None without one."""
    if config.sheet is False or config.sheet is None:
        return None
    path = report.with_suffix(".png") if config.sheet is True else Path(config.sheet).expanduser()
    rows, place = check.distinct_images(table)
    unusable = np.zeros(len(rows), bool)
    unusable[np.searchsorted(rows, headers.rows[headers.problems != ""])] = True
    faces, captions, points = [], [], []
    for row in check.sheet_rows(table, int(config.faces), ~unusable[place]).tolist():
        try:
            [image] = images.read(np.array([row]))
        except DataError:  # One that the sample did not hold; the report cannot know it, the sheet goes on.
            continue
        face, found = shown_face(table, row, image)
        faces.append(face)
        points.append(found)
        captions.append(check.caption(table, row))
    from affect.report import figures as draw

    # Matplotlib takes its own choice of endings; a wrong one is an error of ours in one line.
    draw.save(draw.sample_sheet(faces, captions, points, f"{name}: faces as labelled", lines=5), path)
    return path


def shown_face(table: FaceTable, row: int, image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the face of a row, cut out of a large photograph and with its box drawn, and its points ``(P, 2)``."""
    rows = np.array([row])
    points, box = None, None
    for scheme in labels.SCHEMES.values():
        if points is None and scheme.column in table.names:
            values, valid = table.numbers(scheme.column, rows)
            points = values[0].reshape(-1, 2).astype(np.float64) if valid[0] else None
    if "box" in table.names:
        values, valid = table.numbers("box", rows)
        box = values[0].reshape(2, 2).astype(np.float64) if valid[0] else None
    corners = points if points is not None else box
    finite = None if corners is None else corners[np.isfinite(corners).all(1)]
    height, width = image.shape[:2]
    left, top, right, bottom = 0, 0, width, height
    if finite is not None and len(finite):
        low, high = finite.min(0), finite.max(0)
        margin = 0.5 * max(*(high - low), 1.0)
        left, top = (int(v) for v in np.clip(np.floor(low - margin), 0, [width - 2, height - 2]))
        right, bottom = (int(v) for v in np.clip(np.ceil(high + margin), [left + 2, top + 2], [width, height]))
    cut = np.ascontiguousarray(image[top:bottom, left:right])
    scale = min(1.0, _SHOWN / max(cut.shape[:2]))
    if scale < 1:
        size = (max(1, round(cut.shape[1] * scale)), max(1, round(cut.shape[0] * scale)))
        cut = cv2.resize(cut, size, interpolation=cv2.INTER_AREA)
    scales = np.array([cut.shape[1] / (right - left), cut.shape[0] / (bottom - top)])

    def moved(places: np.ndarray) -> np.ndarray:
        return (places - [left, top] + 0.5) * scales - 0.5

    if box is not None and np.isfinite(box).all():
        (x1, y1), (x2, y2) = np.round(moved(box)).astype(int).tolist()
        cv2.rectangle(cut, (x1, y1), (x2, y2), (255, 230, 60), 1)
    return cut, None if points is None else moved(points)
