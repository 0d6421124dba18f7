"""The supervised reference: the same student, taught by the labels of all tasks' training parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...cache import Cache
from ...options import compose_options, plain
from ...train.alignment import Alignment, build_alignment
from ...train.batch import normalise
from ...train.optimizer import build_optimizer, learning_rate
from ...train.students import Student, StudentOutput, build_student
from .bed import Bed
from .plan import Plan
from .variants import Variant


class Taught(nn.Module):
    """A student with a linear head a task: on its descriptor, or on its tokens for dense tasks.

    Attributes:
        alignment: the heads, under the name that optimisers look for.
    """

    def __init__(self, student: Student, bed: Bed) -> None:
        super().__init__()
        self.student, self.kinds = student, {name: bed.tasks[name]["kind"] for name in bed.tasks}
        self.alignment = nn.ModuleDict()
        for name, kind in self.kinds.items():
            width = student.token_dim if kind == "dense" else student.pooled_dim
            self.alignment[name] = nn.Linear(width, _outputs(bed, name, kind))

    def forward(self, task: str, pixels: Tensor, truth: Tensor) -> Tensor:
        """The loss of a batch of one task."""
        output: StudentOutput = self.student(pixels)
        head = self.alignment[task]
        if self.kinds[task] == "dense":
            share = functional.adaptive_avg_pool2d(truth.float(), self.student.grid).flatten(1)
            return functional.binary_cross_entropy_with_logits(head(output.tokens)[..., 0], share)
        found = head(output.pooled)
        if self.kinds[task] == "regression":
            return functional.mse_loss(found, truth.float())
        return functional.cross_entropy(found, truth)

    def no_weight_decay(self) -> set[str]:
        return {f"student.{name}" for name in self.student.no_weight_decay()}


def train_supervised(
    plan: Plan, student: str, variant: Variant, seed: int
) -> tuple[Student, Alignment]:
    """Train on one task a step, in turn, for the steps of everybody.

    Returns:
        The student, and an untrained alignment that gives its readouts.
    """
    # its heads are one linear layer each, as those of plain supervised training, at its rate
    own = ["recipe=short", f"recipe.steps={plan.steps}", "recipe.alignment_lr=1"]
    options = [*variant.all_options(student), *own]
    config = compose_options("train", [f"cache={plan.store}", "data.shards=unused", *options])
    model = build_student(plain(config.student), seed)
    taught = Taught(model, plan.bed)
    optimizer = build_optimizer(taught, config.recipe)
    random = np.random.default_rng(seed)
    tasks = list(plan.bed.tasks)
    taught.train()
    for step in range(plan.steps):
        task = tasks[step % len(tasks)]
        pixels = plan.bed.pixels[f"{task}/train"]
        rows = random.choice(len(pixels), min(config.recipe.batch_size, len(pixels)), replace=False)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.steps, config.recipe)
        seen = normalise(torch.from_numpy(pixels[rows]), torch.device("cpu"))
        half = plan.precision == "bf16-mixed"
        with plan.computing():
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = taught(task, seen, _truth(plan.bed, task)[rows])
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(taught.parameters(), config.recipe.clip)
        optimizer.step()
    cache = Cache.open(plan.store)
    spaces = {name: cache[name].spec for name in cache.spaces}
    return model, build_alignment(plain(config.align), model, spaces)


def _truth(bed: Bed, task: str) -> Tensor:
    labels = bed.labels[f"{task}/train"]
    kind = bed.tasks[task]["kind"]
    if kind == "dense":
        return torch.from_numpy(labels.masks)
    if kind == "regression":
        spread = labels.targets.std(0)
        return torch.from_numpy((labels.targets - labels.targets.mean(0)) / spread)
    return torch.from_numpy(labels.classes)


def _outputs(bed: Bed, task: str, kind: str) -> int:
    labels = bed.labels[f"{task}/train"]
    if kind == "dense":
        return 1
    return labels.targets.shape[1] if kind == "regression" else int(labels.classes.max()) + 1
