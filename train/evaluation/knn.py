"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from .base import Array, Features, Labels, Measurement, Protocol, choose, correct, several
from .intervals import MeanOf
from .search import QUERIES, nearest
from .truths import Classes


@dataclass(frozen=True)
class KNN(Protocol[Classes]):
    """Accuracy of `knn_predict`: the training images are the neighbours of the test images.

    Where several ``k`` or temperatures are given, the validation split chooses: its images are
    classified by the other training images. The test images are then classified by all of them.
    With one of each there is nothing to choose and no validation figure.

    Attributes:
        k: neighbours, or several to choose from.
        temperature: of the exponential vote weights, or several to choose from.
    """

    truth: ClassVar[type[Classes]] = Classes

    k: int | Sequence[int] = 20
    temperature: float | Sequence[float] = 0.07

    def __post_init__(self) -> None:
        for name, values in (("k", several(self.k)), ("temperature", several(self.temperature))):
            if not values or not all(value > 0 for value in values):
                raise ConfigError(f"knn.{name}={values}: expected positive numbers")

    @property
    def _options(self) -> list[tuple[int, float]]:
        return [(k, t) for k in several(self.k) for t in several(self.temperature)]

    def check(self, truth: Classes) -> None:
        if len(self._options) > 1:
            self.split(len(truth.train), truth.train)

    def measure(self, features: Features, truth: Classes) -> list[Measurement]:
        options = self._options
        chosen, validation = options[0], None
        if len(options) > 1:
            fit, held = self.split(len(truth.train), truth.train)
            found = self._predict(
                features.train[fit], truth.train[fit], features.train[held], options
            )
            scores = {
                option: float(correct(predicted, truth.train[held]).mean())
                for option, predicted in zip(options, found, strict=True)
            }
            k, temperature = choose(scores)
            chosen, validation = (k, temperature), scores[k, temperature]
        (predicted,) = self._predict(features.train, truth.train, features.test, [chosen])
        return [
            Measurement(
                metric="accuracy",
                statistic=MeanOf(correct(predicted, truth.test)),
                validation=validation,
                chosen={"k": chosen[0], "temperature": chosen[1]},
            )
        ]

    def _predict(
        self, train: Array, labels: Labels, queries: Array, options: Sequence[tuple[int, float]]
    ) -> list[Labels]:
        """Classes by each (k, temperature), from one search for the most neighbours."""
        similarity, places = nearest(
            torch.from_numpy(train),
            torch.from_numpy(queries),
            max(k for k, _ in options),
            self.device,
        )
        kinds, positions = np.unique(labels, return_inverse=True)
        near = torch.from_numpy(positions).to(self.device)[places]
        return [
            kinds[_vote(similarity[:, :k], near[:, :k], len(kinds), temperature).cpu().numpy()]
            for k, temperature in options
        ]


def knn_predict(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """The class of each query by its k most similar training features.

    Similarity is the cosine c; each neighbour votes for its class with weight exp(c / temperature).
    This is the protocol of Wu et al. 2018 (arXiv:1805.01978) that DINO and its successors report
    with k = 20 and temperature 0.07. Equal votes go to the smaller class number.

    Args:
        train: [n, D] float.
        labels: [n] int64.
        queries: [q, D] float.
        k: neighbours; all n where there are fewer.

    Returns:
        int64 [q].
    """
    similarity, places = nearest(train, queries, k, train.device)
    kinds, positions = labels.unique(return_inverse=True)
    return kinds[_vote(similarity, positions[places], len(kinds), temperature)]


def _vote(similarity: Tensor, kinds: Tensor, classes: int, temperature: float) -> Tensor:
    """Of the neighbours of each query, best first: cosines and classes [q, k] to classes [q].

    Classes are numbered without gaps: a query has a vote for each.
    """
    predicted = []
    for near, kind in zip(similarity.split(QUERIES), kinds.split(QUERIES), strict=True):
        # Relative to the best neighbour: the same votes up to a factor, and no overflow.
        weights = ((near - near[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(near), classes)
        votes.scatter_add_(1, kind, weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)
