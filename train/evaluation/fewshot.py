"""Few-shot classification: nearest class mean of a handful of labelled images, repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, counted
from .base import ASKED, Array, Features, Labels, Measurement, Protocol, correct, row_blocks
from .intervals import MeanOf
from .truths import Classes


@dataclass(frozen=True)
class FewShot(Protocol[Classes]):
    """Accuracy of the nearest class mean of s labelled images a class, over random draws of them.

    The form of SimpleShot with CL2N features (Wang et al. 2019, arXiv:1911.04623): features x are
    centred by the mean of the (unlabelled) training features and scaled to unit length,

        z = (x - mean) / |x - mean|,     c_k = mean of z over the s images drawn of class k,

    and a test image is given the class whose c_k is nearest in Euclidean distance. There is nothing
    to choose. All classes of the training images take part (all-way). The figure is the mean over
    ``repeats`` draws without replacement; draws depend on the labels and the seed alone, so every
    model is given the same images. The validation figure is that of the training images which a
    draw has left over, 50,000 of them at most.

    Attributes:
        shots: images a class; one figure each.
        repeats: draws.
    """

    truth: ClassVar[type[Classes]] = Classes

    shots: Sequence[int] = (1, 5, 10, 50)
    repeats: int = 10

    def __post_init__(self) -> None:
        if self.repeats < 1 or not self.shots or min(self.shots) < 1:
            raise ConfigError(
                f"fewshot: shots={list(self.shots)} and repeats={self.repeats} must be at least 1"
            )

    def check(self, truth: Classes) -> None:
        kinds, counts = np.unique(truth.train, return_counts=True)
        fewest = int(counts.argmin())
        if counts[fewest] < max(self.shots):
            there = counted(int(counts[fewest]), "training image")
            raise ConfigError(
                f"fewshot.shots={list(self.shots)}: task {truth.name} has {there} of class "
                f"{kinds[fewest]}, fewer than {max(self.shots)}; ask for fewer shots"
            )

    def measure(self, features: Features, truth: Classes) -> list[Measurement]:
        self.check(truth)
        mean = features.train.mean(0, dtype=np.float64).astype(np.float32)
        train, test = _unit(features.train, mean), _unit(features.test, mean)
        return [self._measure(shots, train, test, truth) for shots in self.shots]

    def _measure(self, shots: int, train: Array, test: Array, truth: Classes) -> Measurement:
        kinds = np.unique(truth.train)
        right, each, left_over = np.zeros(len(test)), [], []
        for repeat in range(self.repeats):
            drawn = self.draw(truth.train, shots, repeat)
            means = np.stack([train[chosen].mean(0) for chosen in drawn])
            of_draw = correct(kinds[_nearest(test, means)], truth.test)
            right += of_draw / self.repeats
            each.append(float(of_draw.mean()))
            rest = np.setdiff1d(np.arange(len(train)), drawn)
            if len(rest) > ASKED:
                rest = np.random.default_rng([self.seed, repeat]).choice(rest, ASKED, replace=False)
            if len(rest):
                found = kinds[_nearest(train, means, rest)]
                left_over.append(float(correct(found, truth.train[rest]).mean()))
        spread = float(np.std(each, ddof=1)) if self.repeats > 1 else None
        return Measurement(
            metric="accuracy",
            statistic=MeanOf(right),
            variant=f"{shots}-shot",
            validation=float(np.mean(left_over)) if left_over else None,
            details={"repeats": self.repeats, "deviation_over_repeats": spread},
        )

    def draw(self, labels: Labels, shots: int, repeat: int) -> NDArray[np.int64]:
        """Positions of the images of one draw, int64 [classes, shots], in the order of classes."""
        random = np.random.default_rng([self.seed, shots, repeat])
        _, counts = np.unique(labels, return_counts=True)
        of_kinds = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        return np.stack([random.choice(own, shots, replace=False) for own in of_kinds])


def _unit(x: Array, mean: Array) -> Array:
    """Features [n, K] centred and scaled to unit length."""
    found = np.empty_like(x)
    for part in row_blocks(*x.shape):
        centred = x[part] - mean
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        found[part] = centred / np.maximum(length, np.float32(1e-12))
    return found


def _nearest(x: Array, means: Array, images: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Of features [n, K] of some images, or of all, the nearest of the means [C, K]."""
    images = np.arange(len(x)) if images is None else images
    # |x - c|^2 up to |x|^2, which is the same for every class.
    length = (means**2).sum(1)
    parts = row_blocks(len(images), means.shape[1] + len(means))
    return np.concatenate(
        [np.argmin(length - 2 * x[images[part]] @ means.T, axis=1) for part in parts]
    )
