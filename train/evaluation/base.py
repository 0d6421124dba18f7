"""What every protocol takes and gives: features, what is to be read off them, and measurements.

Nothing here knows of students or of stores: features are arrays, wherever they came from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError, DataError
from .intervals import Statistic
from .truths import Truth

Array = NDArray[np.float32]
Labels = NDArray[np.int64]
CPU = torch.device("cpu")
_BLOCK = 2**24  # numbers that are held at once beside the features themselves


K = TypeVar("K", bound=Hashable)


class OnDemand(Mapping[K, Array]):
    """Arrays that are made each time they are asked for, because all of them would not fit.

    Args:
        keys: of the arrays.
        make: the array of a key.
    """

    def __init__(self, keys: Iterable[K], make: Callable[[K], Array]) -> None:
        self._keys, self._make = dict.fromkeys(keys), make

    def __getitem__(self, key: K) -> Array:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True, eq=False)
class Features:
    """Frozen features of one model, of the images that probes learn from and of the test images.

    Attributes:
        train, test: float32 [n, K] and [m, K]; on a grid [n, N, K] and [m, N, K], row-major.
        grid: (rows, columns) of the N tokens; None for one feature an image.
        space: the teacher's space whose embeddings these are, in its own units; empty where they
            are no teacher's. Of such, training images may be none.
        corrupted: features of the corrupted test images, [m, K] by (corruption, severity), to be
            read by `under`; empty where nobody can compute them, as for teachers whose features
            come from a store.

    Raises:
        DataError: the shapes do not fit each other, or a value is not finite.
    """

    train: Array
    test: Array
    grid: tuple[int, int] | None = None
    corrupted: Mapping[tuple[str, int], Array] = field(default_factory=dict)
    space: str = ""

    def __post_init__(self) -> None:
        self._check("training", self.train)
        self._check("test", self.test)

    def _check(self, side: str, part: Array) -> None:
        axes = 2 if self.grid is None else 3
        some = len(part) or (self.space and part is self.train)
        if part.ndim != axes or part.shape[1:] != self.train.shape[1:] or not some:
            raise DataError(
                f"{side} features have the shape {part.shape}, which does not fit "
                f"{self.train.shape} and the grid {self.grid}"
            )
        if self.grid is not None and part.shape[1] != self.grid[0] * self.grid[1]:
            raise DataError(f"{side} features: {part.shape[1]} tokens are no grid {self.grid}")
        if not all(
            np.isfinite(part[b]).all() for b in row_blocks(len(part), math.prod(part.shape[1:]))
        ):
            raise DataError(f"{side} features are not finite: the model has diverged")

    def under(self, corruption: str, severity: int) -> Array:
        """Features of the corrupted test images [m, K]; made or read anew at each call.

        Raises:
            DataError: they do not fit the others, or a value is not finite.
            KeyError: there are none of this corruption.
        """
        part = self.corrupted[corruption, severity]
        side = f"test ({corruption}, severity {severity})"
        self._check(side, part)
        if len(part) != len(self.test):
            raise DataError(f"{side} features are of {len(part)} images, not {len(self.test)}")
        return part

    @property
    def kind(self) -> str:
        """Which protocols read them: see `Protocol.reads`."""
        return "space" if self.space else "vector" if self.grid is None else "grid"

    @property
    def width(self) -> int:
        """K."""
        return int(self.train.shape[-1])

    def take(self, train: NDArray[np.bool_], test: NDArray[np.bool_]) -> Features:
        """Some of the images of either side."""
        return replace(
            self,
            train=self.train[train],
            test=self.test[test],
            corrupted=OnDemand(self.corrupted, lambda key: self.corrupted[key][test]),
        )


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a protocol finds.

    Attributes:
        metric: such as ``accuracy``; larger is better for all of them.
        statistic: the figure as a function of the test images' weights.
        variant: which of a protocol's figures, such as ``5-shot``; empty where there is one.
        validation: the same metric on the training images that choose; None where nothing is held,
            or all that is held is the same.
        chosen: what the validation split chose.
        details: further figures.
    """

    metric: str
    statistic: Statistic
    variant: str = ""
    validation: float | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


