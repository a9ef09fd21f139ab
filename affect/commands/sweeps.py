# SPDX-License-Identifier: Apache-2.0
"""Many jobs from one command line: listed before the first starts, launched where they are missing, and accounted for.

Hydra's sweepers say which jobs there are and its launchers run them. What stands between them is here: ``sweep.json``
lists every intended job, a finished job is not launched again, and the failure of one, be it an error, a killed process
or a lost node, neither stops nor loses the others. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect.commands import configuration
from affect.errors import AffectError, ConfigError
from affect.files import is_locked, locked, replacing

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.utils import JobReturn
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext
    from omegaconf import DictConfig

SWEEP, LOCK, RUN_LOCK = "sweep.json", "sweep.lock", "run.lock"

WAITING, SUBMITTED, FINISHED, FAILED = "waiting", "submitted", "finished", "failed"
HERE = "process "
"""What the job of an entry begins with that is no number in Slurm's queue but a process of this machine."""

_GRACE = 20.0
"""Seconds that a result may take to appear on a shared file system after its job has left the queue."""

_WITHOUT_EFFECT = re.compile(r"\+*force=")
"""Settings that take no part in what a job is."""


@dataclass(frozen=True)
class Failure:
    """What a job that failed returns, so that the others go on.

    Attributes:
        line: What is said about it.
        code: Exit code.
    """

    line: str
    code: int


class JobError(AffectError):
    """A job failed whose sweeper wants to know: it decides itself how many may fail."""


