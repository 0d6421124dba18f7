"""Periodic k-NN of the student on labelled rows of its own store, held apart from each other."""

from __future__ import annotations

import copy
import sys
from typing import cast

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from ..cache import Cache
from ..errors import ConfigError, DataError, StoreError
from .alignment import Alignment
from .batch import normalise
from .evaluation.knn import knn_predict
from .loading import loaded, prefetched
from .students import Student
from .views import StorePixels, Views

HELD_OUT = 0.2
"""Share of the images that are asked about; the others are the neighbours."""


class KnnMonitor:
    """k-NN accuracy of the backbone's descriptor.

    Of the store's labelled images (their first views) some are drawn once, by the seed; a fifth of
    them are classified by the labels of the rest. The student trains on the pixels of both and sees
    no label, so this tells how a run comes along, not how it would do on unseen images. Drawing
    on the training's random numbers is avoided: a run with the monitor ends with the same bits as
    one without.

    Where the store holds the pixels, groups are drawn in place of images, and all labelled images
    of a group taken: a checksum covers a group, so that one image costs the reading of its whole
    group, and images drawn one by one that of nearly every group of the store, each many times
    over. So each group is read once (by each of two ranks, where their parts meet in it). Which of
    the images are asked about is drawn image by image all the same. In a store whose rows are
    sorted by class a group is of one class, and the figure hangs on fewer classes than images.

    Args:
        images: how many to draw; all where there are fewer. The last group that is drawn is taken
            whole.
        neighbours: k.
        batch_size: rows a forward pass.
        skip: leave damaged images out, and tell of each once, instead of raising what is wrong.

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
        skip: bool = False,
    ) -> None:
        self._fabric, self._neighbours, self._batch = fabric, neighbours, batch_size
        self._workers, self._skip = workers, skip
        self._told: set[str] = set()
        self._views = copy.copy(views)
        self._views.jitter = self._views.crop = None
        labels = np.asarray(cache.labels, dtype=np.int64)
        count = cache.plan.views_a_sample
        first = np.arange(len(cache)) % count == 0
        rows = np.flatnonzero(first & np.asarray(cache.valid, dtype=bool) & (labels >= 0))
        random = np.random.default_rng(seed)
        self._group = cache.plan.group_rows if isinstance(views, StorePixels) else None
        if self._group is None:
            rows = random.permutation(rows)[:images]
        else:
            rows = _of_groups(rows, self._group, images, random)
        rows = rows[: len(rows) // fabric.world_size * fabric.world_size]
        asked = np.arange(len(rows)) < round(HELD_OUT * len(rows))
        if self._group is not None:  # these rows are in the store's order
            asked = random.permutation(asked)
        if not asked.any():
            raise ConfigError(
                f"log.knn_every: the store has {len(rows)} labelled images (.cls), too few to hold "
                "some out; say log.knn_every=0"
            )
        self._rows, self._labels = rows, torch.from_numpy(labels[rows])
        self._asked = torch.from_numpy(asked)

    def accuracy(self, student: Student, alignment: Alignment) -> float | None:
        """Share of the held-out images that are classified as labelled; a collective call.

        None where damage leaves none to ask about, or none to be their neighbours.

        Raises:
            DataError, StoreError: a damaged image or group, where they are not skipped.
        """
        was_training = student.training, alignment.training
        student.eval()
        alignment.eval()
        try:
            features, sound = self._features(student, alignment)
        finally:
            student.train(was_training[0])
            alignment.train(was_training[1])
        asked, known = self._asked & sound, ~self._asked & sound
        if not asked.any() or not known.any():
            return None
        predicted = knn_predict(
            features[known], self._labels[known], features[asked], k=self._neighbours
        )
        return float((predicted == self._labels[asked]).double().mean())

    @torch.no_grad()
    def _features(self, student: Student, alignment: Alignment) -> tuple[Tensor, Tensor]:
        """Descriptors float32 [n, P] and which of them mean anything, bool [n], both on the CPU.

        Every rank computes its share, of damaged images too, so that shares stay equal.
        """
        fabric = self._fabric
        if fabric.world_size > 1:
            # Running statistics are each rank's own; those of the first one are saved.
            for buffer in (*student.buffers(), *alignment.buffers()):
                torch.distributed.broadcast(buffer, 0)
        own = np.split(self._rows, fabric.world_size)[fabric.global_rank]
        orders = [
            [(int(row), 0) for row in part]
            for part in _read_together(own, self._group or 1, self._batch)
        ]
        found, sound = [], torch.ones(len(own), dtype=torch.long)
        done = 0
        for pixels, problems in prefetched(loaded(self._views, orders, self._workers), 2):
            for place in sorted(problems):
                self._leave_out(problems[place])
                sound[done + place] = 0
            done += len(pixels)
            for batch in pixels.split(self._batch):
                inputs = fabric.strategy.precision.convert_input(normalise(batch, fabric.device))
                with fabric.autocast():
                    output = alignment.run_student(student, inputs)
                    found.append(output.pooled.float())
        gathered, kept = (
            cast(Tensor, fabric.all_gather(part)).view(len(self._rows), -1).cpu()
            for part in (torch.cat(found), sound.to(fabric.device))
        )
        return gathered, kept[:, 0] > 0

    def _leave_out(self, problem: DataError | StoreError) -> None:
        if not self._skip:
            raise problem
        if str(problem) not in self._told:
            self._told.add(str(problem))
            print(f"warning: left out of the k-NN: {problem}", file=sys.stderr, flush=True)


def _of_groups(
    rows: NDArray[np.int64], group: int, count: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Of ascending rows all those of random groups, as few as hold ``count``; ascending."""
    groups, counts = np.unique(rows // group, return_counts=True)
    order = random.permutation(len(groups))
    enough = int(np.searchsorted(np.cumsum(counts[order]), count)) + 1
    return rows[np.isin(rows // group, groups[order[:enough]])]


def _read_together(rows: NDArray[np.int64], group: int, count: int) -> list[NDArray[np.int64]]:
    """Rows cut into parts of ``count`` or more, but never within a group."""
    cuts = [0]
    for end in np.flatnonzero(np.diff(rows // group)) + 1:
        if end - cuts[-1] >= count:
            cuts.append(int(end))
    return np.split(rows, cuts[1:])
