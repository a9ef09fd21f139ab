# SPDX-License-Identifier: Apache-2.0
"""The command ``affect``: runs, sweeps, mistakes, help, and that none of the answers waits for torch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import affect
from affect.commands import configuration
from affect.commands.main import COMMANDS, main
from affect.errors import DataError

HEAVY = (
    "torch",
    "torchvision",
    "pytorch_lightning",
    "timm",
    "albumentations",
    "torchmetrics",
    "cv2",
    "sklearn",
    "scipy",
)


def files(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------ runs


def test_a_run_gets_its_configuration_and_leaves_no_trace(calls):
    argv, folder = list(sys.argv), Path.cwd()
    calls.act = lambda config: Path.cwd()
    assert main(["train", "seed=3", "debug=fast", "dataset.root=/a b, c=(d)"]) == 0
    (config,) = calls
    assert (config.seed, config.trainer.max_epochs, config.dataset.root) == (3, 1, "/a b, c=(d)")
    assert "hydra" not in config
    assert (sys.argv, Path.cwd()) == (argv, folder)
    assert list(folder.iterdir()) == []


def test_the_current_folder_stays_while_a_command_runs(calls, tmp_path):
    seen = []
    calls.act = lambda config: seen.append((Path.cwd(), configuration.sweep_job()))
    assert main(["train"]) == 0
    assert seen == [(tmp_path / "user", None)]


def test_a_word_behind_the_command(calls):
    assert main(["benchmark", "loader", "quick=true"]) == 0
    assert main(["benchmark", "what=step"]) == 0
    assert [config.what for config in calls] == ["loader", "step"]


def test_cfg_prints_the_configuration_only(calls, capsys):
    assert main(["train", "experiment=first_run", "--cfg"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.seed, printed.encoder.name) == (7, "large")
    assert "hydra" not in printed
    assert calls == []


# ---------------------------------------------------------------------------------------------------- sweeps


def sweep_jobs(calls):
    jobs = []

    def act(config):
        folder, number = configuration.sweep_job()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "done").write_text(str(config.seed))
        jobs.append((config.seed, folder, number))
        return 0.5

    calls.act = act
    return jobs


def test_jobs_of_a_sweep_have_folders_that_the_same_line_finds_again(calls):
    jobs = sweep_jobs(calls)
    assert main(["train", "-m", "seed=1,2", "dataset.root=/a b,c"]) == 0
    assert [(seed, number) for seed, _, number in jobs] == [(1, 0), (2, 1)]
    assert {config.dataset.root for config in calls} == {"/a b,c"}
    sweep = jobs[0][1].parent
    assert sweep.parent == Path.cwd() / "runs" / "sweeps"
    assert [folder.name for _, folder, _ in jobs] == ["0", "1"]
    assert files() == sorted(
        str(path.relative_to(Path.cwd()))
        for path in (sweep / "0" / "done", sweep / "1" / "done", sweep / "sweep.json", sweep / "sweep.lock")
    )
    first = list(jobs)
    jobs.clear()
    assert main(["train", "dataset.root=/a b,c", "seed=1,2", "--multirun"]) == 0
    assert jobs == first


def test_the_folder_of_a_sweep_can_be_given(calls):
    jobs = sweep_jobs(calls)
    assert main(["train", "-m", "seed=1,2", "hydra.sweep.dir=mine"]) == 0
    assert [folder for _, folder, _ in jobs] == [Path.cwd() / "mine" / "0", Path.cwd() / "mine" / "1"]


def test_an_experiment_may_be_a_sweep(calls, tree):
    jobs = sweep_jobs(calls)
    (tree / "experiment" / "seeds.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweep: {dir: seeds}\n  sweeper: {params: {seed: '4,5'}}\n"
    )
    assert main(["train", "experiment=seeds"]) == 0
    assert [(seed, folder.parent.name) for seed, folder, _ in jobs] == [(4, "seeds"), (5, "seeds")]


def test_paths_are_swept_over_by_choice_alone(calls):
    assert main(["train", "-m", "checkpoint=choice('/a b', \"c=(d),e\")"]) == 0
    assert [config.checkpoint for config in calls] == ["/a b", "c=(d),e"]


def test_all_jobs_run_although_one_fails(calls, capsys):
    def act(config):
        if config.seed == 2:
            raise DataError("no folder x;\n  make it")

    calls.act = act
    assert main(["train", "-m", "seed=1,2,3"]) == 2
    assert [config.seed for config in calls] == [1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "affect train: error: job 1 (seed=2): no folder x; make it",
        "affect train: error: 1 of 3 jobs failed; the same line runs what is missing:",
        "affect train: error:   job 1 (seed=2): no folder x; make it",
    ]


def test_mistakes_in_a_sweep_are_found_before_its_first_job(calls, capsys):
    assert main(["train", "-m", "encoder=small,lage", "seed=1,2"]) == 2
    assert calls == []
    assert "encoder has no option 'lage'; did you mean large?" in only_line(capsys)


@pytest.mark.slow
def test_another_sweeper_is_told_of_failures(calls, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")

    def act(config):
        raise DataError("bad table")

    calls.act = act
    line = ["train", "-m", "hydra/sweeper=optuna", "seed=range(1,9)", "hydra.sweeper.n_trials=2"]
    assert main([*line, "hydra.sweeper.n_jobs=1", "hydra.sweeper.max_failure_rate=0.0"]) == 2
    assert len(calls) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("bad table")
    calls.clear()
    calls.act = lambda config: float(config.seed)
    assert main([*line, "hydra.sweeper.n_jobs=1"]) == 0
    assert len(calls) == 2


LAUNCHED = """
import json, os, subprocess, sys, types
from pathlib import Path


