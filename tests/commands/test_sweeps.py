# SPDX-License-Identifier: Apache-2.0
"""Sweeps: listed first, finished jobs skipped, failures kept apart, whoever launches them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import affect
from affect.commands import configuration, sweeps
from affect.commands.main import main
from affect.errors import DataError
from affect.files import locked

SHIPPED = configuration.config_directory()


def sweep_file() -> dict:
    (path,) = Path("runs").rglob("sweep.json")
    return json.loads(path.read_text())


def states() -> dict[str, str]:
    return {" ".join(job["settings"]): job["state"] for job in sweep_file()["jobs"]}


def training(calls, fails=()):
    """Let jobs store a score, as training does, and fail for some seeds; return the seeds that ran."""
    ran = []

    def act(config):
        ran.append(config.seed)
        if config.seed in fails:
            raise DataError(f"no data for {config.seed}")
        folder, _ = configuration.sweep_job()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"selection": {"score": config.seed / 10}}))
        return config.seed / 10

    calls.act = act
    return ran


@pytest.fixture
def shipped(tree):
    """The stand-in tree with the launchers and sweepers of the package."""
    shutil.copytree(SHIPPED / "hydra", tree / "hydra")
    return tree


def test_every_job_is_listed_before_the_first_runs(calls):
    seen = []
    calls.act = lambda config: seen.append(sweep_file())
    assert main(["train", "-m", "seed=1,2,3", "encoder=large"]) == 0
    first = seen[0]
    assert [job["settings"] for job in first["jobs"]] == [[f"seed={k}", "encoder=large"] for k in (1, 2, 3)]
    assert [job["state"] for job in first["jobs"]] == ["waiting"] * 3
    assert first["varied"] == ["seed"]
    assert [job["varied"] for job in first["jobs"]] == [{"seed": "1"}, {"seed": "2"}, {"seed": "3"}]
    assert (first["command"], first["sweeper"]) == ("train", "basic")
    assert [job["state"] for job in seen[2]["jobs"]] == ["finished", "finished", "waiting"]
    assert [job["state"] for job in sweep_file()["jobs"]] == ["finished"] * 3


def test_a_folder_for_all_jobs_is_that_of_the_sweep(calls, capsys):
    assert main(["train", "-m", "seed=1,2", "+paths.output=mine"]) == 2
    assert "name that one: hydra.sweep.dir=<folder>" in capsys.readouterr().err
    assert calls == []


def test_batches_are_listed_as_a_whole(calls):
    seen = []
    calls.act = lambda config: seen.append(len(sweep_file()["jobs"]))
    assert main(["train", "-m", "seed=1,2,3", "hydra.sweeper.max_batch_size=1"]) == 0
    assert seen == [3, 3, 3]


def test_the_same_line_runs_what_is_missing(calls, capsys):
    line = ["train", "-m", "seed=1,2,3"]
    assert training(calls, fails=(2,)) == []
    assert main(line) == 2
    assert states() == {"seed=1": "finished", "seed=2": "failed", "seed=3": "finished"}
    assert sweep_file()["jobs"][1]["reason"] == "job 1 (seed=2): no data for 2"
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "affect train: error: 1 of 3 jobs failed; the same line runs what is missing:",
        "affect train: error:   job 1 (seed=2): no data for 2",
    ]
    ran = training(calls)
    assert main(line) == 0
    assert ran == [2]
    assert configuration.sweep_job() is None
    assert set(states().values()) == {"finished"}
    assert "next: affect collect sweep=runs/sweeps/train-" in capsys.readouterr().out
    assert main(line) == 0
    assert ran == [2]


def test_a_job_that_was_killed_runs_again(calls):
    class Killed(BaseException):
        pass

    def act(config):
        if config.seed == 2:
            raise Killed

    line = ["train", "-m", "seed=1,2,3"]
    ran = training(calls)
    store = calls.act
    calls.act = lambda config: act(config) or store(config)
    with pytest.raises(Killed):
        main(line)
    assert list(states().values()) == ["finished", "waiting", "waiting"]
    calls.act = store
    ran.clear()
    assert main(line) == 0
    assert ran == [2, 3]


def test_a_changed_configuration_is_not_taken_for_finished(calls, tree):
    ran = training(calls)
    line = ["train", "-m", "seed=1,2"]
    assert main(line) == 0
    (tree / "encoder" / "small.yaml").write_text("name: small\nweights: null\nimage_size: 96\n")
    assert main(line) == 0
    assert ran == [1, 2, 1, 2]  # training itself says what differs, or that nothing does


def test_jobs_keep_their_numbers_when_a_sweep_file_grows(calls, tree):
    folders = []
    ran = training(calls)
    store = calls.act
    calls.act = lambda config: folders.append(configuration.sweep_job()) or store(config)
    experiment = tree / "experiment" / "seeds.yaml"
    text = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper: {{params: {{seed: '{}'}}}}\n"
    experiment.write_text(text.format("1,2"))
    assert main(["train", "experiment=seeds"]) == 0
    experiment.write_text(text.format("3,2,4"))
    assert main(["train", "experiment=seeds"]) == 0
    assert ran == [1, 2, 3, 4]
    assert [(folder.name, number) for folder, number in folders] == [("0", 0), ("1", 1), ("2", 2), ("3", 3)]
    data = sweep_file()
    assert [job["number"] for job in data["jobs"]] == [1, 2, 3]
    assert [job["settings"][0] for job in data["gone"]] == ["seed=1"]


def test_a_running_sweep_is_refused(calls, capsys):
    training(calls)
    line = ["train", "-m", "seed=1,2"]
    assert main(line) == 0
    (lock,) = Path("runs").rglob("sweep.lock")
    with locked(lock):
        assert main(line) == 2
    assert "another process is running it" in capsys.readouterr().err


def test_a_damaged_list_is_named(calls, capsys):
    training(calls)
    assert main(["train", "-m", "seed=1,2"]) == 0
    (path,) = Path("runs").rglob("sweep.json")
    path.write_text('{"jobs": [{"nr": 1}]}')
    assert main(["train", "-m", "seed=1,2"]) == 2
    assert "not a list of jobs" in capsys.readouterr().err


def test_a_sweep_may_be_a_file_and_gives_its_folder_a_name(calls, tree):
    (tree / "sweep").mkdir()
    (tree / "sweep" / "seeds.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper: {params: {seed: '1,2'}}\n"
    )
    (tree / "train.yaml").write_text(
        (tree / "train.yaml").read_text().replace("  - debug: null", "  - sweep: null\n  - debug: null")
    )
    ran = training(calls)
    assert main(["train", "sweep=seeds"]) == 0
    assert main(["train", "-m", "sweep=seeds"]) == 0
    assert ran == [1, 2]
    assert [path.name.rpartition("-")[0] for path in Path("runs/sweeps").iterdir()] == ["seeds"]
    assert main(["train", "sweep=seeds", "seed=7,8"]) == 0  # the line's values take the place of the file's
    assert ran == [1, 2, 7, 8]


# ----------------------------------------------------------------------------------------------------- search


OPTUNA = ["train", "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4"]


def test_a_search_maximises_and_goes_on_where_it_stopped(calls, shipped):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")
    ran = training(calls)
    line = [*OPTUNA, "seed=range(1,99)"]
    assert main(line) == 0
    seeds = list(ran)
    assert len(seeds) == len(set(seeds)) == 4
    (found,) = Path("runs").rglob("optimization_results.yaml")
    assert f"best_value: {max(seeds) / 10}" in found.read_text()
    data = sweep_file()
    assert (data["sweeper"], data["trials"], len(data["jobs"])) == ("optuna", 4, 4)
    assert main(line) == 0
    assert ran == seeds  # drawn again, read, not run
    (found.parent / "2" / "results.json").unlink()
    assert main(line) == 0
    assert ran == [*seeds, seeds[2]]


@pytest.mark.slow
def test_a_failed_trial_does_not_stop_a_search(calls, shipped, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")
    ran = training(calls)
    assert main([*OPTUNA, "seed=range(1,99)"]) == 0
    second = ran[1]
    shutil.rmtree("runs")
    ran = training(calls, fails=(second,))
    assert main([*OPTUNA, "seed=range(1,99)"]) == 2
    assert len(ran) == 4
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"no data for {second}")
    shutil.rmtree("runs")
    training(calls, fails=range(100))
    assert main([*OPTUNA, "seed=range(1,99)"]) == 2  # without a best trial
    assert "4 of 4 jobs failed" in capsys.readouterr().err


def test_paths_of_a_search_keep_their_quotes(calls, shipped):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")
    training(calls)
    line = [*OPTUNA, "seed=range(1,99)", "dataset.root=/a b, c=(d)", "checkpoint=choice('/x,y', '/z (1)')"]
    assert main(line) == 0
    assert {config.dataset.root for config in calls} == {"/a b, c=(d)"}
    assert {config.checkpoint for config in calls} <= {"/x,y", "/z (1)"}


# -------------------------------------------------------------------------------------------------- launchers


LAUNCHED = """
import json, os, signal, sys, time, types


