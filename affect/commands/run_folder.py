# SPDX-License-Identifier: Apache-2.0
"""Where a run lives: its folder is a function of what can change its result, and only one process may write there."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from yaml import YAMLError

from affect import files
from affect.commands.configuration import sweep_job
from affect.commands.starting_point import EARLIER, earlier_weights, weights_file
from affect.data.images import Source
from affect.data.protocol import part_name
from affect.errors import ConfigError
from affect.files import replacing
from affect.report import code_patch, environment, patch_hash

RESULTS, CONFIG, CONTENTS, LOCK = "results.json", "config.yaml", "data.json", "run.lock"
STARTS, CODE, LOGGED = "starts.json", "code", "loggers.json"
"""What each start of a run ran on, folder of the patches of code that was not committed, named by their hash, and under
which names loggers keep the run."""

SELECTION = "selection"
"""Folder in that of a refit where the run lies that chose the number of epochs."""

WITHOUT_EFFECT = (
    *("paths", "logger", "force", "compare", "controlled", "reference", "trust", "group_by", "bootstrap", "hydra"),
    *("figures", "predict_train", "data.num_workers", "data.prefetch_factor", "data.pin_memory"),
    *("callbacks.progress", "callbacks.last", "callbacks.preemption", "callbacks.learning_rate", "callbacks.*.folder"),
    *("dataset.cache", "dataset.images.cache", "dataset.sources.*.cache", "dataset.sources.*.images.cache"),
    *("dataset.expected", "dataset.sources.*.expected", "accept"),
    *("trainer.enable_*", "trainer.log_every_n_steps"),
)
"""Keys, or patterns of keys, that cannot change what a training run computes."""

LATER: dict[str, Any] = {
    "trainer.strategy": "auto",
    "trainer.num_nodes": 1,
    "trainer.sync_batchnorm": False,
    "optimizer.fused": None,
    "data.effective_batch_size": None,
    "learning_rate_scaling": {"rule": "none", "reference_batch_size": None},
    "compile": {"encoder": False, "mode": "default", "backend": "inductor"},
}
"""Keys that runs of earlier versions lack, with the value that does what those did: so written they do not count."""

WRITTEN = frozenset(
    [
        *(RESULTS, CONFIG, CONTENTS, "last.ckpt", "best.safetensors", "compare.json"),
        *("predictions", "release", "figures", "csv", "tensorboard", "mlflow", "wandb", "compare", SELECTION),
        *(STARTS, CODE, LOGGED),
    ]
)
"""Names that a run writes in its folder; nothing else there is ever removed."""


def result_hash(config: DictConfig) -> str:
    """Return 8 hex digits over all keys that can change the result, the seed excepted (it has its own folder).

    They are the same for a config as composed and as stored in its run: interpolations count as what they stand for.
    """
    plain = effective(config)
    plain.pop("seed", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:8]


def effective(config: DictConfig) -> dict[str, Any]:
    """Return a config as plain data, resolved, without the keys that have no effect on the result.

    Where images lie is part of what a run is: other pixels under the same labels are other data, and nobody hashes
    every image. Stored crops are known by their recipe and their table, whatever folder they were made from.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    for pattern in WITHOUT_EFFECT:
        _drop(plain, pattern.split("."))
    assert isinstance(plain, dict)
    for key, value in LATER.items():
        *nodes, name = key.split(".")
        node: Any = plain
        for part in nodes:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node and node[name] == value:
            del node[name]
    dataset, common = plain.get("dataset"), plain.get("prepare")
    listed = (
        (dataset.get("sources") or {}).values() if isinstance(dataset, dict) and "sources" in dataset else [dataset]
    )
    for node in listed:
        recipe = (node.get("prepare") or common) if isinstance(node, dict) else None
        if isinstance(recipe, dict) and recipe.get("stored"):
            for key in ("root", "read.root", "images"):
                _drop(node, key.split("."))
    return plain


def _drop(node: Any, patterns: list[str]) -> None:  # noqa: ANN401
    if not isinstance(node, dict):
        return
    for key in fnmatch.filter([key for key in node if isinstance(key, str)], patterns[0]):
        if len(patterns) == 1:
            del node[key]
        else:
            _drop(node[key], patterns[1:])


def resolve_output(config: DictConfig) -> Path:
    """Return the run's folder and store it as ``paths.output``.

    Alone, a run lives in ``runs/<name>/<dataset>-<test part>/<hash>/seed<k>`` or where ``paths.output`` says; a job
    of a sweep lives in the job's own folder.
    """
    job = sweep_job()
    if job is not None:
        given = config.paths.output
        output = Path(given) / str(job[1]) if given else job[0]
    elif config.paths.output:
        output = Path(config.paths.output)
    else:
        where = f"{config.dataset.name}-{part_name(config.protocol.test)}"
        output = Path(config.paths.runs) / config.name / where / result_hash(config) / f"seed{config.seed}"
    output = output.expanduser().absolute()
    OmegaConf.update(config, "paths.output", str(output))
    return output


