# SPDX-License-Identifier: Apache-2.0
"""Sources from configs: stored tables, several tables in one training, each with its protocol, crop and vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from affect.commands import assembly, evaluate, train
from affect.commands.configuration import compose as compose_config
from affect.data.datamodule import FaceDataModule
from affect.data.images import FileImages
from affect.data.layouts.common import Reading
from affect.data.protocol import Protocol
from affect.data.table import FaceTable
from affect.errors import ConfigError

Run = Callable[..., DictConfig]

LEAVES = {
    "dataset/parts.yaml": """# A table with official parts.
defaults:
  - override /protocol@_global_.protocol: held
  - override /prepare@_global_.prepare: none
  - _self_
name: parts
table: ???
root: null
group: subject
read:
  _target_: affect.data.layouts.table.read
  table: ${..table}
  root: ${..root}
""",
    "dataset/tree.yaml": """# A tree of files.
name: tree
root: ???
group: subject
read:
  _target_: tests.commands.test_assembly.read
  root: ${..root}
images:
  _target_: tests.commands.test_assembly.TableImages
""",
    "dataset/both.yaml": """# A training on two tables as a file.
defaults:
  - concat
  - parts@sources.parts
  - table@sources.table
  - /protocol@sources.parts.protocol: held
  - override /protocol@_global_.protocol: default
  - override /prepare@_global_.prepare: none
  - _self_
name: both
""",
    "protocol/held.yaml": "# Tests on the official part.\ntest: held\nevery: 1\n",
}
SMALL = (
    "encoder=timm", "encoder.name=test_resnet", "encoder.image_size=32", "debug=fast", "logger=none",
    "callbacks.progress=null", "trainer.enable_progress_bar=false", "bootstrap.resamples=20",
)  # fmt: skip


def read(root: str | Path) -> FaceTable:
    """Read a tree of one file with a subject and a valence per line."""
    reading = Reading(root, "tree", ("labels.txt",))
    values = reading.numbers("labels.txt", 2)
    reading.skip("blurred", ["x.png"])
    reading.note("a note of the layout")
    people = [f"p{int(k)}" for k in values[:, 0]]
    image = [f"{k}.png" for k in range(len(values))]
    return reading.table({"image": image, "subject": people, "valence": values[:, 1].astype(np.float32)})


class TableImages:
    """A reader that is given the table."""

    def __init__(self, table: FaceTable) -> None:
        self.table = table

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        return [np.full((8, 8, 3), int(row) % 255, np.uint8) for row in rows]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    folder = tmp_path / "mine" / "conf"
    for name, text in LEAVES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Path]:
    """Two tables of small images: action units, and expressions in another order without contempt, with parts."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    names, others = ([f"{prefix}{k}.png" for k in range(24)] for prefix in ("", "c"))
    for name in (*names, *others):  # of other people: whoever trains on both may test on neither's training
        cv2.imwrite(str(folder / name), generator.integers(0, 256, (32, 32, 3), np.uint8))
    people = [f"s{k // 2:02d}" for k in range(24)]
    units = {f"au{au:02d}_occurrence": np.float32(generator.random(24) < 0.5) for au in (1, 12)}
    full = ("neutral", "happiness", "contempt")
    first = {"image": names, "subject": people, **units, "expression": [full[k % 3] for k in range(24)]}
    few = ("happiness", "neutral")
    part = ["held" if k >= 16 else "train" for k in range(24)]
    second = {
        "image": others, "subject": [f"t{k // 2:02d}" for k in range(24)], "part": part,
        "expression": [few[k % 2] for k in range(24)],
    }  # fmt: skip
    FaceTable.from_columns(first, folder).to_csv(folder / "units.csv")
    FaceTable.from_columns(second, folder).to_csv(folder / "classes.csv")
    return {"units": folder / "units.csv", "classes": folder / "classes.csv"}


@pytest.fixture
def two(conf: Path, tables: dict[str, Path], tmp_path: Path) -> Run:
    """Return a function that composes a training on both tables."""

    def make(*overrides: str, dataset: tuple[str, ...] = ("dataset=[table,parts]",)) -> DictConfig:
        given = (f"dataset.sources.table.table={tables['units']}", f"dataset.sources.parts.table={tables['classes']}")
        data = ("prepare=none", "data.limit=null", "task=[au,expression]")
        paths = (f"paths.output={tmp_path / 'run'}", f"paths.cache={tmp_path / 'cache'}")
        line = [*dataset, *given, *SMALL, *data, *paths, *overrides]
        return compose_config("train", line, conf)

    return make


