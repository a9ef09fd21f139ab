# SPDX-License-Identifier: Apache-2.0
"""The package as users get it: a wheel, an editable install and a checkout, each used from a foreign folder."""

from __future__ import annotations

import itertools
import os
import re
import site
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import affect

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements():
    """Every requirement of the package and its extras."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]]


def constraints():
    """Exact versions by normalised name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in pinned, f"{name} is there twice"
            pinned[canonicalize_name(name)] = Version(version)
    return pinned


def test_constraints_hold_an_allowed_version_of_every_requirement():
    pinned = constraints()
    for requirement in requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_constraints_name_no_address_and_one_build():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|@|--|\+", text)
    assert len({version for name, version in constraints().items() if name.startswith("opencv-")}) == 1


def test_constraints_are_what_these_tests_run_with():
    """Figures and golden values are of these versions; an environment of other versions is not an error."""
    import importlib.metadata

    differing = {}
    for name, version in constraints().items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(installed).public != version.public:
            differing[name] = (str(version), installed)
    if differing:
        pytest.skip(f"the environment differs from constraints.txt: {differing}")


def test_files_about_the_package_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {affect.__version__}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_every_make_target_makes_its_environment_first():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "train", "test", "lint", "format", "benchmark"):
        assert re.search(rf"^{target}: \$\(STAMP\)$", makefile, re.MULTILINE), target
    command = ["make", "-n", "test", "VENV=/nowhere/venv"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (
        shown.index("-m venv /nowhere/venv") < shown.index("-m pip install") < shown.index("/nowhere/venv/bin/pytest")
    )


def test_an_old_python_is_refused_with_a_clear_line(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho Python 3.9.1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "train", f"PYTHON={old}", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"affect needs Python 3.11 or newer, and {old} is: Python 3.9.1\n" in done.stdout
    assert "make train PYTHON=" in done.stdout


def run(*command, cwd, **variables):
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env={**kept, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def environment(tmp_path):
    """A virtual environment without affect that sees the libraries of this one."""
    folder = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=tmp_path)
    packages = run(folder / "bin" / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path)
    # A path in a .pth file is not searched for further .pth files: this environment's own affect stays out.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    Path(packages.strip(), "libraries.pth").write_text("\n".join(sorted(here)) + "\n")
    probe = "import importlib.util as u; assert u.find_spec('torch') and not u.find_spec('affect')"
    run(folder / "bin" / "python", "-c", probe, cwd=tmp_path)
    (tmp_path / "foreign").mkdir()
    return folder


def pip(environment, *words, cwd):
    fixed = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), *fixed, *words, cwd=cwd)


def check_command(program, tmp_path, **variables):
    """Use the command from a foreign folder."""
    foreign = tmp_path / "foreign"
    shown = run(*program, "train", "--help", cwd=foreign, **variables)
    options = {path.stem for path in (ROOT / "conf" / "dataset").glob("*.yaml")}
    # The options of a group begin behind its name and go on in lines that begin further to the right.
    lines = shown.splitlines()
    (first,) = [k for k, line in enumerate(lines) if line.split()[:1] == ["dataset"]]
    indent = len(lines[first]) - len(lines[first].lstrip())
    rest = itertools.takewhile(lambda line: len(line) - len(line.lstrip()) > indent, lines[first + 1 :])
    words = " ".join([lines[first], *rest]).split()[1:]
    assert {word.lstrip("*") for word in words} == options
    composed = run(*program, "train", "--cfg", "experiment=first_run", cwd=foreign, **variables)
    assert "\nname: first_run\n" in composed
    assert list(foreign.iterdir()) == []


def config_directory(python, tmp_path, **variables):
    code = "from affect.commands.configuration import config_directory as d; print(d())"
    return Path(run(python, "-c", code, cwd=tmp_path / "foreign", **variables).strip())


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.yaml")}


@pytest.mark.slow
def test_wheel(environment, tmp_path):
    pytest.importorskip("build")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("affect-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"affect", f"affect-{affect.__version__}.dist-info"}
    assert "affect/data/layouts/orl_teacher.parquet" in names
    kept = {str(path.relative_to(ROOT)) for path in (ROOT / "affect").glob("*/weights/*")}
    assert kept <= set(names)
    assert {Path(name).suffix for name in kept} >= {".bin", ".safetensors"}

    pip(environment, str(wheel), cwd=tmp_path)
    python = environment / "bin" / "python"
    folder = config_directory(python, tmp_path)
    assert folder.is_relative_to(environment)
    assert tree(folder) == tree(ROOT / "conf")
    check_command([environment / "bin" / "affect"], tmp_path)


@pytest.mark.slow
def test_editable_install(environment, tmp_path):
    pytest.importorskip("hatchling")
    pip(environment, "--no-build-isolation", "--editable", str(ROOT), cwd=tmp_path)
    assert config_directory(environment / "bin" / "python", tmp_path) == ROOT / "conf"
    # A copy of conf/ in site-packages would go stale.
    assert not list(environment.glob("lib/*/site-packages/affect"))
    check_command([environment / "bin" / "affect"], tmp_path)


@pytest.mark.slow
def test_checkout_without_installation(environment, tmp_path):
    python = environment / "bin" / "python"
    assert config_directory(python, tmp_path, PYTHONPATH=str(ROOT)) == ROOT / "conf"
    check_command([python, "-m", "affect.commands.main"], tmp_path, PYTHONPATH=str(ROOT))
