"""Whether teachers pull a student's weights in opposite directions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ...cache import Cache, SampleIndex
from ...train.alignment import Alignment
from ...train.batch import to_device
from ...train.data import TrainData
from ...train.students import Student
from ...train.views import StoredViews
from .plan import Plan

BATCHES, BATCH = 4, 64


def weight_cosines(plan: Plan, student: Student, alignment: Alignment) -> dict[str, float]:
    """Cosine of every two teachers' gradients with respect to all weights of the backbone.

    The gradients are those of each teacher's share of the loss, summed over 256 images of the pool,
    with the heads as they are. Below 0 a step along one teacher's gradient raises the other's loss.
    """
    cache = Cache.open(plan.store)
    views = StoredViews(cache, SampleIndex.from_shards(plan.shards), student.size)
    data = TrainData(cache, views, alignment.required_spaces, BATCH, seed=1)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    sums: dict[str, list[Tensor]] = {}
    student.eval()
    alignment.eval()
    for batch in data.batches(0, min(BATCHES, data.steps_per_epoch)):
        pixels, targets = to_device(batch, weights[0].device)
        terms = alignment(alignment.run_student(student, pixels), targets).by_teacher
        for teacher, term in terms.items():
            parts = torch.autograd.grad(term, weights, retain_graph=True, materialize_grads=True)
            before = sums.setdefault(teacher, [torch.zeros_like(weight) for weight in weights])
            for total, part in zip(before, parts, strict=True):
                total += part
    flat = {name: torch.cat([part.flatten() for part in parts]) for name, parts in sums.items()}
    return {
        f"{a}~{b}": float(torch.nn.functional.cosine_similarity(flat[a], flat[b], dim=0))
        for a, b in itertools.combinations(flat, 2)
    }
