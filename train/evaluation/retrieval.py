"""Retrieval: how well images of a test image's class are ranked by similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import ASKED, CPU, Array, Features, Labels, Measurement, Protocol
from .intervals import MeanOf
from .search import cosines, unit, unit_blocks
from .truths import Classes

_COMPARED = 2**28  # similarities that are held at once, of 4 bytes
_RANKED = 2**24  # of those, which are sorted at once, of some 64 bytes meanwhile


@dataclass(frozen=True)
class Retrieval(Protocol[Classes]):
    """Mean average precision: test images are queries, training images the gallery.

    The gallery is ranked by cosine similarity, and an image is relevant if it has the query's
    class. With R relevant images at the ranks r_1 < ... < r_R,

        AP = 1/R sum_i i / r_i ,

    over the whole ranking; mAP is its mean over queries (Manning et al. 2008, section 8.4). There
    is nothing to choose. Queries whose class the gallery lacks count as 0. The validation figure
    takes the held-out training images, 50,000 of them at most, as queries and the others as the
    gallery; there is none where every class has a single image.
    """

    truth: ClassVar[type[Classes]] = Classes

    def measure(self, features: Features, truth: Classes) -> list[Measurement]:
        validation = None
        if np.unique(truth.train, return_counts=True)[1].max() > 1:
            fit, held = self.split(len(truth.train), truth.train)
            held = held[:ASKED]  # in random order
            held_out = average_precision(
                features.train[fit],
                truth.train[fit],
                features.train[held],
                truth.train[held],
                self.device,
            )
            validation = float(held_out.mean())
        found = average_precision(
            features.train, truth.train, features.test, truth.test, self.device
        )
        return [Measurement(metric="mAP", statistic=MeanOf(found), validation=validation)]


def average_precision(
    gallery: Array,
    labels: Labels,
    queries: Array,
    truth: Labels,
    device: torch.device = CPU,
) -> NDArray[np.float64]:
    """Average precision of each query's ranking of the gallery: float64 [q].

    Equal similarities keep the gallery's order. On the device lie at most 2 GiB of similarities,
    1 GiB for their sorting (or what one query needs, if that is more), and a block of the gallery:
    see `search.GALLERY`.

    Args:
        gallery: [n, D].
        labels: [n].
        queries: [q, D].
        truth: [q], the class that is relevant.
        device: computes.
    """
    kept, asked = torch.from_numpy(gallery), torch.from_numpy(queries)
    classes, wanted = (torch.from_numpy(part).to(device) for part in (labels, truth))
    compared, ranked = (max(1, most // len(kept)) for most in (_COMPARED, _RANKED))
    found = []
    for chunk, kinds in zip(asked.split(compared), wanted.split(compared), strict=True):
        similarity = torch.empty(len(chunk), len(kept), device=device)
        own = unit(chunk, device)
        for start, block in unit_blocks(kept, device):
            similarity[:, start : start + len(block)] = cosines(own, block)
        for row, kind in zip(similarity.split(ranked), kinds.split(ranked), strict=True):
            found.append(_precision(row, classes, kind).cpu())
    return torch.cat(found).numpy()


def _precision(similarity: Tensor, classes: Tensor, kinds: Tensor) -> Tensor:
    """Average precision of rankings by similarity [q, n] of classes [n]: float64 [q]."""
    order = similarity.argsort(dim=1, descending=True, stable=True)
    relevant = classes[order] == kinds[:, None]
    del order
    ranks = torch.arange(1, len(classes) + 1, dtype=torch.float64, device=classes.device)
    precision = relevant.cumsum(1, dtype=torch.float64)
    precision.div_(ranks).mul_(relevant)
    return precision.sum(1) / relevant.sum(1).clamp(min=1)