ASKED = 50_000
"""Training images at most that a validation figure by which nothing is chosen asks about."""

T = TypeVar("T", bound=Truth)
V = TypeVar("V", int, float, str)


@dataclass(frozen=True)
class Protocol(ABC, Generic[T]):
    """One way to ask what frozen features are worth; its fields are its options.

    Every choice is made on training images that `split` holds out, never on test images.

    Attributes:
        validation: share of the training images that choose, in (0, 1).
        seed: of the split and of whatever else is drawn.
        device: computes what takes long for many images, where the protocol can use it.
    """

    truth: ClassVar[type[Truth]]
    """What it needs beside features."""
    reads: ClassVar[str] = "vector"
    """One feature an image (``vector``), tokens on a grid (``grid``), or embeddings in the space of
    a teacher (``space``)."""
    needs_corrupted: ClassVar[bool] = False
    """Whether it reads `Features.corrupted`."""

    validation: float = 0.2
    seed: int = 0
    device: torch.device = CPU

    @abstractmethod
    def measure(self, features: Features, truth: T) -> list[Measurement]:
        """Learn from the training side, judge on the test side; all images are labelled."""

    def check(self, truth: T) -> None:
        """Refuse labels that this protocol cannot use, before any feature is computed.

        Images without a label have been left out.

        Raises:
            ConfigError: with what is missing.
        """

    def split(
        self, images: int, classes: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions of the training images that fit and of those that choose.

        It depends on the count, the classes and the options alone, so it is the same for every
        model.

        Args:
            classes: stratify by these; the image of a class that has no other is fitted.

        Raises:
            ConfigError: too few images to split.
        """
        return split(images, self.validation, self.seed, classes)


def split(
    images: int, validation: float, seed: int, classes: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the images that fit and of those that choose, stratified by `classes`.

    The image of a class that has no other is one that fits. Of classes too small to be divided in
    proportion the images that choose are drawn among all, and each keeps one that fits.

    Raises:
        ConfigError: too few images to split.
    """
    from sklearn.model_selection import train_test_split

    alone = np.zeros(images, dtype=bool)
    if classes is not None:
        _, kinds, counts = np.unique(classes, return_inverse=True, return_counts=True)
        alone = counts[kinds] == 1
    others = np.flatnonzero(~alone)
    try:
        fit, held = train_test_split(
            others,
            test_size=validation,
            random_state=seed,
            stratify=None if classes is None else classes[others],
        )
    except ValueError as error:
        if classes is None or not len(others) or not 0 < validation < 1:
            of = "" if classes is None else f" of {len(counts)} classes"
            raise ConfigError(
                f"validation={validation}: cannot split {images} images{of} into some that fit and "
                "some that choose"
            ) from error
        left, chosen = counts.copy(), list[int]()
        for image in np.random.default_rng(seed).permutation(others):
            if left[kinds[image]] > 1 and len(chosen) < validation * len(others):
                left[kinds[image]] -= 1
                chosen.append(image)
        held = np.array(chosen)
        return np.setdiff1d(np.arange(images), held), held
    return np.concatenate([fit, np.flatnonzero(alone)]), held


def correct(predicted: NDArray[Any], truth: NDArray[Any]) -> NDArray[np.float64]:
    """1.0 where the class is right, else 0.0."""
    return (predicted == truth).astype(np.float64)


def row_blocks(rows: int, width: int) -> list[slice]:
    """The rows in parts of at most `_BLOCK` numbers, `width` of them a row."""
    most = max(1, _BLOCK // max(1, width))
    return [slice(start, start + most) for start in range(0, rows, most)]


def several(option: V | Sequence[V]) -> list[V]:
    """An option that is one value, or several to choose from, as a list."""
    if isinstance(option, Sequence) and not isinstance(option, str):
        return list(option)
    return [option]


def choose(scores: Mapping[tuple[Any, ...], float]) -> tuple[Any, ...]:
    """The key of the largest score; the first of equals, and where none is defined (NaN)."""
    return max(scores, key=lambda key: scores[key])


def defined(figure: float) -> float | None:
    """A figure; None for NaN, which JSON does not have."""
    return None if math.isnan(figure) else figure
