"""Protocols applied alike to whatever features are given, and the figures that they find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError
from .base import Features, Protocol, defined
from .intervals import Bootstrap, Statistic
from .truths import Truth


@dataclass(frozen=True)
class Score:
    """One figure of one feature, with its interval.

    Attributes:
        protocol, variant, task, metric: what was measured.
        value: from the test images.
        low, high: bootstrap interval over the test images; None without resamples.
        validation: the metric where choices were made: on training images that were held out.
        chosen, details: see `Measurement`.
        images: how many test images.
        statistic: gives the figure again under other weights of the test images: paired
            differences are ``Bootstrap().difference(a.statistic, b.statistic, a.images)``.
        resampled: the figure on every resample, float64 [resamples]. Models that were scored on the
            same images with the same `Bootstrap` were given the same resamples, so these may be
            subtracted.
    """

    protocol: str
    variant: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    validation: float | None
    chosen: Mapping[str, Any]
    details: Mapping[str, Any]
    images: int
    statistic: Statistic = field(repr=False, compare=False)
    resampled: NDArray[np.float64] = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        """``knn``, ``fewshot/5-shot``, ``regression@angle``: protocol, variant, task if named."""
        variant = f"/{self.variant}" if self.variant else ""
        return f"{self.protocol}{variant}" + ("" if self.task in DEFAULTS else f"@{self.task}")

    def as_json(self) -> dict[str, Any]:
        """All but the statistic and its resamples."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del found["statistic"], found["resampled"]
        return {
            "key": self.key,
            **found,
            "chosen": dict(self.chosen),
            "details": dict(self.details),
        }


DEFAULTS = ("class", "spaces")
"""Tasks that need no naming: the labels of the store and its spaces."""


@dataclass(frozen=True)
class Suite:
    """Protocols that are applied alike to whatever is given.

    Attributes:
        protocols: by name.
        bootstrap: gives the intervals.
    """

    protocols: Mapping[str, Protocol[Any]]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def on(self, device: torch.device) -> Suite:
        """The same protocols, computed on a device where they can use it.

        Figures agree with the CPU's up to the rounding of sums. What has no float64 is not used.
        """
        if device.type != "cuda":
            return self
        moved = {name: replace(one, device=device) for name, one in self.protocols.items()}
        return replace(self, protocols=moved)

    def reads(self, kind: str) -> bool:
        """Whether some protocol reads such features: see `Protocol.reads`."""
        return any(protocol.reads == kind for protocol in self.protocols.values())

    def check(self, truths: Sequence[Truth]) -> None:
        """Refuse protocols without a task of theirs, and tasks that they cannot use.

        Raises:
            ConfigError: with what is missing.
        """
        for name, protocol in self.protocols.items():
            own = [truth for truth in truths if isinstance(truth, protocol.truth)]
            if not own:
                there = ", ".join(f"{t.name} ({type(t).__name__.lower()})" for t in truths)
                raise ConfigError(
                    f"protocols: {name} needs a task of {protocol.truth.__name__.lower()}; there "
                    f"are {there or 'none'}"
                )
            for truth in own:
                kept = truth.labelled()
                for side, labelled in zip(("training", "test"), kept or (), strict=False):
                    if not labelled.any():
                        raise ConfigError(f"task {truth.name}: no {side} image has a label")
                protocol.check(truth if kept is None else truth.take(*kept))

    def score(self, features: Features, truths: Sequence[Truth]) -> list[Score]:
        """Every figure of the protocols that read such features, in the protocols' order.

        Images without a label for a task are left out of that task.

        Raises:
            ConfigError: features and labels are not of equally many images, or too few.
        """
        found = []
        for name, protocol in self.protocols.items():
            if protocol.reads != features.kind:
                continue
            if protocol.needs_corrupted and not features.corrupted:
                continue
            for truth in truths:
                if isinstance(truth, protocol.truth):
                    found += self._apply(name, protocol, features, truth)
        return found

    def _apply(
        self, name: str, protocol: Protocol[Any], features: Features, truth: Truth
    ) -> list[Score]:
        kept = truth.labelled()
        if kept is not None:
            for side, labelled, part in zip(
                ("training", "test"), kept, (features.train, features.test), strict=True
            ):
                if len(labelled) != len(part):
                    raise ConfigError(
                        f"task {truth.name}: {len(labelled)} {side} labels for {len(part)} images"
                    )
                if not labelled.any():
                    raise ConfigError(f"task {truth.name}: no {side} image has a label")
            if not all(labelled.all() for labelled in kept):
                features, truth = features.take(*kept), truth.take(*kept)
        scores = []
        for one in protocol.measure(features, truth):
            images = len(features.test)
            resampled = self.bootstrap.resampled(one.statistic, images)
            low, high = self.bootstrap.bounds(resampled)
            scores.append(
                Score(
                    protocol=name,
                    variant=one.variant,
                    task=truth.name,
                    metric=one.metric,
                    value=float(one.statistic(np.ones((1, images)))[0]),
                    low=defined(low),
                    high=defined(high),
                    validation=one.validation,
                    chosen=one.chosen,
                    details=one.details,
                    images=images,
                    statistic=one.statistic,
                    resampled=resampled,
                )
            )
        return scores
