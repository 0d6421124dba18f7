"""Robustness: a probe learnt on clean images, judged on corrupted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import ConfigError
from .base import Features, Measurement, correct
from .corruptions import CORRUPTIONS, SEVERITIES, Corruption
from .intervals import MeanOf
from .linear import Linear
from .truths import Classes


@dataclass(frozen=True)
class Robustness(Linear):
    """Accuracy of the linear probe of clean features on corrupted test images.

    The probe is that of `Linear`: learnt and chosen on clean training images. Accuracy is averaged
    over severities for each corruption, and over corruptions for the variant ``mean``; ``clean`` in
    the details is the accuracy without corruption. Not divided by AlexNet's errors, as the mCE of
    Hendrycks and Dietterich (2019, arXiv:1903.12261) is. Only models that can be run on pixels have
    a figure: cached features cannot see the corruption.

    Attributes:
        corruptions: names from `CORRUPTIONS`.
        severities: from 1 to 5.
    """

    needs_corrupted: ClassVar[bool] = True

    corruptions: Sequence[str] = tuple(CORRUPTIONS)
    severities: Sequence[int] = SEVERITIES

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("corruptions", "severities"):
            if isinstance(given := getattr(self, option), str | int):
                raise ConfigError(
                    f"robustness.{option}={given}: write a list, robustness.{option}=[{given}]"
                )
        if not self.wanted:
            raise ConfigError("robustness: corruptions and severities must name at least one each")

    @property
    def wanted(self) -> list[Corruption]:
        """The corruptions whose features `measure` reads."""
        return [
            Corruption(name, severity, self.seed)
            for name in self.corruptions
            for severity in self.severities
        ]

    def measure(self, features: Features, truth: Classes) -> list[Measurement]:
        probe = self.fit(features, truth)
        clean = correct(probe.predict(features.test), truth.test)
        found = []
        for name in self.corruptions:
            each = [
                correct(probe.predict(features.under(name, severity)), truth.test)
                for severity in self.severities
            ]
            details = {
                str(severity): float(part.mean())
                for severity, part in zip(self.severities, each, strict=True)
            }
            found.append(
                Measurement("accuracy", MeanOf(np.mean(each, axis=0)), name, details=details)
            )
        mean = np.mean([one.statistic.values for one in found], axis=0)  # type: ignore[attr-defined]
        return [
            Measurement(
                metric="accuracy",
                statistic=MeanOf(mean),
                variant="mean",
                validation=probe.validation,
                chosen={"strength": probe.strength},
                details={"clean": float(clean.mean())},
            ),
            *found,
        ]
