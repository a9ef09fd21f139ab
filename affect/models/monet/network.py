# SPDX-License-Identifier: Apache-2.0
"""MONET's network: one recurrent cell and head per task, run along many orders at once.

Everything is vectorised over examples and orders; the only loop is over the T steps, which depend on each other. The
parameters belong to tasks, so the cell of an action unit is the same at whatever step an order puts it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect.errors import ConfigError, near

Candidate = Literal["tanh", "sigmoid"]
Unknown = Literal["draw", "zero"]


class TaskCells(nn.Module):
    """T gated recurrent units with heads, and the label encoder that they share.

    One step of an order treats task t::

        i  = E v + e                              v: signed one-hot of the label before, 0 at the first step
        z  = s(W_z i + U_z h + b_z)
        r  = s(W_r i + U_r h + b_r)
        c  = tanh(W_c i + U_c (r * h) + b_c)
        h' = z * h + (1 - z) * c                  logit = <w_t, h'> + b_t

    with W, U, b, w of task t.

    Args:
        tasks: Number of tasks T.
        hidden: Size of the state H.
        label_features: Size of the label encoding L.
        candidate: ``tanh`` is the standard unit. ``sigmoid`` is the variant of the authors' research code, where the
            candidate is a sigmoid and the reset gate sees ``s(h)`` in place of ``h``.
        tied: One cell and one head for all tasks (the MRNN baseline), which then differ by their history alone.
    """

    def __init__(
        self,
        tasks: int,
        hidden: int = 64,
        label_features: int = 64,
        candidate: Candidate = "tanh",
        tied: bool = False,
    ) -> None:
        super().__init__()
        if candidate not in ("tanh", "sigmoid"):
            raise ConfigError(f"model.candidate={candidate!r}: {near(str(candidate), ('tanh', 'sigmoid'))}")
        self.tasks, self.hidden, self.label_features, self.candidate = tasks, hidden, label_features, candidate
        cells = 1 if tied else tasks
        # Gates in the order z, r, c along the last axis.
        self.input_kernel = nn.Parameter(torch.empty(cells, label_features, 3 * hidden))
        self.state_kernel = nn.Parameter(torch.empty(cells, hidden, 3 * hidden))
        self.bias = nn.Parameter(torch.zeros(cells, 3 * hidden))
        self.head_weight = nn.Parameter(torch.empty(cells, hidden))
        self.head_bias = nn.Parameter(torch.zeros(cells))
        self.label_weight = nn.Parameter(torch.empty(tasks, label_features))
        self.label_bias = nn.Parameter(torch.zeros(label_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw parameters: Glorot for kernels, orthogonal states (Glorot for the variant), N(0, 1) for labels."""
        for task in range(len(self.bias)):
            for gate in range(3):
                columns = slice(gate * self.hidden, (gate + 1) * self.hidden)
                nn.init.xavier_uniform_(self.input_kernel.data[task, :, columns])
                draw = nn.init.orthogonal_ if self.candidate == "tanh" else nn.init.xavier_uniform_
                draw(self.state_kernel.data[task, :, columns])
        nn.init.xavier_uniform_(self.head_weight)
        nn.init.normal_(self.label_weight)
        for parameter in (self.bias, self.head_bias, self.label_bias):
            nn.init.zeros_(parameter)

    # ---------------------------------------------------------------------------------------------- one step

    def label_tables(self) -> tuple[Tensor, Tensor]:
        """Return what the label encoder gives each cell: without a label ``(T, 3H)``, and per label ``(T·T, 3H)``.

        The input of a cell is linear in a signed one-hot vector, so that all there can ever be is computed once: row
        ``t T + s`` of the second table is what a positive label of task s adds in the cell of task t.
        """
        base = torch.einsum("l,tlg->tg", self.label_bias, self.input_kernel) + self.bias
        known = torch.einsum("sl,tlg->tsg", self.label_weight, self.input_kernel)
        base, known = base.expand(self.tasks, -1), known.expand(self.tasks, -1, -1)
        return base, known.reshape(self.tasks * self.tasks, 3 * self.hidden)

    def step(self, state: Tensor, gates: Tensor, multiply: Multiply) -> Tensor:
        """Return the next state ``(…, H)``.

        Args:
            state: States h ``(…, H)``.
            gates: Input part of the three gates ``(…, 3H)``.
            multiply: Multiplies states by columns of each pair's own state kernel.
        """
        h = self.hidden
        update, reset = (gates[..., : 2 * h] + multiply(state, 0, 2 * h)).sigmoid().chunk(2, -1)
        if self.candidate == "tanh":
            new = (gates[..., 2 * h :] + multiply(reset * state, 2 * h, 3 * h)).tanh()
        else:
            new = (gates[..., 2 * h :] + multiply(reset * state.sigmoid(), 2 * h, 3 * h)).sigmoid()
        return torch.lerp(new, state, update)

    # ------------------------------------------------------------------------------------------------- orders

    def forward(
        self,
        state: Tensor,
        orders: Tensor,
        labels: Tensor | None = None,
        known: Tensor | None = None,
        uniforms: Tensor | None = None,
        unknown: Unknown = "draw",
    ) -> Tensor:
        """Return the logits of every task along every order ``(B, K, T)``, tasks in their own order.

        Args:
            state: Initial states h_0 ``(B, H)``, the same for all orders of an example.
            orders: Orders ``(K, T)`` for all examples, or ``(B, K, T)`` of each.
            labels: Labels in {0, 1} for teacher forcing ``(B, T)``; None draws all labels (ancestral sampling).
            known: Which labels there are, bool ``(B, T)``; None takes all.
            uniforms: Numbers in [0, 1) that labels are drawn by: ``(K, T)`` or ``(B, K, T)``, by task. A label is 1
                where its uniform lies below its probability. None draws them.
            unknown: What stands for a label that is not known: the model's own ``draw``, without gradient, or ``zero``,
                the vector of no label.
        """
        batch, tasks = state.shape[0], self.tasks  # len() would fix the batch size of an exported graph
        shared = orders.ndim == 2
        count = orders.shape[-2]
        base, table = self.label_tables()
        kernel = self.state_kernel.expand(tasks, -1, -1)
        head_weight, head_bias = self.head_weight.expand(tasks, -1), self.head_bias.expand(tasks)
        needs_draw = labels is None or (unknown == "draw" and known is not None)
        if needs_draw and uniforms is None:
            uniforms = torch.rand(batch, count, tasks, device=state.device)
        h = state[:, None].expand(batch, count, self.hidden)
        if not shared:
            orders = orders.expand(batch, count, tasks)
            groups = [Grouped(orders[..., k], tasks) for k in range(tasks)]
        sign = state.new_zeros(batch, count)
        logits = []
        for k in range(tasks):
            task = orders[..., k]
            multiply = Shared(kernel, task) if shared else groups[k].bind(kernel)
            gates = base[task]
            if k:
                gates = gates + sign[..., None] * F.embedding(task * tasks + orders[..., k - 1], table)
            h = self.step(h, gates.expand(batch, count, 3 * self.hidden), multiply)
            logit = (h * head_weight[task]).sum(-1) + head_bias[task]
            logits.append(logit)
            if k + 1 < tasks:
                sign = self._sign(logit.detach(), task.expand(batch, count), labels, known, uniforms, unknown)
        stacked = torch.stack(logits, -1)  # by step
        position = torch.argsort(orders, -1)  # at which step each task comes: the inverse permutation
        return stacked.gather(-1, position.expand(batch, count, tasks))

    @staticmethod
    def _sign(
        logit: Tensor,
        task: Tensor,
        labels: Tensor | None,
        known: Tensor | None,
        uniforms: Tensor | None,
        unknown: Unknown,
    ) -> Tensor:
        """Return 1 for a positive label of ``task`` ``(B, K)``, -1 for a negative one, 0 for none."""
        drawn = None
        if uniforms is not None:
            chance = uniforms.expand(*task.shape, -1).gather(-1, task[..., None])[..., 0]
            drawn = torch.where(chance < logit.sigmoid(), 1.0, -1.0).to(logit)
        if labels is None:
            assert drawn is not None
            return drawn
        forced = (2 * labels - 1).to(logit).gather(1, task)
        if known is None:
            return forced
        other = torch.zeros_like(forced) if unknown == "zero" or drawn is None else drawn
        return torch.where(known.gather(1, task), forced, other)


