# SPDX-License-Identifier: Apache-2.0
"""MONET as a Lightning module: a shared encoder, task-wise recurrent cells, and an order that is learnt with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.encoders import TimmEncoder
from affect.errors import ConfigError, near
from affect.losses.base import Terms
from affect.models.base import AffectModule, Batch, held_out
from affect.models.baseline.network import Heads
from affect.models.monet.loss import bound, mixture
from affect.models.monet.network import Candidate, MultiOrder, Unknown, kept_orders
from affect.models.monet.orders import check_orders, draw_orders, soft_order
from affect.tasks import Task

Mixing = Literal["bound", "mixture"]
Dropout = Literal["example", "batch"]

_EXAMINED = 128
"""Orders whose loss on held-out rows results tell, the most probable ones."""


class Monet(AffectModule):
    """Multi-Order Network (Tallec, Dapogny and Bailly, arXiv 2202.00446) on one task of yes-or-no outputs.

    The loss of a cell is that of the task (``loss=…``), taken along every order that is run. Other tasks get a linear
    head on the same features.

    Args:
        tasks: What to predict, by name.
        encoder: Backbone with ``output=vector``.
        task: Name of the task whose outputs are ordered.
        orders: Number M of orders that are drawn, or a list of permutations.
        order_seed: Seed of the draw.
        with_identity: Whether the natural order is among those that are drawn.
        hidden: Size H of the state.
        label_features: Size L of the label encoding.
        candidate: ``tanh``, or ``sigmoid`` for the cell of the authors' research code.
        tied: One cell and head for all tasks; with one natural order it is the baseline MRNN.
        mixing: ``bound`` (loss B, the mean of the orders' losses) or ``mixture`` (loss A, the mixture's likelihood).
        kept: Number k of orders that are run in training; None runs all.
        dropout: Whether each ``example`` or each ``batch`` has its own draw of kept orders.
        warmup_epochs: Epochs in which the mixture stays uniform. Its gradient is dropped there, so that the
            optimiser's moments start with the first released step.
        order_lr: Learning rate of the order logits, constant.
        train_orders: Whether the mixture is learnt; False keeps it uniform for ever (ablation).
        unknown: What a cell sees of a label that is missing: the model's own ``draw``, or ``zero``.
        samples: Number N of orders and label strings that inference averages over.
        sample_seed: Seed of the numbers that inference draws by.
        fresh_samples: Draw anew at every inference instead.
        log_odds_bias: Start head biases at the log-odds of the training rates.
        **common: Arguments of ``AffectModule``.

    Raises:
        ConfigError: If the task is missing, has no yes-or-no outputs, or has fewer orders than asked for.
    """

    no_weight_decay = ("order_logits",)

    def __init__(
        self,
        tasks: Mapping[str, Task],
        encoder: TimmEncoder,
        task: str = "au",
        orders: int | Sequence[Sequence[int]] = 512,
        order_seed: int = 0,
        with_identity: bool = False,
        hidden: int = 64,
        label_features: int = 64,
        candidate: Candidate = "tanh",
        tied: bool = False,
        mixing: Mixing = "bound",
        kept: int | None = 128,
        dropout: Dropout = "example",
        warmup_epochs: int = 10,
        order_lr: float = 5e-3,
        train_orders: bool = True,
        unknown: Unknown = "draw",
        samples: int = 10,
        sample_seed: int = 0,
        fresh_samples: bool = False,
        log_odds_bias: bool = True,
        **common: Any,  # noqa: ANN401
    ) -> None:
        self.task, self.mixing = task, mixing  # a weighting asks for names of terms while it is bound
        super().__init__(tasks, **common)
        for key, value, options in (
            ("mixing", mixing, ("bound", "mixture")),
            ("dropout", dropout, ("example", "batch")),
            ("unknown", unknown, ("draw", "zero")),
        ):
            if value not in options:
                raise ConfigError(f"model.{key}={value!r}: {near(str(value), options)}")
        if task not in self.tasks:
            raise ConfigError(f"model.task={task}: no such task; {near(task, self.tasks)}")
        ordered = self.tasks[task]
        if not ordered.flags:
            raise ConfigError(f"model.task={task}: MONET orders yes-or-no outputs; choose au or attributes")
        count = ordered.num_outputs
        if isinstance(orders, int):
            drawn = draw_orders(count, orders, order_seed, with_identity)
        else:
            drawn = check_orders(np.asarray([list(order) for order in orders]), count)
        if kept is not None and not 1 <= kept <= len(drawn):
            raise ConfigError(f"model.kept={kept}: must lie between 1 and the number of orders, {len(drawn)}")
        self.kept, self.dropout = kept, dropout
        self.warmup_epochs, self.order_lr = int(warmup_epochs), float(order_lr)
        self.unknown, self.fresh_samples = unknown, bool(fresh_samples)
        self.encoder = encoder
        self.orders = MultiOrder(
            encoder.num_features, torch.as_tensor(drawn), hidden, label_features, candidate, tied, samples, sample_seed
        )
        self.orders.order_logits.requires_grad_(bool(train_orders))
        if log_odds_bias and not tied and ordered.rates is not None:
            rates = torch.as_tensor(ordered.rates, dtype=torch.float32)
            coded = rates.isfinite()
            start = torch.logit(rates.nan_to_num(0.5).clamp(1e-3, 1 - 1e-3))
            self.orders.cells.head_bias.data.copy_(torch.where(coded, start, 0))
        others = {name: other.num_outputs for name, other in self.tasks.items() if name != task}
        self.head = Heads(encoder.num_features, others) if others else None

    def setup(self, stage: str) -> None:
        """Check that the loss can be mixed over orders, besides what every method sets up."""
        super().setup(stage)
        if stage == "fit" and self.task in self.losses:
            one = torch.zeros(1, self.tasks[self.task].num_outputs, device=self.device)
            self.losses[self.task].cells(one, one, one > -1)  # type: ignore[operator]

    def term_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the entries of a task's terms; a mixture's likelihood is one number for all cells."""
        return (name,) if (name, self.mixing) == (self.task, "mixture") else super().term_names(name)

    def features(self, batch: Batch) -> Tensor:
        """Return the encoder's vectors ``(B, D)``."""
        image = batch.image
        return self.encoder(image.contiguous(memory_format=torch.channels_last) if self.channels_last else image)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the representation of each task; of the ordered one the logit of its mean probability."""
        return self._outputs_of(self.features(batch))

    def _outputs_of(self, vector: Tensor) -> dict[str, Tensor]:
        outputs = {} if self.head is None else self._other_outputs(vector)
        outputs[self.task] = self.orders(vector, self.fresh_samples)
        return {name: outputs[name] for name in self.tasks}

    def _other_outputs(self, vector: Tensor) -> dict[str, Tensor]:
        assert self.head is not None
        return {name: self.tasks[name].link(raw) for name, raw in self.head(vector).items()}

    def training_terms(self, batch: Batch) -> dict[str, Terms]:
        """Return the loss terms: of the ordered task mixed over orders under teacher forcing, of others as usual."""
        vector = self.features(batch)
        terms: dict[str, Terms] = {}
        others = {} if self.head is None else self._other_outputs(vector)
        if others:
            terms |= self.task_terms(others, batch, others)
        if self.task in self.losses:
            terms[self.task] = self._ordered_terms(vector, batch)
        if self.objectives:
            self._outputs = {**others, self.task: self.orders(vector, self.fresh_samples)}
        return terms

    def _ordered_terms(self, vector: Tensor, batch: Batch) -> Terms:
        target, mask = batch.targets[self.task], batch.masks[self.task]
        chosen = None
        if self.kept is not None and self.kept < len(self.orders.orders):
            examples = len(vector) if self.dropout == "example" else None
            chosen = kept_orders(len(self.orders.orders), self.kept, examples, vector.device)
        # Cells are fed the raw labels; only the loss sees smoothed ones.
        labels = (target >= 0.5).to(target.dtype)
        known = None if bool(mask.all()) else mask
        logits = self.orders.forced(vector, labels, known, chosen, self.unknown).float()
        weights = self.orders.order_logits if chosen is None else self.orders.order_logits[chosen]
        count = logits.shape[1]
        shown, mask = self.loss_targets(self.task, batch)
        flat = [part[:, None].expand(-1, count, -1).reshape(-1, part.shape[-1]) for part in (shown, mask)]
        cells = self.losses[self.task].cells(logits.reshape(-1, logits.shape[-1]), *flat).view_as(logits)  # type: ignore[operator]
        if self.mixing == "bound":
            return Terms(bound(cells, weights).sum(0), mask.sum(0).float())
        # One number per example; counting its cells keeps the scale of the loss that of the bound.
        return Terms(mixture(cells.sum(-1), weights).sum()[None], mask.sum().float()[None])

    # ------------------------------------------------------------------------------------------ optimisation

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the common groups and one of the order logits: own constant rate, no decay, no shared clipping."""
        logits = self.orders.order_logits
        groups = super().parameter_groups()
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter is not logits]
        groups = [group for group in groups if group["params"]]
        if logits.requires_grad:
            groups.append(
                {
                    "params": [logits],
                    "lr": self.order_lr,
                    "weight_decay": 0.0,
                    "schedule": "constant",
                    "clip": False,
                    "name": "order_logits",
                }
            )
        return groups

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the mixture uniform during warm-up."""
        super().on_before_optimizer_step(optimizer)
        if self.current_epoch < self.warmup_epochs:
            self.orders.order_logits.grad = None

    def heads(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the other tasks."""
        return {} if self.head is None else dict(self.head.linear.items())  # type: ignore[arg-type]

    # ----------------------------------------------------------------------------------------------- reading

    def readings(self) -> dict[str, float]:
        """Return the entropy of the mixture of orders in nats, and its largest weight, besides the common readings."""
        weights = self.orders.order_logits.detach().double().softmax(0)
        entropy = float(-torch.special.xlogy(weights, weights).sum())
        return super().readings() | {"order/entropy": entropy, "order/largest_weight": float(weights.max())}

    def findings(self) -> dict[str, Any]:
        """Return what was learnt of the order, ready for JSON.

        Returns:
            ``outputs``: names of the tasks; ``soft_order``: T × T, rows are steps; ``orders``: the most probable ones
            with their weight; ``entropy``: of the mixture, in nats, and ``uniform_entropy``, its largest value.
        """
        with torch.no_grad():
            weights = self.orders.order_logits.detach().double().softmax(0).cpu()
            orders = self.orders.orders.cpu()
            names = self.tasks[self.task].outputs
            best = weights.argsort(descending=True, stable=True)[:10]
            entropy = float(-(weights * weights.clamp(min=1e-300).log()).sum())
            return super().findings() | {
                "order": {
                    "outputs": list(names),
                    "soft_order": soft_order(orders, weights).tolist(),
                    "orders": [
                        {"weight": float(weights[m]), "order": [names[t] for t in orders[m].tolist()]} for m in best
                    ],
                    "entropy": entropy,
                    "uniform_entropy": float(torch.tensor(len(weights), dtype=torch.float64).log()),
                }
            }

    @torch.no_grad()
    def examine(self, loader: Callable[[str], Iterable[Batch] | None]) -> dict[str, Any]:
        """Return how well each order fits held-out labels, besides what every method tells.

        Topic ``order_loss``: the negative log-likelihood of an image's labels under teacher forcing, in nats, without
        weights or smoothing, averaged over the ``rows`` with a label of the test part, or of the validation part
        without one; for the 128 most probable ``orders``, the least loss first. Missing labels are left out of it;
        where cells are fed draws in their place, these come from fixed numbers.
        """
        told = super().examine(loader)
        weights = self.orders.order_logits.softmax(0)
        chosen = weights.argsort(descending=True, stable=True)[:_EXAMINED]
        names = self.tasks[self.task].outputs
        fixed = torch.Generator().manual_seed(0)
        uniforms = torch.rand(len(chosen), len(names), generator=fixed).to(self.device)
        total, rows = torch.zeros(len(chosen), dtype=torch.float64), 0
        for given in held_out(loader) or ():
            batch = given.to(self.device)  # type: ignore[attr-defined]
            mask = batch.masks[self.task]
            labels = (batch.targets[self.task] >= 0.5).float()
            vector = self.features(batch)
            logits = self.orders.forced(vector, labels, mask, chosen, self.unknown, uniforms).cpu().double()
            losses = F.binary_cross_entropy_with_logits(
                logits, labels.cpu().double()[:, None].expand_as(logits), reduction="none"
            )
            total += torch.where(mask.cpu()[:, None], losses, 0).sum((0, 2))
            rows += int(mask.any(1).sum())
        if not rows:
            return told
        losses = total / rows
        return told | {
            "order_loss": {
                "rows": rows,
                "orders": [
                    {
                        "loss": float(losses[k]),
                        "weight": float(weights[chosen[k]]),
                        "order": [names[t] for t in self.orders.orders[chosen[k]].tolist()],
                    }
                    for k in losses.argsort(stable=True).tolist()
                ],
            }
        }
