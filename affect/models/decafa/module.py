# SPDX-License-Identifier: Apache-2.0
"""DeCaFA as a Lightning module: points of several annotation schemes, supervised at every stage where known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from affect.encoders import Pixels
from affect.errors import ConfigError, near
from affect.losses.base import Terms
from affect.metrics import AlignmentError
from affect.models.base import AffectModule, Batch, held_out
from affect.models.decafa.network import FUSION, Attention, Cascade, Chain, Fusion, StageOutput
from affect.models.decafa.reading import spread
from affect.tasks import Task, to_fractions, to_pixels

Outside = Literal["nearest", "ignore", "keep"]
"""What the loss makes of a labelled point that lies outside the crop, where no map can reach."""

StageWeights = Literal["doubling", "equal", "last"]
"""Named weights of the stages' losses."""


class Decafa(AffectModule):
    """Deep convolutional cascade for face alignment (Dapogny, Bailly and Cord, ICCV 2019, arXiv 1904.02549).

    Each landmark task is one annotation scheme. All schemes are predicted for every face; a face is supervised in those
    in which it is labelled. The loss of a scheme is that of its task, summed over stages with ``stage_weights``;
    validation and prediction take the last stage alone.

    Args:
        tasks: Landmark tasks by name, one per scheme.
        encoder: ``affect.encoders.Pixels``: the normalised image.
        stages: Number of stages.
        widths: Channels of each level of a stage, from the full resolution down.
        convolutions: 3x3 convolutions of a level on each way.
        skips: Whether the levels of a stage are connected (unknown in the paper).
        chain: ``scores``: coarser schemes are read from the scores of finer ones; ``separate``: every scheme from the
            features; ``mixture``: coarser maps are convex combinations of finer maps.
        order: Schemes from fine to coarse; None orders by number of points.
        temperature: Divides scores before the softmax over pixels.
        fusion: What a stage after the first one sees (``affect.models.decafa.network.Fusion``).
        attention: Whether the maps of ``all`` schemes or of the ``fine`` one make the attention.
        detached: Stop gradients at the attention (ablation).
        stage_weights: ``doubling`` (1/8, 1/4, 1/2, 1 for four stages), ``equal`` (1 each), ``last`` (0, …, 0, 1), or a
            list.
        outside: A labelled point outside the crop is supervised by the ``nearest`` place that a map can reach, not at
            all (``ignore``), or as it is (``keep``). Metrics always count it where it is.
        **common: Arguments of ``AffectModule``.

    Raises:
        ConfigError: If a task has no points, two have one scheme, the order names others, or a setting does not fit.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        encoder: Pixels,
        stages: int = 4,
        widths: Sequence[int] = (64, 128, 256),
        convolutions: int = 2,
        skips: bool = False,
        chain: Chain = "scores",
        order: Sequence[str] | None = None,
        temperature: float = 1.0,
        fusion: Sequence[Fusion] = FUSION,
        attention: Attention = "all",
        detached: bool = False,
        stage_weights: StageWeights | Sequence[float] = "doubling",
        outside: Outside = "nearest",
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(tasks, **common)
        if not isinstance(encoder, Pixels):
            raise ConfigError(
                f"model=decafa has its own convolutions and takes the image itself, not {type(encoder).__name__}; use "
                "encoder=pixels"
            )
        stride = 2 ** len(widths)
        if encoder.image_size % stride:
            raise ConfigError(
                f"encoder.image_size={encoder.image_size}: must be a multiple of {stride} px, because each of "
                f"{len(widths)} model.widths halves it"
            )
        if outside not in get_args(Outside):
            raise ConfigError(f"model.outside={outside!r}: {near(str(outside), get_args(Outside))}")
        self.names = chain_order(self.tasks, order)
        self.outside: Outside = outside
        self.encoder = encoder
        schemes = {scheme: self.tasks[name].num_outputs // 2 for scheme, name in self.names.items()}
        self.cascade = Cascade(
            encoder.num_features,
            schemes,
            int(stages),
            [int(width) for width in widths],
            int(convolutions),
            skips,
            chain,
            temperature,
            list(fusion),
            attention,
            detached,
        )
        self.stage_weights = stage_factors(stage_weights, int(stages))

    # ----------------------------------------------------------------------------------------------- outputs

    def run(self, batch: Batch) -> Iterator[StageOutput]:
        """Yield what each stage says of a batch."""
        image = self.encoder(batch.image)
        yield from self.cascade.run(
            image.contiguous(memory_format=torch.channels_last) if self.channels_last else image
        )

    def represent(self, output: StageOutput) -> dict[str, Tensor]:
        """Return the points of a stage as fractions of the crop ``(B, P, 2)`` by task."""
        height, width = output.attention.shape[-2:]
        found = {name: to_fractions(output.points[scheme], height, width) for scheme, name in self.names.items()}
        return {name: found[name] for name in self.tasks}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the last stage's points of every scheme as fractions of the crop, by task."""
        last = None
        for output in self.run(batch):
            last = output
        assert last is not None
        return self.represent(last)

    def training_terms(self, batch: Batch) -> dict[str, Terms]:
        """Return the loss of each scheme, summed over stages with their weights; counts are those of one stage."""
        total: dict[str, Terms] = {}
        for weight, output in zip(self.stage_weights, self.run(batch), strict=True):
            # Stages of weight 0 take part too: processes that train together wait for a gradient of every weight.
            for name, term in self.task_terms(self.represent(output), batch).items():
                before = total[name].sum if name in total else 0.0
                total[name] = Terms(before + weight * term.sum, term.count)
        return total

    def loss_targets(self, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return targets that a map can reach, as ``outside`` says, and their mask."""
        target, mask = super().loss_targets(name, batch)
        if self.outside == "keep":
            return target, mask
        height, width = batch.image.shape[-2:]
        half = 0.5 / target.new_tensor([width, height])  # from the edge to the first pixel centre
        if self.outside == "nearest":
            return torch.minimum(torch.maximum(target, half), 1 - half), mask
        inside = ((target >= 0) & (target <= 1)).all(-1)
        return target, mask & inside

    # ----------------------------------------------------------------------------------------------- reading

    def examine(self, loader: Callable[[str], Iterable[Batch] | None]) -> dict[str, Any]:
        """Return what each stage reaches on held-out faces, besides what every method tells.

        Returns:
            ``stages``: by task the numbers of its alignment metric (``nme``, ``fr/<t>``, ``auc/<t>``, ``skipped``), a
            list each over stages, in pixels of the stored images; ``spread``, the mean distance of a map's mass from
            its point (root of its variance) as a share of the crop's width, over labelled points; and ``points``, how
            many these are.
        """
        batches = held_out(loader)
        told = super().examine(loader)
        if batches is None:
            return told
        sums: dict[str, _Sums] = {}
        for batch in batches:
            moved = batch.to(self.device)  # type: ignore[attr-defined]
            with torch.no_grad():
                for name, found in self._stage_sums(moved).items():
                    sums[name] = found if name not in sums else sums[name].plus(found)
        told_of: dict[str, dict[str, Any]] = {}
        for name, each in sums.items():
            if not each.points:
                continue
            metric = alignment_metric(self.tasks[name])
            scores = [] if metric is None else [metric.scores(statistics) for statistics in each.statistics]
            numbers = {key: [float(stage[key]) for stage in scores] for key in (scores[0] if scores else ())}
            told_of[name] = numbers | {"spread": (each.spread / each.points).tolist(), "points": each.points}
        return told | ({"stages": told_of} if told_of else {})

    def _stage_sums(self, batch: Batch) -> dict[str, _Sums]:
        """Return the statistics of every stage on one batch, by task."""
        height, width = batch.image.shape[-2:]
        statistics: dict[str, list[Tensor]] = {name: [] for name in self.tasks}
        spreads: dict[str, list[Tensor]] = {name: [] for name in self.tasks}
        for output in self.run(batch):
            for scheme, name in self.names.items():
                mask = batch.masks[name]
                true = self._stored(to_pixels(batch.targets[name], height, width), batch)
                metric = alignment_metric(self.tasks[name])
                if metric is not None:
                    points = self._stored(output.points[scheme], batch)
                    statistics[name].append(metric.statistics(points, true, mask).sum(0).cpu())
                spreads[name].append((spread(output.maps[scheme]) / width * mask).double().sum().cpu())
        return {
            name: _Sums(statistics[name], torch.stack(spreads[name]), int(batch.masks[name].sum()))
            for name in self.tasks
        }

    @staticmethod
    def _stored(points: Tensor, batch: Batch) -> Tensor:
        """Return points ``(B, P, 2)`` of the crop in pixels of the stored images, float64."""
        matrix = batch.matrix.to(points.device, torch.float64)  # type: ignore[attr-defined]
        moved = points.double() - matrix[:, None, :, 2]
        return torch.linalg.solve(matrix[:, :, :2], moved.transpose(1, 2)).transpose(1, 2)


class _Sums(NamedTuple):
    """What one task's stages add up to over some faces.

    Attributes:
        statistics: Sums of the alignment metric's statistics, one tensor per stage; none without such a metric.
        spread: Sum over labelled points of their maps' spread, float64 ``(stages,)``.
        points: Number of labelled points.
    """

    statistics: list[Tensor]
    spread: Tensor
    points: int

    def plus(self, other: _Sums) -> _Sums:
        """Return the sums over both sets of faces."""
        added = [a + b for a, b in zip(self.statistics, other.statistics, strict=True)]
        return _Sums(added, self.spread + other.spread, self.points + other.points)


def alignment_metric(task: Task) -> AlignmentError | None:
    """Return the first alignment metric of a task; None if it has none."""
    return next((metric for metric in task.metrics if isinstance(metric, AlignmentError)), None)


def chain_order(tasks: Mapping[str, Task], order: Sequence[str] | None = None) -> dict[str, str]:
    """Return the task of each scheme, schemes in the order of the chain.

    Args:
        tasks: Landmark tasks by name.
        order: Schemes from fine to coarse; None puts more points first.

    Raises:
        ConfigError: If a task has no points, two have one scheme, or the order does not name every scheme once.
    """
    names: dict[str, str] = {}
    for name, task in tasks.items():
        scheme = task.landmark_scheme
        if scheme is None:
            raise ConfigError(f"model=decafa predicts points alone, and task {name} has none; leave it out")
        if scheme in names:
            raise ConfigError(f"tasks {names[scheme]} and {name} both predict scheme {scheme}; remove one of them")
        names[scheme] = name
    if order is None:
        return dict(sorted(names.items(), key=lambda pair: -tasks[pair[1]].num_outputs))
    given = [str(scheme) for scheme in order]
    for scheme in given:
        if scheme not in names:
            raise ConfigError(f"model.order={given}: no task has scheme {scheme}; {near(scheme, names)}")
    missing = [scheme for scheme in names if scheme not in given]
    if missing or len(set(given)) != len(given):
        raise ConfigError(
            f"model.order={given}: name each scheme of the tasks ({', '.join(names)}) once, fine to coarse"
        )
    return {scheme: names[scheme] for scheme in given}


def stage_factors(weights: StageWeights | Sequence[float], stages: int) -> tuple[float, ...]:
    """Return the weight of each stage's loss.

    Args:
        weights: ``doubling`` ends at 1 and halves towards the first stage; ``equal`` is 1 each; ``last`` supervises the
            last stage alone; a list has a number per stage.
        stages: Number of stages.

    Raises:
        ConfigError: If the name is unknown, or the numbers are not one per stage, negative, or 0 for the last stage.

    Example:
        >>> stage_factors("doubling", 4)
        (0.125, 0.25, 0.5, 1.0)
    """
    if isinstance(weights, str):
        if weights not in get_args(StageWeights):
            raise ConfigError(f"model.stage_weights={weights!r}: {near(weights, get_args(StageWeights))}, or a list")
        behind = range(stages - 1, -1, -1)  # stages that follow
        factor = {"doubling": 0.5, "equal": 1.0, "last": 0.0}[weights]
        return tuple(factor**k for k in behind)
    listed = tuple(float(weight) for weight in weights)
    if len(listed) != stages or any(weight < 0 for weight in listed) or not listed[-1] > 0:
        raise ConfigError(
            f"model.stage_weights={list(listed)}: one number per stage ({stages}) is needed, none negative, the last "
            "one more than 0, because it is the last stage that predicts"
        )
    return listed
