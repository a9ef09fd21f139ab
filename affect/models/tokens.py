# SPDX-License-Identifier: Apache-2.0
"""Learned tokens that look at a face: the transformer that the AU and the multi-task method share.

Shapes and initialisation as in the code of Tallec et al., "Multi-label Transformer for Action Unit Detection", arXiv
2203.12531: layers normalise after the residual, tokens attend to each other first and to the patches then, and the
output layer of a family of tokens is shared. Attention is written out, not fused: the grids are small, its maps are
looked at, and auxiliary objectives differentiate through it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from affect.encoders import TimmEncoder
from affect.errors import ConfigError, near
from affect.models.base import AffectModule, Batch, held_out
from affect.tasks import Task

TokenPlan = Literal["method", "task", "output"]
"""Which tokens there are: one per yes-or-no output and one per other task, one per task, or one per output."""


class Attention(nn.Module):
    """Multi-head attention of queries on other vectors; all four maps have biases.

    Args:
        dim: Channels d.
        heads: Number of heads; divides d.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"model.dim={dim} is no multiple of model.heads={heads}")
        self.heads = heads
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return what queries ``(B, K, d)`` read of a context ``(B, N, d)``, and the attention ``(B, heads, K, N)``."""
        q, k, v = (self._split(part) for part in (self.query(query), self.key(context), self.value(context)))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each added and then normalised.

    ``a = norm(q + drop(attention(q, context)))``, ``out = norm(a + drop(mlp(a)))``; the perceptron ends in a dropout of
    its own, as in the authors' code.

    Args:
        dim: Channels d.
        heads: Attention heads.
        hidden: Units of the perceptron.
        dropout: Rate.
    """

    def __init__(self, dim: int = 128, heads: int = 8, hidden: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new queries ``(B, K, d)`` and the attention ``(B, heads, K, N)``."""
        read, weights = self.attention(query, context)
        x = self.norm_attention(query + self.dropout(read))
        return self.norm_mlp(x + self.dropout(self.mlp(x))), weights


class Patches(nn.Module):
    """Positions of a feature map as vectors: a 1x1 convolution, learned positions, self-attention layers.

    Args:
        features: Channels D of the map.
        count: Number of positions N.
        dim: Channels d.
        layers: Self-attention layers.
        heads: Attention heads.
        hidden: Units of a layer's perceptron.
        dropout: Rate.
        placed: Whether positions are learnt; False leaves patches without a place (ablation).
    """

    def __init__(
        self,
        features: int,
        count: int,
        dim: int = 128,
        layers: int = 1,
        heads: int = 8,
        hidden: int = 512,
        dropout: float = 0.1,
        placed: bool = True,
    ) -> None:
        super().__init__()
        self.project = nn.Conv2d(features, dim, 1)
        start = torch.empty(count, dim).normal_(std=0.02)
        self.positions = nn.Parameter(start if placed else torch.zeros_like(start), requires_grad=placed)
        self.position_bias = nn.Parameter(torch.zeros(dim))
        self.layers = nn.ModuleList(Layer(dim, heads, hidden, dropout) for _ in range(layers))

    def forward(self, grid: Tensor) -> Tensor:
        """Return vectors ``(B, N, d)`` of a map ``(B, D, h, w)`` with ``h w = N``."""
        if grid.ndim != 4 or grid.shape[2] * grid.shape[3] != len(self.positions):
            raise ConfigError(
                f"the transformer was built for {len(self.positions)} positions of a feature map and got shape "
                f"{tuple(grid.shape)}; use encoder.output=map and one image size"
            )
        x = self.project(grid).flatten(2).transpose(1, 2) + self.positions + self.position_bias
        for layer in self.layers:
            x = layer(x, x)[0]
        return x


class Tokens(nn.Module):
    """Learned tokens that attend to each other and to patches, in turn.

    Tokens have no position: what a token stands for is its own row of the table.

    Args:
        count: Number of tokens K.
        dim: Channels d.
        layers: Decoder layers, each of self-attention and cross-attention with a perceptron after both.
        heads: Attention heads.
        hidden: Units of a perceptron.
        dropout: Rate.
    """

    def __init__(
        self,
        count: int,
        dim: int = 128,
        layers: int = 2,
        heads: int = 8,
        hidden: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(count, dim).normal_())
        self.bias = nn.Parameter(torch.zeros(dim))
        self.own = nn.ModuleList(Layer(dim, heads, hidden, dropout) for _ in range(layers))
        self.cross = nn.ModuleList(Layer(dim, heads, hidden, dropout) for _ in range(layers))

    def forward(self, patches: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return tokens ``(B, K, d)`` and the attention of each cross layer on patches ``(B, heads, K, N)``."""
        x = (self.table + self.bias).expand(patches.shape[0], -1, -1)
        seen = []
        for own, cross in zip(self.own, self.cross, strict=True):
            x = own(x, x)[0]
            x, weights = cross(x, patches)
            seen.append(weights)
        return x, seen


class Span(NamedTuple):
    """Which tokens belong to a task: ``first`` to ``last`` (excluded), each giving ``outputs`` numbers."""

    first: int
    last: int
    outputs: int


def plan_tokens(tasks: Mapping[str, Task], plan: TokenPlan) -> dict[str, Span]:
    """Return the tokens of each task.

    Example:
        With 12 action units, 8 expressions, valence and arousal the plans have 14, 3 and 22 tokens.
    """
    options = ("method", "task", "output")
    if plan not in options:
        raise ConfigError(f"model.tokens={plan!r}: {near(str(plan), options)}")
    spans, start = {}, 0
    for name, task in tasks.items():
        single = plan == "output" or (plan == "method" and task.flags)
        count = task.num_outputs if single else 1
        spans[name] = Span(start, start + count, task.num_outputs // count)
        start += count
    return spans


class TokenTransformer(nn.Module):
    """Patches, tokens and one linear head for each task's tokens.

    Args:
        features: Channels D of the feature map.
        positions: Number of its positions N.
        spans: Tokens of each task (``plan_tokens``).
        dim: Channels d.
        heads: Attention heads.
        hidden: Units of a layer's perceptron.
        encoder_layers: Self-attention layers on patches.
        decoder_layers: Layers of tokens.
        dropout: Rate.
        placed: Whether patches have learnt positions; False is an ablation.
    """

    def __init__(
        self,
        features: int,
        positions: int,
        spans: Mapping[str, Span],
        dim: int = 128,
        heads: int = 8,
        hidden: int = 512,
        encoder_layers: int = 1,
        decoder_layers: int = 2,
        dropout: float = 0.1,
        placed: bool = True,
    ) -> None:
        super().__init__()
        self.spans = dict(spans)
        self.patches = Patches(features, positions, dim, encoder_layers, heads, hidden, dropout, placed)
        count = max(span.last for span in self.spans.values())
        self.tokens = Tokens(count, dim, decoder_layers, heads, hidden, dropout)
        self.heads = nn.ModuleDict({name: nn.Linear(dim, span.outputs) for name, span in self.spans.items()})

    def forward(self, grid: Tensor) -> dict[str, Tensor]:
        """Return the raw outputs ``(B, K)`` by task for a feature map ``(B, D, h, w)``."""
        return self.read(self.tokens(self.patches(grid))[0])

    def read(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the raw outputs by task of decoded tokens ``(B, K, d)``."""
        return {name: self.heads[name](tokens[:, s.first : s.last]).flatten(1) for name, s in self.spans.items()}


class TokenModule(AffectModule):
    """A backbone's feature map read by tokens.

    Args:
        tasks: What to predict, by name.
        encoder: Backbone with ``output=map`` (positions of a convolutional map or of ViT tokens).
        tokens: Which tokens there are: ``method`` (one per yes-or-no output, one per other task), ``task`` (one per
            task) or ``output`` (one per output).
        dim, heads, hidden, encoder_layers, decoder_layers, dropout, placed: As in ``TokenTransformer``.
        **common: Arguments of ``AffectModule``.
    """

    no_weight_decay = ("positions", "tokens.table")

    def __init__(
        self,
        tasks: Mapping[str, Task],
        encoder: TimmEncoder,
        tokens: TokenPlan = "method",
        dim: int = 128,
        heads: int = 8,
        hidden: int = 512,
        encoder_layers: int = 1,
        decoder_layers: int = 2,
        dropout: float = 0.1,
        placed: bool = True,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(tasks, **common)
        if encoder.output != "map":
            raise ConfigError(f"encoder.output={encoder.output}: tokens look at positions; use encoder.output=map")
        self.encoder = encoder
        self.grid = grid_of(encoder)
        spans = plan_tokens(self.tasks, tokens)
        positions = self.grid[0] * self.grid[1]
        self.transformer = TokenTransformer(
            encoder.num_features, positions, spans, dim, heads, hidden, encoder_layers, decoder_layers, dropout, placed
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the representation of each task."""
        raw = self.transformer(self._map(batch))
        return {name: self.tasks[name].link(value) for name, value in raw.items()}

    def _map(self, batch: Batch) -> Tensor:
        image = batch.image
        return self.encoder(image.contiguous(memory_format=torch.channels_last) if self.channels_last else image)

    @torch.no_grad()
    def attention(self, batch: Batch) -> dict[str, Tensor]:
        """Return where each token looks, by task: ``(B, tokens, h, w)``, summing to 1 over positions.

        It is the attention of the last cross layer on patches, averaged over heads.
        """
        patches = self.transformer.patches(self._map(batch))
        weights = self.transformer.tokens(patches)[1][-1].mean(1).unflatten(-1, self.grid)
        return {name: weights[:, span.first : span.last] for name, span in self.transformer.spans.items()}

    @torch.no_grad()
    def examine(self, loader: Callable[[str], Iterable[Batch] | None]) -> dict[str, Any]:
        """Return where tokens look on average: ``attention`` by task and token, ``(h, w)``, summing to 1.

        The mean is over faces of the test part, or of the validation part without one.
        """
        told = super().examine(loader)
        batches = held_out(loader)
        total: dict[str, Tensor] = {}
        rows = 0
        for batch in batches or ():
            for name, maps in self.attention(batch).items():
                total[name] = maps.double().sum(0) + total.get(name, 0)
            rows += len(batch.image)
        if not rows:
            return told
        names = token_names(self.tasks, self.transformer.spans)
        return told | {
            "attention": {
                task: dict(zip(names[task], (maps / rows).tolist(), strict=True)) for task, maps in total.items()
            }
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the common groups, divided into ``encoder``, ``patches`` and ``tokens`` (key ``name``).

        Schedules may treat them differently, e.g. ``affect.optimization.token_schedule``.
        """
        part = {id(p): "patches" for p in self.transformer.patches.parameters()}
        part |= {id(p): "encoder" for p in self.encoder.parameters()}
        groups = []
        for group in super().parameter_groups():
            if group.get("name"):
                groups.append(group)  # has a place of its own already
                continue
            for name in ("encoder", "patches", "tokens"):
                members = [p for p in group["params"] if part.get(id(p), "tokens") == name]
                if members:
                    groups.append({**group, "params": members, "name": name})
        return groups

    def heads(self) -> dict[str, nn.Linear]:
        """Return the linear layers whose rows are a task's outputs: those of tasks with one token."""
        spans = self.transformer.spans
        return {
            name: layer  # type: ignore[misc]
            for name, layer in self.transformer.heads.items()
            if spans[name].last - spans[name].first == 1
        }


def grid_of(encoder: TimmEncoder) -> tuple[int, int]:
    """Return height and width of an encoder's feature map at its image size."""
    mode = encoder.training
    encoder.eval()
    with torch.no_grad():
        size = encoder.image_size
        grid = encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    encoder.train(mode)
    return int(grid.shape[2]), int(grid.shape[3])


def token_names(tasks: Mapping[str, Task], spans: Mapping[str, Span]) -> dict[str, Sequence[str]]:
    """Return the name of each token by task: its output's, or the task's."""
    return {
        name: tasks[name].outputs if span.last - span.first > 1 or span.outputs == 1 else (name,)
        for name, span in spans.items()
    }
