# SPDX-License-Identifier: Apache-2.0
"""Mutated label files, over all layouts: a table or a ``DataError`` of one line, never another exception."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from affect.errors import DataError
from tests.data.layouts.trees import IMAGES, Case, cases, copied, whole

CASES = cases()
EXAMPLES = 20
PIECES = (
    *(
        b"",
        b" ",
        b",",
        b"\t",
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b'"',
        b"nan",
        b"inf",
        b"-1",
        b"-5",
        b"9",
    ),
    *(b"999", b"1e400", b"99999999999999999999", b"0x10", b"1_0", "½".encode(), "٣".encode(), b"[", b"{", b"}", b";"),
    *(
        b"../../x",
        b"/etc/passwd",
        b"a" * 300,
        b"-0",
        b"1.5.2",
        b"#",
        b"True",
        b"2147483648",
        b"\x1c",
        "\u2028".encode(),
    ),
)
"""What is put into files: separators, numbers at the edges, and what only looks like them."""


@st.composite
def mutations(draw) -> list[tuple[int, float, bytes, int]]:
    """Return a few changes: what is done, where in the file, with which bytes, over how many bytes."""
    one = st.tuples(st.integers(0, 5), st.floats(0, 1, exclude_max=True), st.sampled_from(PIECES), st.integers(0, 40))
    return draw(st.lists(one, min_size=1, max_size=4))


def mutated(content: bytes, changes: list[tuple[int, float, bytes, int]]) -> bytes:
    """Return a file's bytes with the changes made, one after the other."""
    for kind, where, piece, length in changes:
        at = int(where * (len(content) + 1))
        if kind == 0:  # put in
            content = content[:at] + piece + content[at:]
        elif kind == 1:  # put in place of others
            content = content[:at] + piece + content[at + length :]
        elif kind == 2:  # cut off
            content = content[:at]
        else:
            lines = content.split(b"\n")
            k = int(where * len(lines))
            if kind == 3:  # a line once more
                lines.insert(k, lines[k])
            elif kind == 4:  # a line less
                del lines[k]
            else:  # a cell of a line
                cells = lines[k].replace(b",", b" ").split(b" ")
                cells[length % len(cells)] = piece
                lines[k] = (b"," if b"," in lines[k] else b" ").join(cells)
            content = b"\n".join(lines)
    return content


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def tree(request, tmp_path_factory) -> tuple[Case, Path, list[tuple[Path, bytes]]]:
    """A dataset, a copy of its tree, and the files in it that are no images, with their bytes."""
    folder = tmp_path_factory.mktemp("fuzz")
    case: Case = request.param
    root = copied(whole(case.name, folder), folder / "copy")
    touched = case.read(root).metadata["touched"]
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix.lower() not in (*IMAGES, ".avi", ".mp4")]
    # A set with a label file per image remembers these by folder.
    places = [(path, path.relative_to(root)) for path in files]
    labels = [path for path, place in places if str(place) in touched or f"{place.parent}/*" in touched]
    assert {path.suffix for path in labels} == {path.suffix for path in files}
    return case, root, [(path, path.read_bytes()) for path in labels]


def test_a_mutated_file_is_read_or_refused_in_one_line(tree):
    case, root, files = tree
    outcomes = {"read": 0, "refused": 0}

    # Fixed examples: the same on every machine, so that a failure is the commit's and not the day's.
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, len(files) - 1), mutations())
    def attempt(which: int, changes) -> None:
        path, good = files[which]
        path.write_bytes(mutated(good, changes))
        said = ""
        try:
            assert len(case.read(root)) > 0
        except DataError as error:
            said = str(error)
        finally:
            path.write_bytes(good)
        assert "\n" not in said
        outcomes["refused" if said else "read"] += 1

    attempt()
    assert outcomes["read"]
    assert outcomes["refused"]


def test_mutations_change_files():
    """The fuzz is one: nearly all of the changes that it tries change the file."""
    content = b"frame,1,2\n1,0,1\n2,1,0\n"
    chosen = random.Random(0)
    tried = [(chosen.randrange(6), chosen.random(), chosen.choice(PIECES), chosen.randrange(40)) for _ in range(300)]
    assert sum(mutated(content, [change]) != content for change in tried) > 250
