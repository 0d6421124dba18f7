"""Regression probe: a linear map from frozen features to numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from .base import Features, Measurement, Protocol, choose, defined
from .intervals import R2
from .linear import STRENGTHS, check_strengths
from .ridge import RidgeSums, taken
from .truths import Targets


@dataclass(frozen=True)
class Regression(Protocol[Targets]):
    """R^2 of ridge regression from standardised features, averaged over targets.

    Features are standardised by the images that are fitted; a strength s weighs the L2 penalty
    against the mean squared error (scikit-learn's ``alpha = s n``; the scale of a target does not
    matter), and the validation split chooses it by R^2, averaged over the targets that vary there.
    The probe is then fitted on all training images. R^2 is that of scikit-learn's ``r2_score``: 1
    for exact predictions, 0 for the mean of the test targets, negative for worse. Angles are to be
    given as cosine and sine.

    Attributes:
        strengths: L2 strengths to choose from; the first of the best.
    """

    truth: ClassVar[type[Targets]] = Targets

    strengths: Sequence[float] = STRENGTHS

    def __post_init__(self) -> None:
        check_strengths("regression", self.strengths)

    def check(self, truth: Targets) -> None:
        for side, values in (("training", truth.train), ("test", truth.test)):
            if not (np.ptp(values, axis=0) > 0).all():
                raise ConfigError(
                    f"task {truth.name}: a target is the same for every {side} image, so there is "
                    "nothing to predict"
                )
        self.split(len(truth.train))

    def measure(self, features: Features, truth: Targets) -> list[Measurement]:
        self.check(truth)
        fit, held = map(np.sort, self.split(len(truth.train)))

        # Sums of products do not cancel where targets are far from zero and close to each other.
        centre = truth.train.mean(0)
        ridge = RidgeSums(features.width, truth.train.shape[1])

        def add(rows: NDArray[np.int64]) -> None:
            for part in taken(features.train, len(centre), rows):
                ridge.add(features.train[part], truth.train[part] - centre)

        add(fit)
        known = truth.train[held]
        varies = np.ptp(known, axis=0) > 0

        def score(strength: float) -> float:
            if not varies.any():
                return math.nan
            predicted = ridge.solve(strength).values(features.train, held) + centre
            return _value(R2(known[:, varies], predicted[:, varies]))

        scores = {(strength,): score(strength) for strength in self.strengths}
        best = choose(scores)
        add(held)
        predicted = ridge.solve(best[0]).values(features.test) + centre
        error = predicted - truth.test
        return [
            Measurement(
                metric="R2",
                statistic=R2(truth.test, predicted),
                validation=defined(scores[best]),
                chosen={"strength": best[0]},
                details={
                    "r2": [
                        _value(R2(truth.test[:, [t]], predicted[:, [t]]))
                        for t in range(error.shape[1])
                    ],
                    "rmse": np.sqrt((error**2).mean(0)).tolist(),
                    "mae": np.abs(error).mean(0).tolist(),
                },
            )
        ]


def _value(statistic: R2) -> float:
    return float(statistic(np.ones((1, len(statistic.truth))))[0])
