"""Pictures of token grids: the first three principal components of a space as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError


@dataclass(frozen=True)
class Panel:
    """One column of the picture.

    Attributes:
        title: what stands above the column.
        colours: float [images, height, width, 3] in [0, 1]; shown with square cells.
    """

    title: str
    colours: NDArray[np.floating]


class Palette:
    """Colours of a space: its first three principal components as red, green and blue.

    Each is stretched between its 1st and 99th percentile; a component's sign is chosen so that the
    rim of the grids, where the background usually is, is dark.

    Args:
        tokens: float [images, N, D] that fix the colours.
        grid: (rows, columns) of the tokens, rows * columns = N.

    Raises:
        StoreError: the grid does not hold N tokens, or there are fewer than 3 dimensions.
    """

    def __init__(self, tokens: NDArray[np.floating], grid: tuple[int, int]) -> None:
        from sklearn.decomposition import PCA

        if grid[0] * grid[1] != tokens.shape[1] or tokens.shape[2] < 3:
            raise StoreError(f"tokens {tokens.shape} cannot be drawn on a grid {grid}")
        flat = _flat(tokens)
        with np.errstate(divide="ignore", invalid="ignore"):  # shares of no variance at all
            basis = PCA(min(3, len(flat)), random_state=0).fit(flat)
        # One or two tokens have fewer components: the other colours do not vary.
        self._axes = np.zeros((3, tokens.shape[2]))
        self._axes[: len(basis.components_)] = basis.components_
        self._mean = basis.mean_
        self._ends = np.percentile(self._components(tokens), [1, 99], axis=0)
        colours = self(tokens, grid)
        rim = np.concatenate(
            [colours[:, 0], colours[:, -1], colours[:, :, 0], colours[:, :, -1]], axis=1
        ).mean(axis=(0, 1))
        self._ends = np.where(rim > 0.5, self._ends[::-1], self._ends)

    def __call__(self, tokens: NDArray[np.floating], grid: tuple[int, int]) -> NDArray[np.floating]:
        """Tokens [images, N, D] of the same space as colours [images, *grid, 3] in [0, 1]."""
        start, end = self._ends
        span = np.where(np.abs(end - start) < 1e-12, 1.0, end - start)
        colours = (self._components(tokens) - start) / span
        return np.clip(colours, 0, 1).reshape(len(tokens), *grid, 3)

    def _components(self, tokens: NDArray[np.floating]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (_flat(tokens) - self._mean) @ self._axes.T
        return found


def principal_colours(tokens: NDArray[np.floating], grid: tuple[int, int]) -> NDArray[np.floating]:
    """Tokens [images, N, D] as colours [images, *grid, 3], by a palette of their own."""
    return Palette(tokens, grid)(tokens, grid)


def _flat(tokens: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.asarray(tokens, np.float64).reshape(-1, tokens.shape[-1])


def draw_panels(
    path: str | PathLike[str], panels: Sequence[Panel], notes: Mapping[int, str]
) -> None:
    """Write a PNG with a column a panel and a row an image; `notes` names rows at their left."""
    from matplotlib.figure import Figure

    rows = len(panels[0].colours)
    figure = Figure(figsize=(1.5 * len(panels) + 0.6, 1.5 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(panels), squeeze=False)
    for column, panel in enumerate(panels):
        axes[0][column].set_title(panel.title, fontsize=9, parse_math=False)
        for row in range(rows):
            axis = axes[row][column]
            axis.imshow(panel.colours[row], interpolation="nearest", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if column == 0 and row in notes:
                axis.set_ylabel(notes[row], fontsize=9, parse_math=False)
    figure.savefig(path, dpi=140)