def run(config):
    from affect.commands.configuration import sweep_job

    folder, number = sweep_job()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.lock").touch()
    with (folder / "starts").open("a") as file:
        file.write("x")
    if config.seed == 2 and not os.path.exists("healed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if config.seed == 5:
        time.sleep(25)
    if config.seed == 3 and not os.path.exists("healed"):
        raise RuntimeError("a mistake")
    (folder / "results.json").write_text(json.dumps({"selection": {"score": number}, "seed": config.seed}))
    return number


module = types.ModuleType("affect.commands.train")
module.run = run
sys.modules["affect.commands.train"] = module
"""


@pytest.fixture
def user(tmp_path):
    """A folder of a user, and a function that runs a line there with a stand-in for training in every process."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LAUNCHED)
    (tmp_path / "user").mkdir()
    root = Path(affect.__file__).parents[1]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), str(root)]))

    def run(*words):
        command = [sys.executable, "-m", "affect.commands.main", *words]
        folder = tmp_path / "user"
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)

    def start(*words):
        command = [sys.executable, "-m", "affect.commands.main", *words]
        out = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=tmp_path / "user", env=environment, stdout=out, stderr=out)

    run.start = start
    return tmp_path / "user", run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "joblib"])
def test_a_killed_job_neither_stops_nor_loses_the_others(user, launcher):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    folder, run = user
    line = ["train", "-m", "seed=1,2,3,4", f"hydra/launcher={launcher}"]
    done = run(*line)
    assert done.returncode == 1, done.stderr
    (sweep,) = (folder / "runs" / "sweeps").iterdir()
    data = json.loads((sweep / "sweep.json").read_text())
    assert [job["state"] for job in data["jobs"]] == ["finished", "failed", "failed", "finished"]
    lines = done.stderr.splitlines()[-3:]
    assert lines[0] == "affect train: error: 2 of 4 jobs failed; the same line runs what is missing:"
    assert "job 1 (seed=2)" in lines[1]
    assert "without an answer" in lines[1]
    assert "a mistake" in lines[2]
    (folder / "healed").touch()
    before = [(sweep / str(k) / "starts").read_text() for k in (0, 3)]
    done = run(*line)
    assert done.returncode == 0, done.stderr
    assert [(sweep / str(k) / "starts").read_text() for k in (0, 3)] == before
    results = [json.loads((sweep / str(k) / "results.json").read_text()) for k in range(4)]
    assert [(found["seed"], found["selection"]["score"]) for found in results] == [(1, 0), (2, 1), (3, 2), (4, 3)]