@dataclass
class Entry:
    """A job of a sweep.

    Attributes:
        number: Its number, which stays when jobs are added.
        folder: Its folder, relative to that of the sweep.
        settings: Its overrides.
        varied: Those of them that the sweep varies, by key.
        state: ``waiting``, ``submitted``, ``finished`` or ``failed``.
        reason: Why it failed.
        config: Hash of the configuration that it was launched with; None before.
        job: Its number in Slurm's queue, or ``HERE`` and that of the process that runs it.
    """

    number: int
    folder: str
    settings: list[str]
    varied: dict[str, str] = field(default_factory=dict)
    state: str = WAITING
    reason: str | None = None
    config: str | None = None
    job: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What the job is, whatever the order of its settings."""
        return job_key(self.settings)

    @property
    def said(self) -> str:
        """The job in a message."""
        return f"job {self.number} ({' '.join(self.settings)})"


def job_key(settings: Sequence[str]) -> tuple[str, ...]:
    """Return what tells one job from another: its settings in a fixed order, without those of no effect."""
    return tuple(sorted(setting for setting in settings if not _WITHOUT_EFFECT.match(setting)))


class Record:
    """The list of a sweep's jobs, kept in ``sweep.json`` of its folder.

    Args:
        folder: Folder of the sweep.
        about: What else the file says: command, words, sweeper.
        varied: Keys that the sweep varies.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], varied: Sequence[str]) -> None:
        self.folder, self.about, self.varied = folder, dict(about), list(varied)
        self.entries: list[Entry] = []
        self.code = 0
        """Exit code: the highest of the jobs that failed."""
        self.before = {entry.key: entry for entry in read_entries(folder)}

    def add(self, settings: Sequence[str], folder: Callable[[int], str] = str) -> Entry:
        """Return the entry of a job, one of an earlier start with its number, or a new one."""
        key = job_key(settings)
        known = next((entry for entry in self.entries if entry.key == key), None)
        if known is not None:
            return known
        entry = self.before.get(key)
        if entry is None:
            taken = {other.number for other in (*self.before.values(), *self.entries)}
            number = next(number for number in range(len(taken) + 1) if number not in taken)
            entry = Entry(number, folder(number), list(settings))
        entry.settings = list(settings)
        pairs = dict(setting.split("=", 1) for setting in settings if "=" in setting)
        entry.varied = {key: pairs[key] for key in self.varied if key in pairs}
        self.entries.append(entry)
        return entry

    @property
    def gone(self) -> list[Entry]:
        """Jobs of an earlier start that are no longer asked for."""
        asked = {entry.key for entry in self.entries}
        return [entry for key, entry in self.before.items() if key not in asked]

    def write(self) -> None:
        """Write ``sweep.json``, atomically."""
        jobs = sorted(self.entries, key=lambda entry: entry.number)
        data = {**self.about, "varied": self.varied, "jobs": [asdict(entry) for entry in jobs]}
        if self.gone:
            data["gone"] = [asdict(entry) for entry in self.gone]
        with replacing(self.folder / SWEEP) as part:
            part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """Return the content of a sweep's ``sweep.json``, None if there is none.

    Raises:
        ConfigError: If it is damaged.
    """
    path = folder / SWEEP
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["jobs"] = [asdict(Entry(**job)) for job in data["jobs"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a list of jobs ({error}); delete it, and the same line writes it again"
        ) from None
    return data


def read_entries(folder: Path) -> list[Entry]:
    """Return the jobs that ``sweep.json`` lists, those that are no longer asked for included; none without the file."""
    data = read_sweep(folder)
    return [Entry(**job) for job in (*data["jobs"], *data.get("gone", ()))] if data else []


def run_sweep(
    hydra: Hydra,
    command: str,
    job: Callable[[DictConfig], object],
    overrides: Sequence[str],
    about: Mapping[str, Any],
    finished: str | None = None,
    say: Callable[[str], None] = print,
    listed: Callable[[Record], object] = lambda record: None,
) -> Record:
    """Run the jobs of a sweep that are not finished and return the record of all of them.

    Args:
        hydra: On the search path.
        command: Name of the command.
        job: What Hydra calls with the configuration of a job; it returns a ``Failure`` instead of raising, or raises
            ``JobError`` where the sweeper counts failures itself.
        overrides: Those of the sweep, ``hydra.sweep.dir`` among them where the configuration has none.
        about: What ``sweep.json`` says of the sweep.
        finished: Name of the file that tells that a job of this command is done; None runs every job again.
        say: Takes messages.
        listed: Takes the record before anything runs, so that it is there whatever is raised.

    Raises:
        ConfigError: If another process runs the sweep.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode
    from omegaconf import OmegaConf

    config = hydra.compose_config(command, list(overrides), RunMode.MULTIRUN, with_log_configuration=True)
    _fill_search(config, overrides)
    callbacks = Callbacks(config)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    asked = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(asked, list)
    params = {str(key): value for key, value in (config.hydra.sweeper.get("params") or {}).items()}
    # A key of the command line takes the place of the sweep file's, as in Hydra's own sweepers.
    lines = [*(f"{key}={value}" for key, value in params.items()), *asked]
    settings = configuration.parse_overrides(lines, hydra.config_loader)
    parsed = {override.get_key_element(): override for override in settings}
    varied = [key for key, override in parsed.items() if override.is_sweep_override()]
    folder = Path(str(config.hydra.sweep.dir))
    target = str(config.hydra.sweeper.get("_target_", ""))
    basic = target.endswith(".BasicSweeper")
    name = target.rpartition(".")[2].removesuffix("Sweeper").lower()
    trials = None if basic else config.hydra.sweeper.get("n_trials")
    with locked(folder / LOCK):
        record = Record(folder, {**about, "sweeper": name, "trials": trials}, varied)
        listed(record)
        callbacks.on_multirun_start(config=config, config_name=command)
        if basic:
            from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

            launcher = Plugins.instance().instantiate_launcher(context, job, config)  # type: ignore[arg-type]
            keeper = Keeper(launcher, record, context, config, finished, say)
            batches = BasicSweeper.split_arguments(list(parsed.values()), config.hydra.sweeper.get("max_batch_size"))
            keeper.intend([settings for batch in batches for settings in batch])
            for batch in batches:
                keeper.launch(batch, 0)
        else:
            sweeper = Plugins.instance().instantiate_sweeper(
                config=config,
                hydra_context=context,
                task_function=job,  # type: ignore[arg-type]
            )
            # The plugin for Optuna is a shell around its implementation.
            inner: Any = getattr(sweeper, "sweeper", sweeper)
            inner.launcher = Keeper(inner.launcher, record, context, config, finished, say, raises=True)
            record.write()
            sweeper.sweep(arguments=asked)
        callbacks.on_multirun_end(config=config, config_name=command)
    return record


_SEARCH = {
    "direction": ("minimize", "maximize"),
    "max_failure_rate": (0.0, 1.0),
    "sampler.seed": (None, 1),
}
"""Of keys of Optuna's sweeper the default, and what stands in its place here: ``affect train`` returns a score of which
more is better; a failed trial does not stop the others; and the same seed draws the same trials again, so that a search
goes on where it stopped. (Its storage, which could do that too, does not work with SQLAlchemy 2.)"""


def _fill_search(config: DictConfig, overrides: Sequence[str]) -> None:
    from omegaconf import OmegaConf, open_dict, read_write

    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_", "")).endswith(".OptunaSweeper"):
        return
    with read_write(config), open_dict(config):
        for key, (default, value) in _SEARCH.items():
            found = OmegaConf.select(sweeper, key, default="absent")
            given = any(override.lstrip("+").startswith(f"hydra.sweeper.{key}=") for override in overrides)
            if not given and getattr(found, "name", found) == default:
                OmegaConf.update(sweeper, key, value)


class Keeper:
    """Stands in front of a launcher: launches what is missing, and answers for the rest from what is stored.

    Args:
        launcher: Runs jobs.
        record: List of the jobs.
        context: Composes configurations of jobs.
        config: Configuration of the sweep.
        finished: Name of the file that tells that a job is done.
        say: Takes messages.
        raises: Whether the sweeper wants failures as exceptions.
    """

    def __init__(
        self,
        launcher: Launcher,
        record: Record,
        context: HydraContext,
        config: DictConfig,
        finished: str | None,
        say: Callable[[str], None],
        raises: bool = False,
    ) -> None:
        self.launcher, self.record, self.context, self.config = launcher, record, context, config
        self.finished, self.say, self.raises = finished, say, raises
        self.looked_at: set[int] = set()
        """Jobs whose state is that of this start and not of an earlier one."""

    def intend(self, jobs: Sequence[Sequence[str]]) -> list[Entry]:
        """List jobs in ``sweep.json``, with the configuration that each would have now.

        Raises:
            Exception: Hydra's, if the settings of a job do not compose: none was launched then.
        """
        entries = [self.record.add(settings, str) for settings in map(self._readable, jobs)]
        for entry in entries:
            if entry.number in self.looked_at:
                continue
            self.looked_at.add(entry.number)
            composed = self._compose(entry)
            entry.folder = str(composed.hydra.sweep.subdir)
            if (composed.get("paths") or {}).get("output"):
                raise ConfigError(
                    f"paths.output={composed.paths.output}: jobs lie in the folder of their sweep, where it is "
                    "continued and collected; name that one: hydra.sweep.dir=<folder>"
                )
            now = _hash(composed)
            if not self._is_done(entry, now, composed):
                entry.state = SUBMITTED if entry.state == SUBMITTED else WAITING
                entry.config, entry.reason = now, None
            else:
                entry.state, entry.reason = FINISHED, None
        self.record.write()
        return entries

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs that are not finished and return what each of them returned, now or earlier."""
        from hydra.core.utils import JobReturn, JobStatus

        entries = self.intend(job_overrides)
        missing = list({e.number: e for e in entries if e.state not in (FINISHED, FAILED)}.values())
        values = {entry.number: self._stored(entry) for entry in entries if entry.state == FINISHED}
        # A search may draw the same trial twice.
        values |= {entry.number: Failure(str(entry.reason), 1) for entry in entries if entry.state == FAILED}
        for entry in [entry for entry in missing if self._runs_elsewhere(entry)]:
            self.say(f"{entry.said} runs in another process; waiting for it")
            while self._runs_elsewhere(entry):
                time.sleep(1.0)
            if self._exists(entry):
                values[entry.number] = self._stored(entry)
                self._settle(entry, values[entry.number])
                missing.remove(entry)
        if missing:
            values |= self._run(missing)
        returns = []
        for entry in entries:
            value = values.get(entry.number)
            failed = self.raises and isinstance(value, Failure)
            returned = JobReturn(overrides=entry.settings, status=JobStatus.FAILED if failed else JobStatus.COMPLETED)
            returned.return_value = JobError(value.line) if failed and isinstance(value, Failure) else value
            returns.append(returned)
        return returns

    # ------------------------------------------------------------------------------------------------ jobs

    def _readable(self, settings: Sequence[str]) -> list[str]:
        return [_requoted(setting) for setting in settings]

    def _folder(self, entry: Entry) -> Path:
        return self.record.folder / entry.folder

    def _compose(self, entry: Entry) -> DictConfig:
        from omegaconf import open_dict

        composed = self.context.config_loader.load_sweep_config(self.config, list(entry.settings))
        with open_dict(composed):
            composed.hydra.job.num = entry.number
            composed.hydra.job.id = entry.number
        return composed

    def _runs_elsewhere(self, entry: Entry) -> bool:
        """Return whether a job of an earlier start goes on here: it outlives the sweep, and locks its folder late."""
        here = entry.state == SUBMITTED and str(entry.job).startswith(HERE)
        return is_locked(self._folder(entry) / RUN_LOCK) or (here and runs_here(str(entry.job).removeprefix(HERE)))

    def _exists(self, entry: Entry) -> bool:
        return self.finished is not None and (self._folder(entry) / self.finished).is_file()

    def _is_done(self, entry: Entry, now: str, composed: DictConfig) -> bool:
        """Return whether a job need not be launched: finished, with the configuration that it would have now."""
        if not self._exists(entry) or entry.config != now or entry.state == FAILED or composed.get("force"):
            return False
        return not composed.get("compare") or (self._folder(entry) / "compare.json").is_file()

    def _stored(self, entry: Entry) -> object:
        if self.finished is None:
            return None
        data = json.loads((self._folder(entry) / self.finished).read_text(encoding="utf-8"))
        return (data.get("selection") or {}).get("score")

    def _settle(self, entry: Entry, value: object) -> None:
        failed = isinstance(value, Failure)
        entry.state, entry.job = FAILED if failed else FINISHED, None
        entry.reason = value.line if isinstance(value, Failure) else None
        self.record.code = max(self.record.code, value.code if isinstance(value, Failure) else 0)
        self.record.write()

    def _run(self, missing: Sequence[Entry]) -> dict[int, object]:
        kind = type(self.launcher).__name__
        if kind in ("SlurmLauncher", "LocalLauncher"):
            return self._run_submitted(missing)
        if kind == "BasicLauncher":
            values = {}
            logging.getLogger(type(self.launcher).__module__).setLevel(logging.WARNING)  # counts to one each time
            for entry in missing:
                self.say(f"{entry.said}: {self._folder(entry)}")
                values[entry.number] = self._call([entry])[entry.number]
            return values
        return self._run_together(missing)

    def _overrides(self, entry: Entry) -> list[str]:
        # Numbers of missing jobs have gaps, so each job is told its folder.
        return [*entry.settings, f"hydra.sweep.subdir={configuration.quoted(entry.folder)}"]

    def _call(self, entries: Sequence[Entry]) -> dict[int, object]:
        """Launch jobs through the launcher itself and return what each returned."""
        returns = self.launcher.launch([self._overrides(entry) for entry in entries], entries[0].number)
        values = {}
        for entry, returned in zip(entries, returns, strict=True):
            try:
                values[entry.number] = returned.return_value
            except JobError as error:
                values[entry.number] = Failure(str(error), 2)
            self._settle(entry, values[entry.number])
        return values

    def _run_together(self, missing: Sequence[Entry]) -> dict[int, object]:
        """Launch jobs at once; where a killed process takes the launcher along, go on with what is left.

        Jobs that had begun are launched one by one then, because one of them will end like that again.
        """
        values: dict[int, object] = {}
        left = list(missing)
        for entry in left:
            _unlink(self._folder(entry) / RUN_LOCK)
        while left:
            try:
                values |= self._call(left)
                break
            except (AffectError, KeyboardInterrupt):
                raise
            except Exception as error:
                line = f"{type(error).__name__}: {configuration.one_line(error)[:300]}"
            done = [entry for entry in left if self._exists(entry)]
            for entry in done:
                values[entry.number] = self._stored(entry)
                self._settle(entry, values[entry.number])
            begun = [e for e in left if e not in done and (len(left) == 1 or (self._folder(e) / RUN_LOCK).exists())]
            if not begun and not done:
                begun = left
            self.say(f"the launcher failed ({line}); launched one by one: {counted(len(begun))} that had begun")
            for entry in begun:
                try:
                    if len(left) > 1:
                        values |= self._call([entry])
                        continue
                except (AffectError, KeyboardInterrupt):
                    raise
                except Exception as error:
                    line = f"{type(error).__name__}: {configuration.one_line(error)[:300]}"
                values[entry.number] = Failure(f"{entry.said}: its process ended without an answer ({line})", 1)
                self._settle(entry, values[entry.number])
            left = [entry for entry in left if entry not in done and entry not in begun]
        return values

    # --------------------------------------------------------------------------------------------- submitit

    def _run_submitted(self, missing: Sequence[Entry]) -> dict[int, object]:
        """Submit jobs by submitit and wait for each, whatever becomes of the others."""
        import submitit

        logging.getLogger("submitit").setLevel(logging.ERROR)  # a warning each minute where Slurm keeps no accounts
        slurm = type(self.launcher).__name__ == "SlurmLauncher"
        params: dict[str, Any] = self.launcher.params  # type: ignore[attr-defined]
        tasks = range(int(params.get("tasks_per_node") or 1) * int(params.get("nodes") or 1))
        jobs: dict[int, Any] = {}
        known = {entry.number: entry.job for entry in missing if entry.job and not entry.job.startswith(HERE)}
        queued = alive(list(known.values())) if slurm else set()
        for entry in missing:
            if slurm and entry.state == SUBMITTED and entry.number in known and (queued is None or entry.job in queued):
                jobs[entry.number] = submitit.SlurmJob(params["submitit_folder"], known[entry.number], tuple(tasks))
        if jobs:
            self.say(f"in Slurm's queue from an earlier start, waiting for: {counted(len(jobs))}")
        new = [entry for entry in missing if entry.number not in jobs]
        if new:
            for entry, job in zip(new, self._submit(new), strict=True):
                jobs[entry.number] = job
                entry.state, entry.reason, entry.job = SUBMITTED, None, f"{'' if slurm else HERE}{job.job_id}"
            self.record.write()
        if slurm and new:
            self.say(f"submitted to Slurm: {counted(len(new))} ({_ids(new)}); logs in {params['submitit_folder']}")
        try:
            return self._wait({entry.number: (entry, jobs[entry.number]) for entry in missing}, slurm)
        except KeyboardInterrupt:
            if slurm:
                self.say("the jobs go on in Slurm without this process; the same line waits for them again")
            else:
                for job in jobs.values():
                    job.cancel(check=False)
            raise

    def _submit(self, entries: Sequence[Entry]) -> Sequence[Any]:
        """Submit jobs as one array, as the launcher's own ``launch`` does before it waits."""
        import submitit
        from hydra.core.singleton import Singleton

        launcher: Any = self.launcher
        kind = launcher._EXECUTOR
        sizes = ("cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes")
        common = ("timeout_min", "name", "stderr_to_stdout", *sizes)
        params = dict(launcher.params)
        first = {"folder": params.pop("submitit_folder")}
        if "max_num_timeout" in params:
            first[f"{kind}_max_num_timeout"] = params.pop("max_num_timeout")
        try:
            executor = submitit.AutoExecutor(cluster=kind, **first)
            named = {key if key in common else f"{kind}_{key}": value for key, value in params.items()}
            executor.update_parameters(**named)
            arguments = [
                (self._overrides(e), "hydra.sweep.dir", e.number, f"job_id_for_{e.number}", Singleton.get_state())
                for e in entries
            ]
            return executor.map_array(launcher, *zip(*arguments, strict=True))
        except (RuntimeError, subprocess.SubprocessError, submitit.core.utils.FailedJobError) as error:
            # No sbatch here, or Slurm refuses the partition, the time, the account.
            raise ConfigError(f"hydra/launcher: {configuration.one_line(error)}") from error

    def _wait(self, jobs: Mapping[int, tuple[Entry, Any]], slurm: bool) -> dict[int, object]:
        values: dict[int, object] = {}
        lost: dict[int, float] = {}
        left, looked, pause = dict(jobs), time.monotonic(), 5.0
        while left:
            for number, (entry, job) in list(left.items()):
                gone = number in lost and time.monotonic() - lost[number] > _GRACE
                if _has_ended(job, slurm) or gone:
                    values[number] = self._outcome(entry, job, slurm)
                    self._settle(entry, values[number])
                    self._tell(entry, values[number], len(values), len(jobs))
                    del left[number]
            if slurm and left and time.monotonic() - looked > pause:
                queued = alive([job.job_id for _, job in left.values()])
                looked, pause = time.monotonic(), min(30.0, pause * 1.5)
                for number, (_, job) in left.items():
                    if queued is not None and job.job_id not in queued:
                        lost.setdefault(number, time.monotonic())
                    else:
                        lost.pop(number, None)
            time.sleep(0.5 if left else 0)
        return values

    def _tell(self, entry: Entry, value: object, done: int, total: int) -> None:
        settings = " ".join(f"{key}={value}" for key, value in entry.varied.items()) or " ".join(entry.settings)
        self.say(f"{done} of {total}: job {entry.number} ({settings}) {entry.state}")

    def _outcome(self, entry: Entry, job: Any, slurm: bool) -> object:  # noqa: ANN401
        """Return what an ended job returned, or the ``Failure`` that says how it ended."""
        first = job.task(0)
        if not first.paths.result_pickle.exists():
            state = slurm_state(job.job_id) if slurm else str(job.state).lower()
            where = first.paths.stderr if first.paths.stderr.exists() else first.paths.stdout
            said = last_line(where)
            about = f"; its log ends with: {said}" if said else ""
            return Failure(f"{entry.said}: ended without an answer ({state}){about}; see {where}", 1)
        try:
            returned = first.results()[0]
            return returned.return_value
        except JobError as error:
            return Failure(str(error), 2)
        except Exception as error:
            said = last_line(first.paths.stderr) or configuration.one_line(error)[-300:]
            return Failure(f"{entry.said}: {said}; see {first.paths.stderr}", 1)


def _has_ended(job: Any, slurm: bool) -> bool:  # noqa: ANN401
    """Return whether a job left a result, or, on this machine, whether its process is gone."""
    if not slurm:
        return bool(job.done())
    folder = job.paths.folder
    folder.chmod(folder.stat().st_mode)  # lets a network file system look again
    return all(job.task(k).paths.result_pickle.exists() for k in range(job.num_tasks))


def runs_here(process: str) -> bool:
    """Return whether a process of this machine is one of submitit's; its number may belong to another one by now."""
    try:
        command = Path(f"/proc/{int(process)}/cmdline").read_bytes()
    except (OSError, ValueError):  # it is gone, or the system keeps no such list
        return False
    return b"submitit" in command


def alive(ids: Sequence[str]) -> set[str] | None:
    """Return which of Slurm's jobs wait or run, requeued ones included; None if Slurm does not answer."""
    if not ids:
        return set()
    masters = sorted({name.partition("_")[0] for name in ids})
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(masters)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode != 0:
        return set() if "invalid job id" in done.stderr.lower() else None
    return set(done.stdout.split())


def slurm_state(job: str) -> str:
    """Return how Slurm says that a job ended, e.g. ``OUT_OF_MEMORY``; ``lost`` if it no longer knows."""
    command = ["scontrol", "--oneliner", "show", "job", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return f"Slurm job {job} is lost"
    state = re.search(r"JobState=(\S+)", done.stdout)
    return f"Slurm job {job}: {state[1]}" if state else f"Slurm job {job} is lost"


def last_line(path: Path) -> str:
    """Return the last line of a log that says something; empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    # Slurm's and submitit's own messages and progress bars say less than what the job wrote before.
    noise = re.compile(r"(slurmstepd|srun|submitit)\b|.*\d%\|")
    own = [line.strip() for line in lines if line.strip() and not noise.match(line)]
    told = own or [line.strip() for line in lines if line.strip()]
    return told[-1][:300] if told else ""


def counted(number: int) -> str:
    """Return a number of jobs as text."""
    return "1 job" if number == 1 else f"{number} jobs"


def _ids(entries: Sequence[Entry]) -> str:
    ids = [str(entry.job) for entry in entries]
    return ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"


def _hash(composed: DictConfig) -> str:
    """Return a hash of a job's configuration, interpolations as they stand; ``hydra`` takes no part."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    kept = {key: value for key, value in plain.items() if key not in ("hydra", "force")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _requoted(setting: str) -> str:
    """Return a setting of one job that Hydra reads as one value.

    Optuna hands on the choices of a categorical parameter without the quotes that they were written with, so that a
    path with a comma would be a sweep of its own.
    """
    from hydra.errors import HydraException

    key, equals, value = setting.partition("=")
    try:
        simple = not configuration.parse_overrides([setting])[0].is_sweep_override()
    except HydraException:
        simple = False
    return setting if simple or not equals else f"{key}={configuration.quoted(value)}"


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def summary(record: Record) -> list[str]:
    """Return the last lines of a sweep with failures: how many, which and why, and how to go on."""
    failed = [entry for entry in sorted(record.entries, key=lambda e: e.number) if entry.state == FAILED]
    if not failed:
        return []
    lines = [f"{len(failed)} of {counted(len(record.entries))} failed; the same line runs what is missing:"]
    return lines + [f"  {entry.reason}" for entry in failed]


def next_line(record: Record, program: str = "affect collect") -> str:
    """Return what to do with a finished sweep of trainings."""
    return f"{program} sweep={shlex.quote(str(record.folder))}"
