"""What an alignment is: the interface, the token loss, and how grids of different size meet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError
from ...kernels import alignment_loss
from ..students import StudentOutput

Grid = tuple[int, int]


class SpaceTarget(Protocol):
    """What an alignment needs to know of a space; ``cache.SpaceSpec`` is one."""

    @property
    def teacher(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def grid(self) -> Grid | None: ...


@dataclass(frozen=True)
class Space:
    """The plainest `SpaceTarget`."""

    teacher: str
    tokens: int
    dim: int
    grid: Grid | None


class Codes(NamedTuple):
    """Standardised tokens as the store holds them: codes int8 [B, N, D] times scales [B, N]."""

    codes: Tensor
    scales: Tensor

    def decode(self) -> Tensor:
        """The tokens, float32 [B, N, D]."""
        return self.codes.float() * self.scales.float().unsqueeze(-1)


Target = Tensor | Codes
"""Standardised tokens [B, N, D] of a space: floats, or codes that stay codes where they can."""


class AlignmentOutput(NamedTuple):
    """One evaluation of an alignment on a batch.

    Attributes:
        loss: scalar float32 with gradient; what the optimiser minimises.
        losses: detached scalar float32 per space, unweighted, for the log.
        by_teacher: scalar float32 with gradient per teacher: the weighted sum of its spaces' terms,
            before teachers are balanced against each other. `loss` is their balanced combination.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    by_teacher: dict[str, Tensor]


class Alignment(nn.Module, ABC):
    """Draws a student to the cached spaces of several teachers.

    A subclass gives predictions; this class owns what every alignment shares, so that alignments
    differ in their predictions alone. With teachers t, dense spaces s (tokens on a grid) and the
    descriptor d_t of each teacher:

        loss = sum_t l(d^_t, d_t) + dense_weight * sum_s mean_n l(x^_sn, x_sn)

    where l is `token_loss` on standardised targets. A teacher's descriptor is its global space; a
    teacher with several has one term for each, and a teacher with none is given the mean of the
    tokens of its last dense space, so that every alignment is asked for the same things.

    Args:
        student_dim: width C of the student's tokens.
        student_grid: (rows, columns) of the student's tokens.
        spaces: what the store holds, per space; the alignment learns all of them.
        pooled_dim: width P of the student's descriptor; C where not given.
        dense_weight: weight of the token terms; at 0 they are not computed.
        match: where grids differ, "teacher" resamples the student's prediction to the teacher's
            grid and "student" resamples the teacher's tokens to the student's grid.
    """

    readouts: ClassVar[Mapping[str, str]] = {"pooled": "the backbone's own descriptor"}
    """Names that `readout` takes, each with what it is."""

    def __init__(
        self,
        student_dim: int,
        student_grid: Grid,
        spaces: Mapping[str, SpaceTarget],
        *,
        pooled_dim: int | None = None,
        dense_weight: float = 0.3,
        match: Literal["teacher", "student"] = "teacher",
    ) -> None:
        super().__init__()
        if not spaces:
            raise ConfigError("an alignment needs at least one space; align.spaces names none")
        if match not in ("teacher", "student"):
            raise ConfigError(f"align.match={match}: valid are teacher, student")
        self.student_dim, self.student_grid = student_dim, student_grid
        self.pooled_dim = student_dim if pooled_dim is None else pooled_dim
        self.spaces = dict(spaces)
        self.dense_weight, self.match = dense_weight, match
        self.dense = [name for name, space in spaces.items() if space.grid is not None]
        self.descriptors = descriptor_spaces(spaces)
        self.grids = nn.ModuleDict()
        for name in self.dense:
            grid = spaces[name].grid
            assert grid is not None
            ends = (student_grid, grid) if match == "teacher" else (grid, student_grid)
            self.grids[module_key(name)] = GridResample(*ends)

    @property
    def required_spaces(self) -> list[str]:
        """Spaces whose tokens `forward` reads: the trainer fetches these and no others."""
        if self.dense_weight:
            return list(self.spaces)
        return list(dict.fromkeys(self.descriptors.values()))

    @abstractmethod
    def predict(self, output: StudentOutput, *, dense: bool) -> Predictions:
        """Predictions of the standardised targets.

        Args:
            output: the student's tokens [B, N, C] and descriptor [B, P].
            dense: whether the token predictions are wanted.
        """

    def forward(self, output: StudentOutput, targets: Mapping[str, Target]) -> AlignmentOutput:
        """The loss on one batch.

        Args:
            output: the student's tokens [B, N, C] and descriptor [B, P].
            targets: standardised tokens [B, N_s, D_s] per space of `required_spaces`.
        """
        predicted = self.predict(output, dense=bool(self.dense_weight))
        losses: dict[str, Tensor] = {}
        by_teacher: dict[str, Tensor] = {}

        def add(space: str, term: Tensor) -> None:
            teacher = self.spaces[space].teacher
            by_teacher[teacher] = by_teacher[teacher] + term if teacher in by_teacher else term

        for label, space in self.descriptors.items():
            target = targets[space]
            if self.spaces[space].grid is not None:
                target = _floats(target).mean(1, keepdim=True)
            term = token_loss(predicted.descriptors[label].unsqueeze(1), target)
            add(space, term)
            losses[label] = term.detach()
        for space in self.dense if self.dense_weight else ():
            prediction, target = predicted.dense[space], targets[space]
            resample = self.grids[module_key(space)]
            if self.match == "teacher":
                prediction = resample(prediction)
            else:
                target = resample(_floats(target))
            term = token_loss(prediction, target)
            add(space, self.dense_weight * term)
            losses[space] = term.detach()
        return AlignmentOutput(torch.stack(list(by_teacher.values())).sum(), losses, by_teacher)

    def readout(self, output: StudentOutput, kind: str = "pooled") -> Tensor:
        """The feature that an evaluation uses, [B, K] float.

        Raises:
            ConfigError: the alignment has no readout of that name.
        """
        if kind not in self.readouts:
            raise ConfigError(
                f"readout {kind!r}: {type(self).__name__} has {', '.join(self.readouts)}"
            )
        return self._readout(output, kind)

    def _readout(self, output: StudentOutput, kind: str) -> Tensor:
        return output.pooled

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are to stay undecayed."""
        return set()


@dataclass(frozen=True)
class Predictions:
    """What a student says about the spaces, standardised.

    Attributes:
        descriptors: [B, D] float per descriptor label (a key of `Alignment.descriptors`).
        dense: [B, N, D] float on the student's grid per dense space; empty where not wanted.
    """

    descriptors: dict[str, Tensor]
    dense: dict[str, Tensor]


def token_loss(prediction: Tensor, target: Target) -> Tensor:
    """0.9 (1 - cos) + 0.1 smooth-L1 (beta 1, mean over dimensions), averaged over all tokens.

    Computed in float32 whatever the prediction is, autocast or not, and without a float copy of
    codes. The weights are Theia's (Shang et al. 2024, arXiv:2407.20179).

    Args:
        prediction: [B, N, D] float.
        target: [B, N, D], standardised.

    Returns:
        Scalar float32 (float64 for a float64 prediction).
    """
    tokens, scales = target if isinstance(target, Codes) else (target, None)
    with torch.autocast(prediction.device.type, enabled=False):
        terms = alignment_loss(prediction, tokens, scales)
    return 0.9 * terms.cosine + 0.1 * terms.smooth_l1


def _floats(target: Target) -> Tensor:
    return target.decode() if isinstance(target, Codes) else target


class GridResample(nn.Module):
    """Tokens of one grid on another, by one fixed matrix [N_to, N_from].

    Bilinear with half-pixel centres and edges held; where the grid shrinks the triangle widens by
    the ratio, so that every source token counts (antialiasing). Rows sum to one: constants stay,
    and resampling commutes with any linear projection. As a matrix it runs everywhere and its
    gradient is deterministic on CUDA, which the interpolation kernels' is not.
    """

    matrix: Tensor | None

    def __init__(self, source: Grid, target: Grid) -> None:
        super().__init__()
        self.source, self.target = source, target
        matrix = None
        if source != target:
            count = source[0] * source[1]
            basis = torch.eye(count).view(count, 1, *source)
            resized = functional.interpolate(basis, target, mode="bilinear", antialias=True)
            matrix = resized.flatten(1).t().contiguous()
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N_from, D] float to [B, N_to, D].

        Raises:
            ValueError: the tokens are not those of the source grid.
        """
        if tokens.shape[-2] != self.source[0] * self.source[1]:
            raise ValueError(f"{tokens.shape[-2]} tokens are not a grid of {self.source}")
        return tokens if self.matrix is None else torch.matmul(self.matrix.to(tokens.dtype), tokens)


