"""Relational: distributions of similarity instead of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError
from .base import StudentShape
from .regression import Regression
from .spaces import SpaceTarget, module_key
from .targets import Target, floats


class Relational(Regression):
    """The student is to find similar what the teacher finds similar.

    `Regression`'s predictions, compared by what they are similar to. With unit vectors u(x) =
    x / |x|, a teacher's descriptors d_b of the batch and a memory Q of those that came before:

        descriptor    KL( softmax_j(u(d_b) . u(q_j) / T) || softmax_j(u(d^_b) . u(q_j) / T) ),
                      q over the batch's d and Q, mean over b
        tokens        KL( softmax_m(u(x_n) . u(x_m) / T) || softmax_m(u(x^_n) . u(x^_m) / T) ),
                      n and m over the tokens of one image, mean over n and images

    The latter compares the map's self-similarity, so it is free of rotations of the feature space.
    The form of LightlyTrain's third distillation method (queue of 8,192, T = .07), adapted: several
    teachers, each with its memory; descriptor projectors with a hidden layer as in the other
    alignments; and, until the memory is full, only the entries that are there count.

    The memory is saved with the weights. Of several ranks each compares with its own part of the
    batch, and the memory is rank 0's (buffers are broadcast).

    Args:
        queue: descriptors a teacher that are remembered; 0: the batch alone.
        temperature: T.
        hidden: width of the descriptor projectors' hidden layer.
        **options: those of `Alignment`.
    """

    def __init__(
        self,
        student: StudentShape,
        spaces: Mapping[str, SpaceTarget],
        *,
        queue: int = 1024,
        temperature: float = 0.07,
        hidden: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(student, spaces, hidden=hidden, **options)
        if queue < 0 or not 0 < temperature < float("inf"):
            raise ConfigError(
                f"align: queue={queue} must be at least 0 and temperature={temperature} positive"
            )
        self.queue, self.temperature = queue, temperature
        self.memories = nn.ModuleDict(
            {
                module_key(label): _Memory(queue, spaces[space].dim)
                for label, space in self.descriptors.items()
            }
        )

    def descriptor_loss(self, label: str, prediction: Tensor, target: Target) -> Tensor:
        dtype = _at_least_float32(prediction)
        with torch.autocast(prediction.device.type, enabled=False):
            said = functional.normalize(prediction.squeeze(1).to(dtype), dim=-1)
            true = functional.normalize(floats(target).squeeze(1).to(dtype), dim=-1)
            memory: _Memory = self.memories[module_key(label)]  # type: ignore[assignment]
            keys, there = memory.after(true)
            hidden = ~there
            loss = _divergence(
                (true @ keys.t() / self.temperature).masked_fill(hidden, _NEVER),
                (said @ keys.t() / self.temperature).masked_fill(hidden, _NEVER),
            )
        if self.training and torch.is_grad_enabled():
            memory.add(true)
        return loss

    def dense_loss(self, space: str, prediction: Tensor, target: Target) -> Tensor:
        dtype = _at_least_float32(prediction)
        with torch.autocast(prediction.device.type, enabled=False):
            said = functional.normalize(prediction.to(dtype), dim=-1)
            true = functional.normalize(floats(target).to(dtype), dim=-1)
            return _divergence(
                true @ true.transpose(1, 2) / self.temperature,
                said @ said.transpose(1, 2) / self.temperature,
            )


_NEVER = -1e9
"""A logit whose probability is 0 and whose product with 0 is 0."""


def _divergence(true: Tensor, said: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(true) || softmax(said))."""
    log_true, log_said = true.log_softmax(-1), said.log_softmax(-1)
    return (log_true.exp() * (log_true - log_said)).sum(-1).mean()


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Memory(nn.Module):
    """The last descriptors of one teacher, unit vectors; a ring."""

    vectors: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def after(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B + size, D]: a batch [B, D] before the memory; and which of them are there."""
        size = len(self.vectors)
        keys = torch.cat([batch, self.vectors.to(batch.dtype)])
        slots = torch.arange(len(keys), device=batch.device)
        return keys, slots < len(batch) + self.count.clamp(max=size)

    @torch.no_grad()
    def add(self, batch: Tensor) -> None:
        """Write a batch [B, D] over the oldest entries."""
        size = len(self.vectors)
        if not size:
            return
        newest = batch[-size:]
        slots = (self.count + torch.arange(len(newest), device=batch.device)) % size
        # In place, so that DDP goes on knowing the buffers; `after` gave copies.
        self.vectors.index_copy_(0, slots, newest.to(self.vectors.dtype))
        self.count += len(newest)