def datamodule(config: DictConfig) -> FaceDataModule:
    sources = assembly.build_sources(config, assembly.make(config.prepare, "prepare"))
    built = assembly.build_datamodule(config, sources, assembly.build_tasks(config), 32)
    built.setup("fit")
    return built


# ------------------------------------------------------------------------------------------------ one table


def test_a_read_table_is_stored_and_says_so_once(
    conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "labels.txt").write_text("1,0.5\n2,-0.5\n2,0.25\n")
    monkeypatch.chdir(tmp_path)
    line = ["dataset=tree", "dataset.root=tree", f"paths.cache={tmp_path / 'cache'}"]
    config = compose_config("train", line, conf)
    first = assembly.build_sources(config, None)[0]
    assert re.search(r"tree: read 3 rows in \d+\.\d s from tree\n", capsys.readouterr().out)
    again = assembly.build_sources(config, None)[0]
    assert capsys.readouterr().out == ""
    for source in (first, again):
        assert source.table.path is not None
        assert source.table.path.parent == tmp_path / "cache" / "tables"
        assert isinstance(source.images, TableImages)
        assert source.images.table is source.table
        assert (source.skipped, source.notes) == ({"blurred": 1}, ("a note of the layout",))
    # The same words name another folder from elsewhere.
    (tmp_path / "there" / "tree").mkdir(parents=True)
    (tmp_path / "there" / "tree" / "labels.txt").write_text("1,0.5\n")
    monkeypatch.chdir(tmp_path / "there")
    assert len(assembly.build_sources(config, None)[0].table) == 1
    assert len(assembly.build_sources(config, None, fresh=True)[0].table) == 1
    assert capsys.readouterr().out.count("tree: read 1 rows") == 2


def test_near_duplicates_are_those_of_the_tree_as_it_was_read(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8).repeat(12, 1).repeat(12, 2)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/labels.txt").write_text("1,0.5\n2,-0.5\n2,0.25\n")

    def groups(*shown: int) -> tuple[FaceTable, list[str]]:
        for k, which in enumerate(shown):
            cv2.imwrite(str(tmp_path / f"tree/{k}.png"), pictures[which])
        table = read(tmp_path / "tree")
        found = assembly.with_near_duplicates(table, FileImages(table), "tree", tmp_path / "cache")
        return found, list(found.strings("near_duplicates")[0])

    assert groups(0, 1, 0)[1] == ["0", "1", "0"]
    # Delivered again: the labels are the same, the pictures are not.
    (tmp_path / "tree/labels.txt").write_text("1,0.50\n2,-0.5\n2,0.25\n")
    found, numbers = groups(0, 1, 1)
    assert numbers == ["0", "1", "1"]
    assert found.metadata == read(tmp_path / "tree").metadata


def test_a_dataset_brings_its_protocol_and_crop_and_the_command_line_wins(conf: Path) -> None:
    config = compose_config("train", ["dataset=parts", "dataset.table=x.csv"], conf)
    assert (config.protocol.test, config.prepare.name) == ("held", "none")
    config = compose_config("train", ["dataset=parts", "dataset.table=x.csv", "protocol=default", "prepare=box"], conf)
    assert (config.protocol.test, config.prepare.name) == (None, "box")
    config = compose_config("evaluate", ["dataset=parts", "dataset.table=x.csv", "checkpoint=x"], conf)
    assert (config.protocol.test, config.prepare.name) == ("held", "none")
    config = compose_config("evaluate", ["checkpoint=x"], conf)
    assert not {"dataset", "protocol", "prepare"} & set(config)


def test_an_unknown_key_of_a_protocol_is_named(two: Run) -> None:
    with pytest.raises(ConfigError, match=r"^protocol has no key 'tset'; did you mean test"):
        assembly.build_protocols(two("+protocol.tset=1"))
    with pytest.raises(ConfigError, match=r"^dataset.sources.parts.protocol has no key 'tset'; did you mean test"):
        assembly.build_protocols(two("+dataset.sources.parts.protocol.tset=1"))


# ------------------------------------------------------------------------------------------- several tables


def test_each_source_keeps_the_protocol_and_crop_of_its_dataset(two: Run) -> None:
    config = two()
    run, own = assembly.build_protocols(config)
    assert (run.test, own["table"].test, own["parts"].test) == (None, None, "held")
    assert config.dataset.name == "table+parts"
    config = two("protocol=default")
    assert {key: found.test for key, found in assembly.build_protocols(config)[1].items()} == {
        "table": None, "parts": None,
    }  # fmt: skip
    config = two("protocol.split_seed=5", "dataset.sources.parts.protocol.every=2")
    own = assembly.build_protocols(config)[1]
    assert {key: (found.split_seed, found.every) for key, found in own.items()} == {"table": (5, 1), "parts": (5, 2)}


