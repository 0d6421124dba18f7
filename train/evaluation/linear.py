"""Linear probe of frozen features, its regularisation chosen on held-out training images."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError
from .base import CPU, Features, Measurement, Protocol, correct, split
from .classifiers import STEPS, AffineClassifier, LogisticPath, RidgePath, plain_logistic
from .intervals import MeanOf
from .truths import Classes

PROBES = ("ridge", "logistic")
STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""The first of the best is chosen, so of equals the strongest."""
LARGE = 2e10
"""Images times dimensions times classes beyond which scikit-learn is not asked for a logistic
probe, for its copies and its time."""

_told: set[tuple[str, str]] = set()
"""Probes and what `_tell` has told of them."""


@dataclass(frozen=True)
class Linear(Protocol[Classes]):
    """Accuracy of `fit_linear_probe`: a linear classifier of the standardised features.

    The linear evaluation of self-supervised learning in its closed or convex form, whose only
    choice is the L2 strength (Kornblith et al. 2019, arXiv:1805.08974, appendix A, choose it so).

    Attributes:
        probe: ``ridge`` or ``logistic``.
        strengths: L2 strengths to choose from.
    """

    truth: ClassVar[type[Classes]] = Classes

    probe: str = "ridge"
    strengths: Sequence[float] = STRENGTHS

    def __post_init__(self) -> None:
        check_strengths("linear", self.strengths)
        if self.probe not in PROBES:
            raise ConfigError(f"linear.probe={self.probe}: valid are {', '.join(PROBES)}")

    def check(self, truth: Classes) -> None:
        if len(np.unique(truth.train)) < 2:
            raise ConfigError(f"task {truth.name}: the training images are all of one class")
        self.split(len(truth.train), truth.train)

    def fit(self, features: Features, truth: Classes) -> LinearProbe:
        """The probe of the training side."""
        return fit_linear_probe(
            features.train,
            truth.train,
            probe=self.probe,
            strengths=self.strengths,
            validation=self.validation,
            seed=self.seed,
            device=self.device,
        )

    def measure(self, features: Features, truth: Classes) -> list[Measurement]:
        fitted = self.fit(features, truth)
        return [
            Measurement(
                metric="accuracy",
                statistic=MeanOf(correct(fitted.predict(features.test), truth.test)),
                validation=fitted.validation,
                chosen={"strength": fitted.strength},
            )
        ]


def check_strengths(protocol: str, strengths: Sequence[float]) -> None:
    """Refuse an empty list of L2 strengths, and strengths that are not positive.

    Raises:
        ConfigError: names the option.
    """
    if not strengths or not all(strength > 0 for strength in strengths):
        raise ConfigError(f"{protocol}.strengths={list(strengths)}: expected positive numbers")


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
    model: AffineClassifier

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Class numbers int64 [q] of features [q, D]."""
        return self.model.predict(features)


def fit_linear_probe(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    probe: str = "ridge",
    strengths: Sequence[float] = STRENGTHS,
    validation: float = 0.2,
    seed: int = 0,
    device: torch.device = CPU,
) -> LinearProbe:
    """Fit on one part of the training images for every strength, choose on the rest, refit on all.

    Features are standardised by the mean and deviation of the images that are fitted. A strength s
    weighs the L2 penalty against the mean loss over images, so it means the same for every size of
    the training set: scikit-learn's ``alpha = s n`` (ridge) and ``C = 1 / (s n)`` (logistic).
    Ridge probes of all strengths are solved in float64 from one pass over the features:
    scikit-learn's solver would work in the features' float32, to which weak penalties are lost.
    Logistic probes beyond `LARGE` are solved by scikit-learn's solver in blocks on the device, each
    from the last one's solution.

    Args:
        features: [n, D].
        labels: [n].
        probe: ``ridge`` (least squares on +-1 targets, one against the rest) or ``logistic``.
        strengths: to choose from; the first of the best.
        validation: share of the images that chooses; the split is stratified by class: see `split`.
        seed: of the split.
        device: computes logistic probes that are `LARGE`.

    Raises:
        ConfigError: unknown probe, or too few images to split.
    """
    if probe not in PROBES:
        raise ConfigError(f"linear.probe={probe}: valid are {', '.join(PROBES)}")
    fit, held = map(np.sort, split(len(labels), validation, seed, labels))
    path: RidgePath | _Logistic = (
        RidgePath(features, labels) if probe == "ridge" else _Logistic(features, labels, device)
    )
    path.add(fit)
    scores = {
        strength: float((path.solve(strength).predict(features, held) == labels[held]).mean())
        for strength in sorted(strengths, reverse=True)  # from strong to weak: see LogisticPath
    }
    best = max(strengths, key=lambda strength: scores[strength])  # the first of equals
    path.add(held)
    model = path.solve(best)
    if not model.converged:
        _tell(
            probe,
            "steps",
            f"of strength {best} was stopped after {STEPS} steps, before it had converged: what "
            "it scores may be a little below what it could",
        )
    _tell_of_an_edge(probe, scores, best)
    return LinearProbe(float(best), scores[best], model)


def _tell(probe: str, of: str, message: str) -> None:
    """A warning about a probe, once for each thing it is of."""
    if (probe, of) not in _told:
        _told.add((probe, of))
        print(f"warning: a {probe} probe {message}", file=sys.stderr, flush=True)


def _tell_of_an_edge(probe: str, scores: Mapping[float, float], best: float) -> None:
    """Say once, for each probe and end, that accuracy still rises where the strengths end."""
    ordered = sorted(scores)
    for end, edge, neighbour in (("lowest", 0, 1), ("highest", -1, -2)):
        if len(ordered) < 2 or best != ordered[edge]:
            continue
        if scores[best] > scores[ordered[neighbour]]:  # equals tell of no slope
            _tell(
                probe,
                end,
                f"chose {best}, the {end} of its strengths, and may gain from one beyond it: "
                f"extend linear.strengths={ordered}, or robustness.strengths of that protocol",
            )


class _Logistic:
    """Logistic probes of the rows that were added, with the interface of `RidgePath`."""

    def __init__(
        self, x: NDArray[np.float32], labels: NDArray[np.int64], device: torch.device
    ) -> None:
        self._x, self._labels, self._device = x, labels, device
        self._rows = np.empty(0, np.int64)

    def add(self, rows: NDArray[np.int64]) -> None:
        self._rows = np.union1d(self._rows, rows)
        whole = len(self._rows) == len(self._x)
        x = self._x if whole else self._x[self._rows]
        y = self._labels[self._rows]
        large = x.size * len(np.unique(y)) > LARGE
        self.solve = (
            LogisticPath(x, y, self._device).solve if large else partial(plain_logistic, x, y)
        )