def module_key(space: str) -> str:
    """A space's name as a key of `nn.ModuleDict`, which takes no dots."""
    return space.replace(".", "_dot_")


def select_spaces(
    available: Mapping[str, SpaceTarget], wanted: Sequence[str] | None, where: str = "the store"
) -> dict[str, SpaceTarget]:
    """The spaces that a configuration asks for; all that there are where it names none.

    A name may be a space (``dinov2_b/patch``) or a teacher (``dinov2_b``: all of its spaces).

    Raises:
        ConfigError: a name is neither; the message lists what is there.
    """
    if wanted is None:
        return dict(available)
    chosen: dict[str, SpaceTarget] = {}
    for name in wanted:
        found = {key: space for key, space in available.items() if name in (key, space.teacher)}
        if not found:
            raise ConfigError(
                f"align.spaces names {name!r}, which {where} does not hold; there are "
                f"{', '.join(available) or 'none'}"
            )
        chosen |= found
    return chosen


def descriptor_mlp(source: int, hidden: int, target: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear: [B, source] to [B, target]."""
    return nn.Sequential(
        nn.LayerNorm(source), nn.Linear(source, hidden), nn.GELU(), nn.Linear(hidden, target)
    )


def dense_projector(source: int, target: int) -> nn.Sequential:
    """LayerNorm and one Linear: [B, N, source] to [B, N, target]."""
    return nn.Sequential(nn.LayerNorm(source), nn.Linear(source, target))


def descriptor_spaces(spaces: Mapping[str, SpaceTarget]) -> dict[str, str]:
    """Label of each teacher's descriptor -> the space whose token mean it is.

    A global space stands for itself; a teacher without one is given the label ``SPACE:mean`` of its
    last dense space.
    """
    found = {name: name for name, space in spaces.items() if space.grid is None}
    with_own = {spaces[name].teacher for name in found}
    stand_ins: dict[str, str] = {}
    for name, space in spaces.items():
        if space.teacher not in with_own:
            stand_ins[space.teacher] = name  # the last one stays
    return found | {f"{name}:mean": name for name in stand_ins.values()}
