"""What is to be read off features: classes, numbers, maps of either, words, other features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class Truth(ABC):
    """What is to be read off the features of the same images, in the same order.

    Attributes:
        name: of the task, for people.
    """

    name: str

    @abstractmethod
    def labelled(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
        """Which images of either side have a label; None where labels are not the question."""

    @abstractmethod
    def take(self, train: NDArray[np.bool_], test: NDArray[np.bool_]) -> Self:
        """Some of the images of either side."""


@dataclass(frozen=True, eq=False)
class _Labels(Truth):
    name: str
    train: NDArray[Any]
    test: NDArray[Any]

    def take(self, train: NDArray[np.bool_], test: NDArray[np.bool_]) -> Self:
        return replace(self, train=self.train[train], test=self.test[test])


@dataclass(frozen=True, eq=False)
class Classes(_Labels):
    """One class an image: ``train`` int64 [n] and ``test`` int64 [m]; -1 where unknown."""

    def labelled(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        return self.train >= 0, self.test >= 0


@dataclass(frozen=True, eq=False)
class Targets(_Labels):
    """Numbers an image: ``train`` float64 [n, T] and ``test`` float64 [m, T]; NaN where unknown."""

    def labelled(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        return np.isfinite(self.train).all(1), np.isfinite(self.test).all(1)


@dataclass(frozen=True, eq=False)
class Maps(_Labels):
    """A class a pixel: ``train`` int64 [n, H, W] and ``test`` [m, H, W]; -1 where unknown.

    H and W are free: the labels of patches are maps of the size of the grid.
    """

    def labelled(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        return _any(self.train >= 0), _any(self.test >= 0)


@dataclass(frozen=True, eq=False)
class ValueMaps(_Labels):
    """A number a pixel: ``train`` float [n, H, W] and ``test`` [m, H, W]; NaN where unknown."""

    def labelled(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        return _any(np.isfinite(self.train)), _any(np.isfinite(self.test))


@dataclass(frozen=True, eq=False)
class Spaces(Truth):
    """Other representations of the test images, to compare with: ``test`` float32 [m, D] each."""

    name: str
    test: Mapping[str, NDArray[np.float32]]

    def labelled(self) -> None:
        return None

    def take(self, train: NDArray[np.bool_], test: NDArray[np.bool_]) -> Self:
        return replace(self, test={name: part[test] for name, part in self.test.items()})


@dataclass(frozen=True, eq=False)
class Words(Truth):
    """Classes by their names: ``test`` int64 [m], -1 where unknown; training images play no part.

    Attributes:
        names: of the classes by number.
        texts: their embeddings, float32 [classes, D] of unit length, by the space of images that
            they are compared with.
    """

    name: str
    test: NDArray[np.int64]
    names: Sequence[str]
    texts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def labelled(self) -> None:
        return None

    def take(self, train: NDArray[np.bool_], test: NDArray[np.bool_]) -> Self:
        return replace(self, test=self.test[test])


def _any(pixels: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which images [n, H, W] have such a pixel."""
    return np.asarray(pixels.any(axis=(1, 2)), dtype=bool)
