# SPDX-License-Identifier: Apache-2.0
"""THIN as Lightning modules: the exogenous classifier first, then experts that it gates and a loss that dispels it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.encoders import TimmEncoder
from affect.errors import ConfigError, near
from affect.models.base import AffectModule, Batch, Objective, held_out
from affect.models.baseline.network import Heads
from affect.models.thin.loss import Dispelling, absolute_cosine
from affect.models.thin.network import (
    ExogenousHead,
    ExogenousStream,
    Experts,
    Pooling,
    Reads,
    mix,
    require_map,
)
from affect.models.thin.probes import linear_probe, mlp_probe, mutual_information
from affect.models.tokens import grid_of
from affect.models.tree_gate import TreeGate, require_leaves
from affect.tasks import Task

Gate = Literal["none", "endogenous", "exogenous", "oracle"]
GATES: tuple[Gate, ...] = ("none", "endogenous", "exogenous", "oracle")
READS: tuple[Reads, ...] = ("maps", "penultimate", "probabilities")

DISPELLING = "dispelling"
"""Name of the loss among the auxiliary objectives."""

_MOST_CLASSES = 40
"""Classes whose use of the gate results tell, the most frequent ones."""


class Exogenous(AffectModule):
    """Stage 1 of THIN: a classifier of the exogenous variable, whose encoder and head stage 2 freezes.

    Args:
        tasks: One task with classes (an exogenous one), by name.
        encoder: Backbone with ``output=map``.
        pooling: How the head reads the map: ``flatten`` or ``average``.
        hidden: Units of the head's hidden layers.
        **common: Arguments of ``AffectModule``.

    Raises:
        ConfigError: If there is another number of tasks, or the task has no classes.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        encoder: TimmEncoder,
        pooling: Pooling = "flatten",
        hidden: Sequence[int] = (64,),
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(tasks, **common)
        self.task = next(iter(self.tasks))
        if len(self.tasks) != 1 or not self.tasks[self.task].softmax:
            raise ConfigError(
                f"model=exogenous learns the classes of one task, and there are {', '.join(self.tasks)}; write "
                "task=[exogenous] task.exogenous.column=…"
            )
        require_map(encoder)
        self.encoder = encoder
        outputs = self.tasks[self.task].num_outputs
        self.phi = ExogenousHead(encoder.num_features, grid_of(encoder), outputs, pooling, hidden)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the logits of the exogenous classes."""
        return {self.task: self.tasks[self.task].link(self.phi(self.encoder(_ordered(batch, self.channels_last))))}

    def heads(self) -> dict[str, nn.Linear]:
        """Return the last layer; its rows are the classes."""
        return {self.task: self.phi.output}


class Streams(NamedTuple):
    """Feature maps of a batch.

    Attributes:
        endogenous: Map of stream E ``(B, D, h, w)``.
        exogenous: Map of stream G, None where the model has none.
    """

    endogenous: Tensor
    exogenous: Tensor | None


class Thin(AffectModule):
    """Stage 2 of THIN (Arnaud, Dapogny and Bailly, arXiv 2010.07614): gated experts on endogenous features.

    ``logits = sum_l mu_l expert_l(h_E)``, with mu from a soft decision tree that reads the frozen exogenous stream, and
    the loss ``|cos(phi(h_E), phi(h_G))|`` that only stream E can lower.

    If a task named ``exogenous_task`` is among the tasks, its output is what the frozen stream says, which no training
    changes; its labels serve the oracle gate and what results tell of the model. Other tasks get a linear head on the
    average of the endogenous map.

    Args:
        tasks: What to predict, by name.
        encoder: Backbone of stream E with ``output=map``.
        task: Name of the task with classes that experts predict.
        exogenous: The frozen stream; None leaves it out, for ensembles without exogenous gate and dispelling.
        exogenous_task: Name of the task that labels the exogenous variable, where it is among the tasks.
        gate: ``none`` (the plain mean of experts), ``endogenous``, ``exogenous``, or ``oracle`` (expert k for the true
            class k, the mean where it is not known).
        reads: What the gate reads: ``maps`` (averaged over positions), or ``penultimate`` or ``probabilities`` of phi.
        shuffled: Control: the gate of an image reads the features of another one of its batch.
        experts: Number L of experts; a power of two for a tree. One expert is a plain network.
        hidden: Units of an expert's hidden layers.
        pool: Side of the max-pooling of the map before experts; 1 for none.
        norm: Batch norm in experts and gate.
        dispelling: Factor lambda of the dispelling loss; 0 leaves it out.
        initialise: Whether stream E starts with the weights of the exogenous run, as phi's coordinates need it.
        objectives: Further auxiliary objectives by name.
        **common: Arguments of ``AffectModule``.

    Raises:
        ConfigError: If arguments do not fit together.
    """

    no_weight_decay = ("experts.biases",)

    def __init__(
        self,
        tasks: Mapping[str, Task],
        encoder: TimmEncoder,
        task: str = "expression",
        exogenous: ExogenousStream | None = None,
        exogenous_task: str = "exogenous",
        gate: Gate = "exogenous",
        reads: Reads = "maps",
        shuffled: bool = False,
        experts: int = 32,
        hidden: Sequence[int] = (128,),
        pool: int = 2,
        norm: bool = False,
        dispelling: float = 1.0,
        initialise: bool = True,
        objectives: Mapping[str, Objective] | None = None,
        **common: Any,  # noqa: ANN401
    ) -> None:
        objectives = dict(objectives or {})
        if DISPELLING in objectives:
            raise ConfigError(f"objectives.{DISPELLING}: THIN's loss has this name; set model.dispelling")
        if dispelling > 0:
            objectives[DISPELLING] = Dispelling(dispelling)
        super().__init__(tasks, objectives=objectives, **common)
        self.task, self.exogenous_task = task, exogenous_task if exogenous_task in self.tasks else None
        self.gate_kind, self.reads, self.shuffled = gate, reads, bool(shuffled)
        self.pool, self.dispels = int(pool), dispelling > 0
        self._check(encoder, exogenous, experts, dispelling, "optimizer" in common and common["optimizer"] is not None)
        self.encoder, self.exogenous = encoder, exogenous
        self.endogenous_code, self.exogenous_code = nn.Identity(), nn.Identity()  # what the dispelling loss taps
        if exogenous is not None and exogenous.loaded and initialise:
            exogenous.start(encoder)
        height, width = grid_of(encoder)
        if min(height, width) < self.pool or self.pool < 1:
            raise ConfigError(f"model.pool={pool}: the map has {height} x {width} positions")
        features = encoder.num_features * (height // self.pool) * (width // self.pool)
        self.experts = Experts(features, self.tasks[task].num_outputs, int(experts), hidden, norm)
        self.gate: TreeGate | None = None
        if gate in ("endogenous", "exogenous"):
            size = encoder.num_features if exogenous is None else exogenous.reading_size(reads)
            self.gate = TreeGate(size, int(experts), norm)
        others = {n: t.num_outputs for n, t in self.tasks.items() if n not in (task, self.exogenous_task)}
        self.head = Heads(encoder.num_features, others) if others else None

    def _check(
        self, encoder: nn.Module, exogenous: ExogenousStream | None, experts: int, dispelling: float, training: bool
    ) -> None:
        require_map(encoder)
        for key, value, options in (("gate", self.gate_kind, GATES), ("reads", self.reads, READS)):
            if value not in options:
                raise ConfigError(f"model.{key}={value!r}: {near(str(value), options)}")
        if self.task not in self.tasks or not self.tasks[self.task].softmax:
            raise ConfigError(f"model.task={self.task}: no such task with classes; {near(self.task, self.tasks)}")
        if self.task == self.exogenous_task:
            raise ConfigError(f"model.task and model.exogenous_task are both {self.task}; name two tasks")
        if dispelling < 0:
            raise ConfigError(f"model.dispelling={dispelling}: must be 0 or more")
        if self.gate_kind in ("endogenous", "exogenous"):
            require_leaves(int(experts))
        if exogenous is None:
            needs = {
                f"model.gate={self.gate_kind}": self.gate_kind in ("exogenous", "oracle"),
                f"model.reads={self.reads}": self.reads != "maps" and self.gate_kind == "endogenous",
                f"model.dispelling={dispelling:g}": dispelling > 0,
                f"task {self.exogenous_task}": self.exogenous_task is not None,
            }
            for key, wanted in needs.items():
                if wanted:
                    raise ConfigError(f"{key} needs the exogenous stream, and model.exogenous is null")
            return
        if training and not exogenous.loaded and not exogenous.random:
            raise ConfigError(
                "model.exogenous.weights: name the folder of a finished run of model=exogenous (or random=true, a "
                "control)"
            )
        if self.exogenous_task is None:
            if self.gate_kind == "oracle":
                raise ConfigError("model.gate=oracle needs the true classes: add a task named by model.exogenous_task")
            return
        outputs = list(self.tasks[self.exogenous_task].outputs)
        if len(outputs) != exogenous.head.classes or exogenous.labels not in (None, outputs):
            raise ConfigError(
                f"task {self.exogenous_task} has the classes {_short(outputs)} and the exogenous run "
                f"{_short(exogenous.labels or [f'{exogenous.head.classes} of them'])}; "
                f"set task.{self.exogenous_task}.classes as in that run"
            )
        if self.gate_kind == "oracle" and len(outputs) > experts:
            raise ConfigError(
                f"model.gate=oracle: {len(outputs)} exogenous classes need as many experts, not {experts}"
            )

    # --------------------------------------------------------------------------------------------- inference

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the representation of each task."""
        dispels = self.training and self.dispels
        streams = self.streams(batch, dispels or self._needs_exogenous())
        if dispels:
            assert self.exogenous is not None
            assert streams.exogenous is not None
            self.endogenous_code(self.exogenous.head(streams.endogenous))
            with torch.no_grad():
                self.exogenous_code(self.exogenous.head(streams.exogenous))
        weights = self.gate_weights(batch, streams)
        raw = {} if self.head is None else dict(self.head(streams.endogenous.mean((2, 3))))
        raw[self.task] = mix(self.experts(self.expert_input(streams.endogenous)), weights)
        if self.exogenous_task is not None:
            assert self.exogenous is not None
            with torch.no_grad():
                raw[self.exogenous_task] = self.exogenous.head(streams.exogenous)
        return {name: task.link(raw[name]) for name, task in self.tasks.items()}

    def _needs_exogenous(self) -> bool:
        return self.gate_kind == "exogenous" or self.exogenous_task is not None

    def streams(self, batch: Batch, exogenous: bool = True) -> Streams:
        """Return the feature maps of a batch; without ``exogenous``, or where there is no such stream, only E's."""
        image = _ordered(batch, self.channels_last)
        other = self.exogenous(image) if exogenous and self.exogenous is not None else None
        return Streams(self.encoder(image), other)

    def expert_input(self, grid: Tensor) -> Tensor:
        """Return what experts read of the endogenous map: max-pooled and flattened ``(B, features)``."""
        return (F.max_pool2d(grid, self.pool) if self.pool > 1 else grid).flatten(1)

    def gate_weights(self, batch: Batch, streams: Streams) -> Tensor:
        """Return the weight of each expert ``(B, L)``; rows sum to 1."""
        grid = streams.endogenous
        count = len(self.experts.kernels[0])
        even = grid.new_full((grid.shape[0], count), 1 / count)
        if self.gate_kind == "oracle":
            target = batch.targets.get(self.exogenous_task or "")
            if target is None:
                return even
            known = batch.masks[self.exogenous_task or ""].any(1, keepdim=True)
            chosen = torch.where(known, F.one_hot(target.argmax(1), count).to(even), even)
            return chosen[self._partner(grid.shape[0], grid.device)]
        if self.gate is None:
            return even
        source = grid if self.gate_kind == "endogenous" else streams.exogenous
        assert source is not None
        features = source.mean((2, 3)) if self.exogenous is None else self.exogenous.read(source, self.reads)
        return self.gate(features[self._partner(grid.shape[0], grid.device)])

    def _partner(self, size: int, device: torch.device) -> Tensor:
        """Return whose features each image's gate reads ``(B,)``: its own, or in the control those of another."""
        if not self.shuffled:
            return torch.arange(size, device=device)
        if self.training:
            return torch.randperm(size, device=device)
        fixed = torch.Generator().manual_seed(0)  # an evaluation is the same whenever it is made
        return torch.randperm(size, generator=fixed).to(device)

    # ----------------------------------------------------------------------------------------------- reading

    @torch.no_grad()
    def examine(self, loader: Callable[[str], Iterable[Batch] | None]) -> dict[str, Any]:
        """Return what the gate uses and what is left of the exogenous variable in the endogenous features.

        Topics: ``dispelling`` (mean ``|cos|``), ``reads`` (accuracy of phi on either stream), ``probe`` (accuracy of
        fresh classifiers on what experts read; trained on the training part), ``gate`` (mean weight of each leaf by
        exogenous class, and the mutual information of class and largest leaf in nats). All of them on the test part, or
        the validation part without one. Classes are the true ones where the exogenous task is among the tasks, and
        else what the frozen stream takes an image for.
        """
        told = super().examine(loader)
        if self.exogenous is None:
            return told
        batches = held_out(loader)
        if batches is None:
            return told
        held = self._collect(batches)
        found: dict[str, Any] = told | {
            "dispelling": {"abs_cos": float(held.cosine.double().mean()), "rows": len(held.cosine)},
            "gate": self._usage(held),
        }
        if self.exogenous_task is None or not held.known.any():
            return found
        labels = held.labels[held.known]
        share = torch.bincount(labels).double() / len(labels)
        found["reads"] = {
            "exogenous": float((held.exogenous == held.labels)[held.known].double().mean()),
            "endogenous": float((held.endogenous == held.labels)[held.known].double().mean()),
            "most_frequent": float(share.max()),
            "rows": len(labels),
        }
        training = loader("train")
        if training is not None:
            seen = self._collect(training)
            if seen.known.any():
                train = seen.features[seen.known], seen.labels[seen.known]
                test = held.features[held.known], labels
                classes = self.exogenous.head.classes
                found["probe"] = {
                    "linear": linear_probe(train, test, classes),
                    "mlp": mlp_probe(train, test, classes),
                    "training_rows": len(train[1]),
                    "rows": len(labels),
                }
        return found

    def _collect(self, batches: Iterable[Batch]) -> _Collected:
        assert self.exogenous is not None
        parts = []
        for batch in batches:
            moved = batch.to(self.device)  # type: ignore[attr-defined]
            streams = self.streams(moved)
            own, other = self.exogenous.head(streams.endogenous), self.exogenous.head(streams.exogenous)
            if self.exogenous_task is None:
                labels, known = other.argmax(1), torch.ones(len(other), dtype=torch.bool, device=self.device)
            else:
                labels = moved.targets[self.exogenous_task].argmax(1)
                known = moved.masks[self.exogenous_task].any(1)
            features = self.expert_input(streams.endogenous)
            weights, cosine = self.gate_weights(moved, streams), absolute_cosine(own, other)
            parts.append(_Collected(features, weights, cosine, own.argmax(1), other.argmax(1), labels, known))
        return _Collected(
            *(
                torch.cat(columns).float().cpu() if columns[0].is_floating_point() else torch.cat(columns).cpu()
                for columns in zip(*parts, strict=True)
            )
        )

    def _usage(self, held: _Collected) -> dict[str, Any]:
        assert self.exogenous is not None
        weights, labels = held.weights[held.known].double(), held.labels[held.known]
        found: dict[str, Any] = {"overall": held.weights.double().mean(0).tolist()}
        if not len(labels):
            return found
        counts = torch.bincount(labels, minlength=self.exogenous.head.classes)
        frequent = counts.argsort(descending=True, stable=True)[:_MOST_CLASSES].sort().values
        shown = [int(k) for k in frequent if counts[k] > 0]
        names = self.tasks[self.exogenous_task].outputs if self.exogenous_task else self.exogenous.labels
        return found | {
            "by": "true class" if self.exogenous_task else "class that the exogenous stream says",
            "classes": [str(names[k]) if names else str(k) for k in shown],
            "rows": [int(counts[k]) for k in shown],
            "usage": [weights[labels == k].mean(0).tolist() for k in shown],
            "information": mutual_information(weights.argmax(1), labels),
        }

    # ----------------------------------------------------------------------------------------- base behaviour

    def encoder_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield both encoders; that of the exogenous stream never learns."""
        yield "encoder", self.encoder
        if self.exogenous is not None:
            yield "exogenous.encoder", self.exogenous.encoder

    def heads(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the other tasks."""
        return {} if self.head is None else dict(self.head.linear.items())  # type: ignore[arg-type]

    def setup(self, stage: str) -> None:
        """Check that nothing replaced the exogenous weights, besides what every method sets up."""
        super().setup(stage)
        if stage == "fit" and self.exogenous is not None and self.exogenous.changed():
            raise ConfigError(
                "init brought other exogenous weights than model.exogenous.weights; start from a model made with these"
            )


class _Collected(NamedTuple):
    """What a pass over some rows gives, each ``(N, …)`` on the CPU.

    Attributes:
        features: What experts read.
        weights: Weights of experts.
        cosine: ``|cos|`` of what phi reads of both streams.
        endogenous: Class that phi reads of stream E.
        exogenous: Class that phi reads of stream G.
        labels: Exogenous class.
        known: Whether it is known.
    """

    features: Tensor
    weights: Tensor
    cosine: Tensor
    endogenous: Tensor
    exogenous: Tensor
    labels: Tensor
    known: Tensor


def _ordered(batch: Batch, channels_last: bool) -> Tensor:
    return batch.image.contiguous(memory_format=torch.channels_last) if channels_last else batch.image


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)})" if len(names) > 4 else "")
