"""Linear probe of frozen features, its regularisation chosen on held-out training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ...errors import ConfigError

PROBES = ("ridge", "logistic")


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe.

    Attributes:
        strength: the L2 strength that the validation split chose.
        validation: its accuracy there, from 0 to 1.
        model: refitted on all training images; standardises features itself.
    """

    strength: float
    validation: float
    model: Any

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Class numbers int64 [q] of features [q, D]."""
        return np.asarray(self.model.predict(features), dtype=np.int64)


def fit_linear_probe(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    probe: str = "ridge",
    strengths: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    validation: float = 0.2,
    seed: int = 0,
) -> LinearProbe:
    """Fit on one part of the training images for every strength, choose on the rest, refit on all.

    Features are standardised by the mean and deviation of the images that are fitted. A strength s
    weighs the L2 penalty against the mean loss over images, so it means the same for every size of
    the training set: scikit-learn's ``alpha = s n`` (ridge) and ``C = 1 / (s n)`` (logistic).

    Args:
        features: [n, D].
        labels: [n].
        probe: ``ridge`` (least squares on +-1 targets, one against the rest) or ``logistic``.
        strengths: to choose from; the first of the best.
        validation: share of the images that chooses; the split is stratified by class.
        seed: of the split.

    Raises:
        ConfigError: unknown probe, or too few images to split.
    """
    if probe not in PROBES:
        raise ConfigError(f"linear.probe={probe}: valid are {', '.join(PROBES)}")
    try:
        fit_x, held_x, fit_y, held_y = train_test_split(
            features, labels, test_size=validation, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise ConfigError(
            f"linear.validation={validation}: cannot split {len(labels)} images of "
            f"{len(np.unique(labels))} classes: {error}"
        ) from error
    scores = [
        float((_fit(probe, strength, fit_x, fit_y).predict(held_x) == held_y).mean())
        for strength in strengths
    ]
    best = int(np.argmax(scores))
    return LinearProbe(
        float(strengths[best]), scores[best], _fit(probe, strengths[best], features, labels)
    )


def _fit(probe: str, strength: float, x: NDArray[np.float32], y: NDArray[np.int64]) -> Any:
    if probe == "ridge":
        model: Any = RidgeClassifier(alpha=strength * len(x))
    else:
        model = LogisticRegression(C=1 / (strength * len(x)), max_iter=500)
    return make_pipeline(StandardScaler(), model).fit(x, y)
