# SPDX-License-Identifier: Apache-2.0
"""Patterns planted in one cell of a grid, inside a region of their own or outside: for what attention looks at.

An image of ``2 cells`` pixels per side is a grid of cells of 2 x 2 pixels, that is of 12 bytes, which
``affect.encoders.PixelGrid`` reads as channels. Every pattern occurs once in every image; its label says whether it is
inside its own region. So a model that knows what is there but not where knows nothing.
"""

from __future__ import annotations

import numpy as np

from affect.data.controlled.vectors import divide
from affect.data.table import FaceTable
from affect.errors import ConfigError

__all__ = ["images", "planted_patterns"]

SIDE = 2
"""Pixels of a cell's side."""

CHANNELS = 3 * SIDE * SIDE

_PLACE = "cell"


def regions(tasks: int, cells: int) -> np.ndarray:
    """Return which cells belong to each pattern's region, bool ``(tasks, cells, cells)``: blocks of a square tiling.

    Raises:
        ConfigError: If a block would hold no cell.
    """
    blocks = int(np.ceil(np.sqrt(tasks)))
    if tasks < 1 or cells < blocks:
        raise ConfigError(f"dataset: {tasks} regions do not fit a grid of {cells} x {cells} cells")
    row, column = np.indices((cells, cells)) * blocks // cells
    return np.stack([row * blocks + column == task for task in range(tasks)])


def planted_patterns(
    tasks: int = 4,
    cells: int = 8,
    train: int = 3000,
    validation: int = 500,
    test: int = 1000,
    seed: int = 0,
) -> FaceTable:
    """Return the labels ``inside_<t>`` of grids, and the cell of each pattern (``cell_<t>``, row by row).

    Args:
        tasks: Patterns T; pattern t has the t-th block of the grid as its region.
        cells: Cells per side.
        train: Training rows.
        validation: Rows that select.
        test: Test rows.
        seed: Seed of the draw.
    """
    random = np.random.default_rng((seed, 4))
    count = train + validation + test
    inside = regions(tasks, cells).reshape(tasks, -1)
    label = random.random((count, tasks)) < 0.5
    place = np.zeros((count, tasks), np.int64)
    taken = np.zeros((count, cells * cells), bool)
    for task in range(tasks):  # patterns one by one, rows all at once: two never share a cell
        free = np.where(label[:, task, None], inside[task], ~inside[task]) & ~taken
        place[:, task] = np.where(free, random.random(free.shape), -1).argmax(1)
        taken[np.arange(count), place[:, task]] = True
    columns: dict = {"image": [f"grid/{k}" for k in range(count)], "part": divide(train, validation, test).tolist()}
    columns |= {f"{_PLACE}_{t}": place[:, t].astype(np.int32) for t in range(tasks)}
    columns |= {f"attribute_inside_{t}": label[:, t].astype(np.float32) for t in range(tasks)}
    return FaceTable.from_columns(columns, ".", {"dataset": "planted", "label_source": "arithmetic"})


class GridImages:
    """Grids with noise in every cell and patterns in the cells that a table names.

    Args:
        table: A table of ``planted_patterns``.
        cells: Cells per side.
        noise: Standard deviation of the background, in grey levels.
        seed: Seed of patterns and noise; patterns are unlike each other.
    """

    def __init__(self, table: FaceTable, cells: int = 8, noise: float = 20.0, seed: int = 0) -> None:
        random = np.random.default_rng((seed, 5))
        tasks = sum(1 for name in table.names if name.startswith(f"{_PLACE}_"))
        if tasks > CHANNELS:
            raise ConfigError(f"dataset: at most {CHANNELS} patterns are unlike each other, not {tasks}")
        basis = np.linalg.qr(random.normal(size=(CHANNELS, CHANNELS)))[0]
        place = np.stack([table.numbers(f"{_PLACE}_{t}")[0].astype(np.int64) for t in range(tasks)], 1)
        grid = random.normal(scale=noise, size=(len(table), cells * cells, CHANNELS)).astype(np.float32)
        rows = np.arange(len(table))
        for task in range(tasks):
            grid[rows, place[:, task]] += 70.0 * CHANNELS**0.5 * basis[task]
        pixels = np.clip(np.round(grid + 127.5), 0, 255).astype(np.uint8)
        pixels = pixels.reshape(len(table), cells, cells, SIDE, SIDE, 3).transpose(0, 1, 3, 2, 4, 5)
        self.images = np.ascontiguousarray(pixels.reshape(len(table), SIDE * cells, SIDE * cells, 3))

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the images of ``rows``, each RGB uint8."""
        return list(self.images[np.asarray(rows, np.int64)])


def images(table: FaceTable, cells: int = 8, noise: float = 20.0, seed: int = 0) -> GridImages:
    """Return the reader of the grids' images; see ``GridImages``."""
    return GridImages(table, cells, noise, seed)
