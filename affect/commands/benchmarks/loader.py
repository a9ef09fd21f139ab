# SPDX-License-Identifier: Apache-2.0
"""Our loader, from files and from packed shards, against torchvision's ImageFolder.

All get the same JPEG data, decode to the same size, augment alike and give normalised batches.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch

from affect.data.archives import SEPARATOR, ShardImages
from affect.data.dataset import FaceDataset, collate
from affect.data.images import FileImages, ImageReader, Source
from affect.data.sampling import OrderedSampler
from affect.data.table import FaceTable
from affect.data.transforms import FaceTransform
from affect.encoders import TimmEncoder

SIDE, STORED, BATCH, SHARD = 224, 448, 32, 128
"""Pixels of a batch's images, pixels of the stored ones, images of a batch, images of a shard."""


def write_photographs(folder: Path, count: int) -> FaceTable:
    """Write ``count`` JPEG files with the content of photographs into two class folders and return their table."""
    random = np.random.default_rng(0)
    base = _photograph()
    columns: dict[str, list[Any]] = {"image": [], "expression": []}
    for k in range(count):
        name = ("happiness", "neutral")[k % 2]
        path = folder / name / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        x, y = random.integers(0, base.shape[1] - STORED + 1), random.integers(0, base.shape[0] - STORED + 1)
        crop = base[y : y + STORED, x : x + STORED]
        cv2.imwrite(str(path), crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        columns["image"].append(str(path.relative_to(folder)))
        columns["expression"].append(name)
    return FaceTable.from_columns(columns, folder)


def _photograph() -> np.ndarray:
    """Return a photograph that ships in a package, or, without it, a drawn face with camera noise."""
    try:
        from skimage.data import astronaut

        return np.asarray(astronaut())
    except ImportError:
        from affect.data.faces import FaceDials, FaceImages

        return FaceImages(FaceDials(image_size=512), 0).read(np.array([0]))[0]


def pack(table: FaceTable, folder: Path) -> FaceTable:
    """Write the files of a table into shards as ``affect prepare store=shards`` does, and return the table of these.

    Args:
        table: The table, which knows its folder.
        folder: Folder of the shards, and root of their table's names.
    """
    names = [str(name) for name in table.strings("image")[0]]
    packed = [""] * len(names)
    for first in range(0, len(names), SHARD):
        shard = f"shards/u{first // SHARD:05d}.arrow"
        held = range(first, min(first + SHARD, len(names)))
        images = pa.table({"image": pa.array([(table.root / names[k]).read_bytes() for k in held], pa.large_binary())})
        path = folder / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, images.schema) as stream:
            stream.write_table(images)
        for k in held:
            packed[k] = f"{shard}{SEPARATOR}{k - first}"
    return table.with_columns({"image": packed})


def _ours(images: ImageReader, table: FaceTable, seed: int) -> float:
    """Return images per second up to the normalised batch."""
    augment = [
        {
            "_target_": "albumentations.RandomBrightnessContrast",
            "brightness_limit": 0.2,
            "contrast_limit": 0.2,
            "p": 1.0,
        },
        {
            "_target_": "albumentations.CoarseDropout",
            "num_holes_range": (1, 1),
            "hole_height_range": (0.15, 0.3),
            "hole_width_range": (0.15, 0.3),
            "p": 1.0,
        },
    ]
    transform = FaceTransform(SIDE, flip=0.5, rotation=10.0, augment=augment)
    source = Source("photographs", table, images, group="image")
    dataset = FaceDataset([source], [np.arange(len(table))], {}, transform, seed=seed)
    sampler = OrderedSampler(len(table), BATCH)
    loader = torch.utils.data.DataLoader(dataset, sampler=sampler, batch_size=None, collate_fn=collate, num_workers=0)
    encoder = TimmEncoder("test_resnet")
    return _rate((encoder.normalise(batch.image) for batch in loader), len(table))


def _torchvision(folder: Path, count: int) -> float:
    """Return images per second of the usual ImageFolder pipeline."""
    from torchvision import datasets, transforms

    pipeline = transforms.Compose(
        [
            transforms.Resize((SIDE, SIDE)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(10, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.ColorJitter(brightness=0.2, contrast=0.2),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            transforms.RandomErasing(p=1.0, scale=(0.02, 0.09)),
        ]
    )
    dataset = datasets.ImageFolder(str(folder), pipeline)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=0)
    return _rate((image for image, _ in loader), count)


def _rate(batches: Any, count: int) -> float:  # noqa: ANN401
    start = time.perf_counter()
    for _ in batches:
        pass
    return count / (time.perf_counter() - start)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Return images per second of the loaders on one core and their ratios; rounds alternate, the best one counts."""
    count, rounds = (64, 1) if quick else (640, 5)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_photographs(folder / "photographs", count)
        packed = pack(table, folder / "packed")
        readers: dict[str, tuple[ImageReader, FaceTable]] = {
            "files": (FileImages(table), table),
            "packed shards": (ShardImages(packed, folder / "packed"), packed),
        }
        ours: dict[str, list[float]] = {name: [] for name in readers}
        theirs = []
        for k in range(rounds):
            theirs.append(_torchvision(folder / "photographs", count))
            for name, (images, rows) in readers.items():
                ours[name].append(_ours(images, rows, k))
    return [
        {
            "pipeline": f"JPEG {STORED} px to {SIDE} px: flip, rotate, brightness and contrast, occlude, normalise",
            "stored as": name,
            "ours, images/s": max(rates),
            "torchvision ImageFolder (files), images/s": max(theirs),
            "ratio": max(rates) / max(theirs),
        }
        for name, rates in ours.items()
    ]
