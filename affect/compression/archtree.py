# SPDX-License-Identifier: Apache-2.0
"""Pruning to a latency by tree search: several pruned networks are kept side by side, each with its latency measured.

From every network of the beam, children lose channels of one group each, as few as make it faster by a step; those
with the least relevance lost per millisecond saved go on. Archtree: on-the-fly tree-structured exploration for
latency-aware pruning of deep neural networks, arXiv 2311.10549. How the paper expands and ranks is not known here; this
is close to NetAdapt (arXiv 1804.03230) with a beam.
"""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from affect.compression.arguments import check_choices, check_counts, check_parts
from affect.compression.base import Data
from affect.compression.pruning import HEADS, PruningGraph, Scoring, layer_sizes, pruned_records, weight_bytes
from affect.compression.report import Report, count_macs
from affect.errors import ConfigError

__all__ = [
    "Archtree",
    "Candidate",
    "Latency",
    "OnnxRuntimeTimer",
    "TreeSearch",
    "exchange",
    "mac_latency",
    "placed",
    "signature",
]

TIMERS = ("onnxruntime", "macs")


# -------------------------------------------------------------------------------------------------------- latency


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        median: In milliseconds.
        spread: Distance between quartiles, in milliseconds; differences below it are ties.
    """

    median: float
    spread: float = 0.0


Timer = Callable[[nn.Module, Tensor], Latency]


def mac_latency(network: nn.Module, example: Tensor, width: int = 8, per_ms: float = 1e6) -> Latency:
    """Return a latency that depends on shapes alone: multiplications, with output channels rounded up.

    Args:
        network: In evaluation mode.
        example: Images ``(B, 3, H, W)``.
        width: Channels that a processor works on at once: latency is a staircase of the number of channels.
        per_ms: Multiplications in a millisecond.
    """
    with torch.no_grad():
        counts = count_macs(network, lambda: network(example))
    total = 0.0
    for name, macs in counts.items():
        outputs, _ = layer_sizes(network.get_submodule(name))
        total += macs * math.ceil(outputs / width) * width / outputs
    return Latency(total / per_ms)


class OnnxRuntimeTimer:
    """Latency of ONNX Runtime on the CPU of this machine.

    The first network is the reference. Every other is timed in turns with it, pass by pass, and its latency is the
    reference's times the median ratio of neighbouring passes: what else the machine does at the time slows both.

    A graph is exported once; pruned networks have the same graph with smaller weights, which take the place of its own.
    Whether that is so is seen by the output; a network whose graph has sizes in it is exported by itself.

    Args:
        runs: Passes that are timed.
        warmup: Passes before them.
        threads: Threads of one pass.

    Raises:
        ConfigError: If a library is missing, or the network cannot be exported.
    """

    def __init__(self, runs: int = 30, warmup: int = 5, threads: int = 1) -> None:
        try:
            import onnx
            import onnxruntime
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"timer=onnxruntime needs {error.name}: pip install 'affect[export]'") from error
        self.onnx, self.runtime = onnx, onnxruntime
        self.runs, self.warmup, self.threads = int(runs), int(warmup), int(threads)
        self.exports = 0
        self._graph: Any = None
        self._reference: tuple[Any, Latency] | None = None

    def __call__(self, network: nn.Module, example: Tensor) -> Latency:
        """Return the latency of a network in evaluation mode on images ``(B, 3, H, W)``."""
        session = self._session(network, example)
        if self._reference is None:
            (times,) = self._times([session], example)
            self._reference = (session, _latency(times))
            return self._reference[1]
        first, known = self._reference
        before, after = self._times([first, session], example)
        return _latency([known.median * b / a for a, b in zip(before, after, strict=True)])

    def _times(self, sessions: Sequence[Any], example: Tensor) -> list[list[float]]:
        """Return milliseconds of each session's passes, which take turns."""
        feed = {sessions[0].get_inputs()[0].name: example.numpy()}
        times: list[list[float]] = [[] for _ in sessions]
        for run in range(self.warmup + self.runs):
            for session, own in zip(sessions, times, strict=True):
                start = time.perf_counter()
                session.run(None, feed)
                if run >= self.warmup:
                    own.append((time.perf_counter() - start) * 1e3)
        return times

    def _session(self, network: nn.Module, example: Tensor) -> Any:  # noqa: ANN401
        with torch.no_grad():
            expected = network(example)
        if not isinstance(expected, Tensor):
            raise ConfigError(f"timer=onnxruntime: a {type(network).__name__} must return one tensor; take timer=macs")
        if self._graph is not None:
            made = self._opened(self._filled(network))
            if made is not None and self._agrees(made, example, expected):
                return made
        proto = self._exported(network, example)
        made = self._opened(proto)
        if made is None:
            raise ConfigError(f"timer=onnxruntime: ONNX Runtime cannot load this {type(network).__name__}")
        self._graph = proto if self._graph is None else self._graph
        return made

    def _exported(self, network: nn.Module, example: Tensor) -> Any:  # noqa: ANN401
        """Return the graph as it is, so that every parameter has its own name in it."""
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                made = torch.onnx.export(network, (example,), dynamo=True, verbose=False, optimize=False)
        except Exception as error:  # the exporter raises kinds of several libraries
            told = str(error).strip().splitlines()[:1]
            raise ConfigError(
                f"timer=onnxruntime: {type(network).__name__} cannot be exported ({' '.join(told)}); take timer=macs"
            ) from error
        finally:
            logger.setLevel(level)
        assert made is not None
        self.exports += 1
        proto = made.model_proto
        del proto.graph.value_info[:]  # shapes of one network, which are wrong for the next
        return proto

    def _filled(self, network: nn.Module) -> Any:  # noqa: ANN401
        """Return the known graph with the tensors of a network."""
        state = network.state_dict()
        proto = copy.deepcopy(self._graph)
        for held in proto.graph.initializer:
            if held.name in state:
                held.CopyFrom(self.onnx.numpy_helper.from_array(state[held.name].cpu().numpy(), held.name))
        return proto

    def _opened(self, proto: Any) -> Any:  # noqa: ANN401
        """Return a session, or None if the graph does not fit its tensors."""
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = self.threads
        options.log_severity_level = 4
        try:
            return self.runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:  # the runtime raises kinds of its own, without a common base
            return None

    def _agrees(self, session: Any, example: Tensor, expected: Tensor) -> bool:  # noqa: ANN401
        try:
            found = session.run(None, {session.get_inputs()[0].name: example.numpy()})[0]
        except Exception:  # as above: sizes that do not fit are seen when it runs
            return False
        largest = float(expected.abs().max())
        return found.shape == tuple(expected.shape) and bool(
            np.allclose(found, expected.numpy(), rtol=1e-2, atol=1e-3 * largest)
        )


