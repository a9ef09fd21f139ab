# SPDX-License-Identifier: Apache-2.0
"""Any checkpoint by what a user writes: a folder, an ONNX file, a packaged network, a name on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from affect.compression.layers import baked
from affect.errors import CheckpointError, ConfigError
from affect.foreign.adapter import Adapter
from affect.foreign.packaged import PackagedModule, PackagedRelease, read_packaged
from affect.foreign.program import Program, ProgramModule, read_program
from affect.models.base import AffectModule, Batch
from affect.release import COMPRESSION, FILES, Release, build_model, read_release
from affect.tasks import Task

HUB, PACKAGE = "hf-hub:", "packaged:"
ONNX = ".onnx"
_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(@(?P<revision>[\w./-]{1,100}))?")


class Predictor(Protocol):
    """What predicts: a module of ours, an ONNX file, a packaged network."""

    @property
    def tasks(self) -> dict[str, Task]:
        """What it predicts."""
        ...

    def eval(self) -> Predictor:
        """Return itself in evaluation mode."""
        ...

    def to(self, device: torch.device) -> Predictor:
        """Return itself on a device, if it can run there."""
        ...

    def predict_step(self, batch: Batch, batch_index: int = 0) -> dict[str, Tensor]:
        """Return the values of each task."""
        ...


def open_checkpoint(
    given: str | Path, trust: Sequence[str] = (), adapter: Adapter | None = None, what: str = "checkpoint"
) -> Release:
    """Return the checkpoint that a user names, read and checked, not yet built.

    Args:
        given: Folder of a run or a release, ``.onnx`` file, ``packaged:<name>``, or ``<owner>/<name>`` on the Hugging
            Face hub, also as ``hf-hub:<owner>/<name>@<revision>``. What exists on the disk comes first.
        trust: Packages whose classes the checkpoint may name besides this package's public ones.
        adapter: What an ONNX file of somebody else takes and gives.
        what: Key of the command line that named it, for messages.

    Raises:
        CheckpointError: If it cannot be had, is damaged, or names what it may not.
    """
    text = str(given)
    if text.startswith(PACKAGE):
        _refuse_adapter(adapter, text, what)
        return read_packaged(text.removeprefix(PACKAGE))
    path = Path(text).expanduser()
    if not text.startswith(HUB) and path.suffix.lower() == ONNX:
        return read_program(path, adapter, trust, what)
    _refuse_adapter(adapter, text, what)
    name = hub_name(text, path)
    return read_release(path if name is None else from_hub(*name, what=what), trust, what)


def _refuse_adapter(adapter: Adapter | None, text: str, what: str) -> None:
    if adapter is not None:
        raise ConfigError(f"adapter={adapter.name} tells of an ONNX file, and {what}={text} is none")


def hub_name(text: str, path: Path) -> tuple[str, str | None] | None:
    """Return name and revision of a checkpoint on the hub, None for a folder.

    ``owner/name`` is a folder wherever there is one, or a folder ``owner`` that could hold it: a mistyped folder never
    reaches the network.
    """
    if text.startswith(HUB):
        found = _HUB_NAME.fullmatch(text.removeprefix(HUB))
        if found is None:
            raise CheckpointError(f"checkpoint={text}: write hf-hub:<owner>/<name>, optionally with @<revision>")
        return found["name"], found["revision"]
    found = _HUB_NAME.fullmatch(text)
    if found is None or path.exists() or path.parent.is_dir():
        return None
    return found["name"], found["revision"]


def from_hub(name: str, revision: str | None = None, what: str = "checkpoint") -> Path:
    """Return the folder of a release on the Hugging Face hub, from its cache where there is no network.

    Only the files of a release are fetched, under their own names.

    Raises:
        CheckpointError: If it is neither on the hub nor in its cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(FILES), etag_timeout=10)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{what}={name}: no such folder here, and the Hugging Face hub cannot be reached nor has its cache the "
            "release; fetch it where there is a network (hf download), or give a folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{what}={name}: the Hugging Face hub does not give it: {line[:200]}") from error
    return Path(folder)


def build_predictor(release: Release, tasks: Mapping[str, Task]) -> Predictor:
    """Return what predicts, with its weights, in evaluation mode.

    Args:
        release: What ``open_checkpoint`` returned.
        tasks: Its tasks (``affect.release.build_tasks``).

    Raises:
        CheckpointError: If it does not build.
    """
    if isinstance(release, Program):
        return ProgramModule(release.content, tasks, str(release.file), release.adapter)
    if isinstance(release, PackagedRelease):
        return PackagedModule(release.network, tasks)
    return build_inference_model(release, tasks)


def build_inference_model(release: Release, tasks: Mapping[str, Task]) -> AffectModule:
    """Return the model of a release to predict with: codes of a compressed one are decoded once, not at every batch.

    Raises:
        CheckpointError: If it does not build.
    """
    module = build_model(release, tasks)
    return baked(module) if COMPRESSION in release.config else module