class Multiply:
    """Multiplies states ``(B, K, H)`` by some columns of the state kernel of each pair's task."""

    def __call__(self, state: Tensor, first: int, last: int) -> Tensor:
        """Return ``(B, K, last - first)``."""
        raise NotImplementedError


class Shared(Multiply):
    """All examples follow the same orders: one kernel per order.

    Args:
        kernel: State kernels ``(T, H, 3H)``.
        task: Task of each order at this step ``(K,)``.
    """

    def __init__(self, kernel: Tensor, task: Tensor) -> None:
        self.kernel = kernel[task]

    def __call__(self, state: Tensor, first: int, last: int) -> Tensor:
        return torch.bmm(state.transpose(0, 1), self.kernel[..., first:last]).transpose(0, 1)


class Grouped(Multiply):
    """Every example has orders of its own: pairs are grouped by task, so that no kernel is copied for a pair.

    Gathering a kernel per pair would take ``B K H 3H`` numbers at every step. Groups are padded to the largest.

    Args:
        task: Task of each pair at this step ``(B, K)``.
        tasks: Number of tasks T.
    """

    def __init__(self, task: Tensor, tasks: int) -> None:
        flat = task.reshape(-1)
        sizes = torch.bincount(flat, minlength=tasks)
        order = torch.argsort(flat, stable=True)
        width = int(sizes.max())
        start = torch.cumsum(sizes, 0) - sizes
        rank = torch.arange(len(flat), device=flat.device) - start[flat[order]]
        slot = flat[order] * width + rank
        # A slot that no pair fills reads the first pair; nobody reads what comes of it.
        self.pair_of_slot = torch.zeros(tasks * width, dtype=torch.long, device=flat.device)
        self.pair_of_slot[slot] = order
        self.slot_of_pair = torch.empty_like(flat)
        self.slot_of_pair[order] = slot
        self.tasks, self.width, self.kernel = tasks, width, torch.empty(0)

    def bind(self, kernel: Tensor) -> Grouped:
        """Return itself with the kernels ``(T, H, 3H)``."""
        self.kernel = kernel
        return self

    def __call__(self, state: Tensor, first: int, last: int) -> Tensor:
        batch, count, hidden = state.shape
        slots = state.reshape(-1, hidden)[self.pair_of_slot].view(self.tasks, self.width, hidden)
        result = torch.bmm(slots, self.kernel[..., first:last]).view(-1, last - first)
        return result[self.slot_of_pair].view(batch, count, -1)


