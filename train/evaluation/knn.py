"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ConfigError
from .base import Array, Features, Labels, Measurement, Protocol, choose, correct, several
from .intervals import MeanOf
from .truths import Classes

_CHUNK = 1024


@dataclass(frozen=True)
class KNN(Protocol[Classes]):
    """Accuracy of `knn_predict`: the training images are the neighbours of the test images.

    Where several ``k`` or temperatures are given, the validation split chooses: its images are
    classified by the other training images. The test images are then classified by all of them.

    Attributes:
        k: neighbours, or several to choose from.
        temperature: of the exponential vote weights, or several to choose from.
    """

    truth: ClassVar[type[Classes]] = Classes

    k: int | Sequence[int] = 20
    temperature: float | Sequence[float] = 0.07

    def __post_init__(self) -> None:
        if any(k < 1 for k in several(self.k)) or any(t <= 0 for t in several(self.temperature)):
            raise ConfigError("knn.k and knn.temperature must be positive")

    def measure(self, features: Features, truth: Classes) -> list[Measurement]:
        fit, held = self.split(len(truth.train), truth.train)

        def accuracy(k: int, temperature: float) -> float:
            found = self._predict(
                features.train[fit], truth.train[fit], features.train[held], k, temperature
            )
            return float(correct(found, truth.train[held]).mean())

        scores = {
            (k, t): accuracy(k, t) for k in several(self.k) for t in several(self.temperature)
        }
        k, temperature = choose(scores)
        predicted = self._predict(features.train, truth.train, features.test, k, temperature)
        return [
            Measurement(
                metric="accuracy",
                statistic=MeanOf(correct(predicted, truth.test)),
                validation=scores[k, temperature],
                chosen={"k": k, "temperature": temperature},
            )
        ]

    def _predict(
        self, train: Array, labels: Labels, queries: Array, k: int, temperature: float
    ) -> Labels:
        return knn_predict(
            torch.from_numpy(train),
            torch.from_numpy(labels),
            torch.from_numpy(queries),
            k=k,
            temperature=temperature,
        ).numpy()


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
        labels: [n] int64, from 0.
        queries: [q, D] float.
        k: neighbours; all n where there are fewer.

    Returns:
        int64 [q].
    """
    train = functional.normalize(train.float(), dim=1)
    k = min(k, len(train))
    classes = int(labels.max()) + 1
    predicted = []
    for chunk in functional.normalize(queries.float(), dim=1).split(_CHUNK):
        similarity, nearest = (chunk @ train.t()).topk(k, dim=1)
        # Relative to the best neighbour: the same votes up to a factor, and no overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, labels[nearest], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)
