# SPDX-License-Identifier: Apache-2.0
"""Everything that all methods share: terms, weighting, auxiliary objectives, optimisers, logging, prediction.

A method subclasses ``AffectModule`` and overrides ``forward``, and ``training_terms`` or ``parameter_groups`` where it
differs. Optimisation stays automatic.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import pytorch_lightning as pl
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from affect.errors import ConfigError, near
from affect.losses.base import Terms
from affect.models.sharding import Shards, clip_norm, full
from affect.models.weighting import FixedWeighting
from affect.tasks import Task, to_pixels


class Batch(Protocol):
    """What a model may read of a batch; ``affect.data.batch.FaceBatch`` has it."""

    @property
    def image(self) -> Tensor:
        """RGB uint8 ``(B, 3, H, W)``."""
        ...

    @property
    def targets(self) -> dict[str, Tensor]:
        """Targets by task."""
        ...

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks by task."""
        ...

    @property
    def points(self) -> dict[str, Tensor]:
        """Points by landmark scheme ``(B, P, 2)``, in pixels of ``image``."""
        ...

    @property
    def point_masks(self) -> dict[str, Tensor]:
        """Masks of points by landmark scheme ``(B, P)``."""
        ...


class Objective(nn.Module):
    """An auxiliary objective on a model's outputs and on the activations of layers that it taps.

    Attributes:
        layers: Dotted names of the sub-modules whose outputs it needs, relative to the Lightning module.
        weight: Factor of the objective in the total loss; with 0 it takes no part in training and only examines.
        precise: Whether training steps compute in float32 what follows its layers, also under mixed precision, so that
            gradients of what it taps have no coarser numbers.
    """

    layers: tuple[str, ...] = ()
    weight: float = 1.0
    precise: bool = False

    def check(self, name: str, module: AffectModule) -> None:
        """Refuse a model that the objective cannot act on, before anything is trained.

        Args:
            name: Name of the objective, for messages.
            module: The model.

        Raises:
            ConfigError: If a layer does not exist; it names near ones.
        """
        modules = dict(module.named_modules())
        for layer in self.layers:
            if layer in modules:
                continue
            parent = layer
            while parent not in modules:  # the root's name is empty
                parent = parent.rpartition(".")[0]
            named = sorted(filter(None, modules), key=len, reverse=True)
            # A name without its parents is looked for among the last parts; the shortest whole name wins.
            ends = {full.rpartition(".")[2]: full for full in named}
            close = [] if "." in layer else difflib.get_close_matches(layer, ends, n=1)
            told = f"did you mean {ends[close[0]]}?" if close else near(layer, named)
            inside = ", ".join(child for child, _ in modules[parent].named_children()) or "no layers"
            raise ConfigError(f"objective {name}: no layer {layer!r}; {told} ({parent or 'the model'} holds {inside})")

    def attempt(self, name: str, module: AffectModule, batch: Batch) -> None:
        """Refuse a model whose layers exist and give nothing that the objective can act on, by a pass of a few faces.

        Args:
            name: Name of the objective, for messages.
            module: The model with the objective's taps, in evaluation mode.
            batch: Faces of the training part.

        Raises:
            ConfigError: With what to do.
        """

    def forward(self, batch: Batch, outputs: dict[str, Tensor], taps: dict[str, Tensor]) -> Terms:
        """Return the sum of the objective over the samples it applies to, and their number."""
        raise NotImplementedError

    def examine(self, module: AffectModule, batches: Iterable[Batch]) -> dict[str, Any]:
        """Return what held-out faces tell of a trained model in the objective's terms, ready for JSON.

        Args:
            module: The model, in evaluation mode, with the objective's taps.
            batches: Faces of the test part, or of the validation part without one.
        """
        return {}


