"""How the losses of several teachers become one. A new way is one class and one line here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import ConfigError


class Balance(nn.Module, ABC):
    """Combines L_t, one scalar a teacher, into the loss.

    Args:
        teachers: names, in order.
        weights: w_t of some of them; the others have 1.

    Raises:
        ConfigError: a weight is negative or belongs to nobody.
    """

    weights: Tensor

    def __init__(self, teachers: Sequence[str], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.teachers = list(teachers)
        if weights is not None and not isinstance(weights, Mapping):
            raise ConfigError(
                f"align.weights={weights}: expected a number by teacher, such as "
                f"{{{self.teachers[0]}: 2}}"
            )
        given = dict(weights or {})
        for name, value in given.items():
            if name not in self.teachers:
                raise ConfigError(
                    f"align.weights names {name!r}, which is no teacher of this run; there are "
                    f"{', '.join(self.teachers)}"
                )
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigError(f"align.weights.{name}={value}: a weight is at least 0")
        values = [float(given.get(name, 1.0)) for name in self.teachers]
        if not any(values):
            raise ConfigError("align.weights: every teacher has the weight 0")
        self.register_buffer("weights", torch.tensor(values), persistent=False)

    def forward(self, by_teacher: Mapping[str, Tensor], ends: Sequence[Tensor]) -> Tensor:
        """The loss, a float scalar with gradient.

        Args:
            by_teacher: L_t per teacher.
            ends: the tensors through which the losses reach the student.
        """
        losses = torch.stack([by_teacher[name] for name in self.teachers])
        return self.combine(losses, self.weights.to(losses.dtype), ends)

    def factors(self) -> Tensor:
        """What L_t is multiplied by in the loss, [T]: the weights, where nothing else is; on the
        average of what is drawn, and before gradients are projected."""
        return self.weights

    @abstractmethod
    def combine(self, losses: Tensor, weights: Tensor, ends: Sequence[Tensor]) -> Tensor:
        """The loss from L_t [T] and w_t [T]."""


class Fixed(Balance):
    """sum_t w_t L_t."""

    def combine(self, losses: Tensor, weights: Tensor, ends: Sequence[Tensor]) -> Tensor:
        return (weights * losses).sum()


class Normalised(Balance):
    """sum_t w_t L_t / mu_t, with mu_t a running mean of L_t: every teacher pulls equally hard.

    mu is the mean of the first losses and then forgets with the momentum m:

        mu_t <- mu_t + max(1 - m, 1 / n) (L_t - mu_t)         at the n-th forward pass

    so it starts without bias. It counts passes in training only, of which an accumulated step has
    several, and is saved with the weights; where several ranks train, every step begins with rank
    0's (buffers are broadcast).

    Args:
        momentum: m.
    """

    mean: Tensor
    seen: Tensor

    def __init__(
        self,
        teachers: Sequence[str],
        weights: Mapping[str, float] | None = None,
        *,
        momentum: float = 0.99,
    ) -> None:
        super().__init__(teachers, weights)
        if not 0 <= momentum < 1:
            raise ConfigError(f"align.momentum={momentum}: from 0 to below 1")
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(len(self.teachers)))
        self.register_buffer("seen", torch.zeros(()))

    def combine(self, losses: Tensor, weights: Tensor, ends: Sequence[Tensor]) -> Tensor:
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.seen += 1
                rate = torch.clamp(1 / self.seen, min=1 - self.momentum)
                self.mean += rate * (losses.detach().to(self.mean.dtype) - self.mean)
        return (self.factors().to(losses.dtype) * losses).sum()

    def factors(self) -> Tensor:
        # A copy: the next step changes the buffer, and this step's backward pass comes later.
        mean = torch.where(self.seen > 0, self.mean, 1.0)
        return self.weights / mean.clamp_min(1e-12)


class Drop(Balance):
    """Teacher dropping: the teacher with the highest loss stays, each other one is dropped with
    probability p; T / kept times the sum of those that stay. T are those with w_t > 0.

        loss = T / sum_t c_t * sum_t c_t w_t L_t      c_t = 1 for argmax_t w_t L_t, else
                                                      Bernoulli(1 - p)

    From UNIC (Sariyildiz et al. 2024, arXiv:2408.05088), which draws for every image; here one draw
    serves the batch, because each teacher's loss is one number. Draws come from torch's generator,
    whose state checkpoints keep; where several ranks train, each draws for its own part of the
    batch. Nothing is dropped outside training.

    Args:
        p: probability of being dropped.
    """

    def __init__(
        self, teachers: Sequence[str], weights: Mapping[str, float] | None = None, *, p: float = 0.5
    ) -> None:
        super().__init__(teachers, weights)
        if not 0 <= p <= 1:
            raise ConfigError(f"align.drop={p}: a probability, from 0 to 1")
        self.p = p

    def combine(self, losses: Tensor, weights: Tensor, ends: Sequence[Tensor]) -> Tensor:
        losses = weights * losses
        if not (self.training and torch.is_grad_enabled()):
            return losses.sum()
        kept = torch.rand(len(losses), device=losses.device) >= self.p
        kept = kept | (losses.detach() == losses.detach().max())
        asked = (weights > 0).to(losses.dtype)
        share = kept * asked
        return (share * losses).sum() * (asked.sum() / share.sum())


class PCGrad(Balance):
    """Gradients of teachers that conflict are projected before they reach the student.

    With g_t the gradient of w_t L_t at the student's output (all of `ends`, side by side, for the
    whole batch), every g_t loses, for each other teacher u in random order, what points against it:

        h_t <- h_t - min(h_t . g_u, 0) / |g_u|^2 g_u          from h_t = g_t

    The student is trained by sum_t h_t and the heads by sum_t w_t L_t, in one backward pass:

        loss = sum_t w_t L_t + c - stop(c)     c = sum_ends <stop(sum_t h_t - sum_t g_t), end>

    whose value is the plain sum. Source: Yu et al. 2020, "Gradient Surgery for Multi-Task
    Learning", arXiv:2001.06782, algorithm 1, at the shared representation instead of the shared
    parameters. It costs one backward pass through the heads a teacher. Inner products are of one
    rank's part of the batch.
    """

    def combine(self, losses: Tensor, weights: Tensor, ends: Sequence[Tensor]) -> Tensor:
        losses = weights * losses
        total = losses.sum()
        ends = [end for end in ends if end.requires_grad]
        if not (torch.is_grad_enabled() and ends and len(losses) > 1):
            return total
        # Gradients of float16 tensors underflow without the loss scale, which comes later.
        raised = 2.0**12 if any(end.dtype == torch.float16 for end in ends) else 1.0
        # Autocast, within which a loss is computed, is for forward passes: backward ones would meet
        # dtypes that they did not save, and products of small gradients would be 0 in float16.
        with torch.autocast(losses.device.type, enabled=False):
            gradients = []
            for loss in losses.unbind():
                parts = torch.autograd.grad(
                    loss * raised, ends, retain_graph=True, allow_unused=True
                )
                flat = [
                    torch.zeros_like(end, dtype=losses.dtype)
                    if part is None
                    else part.to(losses.dtype)
                    for part, end in zip(parts, ends, strict=True)
                ]
                gradients.append(torch.cat([part.flatten() for part in flat]) / raised)
            stacked = torch.stack(gradients)
            change = projected(stacked).sum(0) - stacked.sum(0)
        surrogate = torch.zeros_like(total)
        for piece, end in zip(change.split([end.numel() for end in ends]), ends, strict=True):
            surrogate = surrogate + (piece.view_as(end) * end.to(piece.dtype)).sum()
        return total + surrogate - surrogate.detach()


def projected(gradients: Tensor) -> Tensor:
    """PCGrad's h_t [T, P] of gradients g_t [T, P]; the order of projections is drawn."""
    products = gradients @ gradients.t()
    # h_t is a combination of the g_u, so that all can be done on coefficients [T, T].
    mix = torch.eye(len(gradients), dtype=gradients.dtype, device=gradients.device)
    for t in range(len(gradients)):
        for u in torch.randperm(len(gradients)).tolist():
            if u == t:
                continue
            along = (mix[t] @ products[:, u]).clamp(max=0)
            square = products[u, u]
            step = torch.where(square > 0, along / square.clamp_min(1e-30), 0.0)
            mix[t, u] -= step
    return mix @ gradients


BALANCES = ("fixed", "normalised", "drop", "pcgrad")


def build_balance(
    kind: str,
    teachers: Sequence[str],
    weights: Mapping[str, float] | None,
    *,
    momentum: float,
    drop: float,
) -> Balance:
    """The balance of that name.

    Raises:
        ConfigError: there is none, or an option has an impossible value.
    """
    if kind == "fixed":
        return Fixed(teachers, weights)
    if kind == "normalised":
        return Normalised(teachers, weights, momentum=momentum)
    if kind == "drop":
        return Drop(teachers, weights, p=drop)
    if kind == "pcgrad":
        return PCGrad(teachers, weights)
    raise ConfigError(f"align.balance={kind}: valid are {', '.join(BALANCES)}")