@pytest.mark.slow
def test_a_job_that_outlived_its_sweep_is_waited_for(user):
    """A job locks its folder only when it has begun to train; until then its process alone tells of it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder, run = user
    line = ["train", "-m", "seed=5", "hydra/launcher=local"]
    first = run.start(*line)
    deadline = time.monotonic() + 120
    while not any("process " in path.read_text() for path in folder.rglob("sweep.json")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.kill()
    first.wait()
    done = run(*line)
    assert done.returncode == 0, done.stderr
    assert "runs in another process; waiting for it" in done.stdout + done.stderr
    (sweep,) = (folder / "runs" / "sweeps").iterdir()
    (job,) = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert (job["state"], job["job"]) == ("finished", None)
    assert (sweep / "0" / "starts").read_text() == "x"


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(user):
    folder, run = user
    line = ["train", "-m", "seed=1,2,4"]
    assert run(*line).returncode == -signal.SIGKILL  # the second job takes the process of the sweep along
    (sweep,) = (folder / "runs" / "sweeps").iterdir()
    data = json.loads((sweep / "sweep.json").read_text())
    assert [job["state"] for job in data["jobs"]] == ["finished", "waiting", "waiting"]
    (folder / "healed").touch()
    done = run(*line)
    assert done.returncode == 0, done.stderr
    assert [(sweep / str(k) / "starts").read_text() for k in range(3)] == ["x", "xx", "x"]
    data = json.loads((sweep / "sweep.json").read_text())
    assert [job["state"] for job in data["jobs"]] == ["finished"] * 3


def fake(folder, monkeypatch, name, text, code=0, error=""):
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\nprintf '%s' '{text}'\nprintf '%s' '{error}' >&2\nexit {code}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)


def test_jobs_in_the_queue_are_told_from_those_that_left_it(tmp_path, monkeypatch):
    assert sweeps.alive([]) == set()
    fake(tmp_path, monkeypatch, "squeue", "12_0\n12_3\n")
    assert sweeps.alive(["12_0", "12_1"]) == {"12_0", "12_3"}
    fake(tmp_path, monkeypatch, "squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")
    assert sweeps.alive(["12_0"]) == set()
    fake(tmp_path, monkeypatch, "squeue", "", 1, "Unable to contact slurm controller")
    assert sweeps.alive(["12_0"]) is None  # nobody knows: keep waiting
    fake(tmp_path, monkeypatch, "scontrol", "JobId=13 ArrayJobId=12 JobState=OUT_OF_MEMORY Reason=OutOfMemory")
    assert sweeps.slurm_state("12_1") == "Slurm job 12_1: OUT_OF_MEMORY"
    fake(tmp_path, monkeypatch, "scontrol", "", 1)
    assert sweeps.slurm_state("12_1") == "Slurm job 12_1 is lost"


def test_a_log_is_told_by_what_the_job_wrote_last(tmp_path):
    path = tmp_path / "log"
    path.write_text(
        "one\naffect train: error: two\ntest:  50%|##  | 1/2\nsrun: error: exited\nslurmstepd: error: killed\n"
    )
    assert sweeps.last_line(path) == "affect train: error: two"
    path.write_text("srun: error: node lost\n")
    assert sweeps.last_line(path) == "srun: error: node lost"
    assert sweeps.last_line(tmp_path / "none") == ""


# ----------------------------------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("path", sorted((SHIPPED / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_compose_every_kind_of_job(path):
    from hydra.types import RunMode

    with configuration.open_hydra("train") as hydra:
        config = hydra.compose_config("train", [f"sweep={path.stem}"], RunMode.MULTIRUN)
        params = dict(config.hydra.sweeper.params)
        if str(config.hydra.sweeper._target_).endswith("OptunaSweeper"):
            assert config.hydra.sweeper.n_trials > 1
            assert all("(" in str(value) for value in params.values())
            hydra.compose_config("train", [f"sweep={path.stem}"], RunMode.RUN)
            return
        parsed = configuration.parse_overrides([f"{key}={value}" for key, value in params.items()])
        each = {o.get_key_element(): list(o.sweep_string_iterator()) for o in parsed}
        assert len(each["seed"]) >= 3
        assert len(each["protocol.test"]) == 3
        first = {key: values[0] for key, values in each.items()}
        for key, values in each.items():
            for value in values:
                settings = [f"{k}={v}" for k, v in (first | {key: value}).items()]
                job = hydra.compose_config("train", [f"sweep={path.stem}", *settings], RunMode.RUN)
                assert str(job.protocol.test) == (first | {key: value})["protocol.test"]


def test_the_guide_for_clusters_names_commands_files_and_keys_that_exist():
    """Lines of a shell compose, and what stands between marks of code is a choice or a key of ``affect train``."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text().replace("\\\n", " ").replace("…", "")
    lines = [line.partition(" #")[0] for line in re.findall(r"affect (?:train|collect|rerun) [^`\n]*", text)]
    assert len(lines) >= 6
    with configuration.open_hydra("train") as hydra:
        for line in lines:
            _, command, *words = shlex.split(line)
            settings = [word.partition(",")[0] if "=[" not in word else word for word in words if "=" in word]
            if command == "collect":  # where the name of a key is that of a group too
                settings = [word.replace("sweep=", "folder=") for word in settings]
            hydra.compose_config(command, settings, RunMode.MULTIRUN)
        spans = [
            span
            for span in re.findall(r"`([^`\n]*=[^`]*)`", text)
            if not re.search(r"[<$]|^(affect|change|by)\b", span)
        ]
        words = {key: word for span in spans for word in shlex.split(span) for key in [word.partition("=")[0]]}
        choices = [
            (key, name)
            for key, _, value in (word.partition("=") for span in spans for word in shlex.split(span))
            if hydra.config_loader.get_group_options(key)
            for name in value.strip("[]").split(",")
            if name
        ]
        assert {("hydra/launcher", "slurm"), ("trainer", "fsdp"), ("logger", "wandb"), ("sweep", "bp4d_folds")} <= {
            *choices
        }
        for group, name in choices:
            assert name in hydra.config_loader.get_group_options(group), (group, name)
        written = [word for key, word in words.items() if "." in key]
        asked = hydra.compose_config("train", ["hydra/launcher=slurm", *written], RunMode.MULTIRUN)
        assert asked.hydra.launcher.additional_parameters == {"mail-type": "FAIL"}
        assert asked.hydra.launcher.setup == ["module load cuda"]
        whole = hydra.compose_config("train", ["hydra/launcher=slurm"], RunMode.MULTIRUN)
        keys = set(
            re.findall(r"(?:trainer|data|compile|optimizer|hydra|callbacks|learning_rate_scaling)\.[a-z_.]+", text)
        )
        absent = object()
        missing = {key for key in keys if OmegaConf.select(whole, key.rstrip("."), default=absent) is absent}
        assert missing == {"hydra.launcher.n_jobs", "hydra.sweeper.n_jobs"}  # of joblib and of Optuna
    (first,) = [line for line in lines if "sweep=faces_folds" in line]
    (folder,) = set(re.findall(r"runs/sweeps/faces_folds-[0-9a-f]{8}", text))
    assert configuration.sweep_folder("train", shlex.split(first)[3:], None) == folder