def test_crops_are_each_sources_own(conf: Path, tables: dict[str, Path]) -> None:
    given = [f"dataset.sources.table.table={tables['units']}", f"dataset.sources.parts.table={tables['classes']}"]
    own = ["encoder.image_size=32", "paths.cache=null", "dataset.sources.table.prepare.margin=0.5"]
    line = ["dataset=[table,parts]", *given, *own]
    config = compose_config("train", line, conf)
    sources = assembly.build_sources(config, assembly.make(config.prepare, "prepare"))
    assert [(s.recipe.name, s.recipe.margin, s.recipe.size) for s in sources] == [
        ("similarity", 0.5, 32), ("none", 0.0, 32),
    ]  # fmt: skip


def test_the_short_spelling_the_long_one_and_a_file_are_one_training(two: Run) -> None:
    short = datamodule(two())
    long = ("dataset=concat", "+dataset@dataset.sources.table=table", "+dataset@dataset.sources.parts=parts")
    for other in (two(dataset=long), two(dataset=("dataset=both",))):
        built = datamodule(other)
        # The order of sources is that of the line.
        order = [[s.name for s in built.sources].index(s.name) for s in short.sources]
        for part in ("train", "validation", "test"):
            for k, rows in enumerate(short.part_rows(part)):
                np.testing.assert_array_equal(built.part_rows(part)[order[k]], rows)


def test_labels_meet_by_name_and_what_a_table_cannot_label_is_masked(two: Run) -> None:
    built = datamodule(two())
    assert [source.name for source in built.sources] == ["table", "parts"]
    expression = built.tasks["expression"]
    batch = built.dataset("all").batch(0, np.arange(48))
    first, second = batch.source.numpy() == 0, batch.source.numpy() == 1
    classes = list(expression.outputs)
    names = ["neutral", "happiness", "contempt"]
    for k in range(24):
        assert classes[int(batch.targets["expression"][k].argmax())] == names[k % 3]
        assert classes[int(batch.targets["expression"][24 + k].argmax())] == ["happiness", "neutral"][k % 2]
    assert batch.masks["au"][first].all()
    assert not batch.masks["au"][second].any()
    assert batch.masks["expression"][first].all()
    masks = dict(zip(classes, batch.masks["expression"][second].all(0).tolist(), strict=True))
    assert masks == {"neutral": True, "happiness": True, "contempt": False}
    assert not batch.masks["expression"][second][:, classes.index("contempt")].any()


def test_each_table_gets_its_share_of_an_epoch(two: Run) -> None:
    built = datamodule(
        two("data.sampling.ratios={table: 0.25, parts: 0.75}", "data.sampling.length=32", "data.limit=null")
    )
    loader = built.train_dataloader()
    sources = np.concatenate([built.dataset("train").locate(key.positions)[0] for key in loader.sampler])
    assert np.bincount(sources).tolist() == [8, 24]


@pytest.mark.slow
def test_two_tables_train_and_are_evaluated_where_each_one_tests(two: Run, tmp_path: Path, conf: Path) -> None:
    train.run(two())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = {source["name"]: source["fingerprint"] for source in results["data"]["sources"]}
    assert set(found) == {"table", "parts"}
    assert found["table"] != found["parts"]
    assert results["dataset"] == "table+parts"
    predicted = FaceTable.read_parquet(tmp_path / "run" / "predictions" / "test.parquet")
    sources = predicted.strings("source")[0]
    assert set(sources) == {"table", "parts"}
    assert set(predicted.strings("group")[0][sources == "parts"]) <= {f"parts/t{k:02d}" for k in range(8, 12)}
    assert "touched" not in json.dumps(results)
    evaluate.run(compose_config("evaluate", [f"checkpoint={tmp_path / 'run'}", "data.num_workers=0"], conf))
    again = json.loads((tmp_path / "run" / "evaluate" / "table+parts-test" / "results.json").read_text())
    assert [r["value"] for r in again["metrics"]["test"]] == pytest.approx(
        [r["value"] for r in results["metrics"]["test"]], nan_ok=True
    )


def test_a_source_that_only_trains_is_not_tested(two: Run) -> None:
    built = datamodule(two("dataset.sources.table.protocol.train_only=true", "data.limit=null"))
    table, parts = built.part_rows("test")
    assert (len(table), parts.tolist()) == (0, list(range(16, 24)))
    assert len(built.part_rows("train")[0]) > 16