class MultiOrder(nn.Module):
    """Order selector and task cells on a feature vector.

    Args:
        features: Size D of the feature vector.
        orders: Orders ``(M, T)``; constants.
        hidden: Size of the state H. The compressor ``D -> H`` with ReLU is there only if they differ.
        label_features: Size of the label encoding L.
        candidate: See ``TaskCells``.
        tied: See ``TaskCells``; the compressor is then linear, and always there.
        samples: Number N of orders and label strings that inference averages over.
        seed: Seed of the uniforms that inference draws by, so that an image has the same probabilities in any batch.
    """

    orders: Tensor
    order_uniforms: Tensor
    label_uniforms: Tensor

    def __init__(
        self,
        features: int,
        orders: Tensor,
        hidden: int = 64,
        label_features: int = 64,
        candidate: Candidate = "tanh",
        tied: bool = False,
        samples: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if samples < 1:
            raise ConfigError(f"model.samples={samples}: at least one sample is needed")
        tasks = orders.shape[1]
        self.compressor: nn.Module | None = None
        if tied:
            self.compressor = nn.Linear(features, hidden)
        elif features != hidden:
            self.compressor = nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
        self.cells = TaskCells(tasks, hidden, label_features, candidate, tied)
        self.order_logits = nn.Parameter(torch.zeros(len(orders)))
        self.register_buffer("orders", orders.long())
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("order_uniforms", torch.rand(samples, generator=draw))
        self.register_buffer("label_uniforms", torch.rand(samples, tasks, generator=draw))

    def state(self, vector: Tensor) -> Tensor:
        """Return the initial state ``(B, H)`` of feature vectors ``(B, D)``."""
        return vector if self.compressor is None else self.compressor(vector)

    def forced(
        self,
        vector: Tensor,
        labels: Tensor,
        known: Tensor | None = None,
        chosen: Tensor | None = None,
        unknown: Unknown = "draw",
        uniforms: Tensor | None = None,
    ) -> Tensor:
        """Return logits under teacher forcing ``(B, K, T)``.

        Args:
            vector: Features ``(B, D)``.
            labels: Labels in {0, 1} ``(B, T)``.
            known: Which of them there are ``(B, T)``; None takes all.
            chosen: Indices of the orders that are run: ``(K,)`` for all examples, ``(B, K)`` of each; None runs all.
            unknown: See ``TaskCells.forward``.
            uniforms: See ``TaskCells.forward``.
        """
        orders = self.orders if chosen is None else self.orders[chosen]
        return self.cells(self.state(vector), orders, labels, known, uniforms, unknown)

    def forward(self, vector: Tensor, fresh: bool = False) -> Tensor:
        """Return the logit of the mean probability of each task ``(B, T)``.

        Orders are drawn from the mixture and labels along each from the model; conditional probabilities are averaged,
        which has less variance than averaging drawn labels.

        Args:
            vector: Features ``(B, D)``.
            fresh: Draw anew for each example instead of by the stored uniforms.
        """
        state = self.state(vector)
        weights = self.order_logits.softmax(0)
        if fresh:
            drawn = torch.multinomial(weights, len(state) * len(self.order_uniforms), replacement=True)
            logits = self.cells(state, self.orders[drawn.view(len(state), -1)])
        else:
            # The place of each uniform among the sums of weights, counted: exported graphs know no search.
            below = weights.cumsum(0)[:, None] < self.order_uniforms
            drawn = below.sum(0).clamp(max=len(weights) - 1)
            logits = self.cells(state, self.orders[drawn], uniforms=self.label_uniforms)
        return mean_logit(logits.float(), 1)


def mean_logit(logits: Tensor, dim: int) -> Tensor:
    """Return the logit of the mean of the probabilities along an axis, exact also where they are near 0 or 1."""
    return torch.logsumexp(F.logsigmoid(logits), dim) - torch.logsumexp(F.logsigmoid(-logits), dim)


def kept_orders(count: int, keep: int, batch: int | None = None, device: torch.device | None = None) -> Tensor:
    """Return ``keep`` of ``count`` orders, drawn uniformly without replacement, sorted.

    Args:
        count: Number of orders M.
        keep: Number k of orders that are kept.
        batch: Number of examples, each with a draw of its own: ``(B, k)``; None draws once, ``(k,)``.
        device: Where to draw.
    """
    if not 1 <= keep <= count:
        raise ConfigError(f"model.kept={keep}: must lie between 1 and the number of orders, {count}")
    shape = (count,) if batch is None else (batch, count)
    # The largest of independent uniform numbers: a Gumbel top-k with equal logits.
    return torch.rand(shape, device=device).topk(keep, -1).indices.sort(-1).values
