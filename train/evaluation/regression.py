"""Regression probe: a linear map from frozen features to numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ...errors import ConfigError
from .base import Array, Features, Measurement, Protocol, choose
from .intervals import R2
from .linear import STRENGTHS, check_strengths
from .truths import Targets


@dataclass(frozen=True)
class Regression(Protocol[Targets]):
    """R^2 of ridge regression from standardised features, averaged over targets.

    Features and targets are standardised by the images that are fitted; a strength s weighs the L2
    penalty against the mean squared error (scikit-learn's ``alpha = s n``), and the validation
    split chooses it by R^2. The probe is then fitted on all training images. R^2 is that of
    scikit-learn's ``r2_score``: 1 for exact predictions, 0 for the mean of the test targets,
    negative for worse. Angles are to be given as cosine and sine.

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

    def measure(self, features: Features, truth: Targets) -> list[Measurement]:
        self.check(truth)
        fit, held = self.split(len(truth.train))

        def score(strength: float) -> float:
            model = _fit(strength, features.train[fit], truth.train[fit])
            return _value(R2(truth.train[held], _predict(model, features.train[held])))

        scores = {(strength,): score(strength) for strength in self.strengths}
        best = choose(scores)
        model = _fit(best[0], features.train, truth.train)
        predicted = _predict(model, features.test)
        error = predicted - truth.test
        return [
            Measurement(
                metric="R2",
                statistic=R2(truth.test, predicted),
                validation=scores[best],
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


def _fit(strength: float, x: Array, y: NDArray[np.float64]) -> Any:
    ridge = make_pipeline(StandardScaler(), Ridge(alpha=strength * len(x)))
    return TransformedTargetRegressor(ridge, transformer=StandardScaler()).fit(x, y)


def _predict(model: Any, x: Array) -> NDArray[np.float64]:
    return np.asarray(model.predict(x), dtype=np.float64).reshape(len(x), -1)


def _value(statistic: R2) -> float:
    return float(statistic(np.ones((1, len(statistic.truth))))[0])