def run(config):
    import my_helper
    from affect.commands.configuration import sweep_job

    folder, number = sweep_job()
    folder.mkdir(parents=True, exist_ok=True)
    rank = os.environ.get("RANK_OF_TEST", "0")
    (folder / f"rank{rank}.json").write_text(json.dumps({
        "seed": config.seed, "root": config.dataset.root, "pid": os.getpid(), "name": config.encoder.name,
        "helper": my_helper.NAME, "number": number,
    }))
    if rank == "0" and config.trainer.devices == 2:
        # What Lightning's launcher does for each further process.
        added = ['hydra.run.dir="."', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
        command = [sys.executable, "-m", "affect.commands.main", *sys.argv[1:], *added]
        subprocess.run(command, env=dict(os.environ, RANK_OF_TEST="1"), check=True)


module = types.ModuleType("affect.commands.train")
module.run = run
sys.modules["affect.commands.train"] = module
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of a user's extension, and an environment in which every Python process has a stand-in for training."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LAUNCHED)
    extension = tmp_path / "my extension"
    (extension / "conf" / "encoder").mkdir(parents=True)
    (extension / "conf" / "encoder" / "mine.yaml").write_text("name: mine\nweights: null\nimage_size: 64\n")
    (extension / "my_helper.py").write_text("NAME = 'helper'\n")
    (tmp_path / "user").mkdir()
    root = Path(affect.__file__).parents[1]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), str(root)]))
    return extension / "conf", tmp_path / "user", environment


def run_elsewhere(elsewhere, *words):
    _, user, environment = elsewhere
    command = [sys.executable, "-m", "affect.commands.main", *words]
    return subprocess.run(command, cwd=user, env=environment, capture_output=True, text=True, timeout=120)


def reports(elsewhere, name):
    return [json.loads(path.read_text()) for path in sorted(elsewhere[1].glob(f"runs/sweeps/train-*/*/{name}.json"))]


def test_launched_jobs_import_the_users_modules(elsewhere):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["train", "-m", "seed=1,2", "encoder=mine", "dataset.root=/a b,c", "hydra/launcher=joblib"]
    done = run_elsewhere(elsewhere, *words, "hydra.launcher.n_jobs=1", "--config-dir", str(elsewhere[0]))
    assert done.returncode == 0, done.stderr
    found = reports(elsewhere, "rank0")
    assert [(report["seed"], report["number"]) for report in found] == [(1, 0), (2, 1)]
    assert {(report["root"], report["name"], report["helper"]) for report in found} == {("/a b,c", "mine", "helper")}


@pytest.mark.slow
def test_jobs_launched_by_submitit_import_the_users_modules(elsewhere):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["train", "-m", "seed=1,2", "encoder=mine", "hydra/launcher=submitit_local"]
    done = run_elsewhere(elsewhere, *words, "--config-dir", str(elsewhere[0]))
    assert done.returncode == 0, done.stderr
    assert [report["helper"] for report in reports(elsewhere, "rank0")] == ["helper", "helper"]


