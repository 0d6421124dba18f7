"""Retrieval: how well images of a test image's class are ranked by similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from .base import Array, Features, Labels, Measurement, Protocol
from .intervals import MeanOf
from .truths import Classes

_CHUNK = 4_000_000  # similarities that are sorted at once


@dataclass(frozen=True)
class Retrieval(Protocol[Classes]):
    """Mean average precision: test images are queries, training images the gallery.

    The gallery is ranked by cosine similarity, and an image is relevant if it has the query's
    class. With R relevant images at the ranks r_1 < ... < r_R,

        AP = 1/R sum_i i / r_i ,

    over the whole ranking; mAP is its mean over queries (Manning et al. 2008, section 8.4). There
    is nothing to choose. Queries whose class the gallery lacks count as 0. The validation figure
    takes the held-out training images as queries and the others as the gallery.
    """

    truth: ClassVar[type[Classes]] = Classes

    def measure(self, features: Features, truth: Classes) -> list[Measurement]:
        fit, held = self.split(len(truth.train), truth.train)
        held_out = average_precision(
            features.train[fit], truth.train[fit], features.train[held], truth.train[held]
        )
        found = average_precision(features.train, truth.train, features.test, truth.test)
        return [
            Measurement(metric="mAP", statistic=MeanOf(found), validation=float(held_out.mean()))
        ]


def average_precision(
    gallery: Array, labels: Labels, queries: Array, truth: Labels
) -> NDArray[np.float64]:
    """Average precision of each query's ranking of the gallery: float64 [q].

    Equal similarities keep the gallery's order.

    Args:
        gallery: [n, D].
        labels: [n].
        queries: [q, D].
        truth: [q], the class that is relevant.
    """
    kept = functional.normalize(torch.from_numpy(gallery).float(), dim=1)
    asked = functional.normalize(torch.from_numpy(queries).float(), dim=1)
    classes, wanted = torch.from_numpy(labels), torch.from_numpy(truth)
    ranks = torch.arange(1, len(kept) + 1, dtype=torch.float64)
    found = []
    rows = max(1, _CHUNK // len(kept))
    for chunk, kind in zip(asked.split(rows), wanted.split(rows), strict=True):
        order = (chunk @ kept.t()).argsort(dim=1, descending=True, stable=True)
        relevant = (classes[order] == kind[:, None]).double()
        precision = relevant.cumsum(1) / ranks
        count = relevant.sum(1)
        found.append((precision * relevant).sum(1) / count.clamp(min=1))
    return torch.cat(found).numpy()