def test_the_lines_of_the_guide_keep_seeds_whole():
    """Hydra varies last what is written first: a sweep that is stopped early has every test part of its first seeds."""
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    swept = [re.findall(r"(\S+?)=\S*,", line) for line in re.findall(r"affect train -m [^`\n]*", text)]
    assert ["seed", "protocol.test"] in swept
    assert all(keys.index("seed") == 0 for keys in swept if "seed" in keys)


def test_sources_follow_the_test_part_of_a_sweep():
    """Each job has one test part, not one for the run and another for each source."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    with configuration.open_hydra("train") as hydra:
        line = configuration.expand_sources(hydra, "train", ["dataset=[bp4d,disfa]", "protocol.test=P1,P2"])
        swept = [o.get_key_element() for o in configuration.parse_overrides(line) if o.is_sweep_override()]
        assert swept == ["protocol.test"]
        job = hydra.compose_config("train", [*(o for o in line if "P1,P2" not in o), "protocol.test=P2"], RunMode.RUN)
        sources = OmegaConf.to_container(job.dataset.sources, resolve=False)
        assert {name: node["protocol"]["test"] for name, node in sources.items()} == dict.fromkeys(
            ("bp4d", "disfa"), "${protocol.test}"
        )
        assert (job.dataset.sources.bp4d.protocol.test, job.dataset.sources.disfa.protocol.test) == ("P2", "P2")


@pytest.mark.parametrize("name", ["slurm", "local"])
def test_shipped_launchers_have_the_keys_of_their_classes(name):
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    pytest.importorskip("submitit")
    node = OmegaConf.load(SHIPPED / "hydra" / "launcher" / f"{name}.yaml")
    target = get_class(node._target_)
    from hydra_plugins.hydra_submitit_launcher import config

    known = config.SlurmQueueConf if name == "slurm" else config.LocalQueueConf
    assert target.__name__ in ("SlurmLauncher", "LocalLauncher")
    assert set(node) == set(known.__dataclass_fields__)


def test_any_option_of_sbatch_may_be_given(tmp_path):
    slurm = pytest.importorskip("submitit.slurm.slurm")
    for given, expected in ((None, 0), ({"mail-type": "FAIL"}, 1)):
        text = slurm._make_sbatch_string("true", tmp_path, additional_parameters=given)
        assert text.count("#SBATCH --mail-type=FAIL\n") == expected


def test_a_launcher_that_has_no_slurm_says_so(calls, shipped, capsys, monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    training(calls)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "-m", "seed=1,2", "hydra/launcher=slurm"]) == 2
    assert "hydra/launcher" in capsys.readouterr().err
