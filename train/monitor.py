"""Periodic k-NN of the student on labelled rows of its own store, held apart from each other."""

from __future__ import annotations

import copy

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from ..cache import Cache
from ..errors import ConfigError
from .alignment import Alignment
from .data import Views, decoded, normalise, prefetched
from .evaluation.knn import knn_predict
from .students import Student

HELD_OUT = 0.2
"""Share of the images that are asked about; the others are the neighbours."""


class KnnMonitor:
    """k-NN accuracy of the backbone's descriptor.

    Of the store's labelled images (their first views) some are drawn once, by the seed; a fifth of
    them are classified by the labels of the rest. The student trains on the pixels of both and sees
    no label, so this tells how a run comes along, not how it would do on unseen images. Drawing
    on the training's random numbers is avoided: a run with the monitor ends with the same bits as
    one without.

    Args:
        images: how many to draw; all where there are fewer.
        neighbours: k.
        batch_size: rows a forward pass.

    Raises:
        ConfigError: the store has too few labelled images to split.
    """

    def __init__(
        self,
        fabric: Fabric,
        cache: Cache,
        views: Views,
        *,
        images: int,
        neighbours: int,
        seed: int,
        batch_size: int,
        workers: int,
    ) -> None:
        self._fabric, self._neighbours, self._batch = fabric, neighbours, batch_size
        self._workers = workers
        self._views = copy.copy(views)
        self._views.jitter = self._views.crop = None
        labels = np.asarray(cache.labels, dtype=np.int64)
        count = int(cache.manifest.plan.views["count"])
        first = np.arange(len(cache)) % count == 0
        rows = np.flatnonzero(first & np.asarray(cache.valid, dtype=bool) & (labels >= 0))
        rows = np.random.default_rng(seed).permutation(rows)[:images]
        rows = rows[: len(rows) // fabric.world_size * fabric.world_size]
        self._asked = round(HELD_OUT * len(rows))
        if not self._asked:
            raise ConfigError(
                f"log.knn_every: the store has {len(rows)} labelled images (.cls), too few to hold "
                "some out; say log.knn_every=0"
            )
        self._rows, self._labels = rows, torch.from_numpy(labels[rows])

    def accuracy(self, student: Student, alignment: Alignment) -> float:
        """Share of the held-out images that are classified as labelled; a collective call."""
        was_training = student.training, alignment.training
        student.eval()
        alignment.eval()
        try:
            features = self._features(student, alignment)
        finally:
            student.train(was_training[0])
            alignment.train(was_training[1])
        asked = self._asked
        predicted = knn_predict(
            features[asked:], self._labels[asked:], features[:asked], k=self._neighbours
        )
        return float((predicted == self._labels[:asked]).double().mean())

    @torch.no_grad()
    def _features(self, student: Student, alignment: Alignment) -> Tensor:
        """Descriptors float32 [n, P] on the CPU; every rank computes its share."""
        fabric = self._fabric
        own = self._rows[fabric.global_rank :: fabric.world_size]
        parts = np.split(own, range(self._batch, len(own), self._batch))
        orders = [[(int(row), 0) for row in part] for part in parts]
        found = []
        for pixels in prefetched(decoded(self._views, orders, self._workers), 2):
            inputs = fabric.strategy.precision.convert_input(normalise(pixels, fabric.device))
            with fabric.autocast():
                output = alignment.run_student(student, inputs)
                found.append(output.pooled.float())
        gathered = fabric.all_gather(torch.cat(found))
        assert isinstance(gathered, Tensor)
        # [world, n / world, P], rank r holding rows r, r + world, ...: back into the rows' order.
        return gathered.view(fabric.world_size, len(own), -1).transpose(0, 1).flatten(0, 1).cpu()