def test_further_processes_of_a_job_run_that_job_and_not_the_sweep(elsewhere):
    words = ["train", "-m", "seed=1,2", "trainer.devices=2", "encoder=mine", "dataset.root=/a b,c"]
    done = run_elsewhere(elsewhere, *words, f"--config-dir={elsewhere[0]}")
    assert done.returncode == 0, done.stderr
    first, further = reports(elsewhere, "rank0"), reports(elsewhere, "rank1")
    assert len(further) == 2
    for a, b in zip(first, further, strict=True):
        assert a.pop("pid") != b.pop("pid")
        assert a == b


# -------------------------------------------------------------------------------------------------- mistakes


def only_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "affect: error: there is no command 'trian'; did you mean train?"),
        (["--nope"], "affect: error: unknown option --nope"),
        (["train", "datset=faces"], "affect train: error: there is no key 'datset'; did you mean dataset"),
        (["train", "seed=1,2"], "affect train: error: seed=1,2: several values need -m"),
        (["train", "--seed=3"], "settings are written without dashes: seed=3"),
        (["train", "--multi"], "unknown option --multi; did you mean --multirun?"),
        (["train", "--config-dir"], "--config-dir needs a folder"),
        (["train", "--config-dir", "nope"], "--config-dir nope: not a folder"),
        (["train", "dataset=table"], "affect train: error: missing dataset.table; write dataset.table=labels.csv"),
        (["predict", "finder=faceapi"], "affect predict: error: missing checkpoint (and input); write checkpoint="),
        (["predict"], "choose one of finder: faceapi, mediapipe"),
        (["benchmark", "stp"], "affect benchmark has no 'stp'; did you mean step?"),
        (["benchmark"], "missing what; write affect benchmark step"),
        (["train", "-m", "seed=1,2", "dataset=table"], "missing dataset.table"),
        (["--completion", "tcsh"], "no completion for 'tcsh'; known: bash, zsh, fish"),
        (["--completion"], "which shell?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(calls, capsys, words, said):
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[0]
    assert len(lines) == (5 if "-m" in words else 1)  # each job, and at the end a heading and each again
    assert calls == []


def test_errors_for_users_are_one_line(calls, capsys):
    def act(config):
        raise DataError("labels.csv, row 7:\n   label 9 is outside [0, 5]")

    calls.act = act
    assert main(["train"]) == 2
    assert only_line(capsys) == "affect train: error: labels.csv, row 7: label 9 is outside [0, 5]"


def test_traceback_on_request(calls, capsys):
    def act(config):
        raise DataError("bad")

    calls.act = act
    assert main(["train", "--traceback"]) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1] == "affect train: error: bad"
    assert main(["train", "sed=1", "--traceback"]) == 2
    assert "hydra.errors.ConfigCompositionException" in capsys.readouterr().err


def refuse(value):
    """A component that refuses its configuration."""
    raise DataError(f"{value} is too much")


def test_errors_inside_of_instantiate_are_the_inner_line(calls, capsys):
    calls.act = lambda config: instantiate({"_target_": f"{__name__}.refuse", "value": 3})
    sys.modules.setdefault(__name__, sys.modules[refuse.__module__])
    assert main(["train"]) == 2
    assert only_line(capsys) == "affect train: error: 3 is too much"


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": "collections.OrderedDict.nope"}, "cannot import collections.OrderedDict.nope"),
        ({"_target_": "my_package.Encoder"}, "No module named 'my_package'"),
        ({"_target_": "fractions.Fraction", "nmerator": 1}, "unexpected keyword argument 'nmerator'"),
    ],
)
def test_targets_that_cannot_be_made_are_one_line(calls, capsys, node, said):
    calls.act = lambda config: instantiate(OmegaConf.create({"encoder": node}).encoder)
    assert main(["train"]) == 2
    line = only_line(capsys)
    assert line.startswith("affect train: error: encoder: ")
    assert said in line
    with pytest.raises(InstantiationException):
        instantiate(node)


def test_interpolation_errors_are_one_line(calls, capsys):
    calls.act = lambda config: OmegaConf.create({"a": {"b": "${no.where}"}}).a.b
    assert main(["train"]) == 2
    assert only_line(capsys) == "affect train: error: a.b: Interpolation key 'no.where' not found"


