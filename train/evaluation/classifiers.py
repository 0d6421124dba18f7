"""Linear classifiers of standardised features, for one L2 strength after another."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .base import Array, Labels, row_blocks
from .ridge import AffineMap, RidgeSums, Rows, standardisation, taken
from .search import whole_float32

STEPS = 500
"""Of L-BFGS, at most."""


@dataclass(frozen=True, eq=False)
class AffineClassifier:
    """The class of the largest of as many outputs; or, of two classes, the sign of one output.

    Attributes:
        kinds: class numbers int64 [C], ascending.
        map: features [b, K] to [b, C], or to [b, 1].
        converged: whether the solver was not stopped before.
    """

    kinds: Labels
    map: AffineMap
    converged: bool = True

    def predict(self, x: Array, rows: Rows | None = None) -> Labels:
        """Class numbers [n] of features [n, K], or of those of some rows."""
        found = []
        for part in taken(x, len(self.kinds), rows):
            scores = self.map.values(x[part])  # weak penalties leave weights that cancel
            found.append(scores.argmax(1) if scores.shape[1] > 1 else (scores[:, 0] > 0) * 1)
        return self.kinds[np.concatenate(found)]


class RidgePath:
    """Least squares on +-1 targets, one class against the rest, for any strength.

    Args:
        x: [n, K]; read in blocks.
        labels: [n].
    """

    def __init__(self, x: Array, labels: Labels) -> None:
        self._x, self._labels = x, labels
        self._kinds = np.unique(labels)
        self._sums = RidgeSums(x.shape[1], len(self._kinds))

    def add(self, rows: Rows) -> None:
        """Learn from some rows, beside those before."""
        for part in taken(self._x, len(self._kinds), rows):
            is_kind = self._labels[part][:, None] == self._kinds
            self._sums.add(self._x[part], np.where(is_kind, 1.0, -1.0))

    def solve(self, strength: float) -> AffineClassifier:
        """See `RidgeSums.solve`."""
        return AffineClassifier(self._kinds, self._sums.solve(strength))


def plain_logistic(x: Array, labels: Labels, strength: float) -> AffineClassifier:
    """scikit-learn's ``LogisticRegression`` of standardised features: what `LogisticPath` finds.

    Args:
        x: [n, K]; three copies are held meanwhile.
        labels: [n].
        strength: scikit-learn's ``C = 1 / (strength n)``.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=1 / (strength * len(x)), max_iter=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says it
        model.fit(scaler.transform(x), labels)
    weight = model.coef_.T.astype(np.float64) / scaler.scale_[:, None]
    return AffineClassifier(
        model.classes_,
        AffineMap(weight, model.intercept_ - scaler.mean_ @ weight),
        bool(model.n_iter_.max() < STEPS),
    )


class LogisticPath:
    """Multinomial logistic regression in blocks, for features too many for scikit-learn's copies.

    With z the standardised features, it minimises what scikit-learn's ``LogisticRegression`` does,

        1/n sum_i -log softmax(W z_i + b)[y_i] + strength / 2 |W|^2

    (of two classes, W and b of one output against a zero), by the same solver, SciPy's L-BFGS-B,
    from the last strength's solution on. On the device lies one block of features and its outputs;
    every step reads all features once.

    Args:
        x: [n, K].
        labels: [n].
        device: computes.
        tolerance: largest component of the gradient at the end; scikit-learn's default.
        iterations: at most.
    """

    def __init__(
        self,
        x: Array,
        labels: Labels,
        device: torch.device,
        *,
        tolerance: float = 1e-4,
        iterations: int = STEPS,
    ) -> None:
        self._x, self._device = x, device
        self._tolerance, self._iterations = tolerance, iterations
        self._kinds, self._labels = np.unique(labels, return_inverse=True)
        self._outputs = len(self._kinds) if len(self._kinds) > 2 else 1
        self._parts = row_blocks(len(x), x.shape[1] + 2 * len(self._kinds))
        first, second = np.zeros((2, x.shape[1]))
        for part in self._parts:
            values = x[part].astype(np.float64)
            first += values.sum(0)
            second += (values**2).sum(0)
        self._mean, self._scale = standardisation(len(x), first, second)
        self._on_device = [
            torch.from_numpy(one).to(device, torch.float32) for one in (self._mean, self._scale)
        ]
        self._found = np.zeros(self._outputs * (x.shape[1] + 1))

    def solve(self, strength: float) -> AffineClassifier:
        """The classifier of a strength; several are best asked for from strong to weak."""
        from scipy.optimize import minimize

        options = {"maxiter": self._iterations, "gtol": self._tolerance, "ftol": 1e-14}
        found = minimize(
            self._loss, self._found, (strength,), "L-BFGS-B", jac=True, options=options
        )
        self._found = found.x
        parameters = self._found.reshape(self._outputs, -1)
        weight = parameters[:, :-1].T / self._scale[:, None]
        return AffineClassifier(
            self._kinds,
            AffineMap(weight, parameters[:, -1] - self._mean @ weight),
            found.nit < self._iterations,
        )

    def _loss(
        self, flat: NDArray[np.float64], strength: float
    ) -> tuple[float, NDArray[np.float64]]:
        """The objective and its gradient: float32 within blocks, float64 over them."""
        parameters = torch.from_numpy(flat.reshape(self._outputs, -1))
        weight, bias = (
            part.to(self._device, torch.float32)
            for part in parameters.split([flat.size // self._outputs - 1, 1], 1)
        )
        loss = 0.0
        gradient = torch.zeros(parameters.shape, dtype=torch.float64, device=self._device)
        for part in self._parts:
            z = self._standardised(part)
            kinds = torch.from_numpy(self._labels[part]).to(self._device)
            with whole_float32():
                outputs = torch.addmm(bias.T, z, weight.T)
                if self._outputs == 1:
                    outputs = functional.pad(outputs, (1, 0))
                logs = outputs.log_softmax(1)
                own = logs.gather(1, kinds[:, None])
                loss -= float(own.sum(dtype=torch.float64))
                error = logs.exp_()
                error.scatter_add_(1, kinds[:, None], torch.full_like(own, -1.0))
                error = error[:, -self._outputs :]
                gradient[:, :-1] += error.T @ z
            gradient[:, -1] += error.sum(0, dtype=torch.float64)
        gradient /= len(self._x)
        penalised = parameters[:, :-1]
        found = gradient.cpu()
        found[:, :-1] += strength * penalised
        loss = loss / len(self._x) + strength / 2 * float((penalised**2).sum())
        return loss, found.numpy().ravel()

    def _standardised(self, part: slice) -> Tensor:
        mean, scale = self._on_device
        return (torch.from_numpy(self._x[part]).to(self._device) - mean) / scale
