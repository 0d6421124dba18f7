"""The untrained floor: each student's architecture with its initial, random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..batch import normalise
from ..batch_norm import BATCH, IMAGES, batch_norms, settle_batch_norms, settling_images
from ..loading import decoded
from ..students import Student
from ..views import choose_views
from .features import LabelledRows
from .runs import Run


def floor_names(runs: Sequence[Run], names: Mapping[Path, str]) -> dict[str, str]:
    """The name of each untrained student, by `Run.untrained`: the model's, and its seed. Where
    several have one, being of other options, the run tells them apart."""
    first = {run.untrained: run for run in reversed(runs)}
    labels = {
        described: f"{run.model['student']['name']}-s{run.model['seed']}"
        for described, run in first.items()
    }
    of_several = {label for label, count in Counter(labels.values()).items() if count > 1}
    return {
        described: f"{label} of {names[first[described].folder]}" if label in of_several else label
        for described, label in labels.items()
    }


def settled_on(student: Student, images: LabelledRows) -> dict[str, Any]:
    """What determines the statistics that `settle` gives, as JSON; nothing without batch norms."""
    if not batch_norms(student):
        return {}
    return {"settled": {**images.identity, "images": IMAGES, "batch": BATCH}}


def settle(
    student: Student,
    images: LabelledRows,
    device: torch.device,
    *,
    workers: int,
    interpolation: str,
    max_pixels: int | None,
) -> None:
    """Settle the batch norms of an untrained student on some of the images, in float32.

    Raises:
        DataError: the images are not those of the store.
    """
    if not batch_norms(student):
        return
    views, _ = choose_views(
        images.cache, lambda: images.index, student.size,
        interpolation=interpolation, max_pixels=max_pixels,
    )  # fmt: skip
    parts = [images.rows[part] for part in settling_images(len(images.rows))]
    orders = [[(int(row), 0) for row in part] for part in parts]
    student.to(device)
    settle_batch_norms(
        student, (normalise(pixels, device) for pixels in decoded(views, orders, workers))
    )