class AffectModule(pl.LightningModule):
    """Base of every method.

    Args:
        tasks: What to predict, by name; bound (``Task.bind``) before the module is built.
        optimizer: Partial of a ``torch.optim`` optimiser; called with parameter groups.
        scheduler: Partial of a learning-rate schedule, called with the optimiser and, if it takes it, ``total_steps``;
            None keeps the rate constant.
        scheduler_interval: Whether the schedule advances per ``step`` or per ``epoch``; None takes steps for a schedule
            that is told how many there are (``total_steps``), and epochs for any other.
        weighting: How task losses are weighed in the sum; None uses each task's fixed weight, which otherwise is a
            factor of what the weighting makes of the task.
        objectives: Auxiliary objectives by name.
        encoder_lr_scale: Factor of the learning rate for encoders.
        layer_decay: Layer-wise factor: a block ``d`` blocks below an encoder's last one learns at ``layer_decay ** d``
            times the encoder's rate. None gives all blocks the same rate.
        channels_last: Keep convolutional weights and images in channels-last memory order.
        mixup: Parameter of the symmetric Beta distribution that pairs of training images and their labels are mixed by,
            one draw per image; None mixes nothing. Losses see mixed labels, models that are fed labels their own.

    Attributes:
        last_validation: What the validation of the current epoch logged; empty before it.
        shards: How encoders are shared out over processes, set by ``FullyShardedStrategy``; None where they are whole.
        quantization: What of the model is quantized (``affect.quantization.Quantization``), None for a float model.
        taps: Activations of the layers that objectives asked for, from the last forward pass; not detached.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        tasks: Mapping[str, Task],
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        scheduler_interval: str | None = None,
        weighting: nn.Module | None = None,
        objectives: Mapping[str, Objective] | None = None,
        encoder_lr_scale: float = 1.0,
        layer_decay: float | None = None,
        channels_last: bool = False,
        mixup: float | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ConfigError("a model needs at least one task: task=[au,expression]")
        if scheduler_interval not in (None, "step", "epoch"):
            raise ConfigError(f"model.scheduler_interval={scheduler_interval}: write step, epoch or null")
        if taken := sorted(set(tasks) & set(objectives or {})):
            raise ConfigError(f"objectives.{taken[0]}: a task has this name; give the objective another one")
        self.tasks: dict[str, Task] = dict(tasks)
        self.losses = nn.ModuleDict({n: t.loss for n, t in self.tasks.items() if t.loss is not None})
        self.targets = nn.ModuleDict({n: t.target for n, t in self.tasks.items() if t.target is not None})
        self.validation_metrics = nn.ModuleDict({n: nn.ModuleList(t.metrics) for n, t in self.tasks.items()})
        self.optimizer, self.scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval
        self.weighting = weighting or FixedWeighting({name: self.tasks[name].weight for name in self.losses})
        if hasattr(self.weighting, "bind"):
            self.weighting.bind(dict(self.losses.items()), {name: self.term_names(name) for name in self.losses})
        self.objectives = nn.ModuleDict({n: o for n, o in (objectives or {}).items() if o is not None})
        if mixup is not None:
            unmixed = [n for n, t in self.tasks.items() if t.landmark_scheme is not None] + list(self.objectives)
            if not mixup > 0:
                raise ConfigError(f"model.mixup={mixup}: must be more than 0, or null for none")
            if unmixed:
                raise ConfigError(f"model.mixup={mixup}: points of two faces cannot be mixed; leave {unmixed[0]} out")
        self.mixup = mixup
        self._mixed: tuple[Tensor, Tensor] | None = None
        self.channels_last = channels_last
        self.encoder_lr_scale, self.layer_decay = float(encoder_lr_scale), layer_decay
        self.taps: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] | None = None
        self._tap_handles: list[Any] = []
        self._tap_versions: dict[str, int | None] = {}
        self._precise: frozenset[str] = frozenset()
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "val": {}}
        self.last_validation: dict[str, float] = {}
        self.quantization: Any = None
        self.shards: Shards | None = None

    # ---------------------------------------------------------------------------------- what methods override

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the representation of each task (logits, bounded numbers, point fractions)."""
        raise NotImplementedError

    def training_terms(self, batch: Batch) -> dict[str, Terms]:
        """Return the loss terms of a training batch by task; by default the task losses of ``forward``."""
        return self.task_terms(self(batch), batch)

    def term_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the entries of a task's loss terms: its outputs, or itself where there is one entry."""
        task = self.tasks[name]
        return (name,) if task.softmax or task.landmark_scheme is not None else tuple(task.outputs)

    def encoder_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the encoders (name, module): the parts that ``init=`` takes over and that learn at scaled rates."""
        encoder = getattr(self, "encoder", None)
        if encoder is not None:
            yield "encoder", encoder

    def heads(self) -> dict[str, nn.Linear]:
        """Return the linear layer of each task whose rows are the task's outputs, for ``init=`` by label name."""
        return {}

    # ------------------------------------------------------------------------------------------------- terms

    def task_terms(
        self, outputs: Mapping[str, Tensor], batch: Batch, only: Collection[str] | None = None
    ) -> dict[str, Terms]:
        """Return the loss terms of each task; targets are transformed here and nowhere before.

        Args:
            outputs: Representation by task.
            batch: The batch.
            only: Tasks whose terms are wanted; None takes all that have a loss.
        """
        self._outputs = dict(outputs)
        terms = {}
        for name, loss in self.losses.items():
            if only is not None and name not in only:
                continue
            terms[name] = loss(outputs[name], *self.loss_targets(name, batch))
        return terms

    def loss_targets(self, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what a task's loss compares with: targets mixed, then transformed, and their mask.

        Only here do losses meet other labels than the raw ones. A mixed cell counts where both labels are known.
        """
        target, mask = batch.targets[name], batch.masks[name]
        if self._mixed is not None:
            share, partner = self._mixed
            both = mask & mask[partner]
            target = torch.where(both, share * target + (1 - share) * target[partner], 0)
            mask = both
        return self.tasks[name].transform_targets(target, mask), mask

    def _mix(self, batch: Batch) -> Batch:
        """Return the batch with mixed images, and remember how, for ``loss_targets``."""
        assert self.mixup is not None
        count = len(batch.image)
        concentration = torch.full((count,), float(self.mixup))
        share = torch.distributions.Beta(concentration, concentration).sample().to(batch.image.device)
        partner = torch.randint(count, (count,)).to(batch.image.device)
        factor = share.view(-1, 1, 1, 1)
        mixed = factor * batch.image + (1 - factor) * batch.image[partner]
        self._mixed = (share[:, None], partner)
        return dataclasses.replace(batch, image=mixed.round().to(torch.uint8))  # type: ignore[type-var]

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the total loss: each term over the global number of valid cells, weighed and summed."""
        self._outputs = None
        if self.mixup is not None:
            batch = self._mix(batch)
        acting = {name: objective for name, objective in self.objectives.items() if objective.weight != 0}
        with self._precise_behind({layer for one in acting.values() if one.precise for layer in one.layers}):
            terms = self.training_terms(batch)
            self._mixed = None
            if acting:
                outputs = self(batch) if self._outputs is None else self._outputs
                taps = self.intact_taps()
                terms |= {name: objective(batch, outputs, taps) for name, objective in acting.items()}
        self._outputs, self.taps = None, {}
        counts = self._global_counts(terms)
        world = self.trainer.world_size if self._trainer is not None else 1
        total = terms[next(iter(terms))].sum.sum() * 0
        task_terms = {name: Terms(term.sum * world, counts[name]) for name, term in terms.items()}
        weighed = self.weighting({name: term for name, term in task_terms.items() if name in self.tasks})
        fixed = isinstance(self.weighting, FixedWeighting)  # the weights of tasks are its own
        for name, value in weighed.items():
            total = total + (value if fixed else self.tasks[name].weight * value)
        for name, objective in acting.items():
            term = task_terms[name]
            total = total + objective.weight * term.sum.sum() / term.count.sum().clamp(min=1)
        self._accumulate("train", terms)
        self.log("loss", total.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=len(batch.image))
        return total

    def _global_counts(self, terms: Mapping[str, Terms]) -> dict[str, Tensor]:
        """Return counts summed over all processes, so that unequal masks weigh as in one process."""
        counts = {name: term.count.detach().float() for name, term in terms.items()}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flat = torch.cat([counts[name] for name in sorted(counts)])
            torch.distributed.all_reduce(flat)
            parts = flat.split([len(counts[name]) for name in sorted(counts)])
            counts = dict(zip(sorted(counts), parts, strict=True))
        return counts

    # ----------------------------------------------------------------------------------------------- logging

    def _accumulate(self, stage: str, terms: Mapping[str, Terms]) -> None:
        """Add up sums and counts ourselves: they are part of a checkpoint, so a resumed epoch logs the same mean."""
        for name, term in terms.items():
            pair = torch.stack([term.sum.detach().sum().double(), term.count.sum().double()])
            held = self._sums[stage].get(name)
            self._sums[stage][name] = pair if held is None else held.to(pair.device) + pair

    def epoch_losses(self, stage: str) -> dict[str, float]:
        """Return the mean of each term since the last call, over all processes, and start anew."""
        losses = {}
        for name, pair in sorted(self._sums[stage].items()):
            total = _over_processes(pair)
            if total[1] > 0:
                losses[f"{stage}/{name}/loss"] = float(total[0] / total[1])
        self._sums[stage] = {}
        return losses

    def on_train_epoch_start(self) -> None:
        """Forget the validation of an earlier epoch: an epoch without one reports none."""
        self.last_validation = {}

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Update losses and metrics of the inference path."""
        outputs = self(batch)
        self._accumulate("val", self.task_terms(outputs, batch))
        for name, metrics in self.validation_metrics.items():
            values = self.tasks[name].predict(outputs[name].float())
            target, mask = batch.targets[name], batch.masks[name]
            if self.tasks[name].landmark_scheme is not None:
                height, width = batch.image.shape[-2:]
                values, target = to_pixels(values, height, width), to_pixels(target, height, width)
            for metric in metrics:
                metric.update(values, target, mask)
        self._outputs, self.taps = None, {}

    def on_validation_epoch_end(self) -> None:
        """Log losses and metrics, and the mean over tasks of the metric that stands for each (``val/score``).

        Where no metric stands for any task, ``val/score`` is minus the mean of the tasks' losses.
        """
        logged = self.epoch_losses("val")
        scores = []
        for name, metrics in self.validation_metrics.items():
            for metric in metrics:
                for key, value in metric.compute().items():
                    logged[f"val/{name}/{key}"] = float(value)
                metric.reset()
            score = self.tasks[name].score
            if score is not None:
                key = f"val/{name}/{score}"
                if key not in logged:
                    known = [k.removeprefix(f"val/{name}/") for k in logged if k.startswith(f"val/{name}/")]
                    raise ConfigError(f"task.{name}.score={score}: no such metric; {near(score, known)}")
                scores.append(logged[key])
        if all(task.score is None for task in self.tasks.values()):  # then the lower mean loss is the better
            losses = [logged[f"val/{name}/loss"] for name in self.losses if f"val/{name}/loss" in logged]
            scores = [-sum(losses) / len(losses)] if losses else []
        finite = [score for score in scores if score == score]  # a metric without labels is NaN and says nothing
        if finite:
            logged["val/score"] = sum(finite) / len(finite)
        self.last_validation = logged
        shown = {key: value for key, value in logged.items() if value == value}
        self.log_dict({k: v for k, v in shown.items() if k != "val/score"}, rank_zero_only=True)
        if "val/score" in shown:
            self.log("val/score", shown["val/score"], prog_bar=True, rank_zero_only=True)

    def predict_step(self, batch: Batch, batch_index: int = 0) -> dict[str, Tensor]:
        """Return the values of each task (probabilities, bounded numbers; landmarks as fractions of the crop)."""
        outputs = self(batch)
        self.taps = {}
        return {name: self.tasks[name].predict(output.float()) for name, output in outputs.items()}

    # ------------------------------------------------------------------------------------------ optimisation

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups of trainable parameters with ``lr_scale``; no weight decay for biases, norms and scalars.

        Nor for what the class (``no_weight_decay``) or the encoder's architecture excludes, e.g. position embeddings.
        Methods override this to add groups of their own. Besides the optimiser's keys a group may have ``lr`` (its own
        rate instead of a scaled one), ``schedule="constant"`` (the schedule leaves it alone), ``clip=False`` (no part
        in the clipping of gradients) and ``name``.
        """
        depth: dict[int, float] = {}
        undecayed: set[int] = set()
        for _, encoder in self.encoder_modules():
            layers = encoder.layer_index() if self.layer_decay is not None else {}
            last = max(layers.values(), default=0)
            kept = encoder.model.no_weight_decay() if hasattr(encoder.model, "no_weight_decay") else ()
            for name, parameter in encoder.model.named_parameters():
                below = last - layers.get(name, last)
                if name in kept:
                    undecayed.add(id(parameter))
                depth[id(parameter)] = self.encoder_lr_scale * (self.layer_decay or 1.0) ** below
        groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
        rate = getattr(self.weighting, "lr", None)
        weights = [p for p in self.weighting.parameters() if p.requires_grad and rate is not None]
        apart = {id(parameter) for parameter in weights}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and id(parameter) not in apart:
                named = id(parameter) in undecayed or any(key in name for key in self.no_weight_decay)
                decayed = parameter.ndim > 1 and not named
                # Fused steps take parameters that are shared out, or none that are.
                kind = (depth.get(id(parameter), 1.0), decayed, isinstance(parameter, DTensor))
                groups.setdefault(kind, []).append(parameter)
        listed: list[dict[str, Any]] = [
            {"params": parameters, "lr_scale": scale} | ({} if decayed else {"weight_decay": 0.0})
            for (scale, decayed, _), parameters in groups.items()
        ]
        if weights:
            constant = {"weight_decay": 0.0, "schedule": "constant", "clip": False}
            listed.append({"params": weights, "lr": rate, "name": "weighting", **constant})
        return listed

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser over ``parameter_groups``."""
        if self.optimizer is None:
            raise ConfigError("no optimizer: add optimizer=adamw")
        keywords = getattr(self.optimizer, "keywords", {})
        groups = self.parameter_groups()
        if not groups:
            raise ConfigError("no trainable parameters: encoder.trainable=none needs a model with heads")
        rate = keywords.get("lr")
        if rate is not None:
            if not isinstance(rate, int | float):
                raise ConfigError(f"optimizer.lr={rate}: a number is needed")
            for group in groups:
                group.setdefault("lr", rate * group.get("lr_scale", 1.0))
        return self.optimizer(groups)

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Return the optimiser and its schedule."""
        optimizer = self.build_optimizer()
        if self.scheduler is None:
            return optimizer
        function = getattr(self.scheduler, "func", self.scheduler)
        parameters = inspect.signature(function).parameters
        counted = not {"total_steps", "steps_per_epoch"}.isdisjoint(parameters)
        interval = self.scheduler_interval or ("step" if counted else "epoch")
        extra = {}
        if counted:
            steps, epochs = int(self.trainer.estimated_stepping_batches), int(self.trainer.max_epochs or 1)
            if "total_steps" in parameters:
                extra["total_steps"] = steps if interval == "step" else epochs
            if "steps_per_epoch" in parameters:
                extra["steps_per_epoch"] = -(-steps // epochs) if interval == "step" else 1
        scheduler = self.scheduler(optimizer, **extra)
        _hold_constant(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:  # noqa: ANN401
        """Advance the schedule; groups with ``schedule="constant"`` keep their rate."""
        super().lr_scheduler_step(scheduler, metric)
        _hold_constant(scheduler.optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as the trainer is told to; groups with ``clip=False`` take no part."""
        if not gradient_clip_val:
            return
        parameters = [p for group in optimizer.param_groups if group.get("clip", True) for p in group["params"]]
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif self.shards is not None:
            clip_norm(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    # ----------------------------------------------------------------------------------------------- reading

    def findings(self) -> dict[str, Any]:
        """Return what a trained model tells of itself (an order, learnt weights), ready for JSON, by topic."""
        found: dict[str, Any] = getattr(self.weighting, "findings", dict)()
        return {"weighting": found} if found else {}

    def examine(self, loader: Callable[[str], Iterable[Batch] | None]) -> dict[str, Any]:
        """Return what data tell of a trained model (what a gate uses, what features hold), by topic, ready for JSON.

        It stands beside ``findings``. The model is in evaluation mode and stays so.

        Args:
            loader: Returns batches of rows spread evenly over ``train``, ``validation`` or ``test``, cropped as in
                evaluation, or None for a part without rows. What nobody asks for costs nothing.
        """
        found = {}
        for name, objective in self.objectives.items():
            if type(objective).examine is Objective.examine:
                continue
            batches = held_out(loader)
            told = {} if batches is None else objective.examine(self, batches)  # type: ignore[operator]
            if told:
                found[name] = told
        return {"objectives": found} if found else {}

    def readings(self) -> dict[str, float]:
        """Return what a model learns beside its outputs as numbers by name; they are logged after every epoch."""
        found: dict[str, Any] = getattr(self.weighting, "findings", dict)()
        sigma = found.get("sigma", {})
        return {f"weighting/sigma/{task}/{o}": float(s) for task, found in sigma.items() for o, s in found.items()}

    # --------------------------------------------------------------------------------- taps, state, placement

    def setup(self, stage: str) -> None:
        """Attach the taps of auxiliary objectives; a layer that does not exist is an error that lists near ones."""
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        if not self._tap_handles:
            self._attach_taps()

    def _attach_taps(self) -> None:
        modules = dict(self.named_modules())
        for name, objective in self.objectives.items():
            objective.check(name, self)
            for layer in objective.layers:
                self._tap_handles.append(modules[layer].register_forward_hook(self._tap(layer)))

    def attempt_objectives(self, batch: Batch) -> None:
        """Let every objective, also one of weight 0, try the model on a few faces; nothing of the model changes.

        Taps are there for that long only where ``setup`` has not attached them yet; no random number is used up.

        Args:
            batch: Faces of the training part, on the model's device.

        Raises:
            ConfigError: If a layer cannot serve an objective; with what to do.
        """
        mode, attached = self.training, bool(self._tap_handles)
        self.eval()
        try:
            if not attached:
                self._attach_taps()
            with torch.random.fork_rng(devices=[]):
                for name, objective in self.objectives.items():
                    objective.attempt(name, self, batch)  # type: ignore[operator]
        finally:
            if not attached:
                for handle in self._tap_handles:
                    handle.remove()
                self._tap_handles = []
            self.taps = {}
            self.train(mode)

    def configure_model(self) -> None:
        """Share out the encoders where the strategy says so."""
        if self.shards is not None:
            self.shards.share_out(self, self.encoder_modules())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the gradients of what stays whole beside shared-out encoders."""
        if self.shards is not None:
            self.shards.average_gradients(self)

    def on_validation_start(self) -> None:
        """Hold shared-out encoders as a whole: processes differ in their number of validation batches."""
        if self.shards is not None:
            self.shards.keep_whole(self, True)

    def on_validation_end(self) -> None:
        """Go back to parts of shared-out encoders."""
        if self.shards is not None:
            self.shards.keep_whole(self, False)

    def _tap(self, layer: str) -> Callable[..., Tensor]:
        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            if layer in self._precise and isinstance(output, Tensor):
                # Operations go on casting what they are given, now to float32: half of another branch fits, too.
                torch.set_autocast_dtype(output.device.type, torch.float32)
                output = output.float()
            self.taps[layer], self._tap_versions[layer] = output, _version(output)
            return output

        return keep

    @contextmanager
    def _precise_behind(self, layers: Collection[str]) -> Iterator[None]:
        """Compute in float32 from the first of some layers on; without autocast everything stays as it is."""
        device = self.device.type
        if not layers or not torch.is_autocast_enabled(device):
            yield
            return
        dtype, self._precise = torch.get_autocast_dtype(device), frozenset(layers)
        try:
            yield
        finally:
            torch.set_autocast_dtype(device, dtype)
            self._precise = frozenset()

    def intact_taps(self) -> dict[str, Tensor]:
        """Return the taps of the last forward pass, each as its layer gave it.

        Raises:
            ConfigError: If an operation behind a layer overwrote its output, e.g. a ReLU in place: the tensor then is
                that operation's output.
        """
        for layer, output in self.taps.items():
            if _version(output) != self._tap_versions[layer]:
                raise ConfigError(
                    f"the output of layer {layer} is changed in place by what follows it, so that it cannot be tapped; "
                    "name the activation or the block behind it"
                )
        return self.taps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store open sums and the last validation, so that a continued epoch reports what it would have reported.

        Sums are those of all processes, which call this together.
        """
        checkpoint["affect_sums"] = {
            stage: {name: _over_processes(pair).cpu() for name, pair in sorted(sums.items())}
            for stage, sums in self._sums.items()
        }
        checkpoint["affect_last_validation"] = dict(self.last_validation)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore open sums, which the first of several processes goes on with, and the last validation."""
        first = self._trainer is None or self.trainer.is_global_zero
        stored = {
            stage: {name: pair if first else torch.zeros_like(pair) for name, pair in sums.items()}
            for stage, sums in checkpoint.get("affect_sums", {}).items()
        }
        self._sums = {"train": {}, "val": {}, **stored}
        self.last_validation = dict(checkpoint.get("affect_last_validation", {}))

    def release_state(self) -> dict[str, Tensor]:
        """Return the tensors that prediction needs: no loss, metric or target-transform buffers.

        Of encoders that are shared out, all processes must ask together.
        """
        excluded = ("losses.", "targets.", "validation_metrics.", "objectives.", "weighting.")
        return {name: full(value) for name, value in self.state_dict().items() if not name.startswith(excluded)}

    def load_release_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``release_state`` returned.

        Raises:
            RuntimeError: If a tensor is missing, unexpected or of another shape.
        """
        own = self.release_state()
        missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        if missing or unexpected:
            raise RuntimeError(f"missing tensors {missing[:3]}, unexpected tensors {unexpected[:3]}")
        self.load_state_dict(dict(state), strict=False)


def held_out(loader: Callable[[str], Iterable[Batch] | None]) -> Iterable[Batch] | None:
    """Return the batches of the test part, or of the validation part without one; None where there is neither."""
    return next((found for found in map(loader, ("test", "validation")) if found is not None), None)


def _version(output: object) -> int | None:
    """Return how often a tensor has been changed in place; None of what is none, or has no such count."""
    return output._version if isinstance(output, Tensor) and not output.is_inference() else None


def _over_processes(numbers: Tensor) -> Tensor:
    """Return the sum of ``numbers`` over all processes, which must ask together."""
    total = numbers.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


def _hold_constant(optimizer: torch.optim.Optimizer) -> None:
    """Give groups with ``schedule="constant"`` their initial rate, whatever a schedule made of it."""
    for group in optimizer.param_groups:
        if group.get("schedule") == "constant" and "initial_lr" in group:
            group["lr"] = group["initial_lr"]