def is_first_process() -> bool:
    """Return whether this process is alone or the first of a distributed run: the one that writes and prints."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process ends in whatever way.

    Only the first process of a distributed run takes it.

    Raises:
        ConfigError: If another process holds it.
    """
    if not is_first_process():
        yield
        return
    with files.locked(folder / LOCK):
        yield


def clear(folder: Path, keep: Sequence[str] = ()) -> None:
    """Remove what an earlier run left in ``folder``; files that no run writes stay.

    Args:
        folder: The run's folder.
        keep: Names that stay all the same.

    Raises:
        ConfigError: If the folder holds files but no run.
    """
    # MLflow's database is made with the logger, before this, and takes the runs of every start.
    found = [path for path in folder.iterdir() if path.name not in (LOCK, "mlflow", *keep) and not _is_part(path)]
    if found and held_config(folder) is None:
        raise ConfigError(
            f"force=true: {folder} holds files but no run of affect ({found[0].name}, …), and nothing is removed; "
            "choose another paths.output"
        )
    for path in folder.iterdir():
        if (path.name in WRITTEN and path.name not in keep) or _is_part(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_part(path: Path) -> bool:
    """Return whether a file is what a killed process left of one that it was writing."""
    return path.name.startswith(".") and ".part" in path.name and path.is_file()


def held_config(folder: Path) -> DictConfig | None:
    """Return the config of the run that was begun in ``folder``; None if there is none."""
    try:
        held = OmegaConf.load(folder / CONFIG)
    except (OSError, YAMLError):
        return None
    return held if isinstance(held, DictConfig) and {"task", "model", "trainer", "seed"} <= set(held) else None


def contents(sources: Sequence[Source], config: DictConfig) -> dict[str, dict[str, str]]:
    """Return what a run was made of beyond its config: fingerprints of its tables and of the weights that it names.

    Weights are those that it starts from (``init``) and those of an earlier stage (``model.exogenous.weights``).
    """
    found = {"table": {source.name: source.table.fingerprint for source in sources}, **{key: {} for key in EARLIER}}
    for key, given in earlier_weights(config).items():
        with weights_file(key, given, list(config.trust)).open("rb") as file:
            found[key] = {str(given): hashlib.file_digest(file, "sha256").hexdigest()[:16]}
    return found


def same_run(folder: Path, config: DictConfig, made_of: Mapping[str, Mapping[str, str]]) -> None:
    """Check that the run that a folder holds, if any, is the one that the config and the data ask for.

    A start that ended before its first checkpoint holds nothing.

    Args:
        folder: The run's folder.
        config: The config of the run.
        made_of: What ``contents`` returned.

    Raises:
        ConfigError: If the folder holds another run; the message names what differs.
    """
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in (RESULTS, "last.ckpt")):
        return
    held = OmegaConf.load(folder / CONFIG)
    keys = differing(held, config) if isinstance(held, DictConfig) else ["its config"]
    if keys:
        raise ConfigError(
            f"{folder} holds another run (differs in {', '.join(keys[:6])}); "
            "choose another paths.output, or force=true to replace it"
        )
    path = folder / CONTENTS
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for kind, found in made_of.items():
        for name, new in found.items():
            old = stored.get(kind, {}).get(name, new)
            if old != new:
                raise ConfigError(
                    f"{folder} holds a run on other data ({kind} {name}: {old} then, {new} now); "
                    "choose another paths.output, or force=true to replace it"
                )


def store(folder: Path, config: DictConfig, made_of: Mapping[str, Mapping[str, str]]) -> None:
    """Write down what the run in ``folder`` is, for ``same_run``; a continued run keeps what it stored."""
    if (folder / CONFIG).is_file() and (folder / "last.ckpt").is_file():
        return
    with replacing(folder / CONTENTS) as part:
        part.write_text(json.dumps(made_of, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with replacing(folder / CONFIG) as part:
        part.write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")


def note_start(folder: Path) -> list[dict[str, Any]]:
    """Note when and on what a run is started or continued, with its code, and return all of its starts.

    Code is what is imported now: files that change while the run goes on are not those that ran.
    """
    path = folder / STARTS
    starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    patch = code_patch()
    if patch:
        with replacing(folder / CODE / f"{patch_hash(patch)}.patch") as part:
            part.write_bytes(patch.encode("utf-8", "surrogateescape"))
    starts.append({"time": time.time(), "environment": environment()})
    with replacing(path) as part:
        part.write_text(json.dumps(starts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return starts


def differing(a: DictConfig, b: DictConfig) -> list[str]:
    """Return the dotted keys in which two configs differ, keys without effect left out."""

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:  # noqa: ANN401
        if isinstance(node, dict):
            parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items()]
            return {key: value for part in parts for key, value in part.items()}
        return {prefix: node}

    ours, theirs = flat(effective(a)), flat(effective(b))
    found = {key for key in set(ours) | set(theirs) if ours.get(key) != theirs.get(key)}
    # Weights are drawn in the order in which these are built.
    for node in ("task", "objectives"):
        ordered, other = list(a.get(node) or ()), list(b.get(node) or ())
        if ordered != other and sorted(ordered) == sorted(other):
            found.add(f"{node} (order)")
    return sorted(found)
