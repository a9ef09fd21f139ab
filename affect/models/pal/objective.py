# SPDX-License-Identifier: Apache-2.0
"""The privileged attribution loss as an auxiliary objective on any convolutional layer of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from affect.errors import ConfigError, near
from affect.labels import SCHEMES
from affect.losses.base import Terms
from affect.losses.privileged_attribution import (
    Channels,
    Kind,
    Scale,
    attribution,
    correlation,
    landmark_prior,
    privileged_attribution,
    spread_of,
)
from affect.models.base import AffectModule, Batch, Objective

_CONSTANT = 1e-5


class PrivilegedAttribution(Objective):
    """Pulls the attribution of a layer to the landmarks of the face (arXiv 2203.12905); free at inference.

    Images without landmarks do not count. Under mixed precision a training step computes in float32 all that follows
    the layer, so that the attribution and its gradient are those of float32; up to the layer it stays as chosen.

    Args:
        layer: Dotted name of the layer, relative to the Lightning module, e.g. ``encoder.model.layer4``; its output is
            ``(B, C, h, w)``.
        task: Task whose logits make the score.
        score: ``sum`` of all logits of the task, or those of the ``label`` (images without a label then do not count).
        scheme: Landmark scheme of the prior.
        kind: ``grad_input`` or ``grad``. In a network of ReLUs ``grad`` trains nothing below the layer.
        channels: ``mean``, ``half_mean`` or ``all``.
        scale: ``norm`` or ``std``.
        sigma: Standard deviation of a landmark's Gaussian in pixels of the image.
        weight: Factor in the total loss; with 0 a model trains as without, and results tell its correlation.
        shuffled: Control: each image is pulled to the landmarks of another one of its batch.
    """

    precise = True

    def __init__(
        self,
        layer: str,
        task: str = "expression",
        score: str = "sum",
        scheme: str = "68",
        kind: Kind = "grad_input",
        channels: Channels = "mean",
        scale: Scale = "norm",
        sigma: float = 3.0,
        weight: float = 1.0,
        shuffled: bool = False,
    ) -> None:
        super().__init__()
        for key, value, options in (
            ("score", score, ("sum", "label")),
            ("scheme", str(scheme), tuple(SCHEMES)),
            ("kind", kind, ("grad_input", "grad")),
            ("channels", channels, ("mean", "half_mean", "all")),
            ("scale", scale, ("norm", "std")),
        ):
            if value not in options:
                raise ConfigError(f"objective privileged attribution: {key}={value!r}; {near(str(value), options)}")
        if not sigma > 0:
            raise ConfigError(f"objective privileged attribution: sigma={sigma} must be more than 0 pixels")
        if not weight >= 0:
            raise ConfigError(f"objective privileged attribution: weight={weight} must be 0 or more")
        self.layers, self.schemes = (str(layer),), (str(scheme),)
        self.layer, self.task, self.score, self.scheme = str(layer), task, score, str(scheme)
        self.kind, self.channels, self.scale = kind, channels, scale
        self.sigma, self.weight, self.shuffled = float(sigma), float(weight), bool(shuffled)

    def check(self, name: str, module: AffectModule) -> None:
        """Refuse a model without the layer or the task, or whose landmarks are its outputs.

        Raises:
            ConfigError: With near names.
        """
        super().check(name, module)
        if self.task not in module.tasks:
            raise ConfigError(f"objectives.{name}.task={self.task}: no such task; {near(self.task, module.tasks)}")

    def attribution(self, batch: Batch, outputs: dict[str, Tensor], taps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the attribution, float32 ``(B, C, h, w)``, and which images have a score, bool ``(B,)``.

        Raises:
            ConfigError: If the task is unknown, or the layer's output is no map or has no part in its logits.
        """
        score, activation, scored = self._scored(batch, outputs, taps)
        with self._part_in_the_logits():
            return attribution(score, activation, self.kind), scored

    def _scored(
        self, batch: Batch, outputs: dict[str, Tensor], taps: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of all images' scores, the layer's output, and which images have a score, bool ``(B,)``."""
        if self.task not in outputs:
            raise ConfigError(f"objective privileged attribution: no task {self.task!r}; {near(self.task, outputs)}")
        activation = self._map(taps)
        logits = outputs[self.task].float()
        scored = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if self.score == "label":
            mask = batch.masks[self.task]
            scored = mask.any(1)
            logits = torch.where(mask, logits * batch.targets[self.task], 0)
        if not activation.requires_grad:
            raise ConfigError(
                f"objective privileged attribution: nothing below or at layer {self.layer} is trained, so it could "
                "change nothing; set encoder.trainable=all, or name a later layer"
            )
        return logits.sum(), activation, scored

    def _map(self, taps: dict[str, Tensor]) -> Tensor:
        """Return the layer's output if it is a map.

        Raises:
            ConfigError: If the layer was not called, or gives something else.
        """
        if self.layer not in taps:
            raise ConfigError(
                f"objective privileged attribution: the model never calls layer {self.layer} for its outputs (it calls "
                "what the layer holds, or nothing of it); name a convolutional layer that it does"
            )
        activation = taps[self.layer]
        if not isinstance(activation, Tensor) or activation.ndim != 4:
            given = f"shape {tuple(activation.shape)}" if isinstance(activation, Tensor) else type(activation).__name__
            raise ConfigError(
                f"objective privileged attribution: layer {self.layer} gives {given}, "
                "and a map (B, C, h, w) is needed; name a convolutional layer"
            )
        return activation

    def attempt(self, name: str, module: AffectModule, batch: Batch) -> None:
        """Refuse a layer that gives no map, is overwritten, is not trained or has no part in the task's logits.

        Raises:
            ConfigError: With layers that give maps.
        """
        outputs = module(batch)
        try:
            self._map(module.intact_taps())
        except ConfigError as error:
            why = str(error).removeprefix("objective privileged attribution: ")
            raise ConfigError(f"objective {name}: {why}; {near(self.layer, _maps(module, batch))}") from error
        if self.weight != 0:
            self.attribution(batch, outputs, module.taps)
        self._look(module, batch)

    @contextmanager
    def _part_in_the_logits(self) -> Iterator[None]:
        """Say which layer it is that the logits do not depend on."""
        try:
            yield
        except RuntimeError as error:
            if "not have been used in the graph" not in str(error):
                raise
            raise ConfigError(
                f"objective privileged attribution: layer {self.layer} has no part in the logits of {self.task}"
            ) from error

    def look(self, module: AffectModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what a model attributes its score to, and how well that lies on the landmarks, in evaluation mode.

        Args:
            module: Model with the objective's taps, i.e. after ``setup``.
            batch: Faces, with labels where the score asks for them.

        Returns:
            Mean over channels of the attribution ``(B, h, w)``, and its correlation with the prior ``(B,)``, NaN for
            images without landmarks.
        """
        return self._look(module, batch)[self.kind]

    def _look(self, module: AffectModule, batch: Batch) -> dict[Kind, tuple[Tensor, Tensor]]:
        """Return what ``look`` does for either kind."""
        mode, trained = module.training, {p: p.requires_grad for p in module.parameters()}
        module.eval()
        for parameter in trained:  # gradients reach a layer of a frozen encoder, too
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad(), torch.autocast(batch.image.device.type, enabled=False):
                outputs = module(batch)
                score, activation, scored = self._scored(batch, outputs, module.intact_taps())
                with self._part_in_the_logits():
                    (gradient,) = torch.autograd.grad(score, activation)
        finally:
            for parameter, wanted in trained.items():
                parameter.requires_grad_(wanted)
            module.train(mode)
            module.taps = {}
        gradient, activation = gradient.detach().float(), activation.detach().float()
        prior, some = self.prior(batch, (gradient.shape[-2], gradient.shape[-1]))
        maps: dict[Kind, Tensor] = {"grad_input": gradient * activation, "grad": gradient.abs()}
        return {
            kind: (
                found.mean(1),
                torch.where(some & scored & (spread_of(found) >= _CONSTANT), correlation(found, prior), torch.nan),
            )
            for kind, found in maps.items()
        }

    def examine(self, module: AffectModule, batches: Iterable[Batch]) -> dict[str, Any]:
        """Return the mean correlation of either kind of attribution with the landmarks, and over how many images.

        None where no image has one: without landmarks, or because an attribution is the same at every position. It is
        the same measure for every setting of the objective, so that these can be compared.
        """
        found: dict[Kind, list[Tensor]] = {"grad_input": [], "grad": []}
        for batch in batches:
            looked = self._look(module, batch.to(module.device))  # type: ignore[attr-defined]
            for kind, parts in found.items():
                parts.append(looked[kind][1].cpu())
        told: dict[str, Any] = {"layer": self.layer}
        for kind, parts in found.items():
            values = torch.cat(parts) if parts else torch.zeros(0)
            known = values[~values.isnan()].double()
            told[kind] = {"correlation": float(known.mean()) if len(known) else None, "rows": len(known)}
        return told

    def prior(self, batch: Batch, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the prior maps ``(B, h, w)`` of a batch and which images have one ``(B,)``."""
        height, width = batch.image.shape[-2:]
        points, mask = batch.points[self.scheme], batch.point_masks[self.scheme]
        return landmark_prior(points, mask, (height, width), size, self.sigma)

    def forward(self, batch: Batch, outputs: dict[str, Tensor], taps: dict[str, Tensor]) -> Terms:
        """Return the loss summed over the images with landmarks, and their number.

        Raises:
            ConfigError: Besides what ``attribution`` raises, if the attribution is the same at every position.
        """
        # Gradients of gradients lose what half precision leaves of them.
        with torch.autocast(batch.image.device.type, enabled=False):
            found, scored = self.attribution(batch, outputs, taps)
            prior, some = self.prior(batch, (found.shape[-2], found.shape[-1]))
            if self.shuffled:  # every image but that of a batch of one gets another one's
                prior, some = prior.roll(1, 0), some.roll(1, 0)
            used = some & scored
            if self.kind == "grad" and bool(used.any()) and bool((spread_of(found)[used] < _CONSTANT).all()):
                raise ConfigError(
                    f"objective privileged attribution: the gradient at layer {self.layer} is the same at every "
                    "position (behind it is only an average), so it has no direction; take kind=grad_input or an "
                    "earlier layer"
                )
            loss = privileged_attribution(found, prior, self.channels, self.scale)
            return Terms(torch.where(used, loss, 0).sum()[None], used.sum().float()[None])


def _maps(module: AffectModule, batch: Batch) -> list[str]:
    """Return the names of the layers whose outputs are maps ``(B, C, h, w)`` that nothing changes in place."""
    found: dict[str, tuple[Tensor, int]] = {}

    def note(name: str) -> Callable[..., None]:
        def keep(layer: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found[name] = output, output._version

        return keep

    handles = [layer.register_forward_hook(note(name)) for name, layer in module.named_modules() if name]
    try:
        with torch.no_grad():
            module(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, (output, version) in found.items() if output._version == version]
