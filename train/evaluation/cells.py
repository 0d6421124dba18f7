"""What the cells of a grid hold of a map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cell_means(
    values: NDArray[np.float64], known: NDArray[np.bool_], grid: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over the known pixels of each cell of a grid, and the known share of the cell.

    A cell is the area that belongs to a token where the grid covers the whole map; pixels on a
    border between cells count for each by their area.

    Args:
        values: [b, H, W, T]; 0 where not known.
        known: bool [b, H, W].

    Returns:
        float64 [b, rows * columns, T], 0 in cells without known pixels, and float64
        [b, rows * columns] from 0 to 1.
    """
    rows, columns = (_areas(edge, cells) for edge, cells in zip(known.shape[1:], grid, strict=True))
    sums = np.einsum("rh,bhwk,cw->brck", rows, values, columns, optimize=True)
    weight = np.einsum("rh,bhw,cw->brc", rows, known.astype(np.float64), columns, optimize=True)
    weight = weight[..., None]
    means = np.divide(sums, weight, out=np.zeros_like(sums), where=weight > 0)
    return means.reshape(len(values), -1, values.shape[-1]), weight.reshape(len(values), -1)


def _areas(edge: int, cells: int) -> NDArray[np.float64]:
    """[cells, edge]: the share of each cell's length that each pixel takes; rows sum to one."""
    pixel, cell = np.arange(edge) / edge, np.arange(cells)[:, None] / cells
    low, high = np.maximum(pixel, cell), np.minimum(pixel + 1 / edge, cell + 1 / cells)
    return np.maximum(high - low, 0.0) * cells
