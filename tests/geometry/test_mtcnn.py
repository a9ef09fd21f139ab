# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from affect.errors import ConfigError
from affect.geometry import mtcnn
from affect.geometry.mtcnn import MtcnnDetector

installed = importlib.util.find_spec("facenet_pytorch") is not None


class Confident(torch.nn.Module):
    """A network that is sure of everything, or of nothing, and moves no box."""

    def __init__(self, dense, sure):
        super().__init__()
        self.dense, self.sure = dense, sure

    def forward(self, x):
        shape = (len(x),) if self.dense else (len(x), (x.shape[2] - 10) // 2, (x.shape[3] - 10) // 2)
        return torch.full(shape, 0.99 if self.sure else 0.1), torch.zeros(len(x), 4, *shape[1:])


def cascade(monkeypatch, **sure):
    monkeypatch.setattr(mtcnn, "_network", lambda name, device: Confident(name != "pnet", sure.get(name, True)))
    return MtcnnDetector(smallest=24)


@pytest.mark.skipif(installed, reason="the package is installed")
def test_without_the_package_the_message_says_what_to_do():
    with pytest.raises(ConfigError, match=r"pip install --no-deps facenet-pytorch==2.6.0.*prepare.detector=faceapi"):
        MtcnnDetector()


@pytest.mark.parametrize(
    ("name", "shape", "scores"),
    [("pnet", (2, 3, 30, 40), (2, 10, 15)), ("rnet", (5, 3, 24, 24), (5,)), ("onet", (5, 3, 48, 48), (5,))],
)
def test_networks_have_the_published_shapes(name, shape, scores):
    network = mtcnn._Cascade(*mtcnn._SHAPES[name])
    score, move = network(torch.zeros(shape))
    assert score.shape == scores
    assert move.shape == (shape[0], 4, *scores[1:])
    count = {"pnet": 6632, "rnet": 100178, "onet": 389040 - 2570}[name]
    assert sum(p.numel() for p in network.parameters()) == count


def test_any_of_the_three_networks_can_reject_everything(monkeypatch):
    image = np.full((60, 70, 3), 90, np.uint8)
    assert cascade(monkeypatch).detect(image)
    for name in ("pnet", "rnet", "onet"):
        assert cascade(monkeypatch, **{name: False}).detect(image) == []
    assert cascade(monkeypatch).detect(image[:8, :8]) == []


def test_faces_apart_are_kept_and_the_surest_of_several_on_one_place(monkeypatch):
    boxes = torch.tensor([[10, 10, 50, 50], [12, 12, 48, 48], [60, 10, 100, 50.0]])
    assert mtcnn._apart(boxes, torch.tensor([0.8, 0.9, 0.7])) == [1, 2]
    squares = mtcnn._squared(torch.tensor([[10, 20, 30, 60.0]]))
    assert squares.tolist() == [[0, 20, 40, 60]]


@pytest.mark.skipif(not installed, reason="needs facenet-pytorch")
def test_boxes_are_those_of_the_package():
    astronaut = pytest.importorskip("skimage.data").astronaut()
    (face,) = MtcnnDetector().detect(astronaut)
    np.testing.assert_allclose(face.box, (180, 61, 267, 171), atol=1.5)
    assert face.score > 0.999
