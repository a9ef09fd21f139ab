# SPDX-License-Identifier: Apache-2.0
"""Kept tables (docs/experiments) are those of the experiments as they are configured, and are quoted right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "experiments"
NAMES = sorted(path.stem for path in KEPT.glob("*.md") if path.stem != "README")
QUOTING = {
    "affect/models/monet/README.md": "monet",
    "affect/models/au_transformer/README.md": "au_transformer",
    "affect/models/pal/README.md": "pal",
    "affect/models/thin/README.md": "thin",
    "affect/models/task_token_transformer/README.md": "uncertainty",
    "affect/quantization/README.md": "qat",
    "affect/compression/README.md": "compression",
    "affect/tasks/README.md": "rhls",
}
ESTIMATE = r"[+-]?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]"


def rows(text: str) -> list[list[str]]:
    """Cells of the lines of tables."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    return [[cell.strip().replace("\\|", "|") for cell in line] for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_table_is_that_of_its_experiment(name: str) -> None:
    """Whoever changes claim, expectation, arms, measures or seeds runs the experiment again."""
    text = (KEPT / f"{name}.md").read_text(encoding="utf-8")
    file = ROOT / "conf" / "experiment" / "controlled" / f"{name}.yaml"
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))["controlled"]
    scale = plan["scales"]["paper"]
    assert f"Claim: {plan['claim']} ({plan['source']})" in text
    assert f"Expected: {plan['expected']}" in text
    assert f"Mean over {scale['seeds']} seeds" in text
    assert f"affect reproduce experiment=controlled/{name} scale=paper" in text
    header, _, *arms = rows(text)
    assert [row[0] for row in arms] == list(scale.get("arms") or plan["arms"])
    baseline = plan["baseline"] if isinstance(plan["baseline"], str) else "baseline"
    assert [title for title in header[1:] if not title.endswith(f" − {baseline}")] == list(plan["measures"])
    assert (KEPT / f"{name}.png").stat().st_size > 1000
    assert f"[{name}]({name}.md)" in (KEPT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("file", "prefix"), QUOTING.items())
def test_methods_quote_the_kept_tables(file: str, prefix: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    kept = "".join((KEPT / f"{name}.md").read_text(encoding="utf-8") for name in NAMES if name.startswith(prefix))
    known = set(re.findall(ESTIMATE, kept))
    quoted = [set(re.findall(ESTIMATE, " ".join(row))) for row in rows(text)]
    assert set().union(*quoted), "no table quotes anything"
    # Numbers of one line belong to one arm.
    lines = [set(re.findall(ESTIMATE, line)) for line in kept.splitlines() if line[:1] == "|"]
    for numbers in quoted:
        assert numbers <= known
        if prefix != "rhls":  # whose lines have two experiments
            assert any(numbers <= line for line in lines), numbers


@pytest.mark.parametrize("file", [*QUOTING, "docs/experiments/README.md"])
def test_links_lead_somewhere(file: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / file).read_text(encoding="utf-8"))
    here = [link for link in links if not link.startswith("http")]
    assert here
    assert [link for link in here if not (ROOT / file).parent.joinpath(link).exists()] == []