def _latency(times: Sequence[float]) -> Latency:
    low, _, high = statistics.quantiles(times, n=4)
    return Latency(statistics.median(times), high - low)


Shape = tuple[tuple[str, int, int], ...]


def signature(network: nn.Module) -> Shape:
    """Return what a network's latency depends on: names and channels of its layers."""
    return tuple((name, *layer_sizes(layer)) for name, layer in network.named_modules() if layer_sizes(layer)[0])


# ---------------------------------------------------------------------------------------------- candidates in place


def _plain(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, tuple):
        return all(_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def exchange(one: nn.Module, two: nn.Module) -> None:
    """Exchange tensors and sizes of two networks of the same layers; their modules stay where they are.

    So a model that ``one`` is part of becomes that of ``two``, heads included, and hooks stay in place.
    """
    for a, b in zip(one.modules(), two.modules(), strict=True):
        mine, theirs = a.__dict__, b.__dict__
        for key in mine.keys() & theirs.keys():
            if key in ("_parameters", "_buffers") or (_plain(mine[key]) and _plain(theirs[key])):
                mine[key], theirs[key] = theirs[key], mine[key]


@contextmanager
def placed(network: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let ``network`` be ``other`` for a while."""
    exchange(network, other)
    try:
        yield
    finally:
        exchange(network, other)


@dataclass
class Candidate:
    """A pruned network on the way to the budget.

    Attributes:
        network: It.
        latency: Of a forward pass.
        scores: Relevance of the units that are left, ``(U,)`` by name of their group.
        lost: Relevance that was removed since the start.
        path: Groups that lost units, in order, and which units of those that were left.
        rest: Puts back what training changed outside of the network (heads); None where it was not trained.
    """

    network: nn.Module
    latency: Latency
    scores: Mapping[str, Tensor]
    lost: float = 0.0
    path: tuple[tuple[str, Tensor], ...] = ()
    rest: Callable[[], None] | None = None

    def told(self) -> str:
        """Return how it was made, to break ties."""
        return " ".join(f"{name} {units.tolist()}" for name, units in self.path)


# --------------------------------------------------------------------------------------------------------- search


@dataclass
class TreeSearch:
    """Search among pruned networks for those within a latency.

    One place of the beam is that of the greedy search (``beam=1``), so that a wider one never loses more.

    Args:
        example: Images ``(B, 3, H, W)`` of the size that the network is used with.
        timer: Latency of a network; asked once for each signature.
        build: Makes the graph of a network; None makes one without protected layers.
        beam: Networks that go on after each level; 1 is greedy.
        children: Groups tried per network: those with the least relevance per multiplication that they save.
        step: Part of a network's latency that a child is to save; the last step saves no more than is needed.
        round_to: Sizes of groups go down to multiples of this.
        most: Largest part of a group's original units that may go.
        refine: Called for each network that goes on: may train it, and score its units anew.
        judge: Score of a network on a validation part, higher is better; decides where latencies cannot.

    Attributes:
        known: Latency of every signature that was asked for.
        levels: How often the beam was expanded.
    """

    example: Tensor
    timer: Timer
    build: Callable[[nn.Module], PruningGraph] | None = None
    beam: int = 3
    children: int = 4
    step: float = 0.1
    round_to: int = 1
    most: float = 0.9
    refine: Callable[[Candidate], None] | None = None
    judge: Callable[[Candidate], float] | None = None
    known: dict[Shape, Latency] = field(default_factory=dict, init=False)
    levels: int = field(default=0, init=False)

    def __call__(self, network: nn.Module, budget: float, scores: Mapping[str, Tensor]) -> list[Candidate]:
        """Return candidates within the budget, the least relevance lost first; at most as many as the beam is wide.

        Args:
            network: In evaluation mode; it is not changed.
            budget: Latency in milliseconds that is allowed.
            scores: Relevance of each unit of the network, ``(U,)`` by name of its group.

        Raises:
            ConfigError: If nothing more can be removed before the budget is met.
        """
        start = Candidate(copy.deepcopy(network), self.latency(network), scores)
        if start.latency.median <= budget:
            return [start]
        whole = {name: len(group) for name, group in self._graph(start.network).groups.items()}
        level, found = [start], []
        greedy: Candidate | None = start
        while level:
            self.levels += 1
            grown: dict[Shape, Candidate] = {}
            leader = None
            for parent in level:
                born = self._children(parent, budget, whole)
                if parent is greedy and born:
                    leader = self._pick(born, 1, start)[0]
                for child in born:
                    key = signature(child.network)
                    if key not in grown or child.lost < grown[key].lost:
                        grown[key] = child
            found += [one for one in grown.values() if one.latency.median <= budget]
            # Dropped where another has its shape and lost less; the line of the greedy search goes on all the same.
            found += [leader] if leader and leader.latency.median <= budget and not _among(leader, found) else []
            greedy = leader if leader is not None and leader.latency.median > budget else None
            least = min((one.lost for one in found), default=math.inf)
            others = [
                one
                for one in grown.values()
                if one.latency.median > budget and one is not greedy and one.lost < least  # what is lost only grows
            ]
            level = ([] if greedy is None else [greedy]) + self._pick(others, self.beam - 1, start)
            if self.refine is not None:
                for one in level:
                    self.refine(one)
        if not found:
            fastest, now = min(one.median for one in self.known.values()), start.latency.median
            raise ConfigError(
                f"a latency of {budget:.4g} ms cannot be reached by pruning: {fastest:.4g} of {now:.4g} ms is the "
                f"fastest found with most={self.most:g}; allow more time, or protect less"
            )
        return sorted(found, key=lambda one: (one.lost, one.latency.median, one.told()))[: self.beam]

    def latency(self, network: nn.Module) -> Latency:
        """Return the latency of a network, measured once for all of its shape."""
        key = signature(network)
        if key not in self.known:
            self.known[key] = self.timer(network, self.example)
        return self.known[key]

    def _graph(self, network: nn.Module) -> PruningGraph:
        return PruningGraph(network, self.example) if self.build is None else self.build(network)

    def _pick(self, candidates: Sequence[Candidate], count: int, start: Candidate) -> list[Candidate]:
        """Return the candidates with the least relevance lost per millisecond saved since the start.

        Those that differ from the last one of them by no more than latencies spread are put in order by ``judge``.
        """

        def price(one: Candidate, sure: float = 0) -> float:
            """Relevance per millisecond, if the latency was ``sure`` spreads longer than measured."""
            saved = start.latency.median - one.latency.median - sure * one.latency.spread
            return one.lost / saved if saved > 0 else math.inf

        ordered = sorted(candidates, key=lambda one: (price(one), one.latency.median, one.told()))
        if len(ordered) <= count or count < 1 or self.judge is None:
            return ordered[: max(count, 0)]
        last = ordered[count - 1]
        sure = [one for one in ordered[:count] if price(one, 1) < price(last, -1)]
        tied = [one for one in ordered[: 2 * count] if not _among(one, sure) and price(one, -1) <= price(last, 1)]
        if len(sure) + len(tied) > count:
            judged = [self.judge(one) for one in tied]
            tied = [tied[k] for k in sorted(range(len(tied)), key=lambda k: -judged[k])]
        return [*sure, *tied][:count]

    def _children(self, parent: Candidate, budget: float, whole: Mapping[str, int]) -> list[Candidate]:
        """Return networks that each lost units of one group and are faster by a step, or as fast as the budget asks."""
        now = parent.latency.median
        goal = max(now * (1 - self.step), budget)
        graph = self._graph(parent.network)
        costs = graph.layer_costs("macs")
        total = graph.cost_after(costs, {})
        offers = []
        for name, group in graph.groups.items():
            floor = max(1, round((1 - self.most) * whole.get(name, len(group))))
            sizes = [n for n in range(1, len(group) - floor + 1) if (len(group) - n) % self.round_to == 0]
            if not sizes:
                continue
            # Multiplications foretell how many units a step takes, until latency is measured.
            left = [graph.cost_after(costs, {name: n}) / total for n in sizes]
            guess = next((k for k, part in enumerate(left) if now * part <= goal), len(sizes) - 1)
            order = torch.argsort(parent.scores[name], stable=True)
            lost = float(parent.scores[name][order[: sizes[guess]]].sum())
            offers.append((lost / max(1 - left[guess], 1e-12), name, order, sizes, guess))
        offers.sort(key=lambda offer: offer[:2])
        grown = []
        for _, name, order, sizes, guess in offers[: self.children]:
            one = self._fewest(parent, name, order, sizes, guess, goal)
            if one.latency.median < now:
                grown.append(one)
        return grown

    def _fewest(
        self, parent: Candidate, name: str, order: Tensor, sizes: Sequence[int], guess: int, goal: float
    ) -> Candidate:
        """Return the child with the fewest units of a group removed that reaches the goal, or with all that may go.

        Latency is taken to fall with the number of units; the search starts at the guess and doubles its stride.
        """
        low, high, k, stride = -1, len(sizes), guess, 1
        found: dict[int, Candidate] = {}
        while high - low > 1:
            found[k] = self._without(parent, name, order[: sizes[k]])
            if found[k].latency.median <= goal:
                high, k = k, k - stride
            else:
                low, k = k, k + stride
            stride *= 2
            if not low < k < high:
                k = (low + high) // 2
        return found[min(high, len(sizes) - 1)]

    def _without(self, parent: Candidate, name: str, units: Tensor) -> Candidate:
        """Return a copy of a candidate without some units of a group."""
        network = copy.deepcopy(parent.network)
        self._graph(network).prune({name: units})
        scores = parent.scores[name]
        left = torch.ones(len(scores), dtype=torch.bool).index_fill(0, units, False)
        return Candidate(
            network,
            self.latency(network),
            {**parent.scores, name: scores[left]},
            parent.lost + float(scores[units].sum()),
            (*parent.path, (name, units)),
            parent.rest,
        )


def _among(one: Candidate, others: Sequence[Candidate]) -> bool:
    return any(one is other for other in others)


class Archtree:
    """Pruning to a latency: the best of several pruned networks, with training at the end.

    Args:
        latency: Part of the original's latency that is allowed, above 0 and below 1.
        milliseconds: Latency that is allowed, in the place of ``latency``; only with ``timer=onnxruntime``.
        timer: ``onnxruntime`` measures; ``macs`` computes from shapes and always gives the same.
        beam: Networks kept side by side; 1 is greedy.
        children: Groups tried for each of them.
        step: Part of the latency that goes at each level.
        criterion: Relevance of channels, one of ``affect.compression.pruning.CRITERIA``.
        mode: Of ``singe``: ``layer`` or ``exact``.
        steps: Points of the path, for ``singe``.
        batches: Batches that relevance is measured on.
        normalise: ``none``, or ``mean``: relevance is divided by the mean of its group in the original.
        rescore: Whether relevance is measured again on every network that goes on, or carried along.
        round_to: Channels go down to multiples of this; latency is a staircase, often of 8 channels.
        most: Largest part of a layer's channels that may go.
        batch: Images of a timed pass.
        runs: Timed passes.
        threads: Threads of a pass.
        tune_steps: Training steps of every network that goes on.
        final_steps: Training steps at the end.
        heads: ``dims``, ``whole`` or ``none``: what is removed of attention.
        protect: Names of layers, or their beginnings, that stay as they are.
    """

    name, stage = "archtree", "prune"

    def __init__(
        self,
        latency: float = 0.5,
        milliseconds: float | None = None,
        timer: str = "onnxruntime",
        beam: int = 3,
        children: int = 4,
        step: float = 0.1,
        criterion: str = "taylor",
        mode: str = "layer",
        steps: int = 8,
        batches: int = 4,
        normalise: str = "none",
        rescore: bool = True,
        round_to: int = 8,
        most: float = 0.9,
        batch: int = 1,
        runs: int = 30,
        threads: int = 1,
        tune_steps: int = 0,
        final_steps: int = 1000,
        heads: str = "dims",
        protect: Sequence[str] = (),
    ) -> None:
        self.scoring = Scoring(criterion, mode, int(steps), batches=int(batches))
        self.scoring.check(self.name)
        check_choices(self.name, timer=(timer, TIMERS), normalise=(normalise, ("none", "mean")), heads=(heads, HEADS))
        check_parts(self.name, latency=latency, step=step, most=most)
        counts = {"beam": beam, "children": children, "round_to": round_to, "batch": batch, "threads": threads}
        check_counts(self.name, **counts)
        if int(runs) < 2:
            raise ConfigError(f"compression.{self.name}.runs={runs}: at least 2, 30 for a median that can be trusted")
        if milliseconds is not None and not (float(milliseconds) > 0 and timer == "onnxruntime"):
            raise ConfigError(
                f"compression.{self.name}.milliseconds={milliseconds}: above 0, and only with timer=onnxruntime; "
                "timer=macs takes latency, a part of the original's"
            )
        self.latency, self.milliseconds, self.timer = float(latency), milliseconds, timer
        self.beam, self.children, self.step = int(beam), int(children), float(step)
        self.criterion = criterion
        self.normalise, self.rescore = normalise, bool(rescore)
        self.round_to, self.most, self.batch, self.runs = int(round_to), float(most), int(batch), int(runs)
        self.threads, self.tune_steps, self.final_steps = int(threads), int(tune_steps), int(final_steps)
        self.heads, self.protect = heads, tuple(protect)
        trained = self.tune_steps or self.final_steps
        self.needs: tuple[str, ...] = (*self.scoring.needs, *(("train",) if trained else ()))

    def prepare(self, network: nn.Module, data: Data) -> None:
        """Nothing is needed of the untouched network."""

    def __call__(self, network: nn.Module, data: Data) -> Report:
        """Search, put the best candidate in the place of the network, and train it."""
        assert data.example is not None
        image = data.example[:1]
        example = image.expand(self.batch, *image.shape[1:]).contiguous()
        sizes = {n: weight_bytes(layer) for n, layer in network.named_modules()}
        widths = {n: layer_sizes(layer) for n, layer in network.named_modules()}
        rest = None if data.remember is None else data.remember()

        def build(one: nn.Module) -> PruningGraph:
            return PruningGraph(one, image, self.protect, self.heads)

        graph = build(network)
        if not graph.groups:
            why = "; ".join(f"{name} {reason}" for name, reason in list(graph.left.items())[:3])
            raise ConfigError(f"compression={self.name}: no channels can be removed of this network: {why}")
        raw = self.scoring(graph, data.losses)
        means = {n: float(s.mean().clamp_min(1e-300)) if self.normalise == "mean" else 1.0 for n, s in raw.items()}

        def put_rest(one: Candidate) -> None:
            put = one.rest or rest
            if put is not None:
                put()

        # Losses, training and scores are those of the model that ``network`` is part of.
        def refine(one: Candidate) -> None:
            put_rest(one)
            with placed(network, one.network):
                if self.tune_steps and data.train is not None:
                    data.train(self.tune_steps)
                    network.eval()
                    one.rest = None if data.remember is None else data.remember()
                if self.rescore:
                    found = self.scoring(build(network), data.losses)
                    one.scores = {**one.scores, **{n: s / means[n] for n, s in found.items()}}

        def judge(one: Candidate) -> float:
            assert data.score is not None
            put_rest(one)
            with placed(network, one.network):
                return data.score()

        timer: Timer = (
            partial(mac_latency, width=self.round_to)
            if self.timer == "macs"
            else OnnxRuntimeTimer(self.runs, threads=self.threads)
        )
        search = TreeSearch(
            example,
            timer,
            build,
            self.beam,
            self.children,
            self.step,
            self.round_to,
            self.most,
            refine if self.rescore or self.tune_steps else None,
            judge if data.score is not None else None,
        )
        before = search.latency(network)
        budget = self.latency * before.median if self.milliseconds is None else float(self.milliseconds)
        found = search(network, budget, {n: s / means[n] for n, s in raw.items()})
        judged = [judge(one) for one in found] if data.score is not None and len(found) > 1 else [0.0]
        best = found[max(range(len(judged)), key=lambda k: judged[k])]
        exchange(network, best.network)
        put_rest(best)
        if self.final_steps and data.train is not None:
            data.train(self.final_steps)
            network.eval()
        after = timer(network, example)  # again: of several that were measured, a lucky one may have been taken
        return self._report(network, widths, sizes, before, after, budget, search, found, list(graph.notes))

    def _report(
        self,
        network: nn.Module,
        widths: Mapping[str, tuple[int, int]],
        sizes: Mapping[str, int],
        before: Latency,
        after: Latency,
        budget: float,
        search: TreeSearch,
        found: Sequence[Candidate],
        notes: list[str],
    ) -> Report:
        keys = ("latency", "milliseconds", "timer", "beam", "children", "step", "criterion", "round_to", "batch")
        totals = {
            "before": before.median,
            "after": after.median,
            "budget": budget,
            "spread": max(before.spread, after.spread),
            "timed": float(len(search.known)),
            "levels": float(search.levels),
            "candidates": float(len(found)),
        }
        records = pruned_records(network, widths, sizes, self.name)
        report = Report(self.name, {key: getattr(self, key) for key in keys}, records, totals, notes)
        if self.timer == "macs":
            report.notes.append("latencies are millions of multiplications, not times (timer=macs)")
            return report
        spreads = f"quartiles {before.spread:.2g} and {after.spread:.2g} ms apart"
        report.notes.append(
            f"ONNX Runtime, batch of {self.batch}, {self.threads} thread(s), median of {self.runs}: "
            f"{before.median:.3g} → {after.median:.3g} ms, {spreads}"
        )
        if after.median > budget:
            report.notes.append(
                f"timed again at the end it is above the budget of {budget:.3g} ms: where quartiles are far apart the "
                f"machine was busy; run it on an idle one, or with more than runs={self.runs}"
            )
        return report
