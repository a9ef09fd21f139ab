# SPDX-License-Identifier: Apache-2.0
"""How task losses are weighed in a multi-task sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from affect.errors import ConfigError, near
from affect.losses import MSE
from affect.losses.base import Terms


class FixedWeighting(nn.Module):
    """A constant factor per task.

    Args:
        weights: Factor by task name. Tasks that are not named weigh 1.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = {name: float(weight) for name, weight in (weights or {}).items()}

    def forward(self, terms: Mapping[str, Terms]) -> dict[str, Tensor]:
        """Return the weighed mean over valid cells of each task; counts are global, sums are local."""
        for name in self.weights:
            if name not in terms:
                raise ConfigError(f"weighting: no task {name!r}; {near(name, terms)}")
        return {
            name: self.weights.get(name, 1.0) * term.sum.sum() / term.count.sum().clamp(min=1)
            for name, term in terms.items()
        }


class _Within(torch.autograd.Function):
    """Clamping to [-limit, limit] whose gradient vanishes only where a step along it would lead further out.

    That of ``torch.clamp`` vanishes wherever a number has left the range, from where it would never come back.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, limit: float) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(s)
        ctx.limit = limit
        return s.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (s,), (gradient,) = ctx.saved_tensors, gradients
        outwards = ((s >= ctx.limit) & (gradient < 0)) | ((s <= -ctx.limit) & (gradient > 0))
        return torch.where(outwards, 0, gradient), None


class UncertaintyWeighting(nn.Module):
    r"""Weights that follow from one learned scalar per term, its homoscedastic uncertainty.

    With :math:`s_k = \log\sigma_k` and a term's mean :math:`l_k` over its valid cells:

    .. math::
        e^{-2 s_k}\, l_k + s_k \text{ (classification)}, \qquad
        \tfrac12 e^{-2 s_k}\, l_k + s_k \text{ (Gaussian regression)}

    (Kendall, Gal and Cipolla, CVPR 2018, arXiv 1705.07115; per action unit as in Tallec et al., arXiv 2208.03506). For
    a fixed loss the minimum lies at :math:`\tfrac12\log 2 l_k` and :math:`\tfrac12\log l_k`, so that rescaling a
    loss changes nothing there. A term without a valid cell in a batch counts 0, its :math:`s_k` included: otherwise
    that would drift.

    Args:
        gaussian: Tasks whose loss is a squared error and so the exponent of a Gaussian; None takes those whose loss is
            ``MSE``. Any other loss (also 1 - CCC, which is no likelihood) is weighed as a classification.
        limit: s is clamped to [-limit, limit], where a loss that can reach 0 would drive it to minus infinity; it comes
            back when the loss rises again.
        lr: Learning rate of s, constant; None takes the optimiser's.
        train: Whether s is learnt; False leaves it where it starts.
        initial: Standard deviations to start from, by task: one number, or one by output. What is not named starts
            at 1. With ``train=False`` and the true ones these are the weights that noise asks for.
    """

    def __init__(
        self,
        gaussian: Sequence[str] | None = None,
        limit: float = 5.0,
        lr: float | None = 1e-3,
        train: bool = True,
        initial: Mapping[str, float | Mapping[str, float]] | None = None,
    ) -> None:
        super().__init__()
        if not limit > 0:
            raise ConfigError(f"weighting.limit={limit}: must be more than 0")
        self.initial = dict(initial or {})
        self.gaussian = None if gaussian is None else tuple(gaussian)
        self.limit, self.lr, self.trained = float(limit), lr, bool(train)
        self.log_sigma = nn.ParameterDict()
        self.outputs: dict[str, tuple[str, ...]] = {}

    def bind(self, losses: Mapping[str, nn.Module], outputs: Mapping[str, Sequence[str]]) -> None:
        """Make one scalar for each entry of each task's terms.

        Args:
            losses: Loss of each task.
            outputs: Names of the entries of each task's terms: its outputs, or the task for a single term.

        Raises:
            ConfigError: If ``gaussian`` or ``initial`` names a task or an output that there is not, or a standard
                deviation outside of the limits.
        """
        for name in self.gaussian or ():
            if name not in losses:
                raise ConfigError(f"weighting.gaussian: no task {name!r}; {near(name, losses)}")
        if self.gaussian is None:
            self.gaussian = tuple(name for name, loss in losses.items() if isinstance(loss, MSE))
        self.outputs = {name: tuple(names) for name, names in outputs.items()}
        for name in self.initial:
            if name not in losses:
                raise ConfigError(f"weighting.initial: no task {name!r}; {near(name, losses)}")
        for name, names in self.outputs.items():
            start = torch.tensor(self._start(name, names), dtype=torch.float32)
            self.log_sigma[name] = nn.Parameter(start, requires_grad=self.trained)

    def _start(self, name: str, names: Sequence[str]) -> list[float]:
        """Return the logarithm of the standard deviation that each entry of a task starts from."""
        given = self.initial.get(name, 1.0)
        by_output = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
        for output, sigma in by_output.items():
            if output not in names:
                raise ConfigError(f"weighting.initial.{name}: no output {output!r}; {near(output, names)}")
            if not math.exp(-self.limit) <= sigma <= math.exp(self.limit):
                raise ConfigError(
                    f"weighting.initial.{name}: a standard deviation of {sigma} for {output}; it must be positive, and "
                    f"its logarithm within weighting.limit={self.limit:g}"
                )
        return [math.log(by_output.get(output, 1.0)) for output in names]

    def forward(self, terms: Mapping[str, Terms]) -> dict[str, Tensor]:
        """Return the weighed loss of each task; counts are global, sums are local.

        Raises:
            ConfigError: If a task's terms are not those that were bound.
        """
        return {name: self._weigh(name, term) for name, term in terms.items()}

    def _weigh(self, name: str, term: Terms) -> Tensor:
        s = self.log_sigma[name]
        total, count = term
        if len(s) == 1 and len(total) > 1:
            total, count = total.sum(0, keepdim=True), count.sum(0, keepdim=True)
        if len(s) != len(total):
            raise ConfigError(
                f"weighting=uncertainty: task {name} has {len(total)} loss terms and {len(s)} uncertainties; "
                "choose a loss with one term per output"
            )
        s = _Within.apply(s, self.limit)
        mean = total / count.clamp(min=1)
        half = 0.5 if name in (self.gaussian or ()) else 1.0
        return torch.where(count > 0, half * (-2 * s).exp() * mean + s, total * 0).sum()

    def findings(self) -> dict[str, Any]:
        """Return the learned standard deviations by task and output, ready for JSON."""
        return {
            "sigma": {
                name: dict(
                    zip(names, self.log_sigma[name].detach().clamp(-self.limit, self.limit).exp().tolist(), strict=True)
                )
                for name, names in self.outputs.items()
            }
        }
