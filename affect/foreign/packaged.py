# SPDX-License-Identifier: Apache-2.0
"""Small expression networks of other people whose weights ship with this package, as checkpoints to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from affect.errors import CheckpointError, near
from affect.foreign import mini_xception
from affect.foreign.adapter import Adapter, Input, Output
from affect.geometry import faceapi
from affect.models.base import Batch
from affect.release import Release
from affect.tasks import Task


@dataclass(frozen=True)
class Packaged:
    """A network that ships.

    Attributes:
        adapter: What it takes and gives.
        build: Returns the network in evaluation mode; it takes what ``adapter.input`` prepares.
        sha256: Hash of its weights.
    """

    adapter: Adapter
    build: Callable[[], nn.Module]
    sha256: str


PACKAGED: Mapping[str, Packaged] = MappingProxyType(
    {
        "face_expression": Packaged(
            Adapter(
                "face_expression",
                Input(112, range=255.0),
                {"expression": Output("expression", faceapi.EXPRESSIONS)},
                {"name": "face_expression", "kind": "box", "size": 112, "margin": 0.1, "border": "replicate"},
                tested=True,
                source=f"{faceapi.ORIGIN}, MIT; its training data are not documented",
            ),
            lambda: faceapi.network("face_expression"),
            faceapi.weights_hash("face_expression"),
        ),
        "mini_xception": Packaged(
            Adapter(
                "mini_xception",
                Input(64, colour="GREY", mean=(0.5,), std=(0.5,)),
                {"expression": Output("expression", mini_xception.EXPRESSIONS)},
                {"name": "mini_xception", "kind": "box", "size": 64, "margin": 0.1, "border": "replicate"},
                tested=True,
                source=f"{mini_xception.ORIGIN}, MIT; trained on FER2013",
            ),
            mini_xception.network,
            mini_xception.SHA256,
        ),
    }
)
"""Networks by name: ``checkpoint=packaged:<name>``."""


@dataclass(frozen=True)
class PackagedRelease(Release):
    """A packaged network in the place of a release.

    Attributes:
        network: Its name.
    """

    network: str = ""


def read_packaged(name: str) -> PackagedRelease:
    """Return a packaged network.

    Raises:
        CheckpointError: If there is none of that name.
    """
    if name not in PACKAGED:
        raise CheckpointError(f"checkpoint=packaged:{name}: no such network; {near(name, PACKAGED)}")
    from pathlib import Path

    adapter = PACKAGED[name].adapter
    config = {"task": adapter.config(), "model": {}}
    return PackagedRelease(Path(), config, adapter.labels(), adapter.preprocess(), {}, {}, network=name)


class PackagedModule:
    """Predicts by a packaged network what a module of ours would.

    Args:
        name: Its name.
        tasks: What it predicts.
    """

    def __init__(self, name: str, tasks: Mapping[str, Task]) -> None:
        self.tasks, self.adapter = dict(tasks), PACKAGED[name].adapter
        self.network = PACKAGED[name].build()

    def eval(self) -> PackagedModule:
        """Return itself: the network is in evaluation mode."""
        return self

    def to(self, device: torch.device | str) -> PackagedModule:
        """Return itself; the small networks are shared and stay where they are."""
        return self

    def predict_step(self, batch: Batch, batch_index: int = 0) -> dict[str, Tensor]:
        """Return the values of each task, as ``AffectModule.predict_step`` does, on the CPU."""
        [(task, output)] = self.adapter.outputs.items()
        with torch.inference_mode():
            return {task: output.read(self.network(self.adapter.input.prepare(batch.image.cpu())))}