def test_sources_that_cannot_be_told_apart_or_read_are_refused(two: Run, conf: Path, tables: dict[str, Path]) -> None:
    twice = (f"+dataset@dataset.sources.{key}=table" for key in ("one", "two"))
    given = (f"dataset.sources.{key}.table={tables['units']}" for key in ("one", "two"))
    config = compose_config("train", ["dataset=concat", *twice, *given], conf)
    with pytest.raises(ConfigError, match=r"one and two are both named table.*set dataset.sources.two.name=table2"):
        assembly.build_sources(config, None)
    config.dataset.sources.two.name = "table2"
    assert [source.name for source in assembly.build_sources(config, None)] == ["table", "table2"]
    with pytest.raises(ConfigError, match=r"dataset=\[table,table\]: table twice; give the second one a name"):
        compose_config("train", ["dataset=[table,table]"], conf)
    with pytest.raises(ConfigError, match=r"dataset=concat has no tables; write dataset=\["):
        assembly.build_sources(compose_config("train", ["dataset=concat"], conf), None)
    with pytest.raises(ConfigError, match="dataset has no option 'tabel'; did you mean table"):
        compose_config("train", ["dataset=[tabel,parts]"], conf)
    config = compose_config("train", ["dataset=concat", "+dataset.sources.x.root=here"], conf)
    with pytest.raises(ConfigError, match=r"dataset\.sources\.x is no dataset"):
        assembly.build_sources(config, None)


@pytest.mark.slow
def test_every_shipped_dataset_can_be_one_of_several() -> None:
    from affect.commands.configuration import command_groups, config_directory, open_hydra

    names = sorted(path.stem for path in (config_directory() / "dataset").glob("*.yaml") if path.stem != "concat")
    config = compose_config("train", [f"dataset=[{','.join(names)}]"])
    nodes = assembly.source_nodes(config)
    assert len(nodes) == len(names)
    with open_hydra("train") as hydra:
        for node, name in zip(nodes.values(), names, strict=True):
            for missing in [key for key in node if OmegaConf.is_missing(node, key)]:
                node[missing] = f"given {name}"
            resolved = OmegaConf.to_container(node, resolve=True)
            # What its reader takes is its own, not a neighbour's.
            given = {key: value for key, value in resolved["read"].items() if key in resolved}
            assert given == {key: resolved[key] for key in given}, name
            alone = command_groups(hydra, "train", [f"dataset={name}"])
            protocol = OmegaConf.load(config_directory() / "protocol" / f"{alone['protocol'][0]}.yaml")
            assert Protocol(**resolved["protocol"]) == Protocol(**OmegaConf.to_container(protocol)), name
            assert resolved["prepare"]["name"] == alone["prepare"][0], name


def test_a_key_for_another_encoder_is_named_with_the_line_that_leaves_it_out() -> None:
    config = compose_config("train", ["sweep=faces_folds", "encoder=timm"])
    with pytest.raises(ConfigError, match=r"^encoder\.widths: TimmEncoder takes no widths; .*'~encoder\.widths'$"):
        assembly.build_model(config, {})
    # A run resolves its config first: what pointed to the encoder is then a copy of it.
    parts = {name: OmegaConf.to_container(config[name], resolve=True) for name in ("encoder", "model")}
    with pytest.raises(ConfigError, match=r"^encoder\.widths: TimmEncoder takes no widths"):
        assembly.make(OmegaConf.create(parts).model, "model", _partial_=True)
    without = compose_config("train", ["sweep=faces_folds", "encoder=timm", "~encoder.widths"])
    assert "widths" not in without.model.encoder


def test_settings_of_a_callback_that_is_not_chosen_are_refused() -> None:
    config = compose_config("train", ["callbacks=[default]", "+callbacks.qat.freeze_norms=3"])
    with pytest.raises(
        ConfigError, match=r"^callbacks\.qat: freeze_norms of a callback that is not chosen.*'~callbacks"
    ):
        train.build_trainer(config, [])


def test_the_small_recipe_trains_in_float_without_its_quantization() -> None:
    small = compose_config("train", ["experiment=cpu_small"])
    assert (small.callbacks.qat.activations, small.callbacks.qat.freeze_norms) == (8, 15)
    float_one = compose_config("train", ["experiment=cpu_small", "callbacks=[default]"])
    assert list(float_one.callbacks) == list(compose_config("train", []).callbacks)
