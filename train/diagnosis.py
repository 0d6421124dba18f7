"""How the teachers' pulls relate, and whether the student still tells images apart; sampled."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from .alignment import Alignment, AlignmentOutput
from .students import StudentOutput

COLLAPSED = 0.01
"""Spread below which tokens are called collapsed."""


def teacher_gradients(
    terms: Mapping[str, Tensor],
    shared: Sequence[Tensor],
    scale: float = 1.0,
    factors: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Share of each teacher in the gradient, and the angles between the teachers' gradients.

    The gradients are those at the student's output: its tokens, its descriptor and what else an
    alignment reads of it. That is the last thing that all teachers share, and where the gradient of
    every weight of the backbone comes from.
    Sener and Koltun 2018 (arXiv:1810.04650, section 3.3) bound the conflict on the weights by the
    one there; it costs no pass through the backbone. Frees nothing: the loss can go backward after.

    Args:
        terms: scalar loss with gradient per teacher.
        shared: tensors of the student's output, part of the graph of the terms.
        scale: factor for the way back, where gradients of half precision would vanish.
        factors: of the terms in the loss; None: 1.

    Returns:
        ``share/TEACHER``: norm of its gradient, times its factor, over the sum of all teachers';
        ``conflict/A~B``: cosine between two teachers' gradients, below 0 where they oppose;
        ``conflict/least``: the least of them. Nothing for a single teacher.
    """
    if len(terms) < 2:
        return {}
    gradients = {}
    for teacher, term in terms.items():
        parts = torch.autograd.grad(
            term * scale, list(shared), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        gradients[teacher] = torch.cat([part.float().flatten() for part in parts])
    norms = {teacher: gradient.norm() for teacher, gradient in gradients.items()}
    pulls = {name: norm * (factors[name] if factors else 1) for name, norm in norms.items()}
    total = torch.stack(list(pulls.values())).sum().clamp_min(1e-30)
    found = {f"share/{teacher}": pull / total for teacher, pull in pulls.items()}
    cosines = {
        f"conflict/{a}~{b}": torch.dot(gradients[a], gradients[b])
        / (norms[a] * norms[b]).clamp_min(1e-30)
        for a, b in itertools.combinations(terms, 2)
    }
    found |= cosines | {"conflict/least": torch.stack(list(cosines.values())).min()}
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def spread(features: Tensor) -> float:
    """How far features of different images lie apart, of their size: 0 where all are the same.

    The root of their variance over the batch, over the root of their mean square. With an update of
    many images it is 1 for independent centred features.

    Args:
        features: [B, K] float, B at least 2.
    """
    values = features.float()
    variance = values.var(0, correction=0).mean()
    return float((variance / values.square().mean().clamp_min(1e-30)).sqrt())


@torch.no_grad()
def spreads(alignment: Alignment, features: StudentOutput) -> dict[str, float]:
    """`spread` of the descriptor, and of the model tokens where the alignment has such."""
    if len(features.pooled) < 2:
        return {}
    found = {"spread/pooled": spread(features.pooled)}
    if "tokens" in alignment.readouts:
        found["spread/model_tokens"] = spread(alignment.readout(features, "tokens"))
    return found


class Diagnosis:
    """Takes the samples of a run, and warns once when tokens have collapsed.

    Args:
        after: step from which a small spread is an alarm: model tokens begin all alike.
    """

    def __init__(self, fabric: Fabric, alignment: Alignment, after: int) -> None:
        self._fabric, self._alignment, self._after = fabric, alignment, after
        self._warned = False

    def sample(self, step: int, seen: tuple[StudentOutput, AlignmentOutput]) -> dict[str, float]:
        """Means over all ranks of `teacher_gradients` and `spreads`; before the loss goes back."""
        features, output = seen
        scaler = getattr(self._fabric.strategy.precision, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        balance = self._alignment.balance
        factors = dict(zip(balance.teachers, balance.factors(), strict=True))
        local = teacher_gradients(output.by_teacher, features.ends(), scale, factors)
        with self._fabric.autocast():
            local |= spreads(self._alignment, features)
        values = torch.tensor(list(local.values()), device=self._fabric.device)
        means = cast(Tensor, self._fabric.all_reduce(values, reduce_op="mean")).tolist()
        found = dict(zip(local, means, strict=True))
        if step >= self._after and not self._warned and self._fabric.global_rank == 0:
            self._alarm(step, found)
        return found

    def _alarm(self, step: int, found: Mapping[str, float]) -> None:
        for name, value in found.items():
            if name.startswith("spread/") and value < COLLAPSED:
                self._warned = True
                print(
                    f"warning: {name} is {value:.4f} at step {step}: the student gives all images "
                    "nearly the same features; lower recipe.lr, or look at the loss of each space",
                    file=sys.stderr,
                )