def test_bugs_show_their_traceback_and_exit_code_1(calls, capsys):
    calls.act = lambda config: [][1]
    assert main(["train"]) == 1
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1] == "affect train: error: IndexError: list index out of range"


def test_interrupts(calls, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    def lightning(config):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    for act, line in ((interrupt, ["train"]), (lightning, ["train", "-m", "seed=1,2"])):
        calls.act = act
        assert main(line) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "affect train: interrupted"
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------ extensions


def test_config_dir_adds_configurations_and_modules(calls, tmp_path):
    extension = tmp_path / "extension"
    (extension / "conf" / "experiment").mkdir(parents=True)
    (extension / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 99\n")
    (extension / "my_module_of_a_user.py").write_text("VALUE = 5\n")
    seen = {}

    def act(config):
        import my_module_of_a_user

        code = "import my_module_of_a_user; print(my_module_of_a_user.VALUE)"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seen.update(seed=config.seed, here=my_module_of_a_user.VALUE, child=child.stdout.strip())

    calls.act = act
    path, environment = list(sys.path), dict(os.environ)
    assert main(["train", "experiment=mine", "--config-dir", "../extension/conf"]) == 0
    assert seen == {"seed": 99, "here": 5, "child": "5"}
    assert sys.path == path
    assert dict(os.environ) == environment
    sys.modules.pop("my_module_of_a_user")


# ------------------------------------------------------------------------------------------------------ help


def test_help_lists_commands(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {command.name} " in shown for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"affect {affect.__version__}\n"


def test_help_of_a_command_lists_groups_with_options(calls, tmp_path, capsys):
    (tmp_path / "mine" / "encoder").mkdir(parents=True)
    (tmp_path / "mine" / "encoder" / "my_encoder.yaml").write_text("name: mine\n")
    assert main(["train", "--help", "encoder=large", "--config-dir", str(tmp_path / "mine")]) == 0
    shown = capsys.readouterr().out
    assert "  encoder     *large  my_encoder  small\n" in shown
    assert "  task        *au  *expression  pose\n" in shown
    assert "  experiment  controlled/parity  first_run  wrong\n" in shown
    assert "  hydra/" not in shown.replace("  hydra/launcher", "")
    assert calls == []


def test_help_of_every_command_has_groups_keys_and_examples(capsys):
    for command in COMMANDS:
        assert main([command.name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(command.summary)
        assert all(f"  affect {example}\n" in shown for example in command.examples)
        assert max(map(len, shown.splitlines())) <= 120


def test_the_examples_and_keys_of_the_help_exist():
    for command in COMMANDS:
        with configuration.open_hydra(command.name) as hydra:
            groups = configuration.command_groups(hydra, command.name)
            own_table = ["dataset=table"] if "dataset" in groups else []
            configs = [configuration.plain_config(hydra, command.name, words) for words in ([], own_table)]
            keys = {key for config in configs for key, _ in configuration.leaves(config)} | set(command.names)
        keys |= {"dataset.leave_out"} if "dataset" in groups else set()  # every dataset takes it, none has it
        for key, _ in command.keys:
            assert key in groups or key in keys or key == "hydra/launcher", key
        for example in command.examples:
            settings = [word for word in shlex.split(example)[1:] if "=" in word]
            assert set(command.names.values()) <= keys
            if any(word.partition("=")[0] in groups for word in settings):
                configuration.compose(command.name, settings)
            else:
                assert {word.partition("=")[0] for word in settings} <= keys, example
            # The default crop needs points, which a table of one's own rarely has.
            assert command.name != "train" or "dataset=table" not in settings or "prepare=none" in settings


def test_answers_do_not_wait_for_torch():
    """Help, completion and mistakes import nothing heavy, and take little time of the processor."""
    lines = [
        ["train", "--help"],
        ["--help"],
        ["train", "datset=1"],
        ["predict", "input=x"],
        ["train", "-m", "seed=1,2", "encoder=nope"],
        ["--complete", "affect train trainer."],
    ]
    code = f"""
        import sys, time
        from affect.commands.main import main
        for number, line in enumerate({lines!r}):
            main(line)
            heavy = [name for name in {HEAVY!r} if name in sys.modules]
            assert not heavy, (line, heavy)
            assert number or time.process_time() < 2, time.process_time()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, timeout=120)
