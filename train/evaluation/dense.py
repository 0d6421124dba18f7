"""Dense linear probe: classes of pixels from the tokens of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from .base import Array, Features, Labels, Measurement
from .cells import cell_means
from .grid_probe import GridProbe, over_images, pixel_scores
from .intervals import MeanIoU
from .ridge import AffineMap, RidgeSums
from .truths import Maps


@dataclass(frozen=True)
class Dense(GridProbe[Maps]):
    """Mean intersection over union of a linear classifier of each token.

    The linear segmentation of DINOv2 (Oquab et al. 2023, arXiv:2304.07193, section 7.4: one linear
    layer on frozen patch tokens, its scores resized to the map) with least squares in the place of
    gradient descent. A token's target is the share of each class among the labelled pixels of its
    cell, and it weighs as much as its labelled share; features are standardised; the L2 strength s
    (``alpha = s`` times the total weight) is chosen by mIoU on held-out training images, and the
    probe is then fitted on all of them. Class scores are resized bilinearly from the grid to the
    maps, so that models with different grids are judged on the same pixels; unlabelled pixels are
    left out. The mIoU pools pixels over test images and averages over the classes that occur.
    """

    truth: ClassVar[type[Maps]] = Maps
    named: ClassVar[str] = "dense"

    def check(self, truth: Maps) -> None:
        if len(np.unique(truth.train[truth.train >= 0])) < 2:
            raise ConfigError(f"task {truth.name}: the training maps show fewer than two classes")
        self.split(len(truth.train))

    def measure(self, features: Features, truth: Maps) -> list[Measurement]:
        self.check(truth)
        assert features.grid is not None
        grid, (kinds, train, test) = features.grid, _without_gaps(truth.train, truth.test)
        fit, held = self.split(len(train))
        part = _ridge(features.train, grid, train, len(kinds), fit)

        def miou(probe: AffineMap) -> float:
            found, _ = _judge(probe, features.train, grid, train, held)
            return float(found(np.ones((1, len(held))))[0])

        strength, validation = self.chosen(part, miou)
        probe = _ridge(features.train, grid, train, len(kinds)).solve(strength)
        statistic, accuracy = _judge(probe, features.test, grid, test)
        shared, joined = statistic.intersection.sum(0), statistic.union.sum(0)
        iou: list[float | None] = [None] * (int(kinds.max()) + 1)
        for kind, s, j in zip(kinds, shared, joined, strict=True):
            iou[kind] = float(s / j) if j else None
        return [
            Measurement(
                metric="mIoU",
                statistic=statistic,
                validation=validation,
                chosen={"strength": strength},
                details={"pixel_accuracy": accuracy, "iou": iou},
            )
        ]


def _without_gaps(train: Labels, test: Labels) -> tuple[Labels, Labels, Labels]:
    """The class numbers that occur, ascending, and maps of their positions among these.

    16 bits can number classes into the ten thousands, and every one of them costs room and time.
    """
    kinds = np.union1d(np.unique(train), np.unique(test))
    kinds = kinds[kinds >= 0]
    if len(kinds) == kinds[-1] + 1:
        return kinds, train, test

    def positions(maps: Labels) -> Labels:
        return np.where(maps < 0, maps, np.searchsorted(kinds, maps))

    return kinds, positions(train), positions(test)


def cell_shares(
    maps: Labels, grid: tuple[int, int], classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the cells of a grid hold: shares of the classes, and the labelled share of each cell.

    See `cell_means`.

    Args:
        maps: int64 [b, H, W]; -1 where unlabelled.

    Returns:
        float64 [b, rows * columns, classes], which sum to one in cells with labelled pixels, and
        float64 [b, rows * columns] from 0 to 1.
    """
    one_hot = (maps[..., None] == np.arange(classes)).astype(np.float64)
    return cell_means(one_hot, maps >= 0, grid)


def _ridge(
    tokens: Array,
    grid: tuple[int, int],
    maps: Labels,
    classes: int,
    images: NDArray[np.int64] | None = None,
) -> RidgeSums:
    """Of the tokens of some images, or of all."""
    sums = RidgeSums(tokens.shape[-1], classes)
    for part in over_images(tokens, maps[0].size * classes, images):
        shares, weight = cell_shares(maps[part], grid, classes)
        sums.add(
            tokens[part].reshape(-1, tokens.shape[-1]),
            shares.reshape(-1, classes),
            weight.reshape(-1),
        )
    return sums


def _judge(
    probe: AffineMap,
    tokens: Array,
    grid: tuple[int, int],
    maps: Labels,
    images: NDArray[np.int64] | None = None,
) -> tuple[MeanIoU, float]:
    """Intersections and unions of each image, and the share of labelled pixels that are right."""
    classes = len(probe.bias)
    shared, joined, right, labelled = [], [], 0, 0
    for part in over_images(tokens, maps[0].size * classes, images):
        truth = maps[part]
        found = pixel_scores(probe, tokens[part], grid, truth.shape[1:]).argmax(1)
        known = truth >= 0
        right += int((found == truth)[known].sum())
        labelled += int(known.sum())
        for kind in range(classes):
            said, is_kind = (found == kind) & known, truth == kind
            shared.append((said & is_kind).sum((1, 2)))
            joined.append((said | is_kind).sum((1, 2)))

    def stacked(counts: list[NDArray[np.int64]]) -> NDArray[np.float64]:
        rows = [np.stack(counts[i : i + classes], 1) for i in range(0, len(counts), classes)]
        return np.concatenate(rows).astype(np.float64)

    return MeanIoU(stacked(shared), stacked(joined)), right / labelled
