"""What an alignment is: the interface, and the loss that alignments share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import alignment_loss
from ..groups import undecayed
from ..stages import Interaction, Stage
from ..students import StudentOutput
from .balance import build_balance
from .grids import GridPool, GridResample
from .heads import dense_projector, descriptor_mlp
from .spaces import (
    Grid,
    Space,
    SpaceTarget,
    dense_spaces,
    descriptor_spaces,
    module_key,
    select_spaces,
)
from .targets import Codes, StoredSpace, Target, build_units, floats

__all__ = [
    "Alignment",
    "AlignmentOutput",
    "Codes",
    "GridResample",
    "Predictions",
    "Runs",
    "Space",
    "SpaceTarget",
    "StudentShape",
    "Target",
    "Term",
    "dense_projector",
    "descriptor_mlp",
    "descriptor_spaces",
    "module_key",
    "select_spaces",
    "token_loss",
]


class StudentShape(Protocol):
    """The widths, grid and depths that an alignment is built for; `Student` has them."""

    @property
    def token_dim(self) -> int: ...
    @property
    def grid(self) -> Grid: ...
    @property
    def pooled_dim(self) -> int: ...
    @property
    def stages(self) -> tuple[Stage, ...]: ...
    @property
    def patch_dim(self) -> int | None: ...


class Runs(Protocol):
    """A student that can be run, as `Student.forward` says."""

    def __call__(
        self,
        pixels: Tensor,
        *,
        stages: tuple[int, ...] = (),
        interaction: Interaction | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> StudentOutput: ...


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


class Term(NamedTuple):
    """One term of a loss.

    Attributes:
        label: its name in the log.
        teacher: whose it is.
        weight: its factor in that teacher's sum.
        loss: scalar float32 with gradient.
    """

    label: str
    teacher: str
    weight: float
    loss: Tensor


@dataclass(frozen=True)
class Predictions:
    """What a student says about the spaces, in the units of `align.targets`.

    Attributes:
        descriptors: [B, D] float per descriptor label (a key of `Alignment.descriptors`).
        dense: [B, N, D] float on the student's grid per dense space; empty where not wanted.
    """

    descriptors: dict[str, Tensor]
    dense: dict[str, Tensor]


class Alignment(nn.Module, ABC):
    """Draws a student to the cached spaces of several teachers.

    A subclass gives predictions; this class owns what every alignment shares, so that alignments
    differ in their predictions alone, unless they say otherwise. With teachers t, dense spaces s
    (tokens on a grid) and the descriptor d_t of each teacher:

        L_t  = l(d^_t, d_t) + dense_weight * sum_{s of t} mean_n l(x^_sn, x_sn)
        loss = sum_t w_t L_t          (or as `balance` combines them)

    where l is `token_loss` in the units of `targets`. A teacher's descriptor is its global space; a
    teacher with several has one term for each, and a teacher with none is given the mean of the
    tokens of its last dense space, so that every alignment is asked for the same things.

    The interface: `run_student` says what is read of the student (its output; some also its depths,
    or masked images), `required_spaces` which spaces are fetched, `forward` the loss, `readout` the
    features that an evaluation or an export uses and `readout_parameters` what they cost.

    Args:
        student: the widths, grid and depths of the student.
        spaces: what the store holds, per space; the alignment learns all of them.
        stored: gives the open space of a name; fits the units of `targets`. None for a run that is
            loaded, whose weights hold them.
        dense_weight: weight of the token terms; at 0 they are not computed.
        match: where grids differ, "teacher" resamples the student's prediction to the teacher's
            grid and "student" resamples the teacher's tokens to the student's grid.
        targets: units of the targets: "standardise" (unit variance), "phis" (PHI-S) or "none"
            (the teacher's own); see `targets`.
        balance: "fixed", "normalised", "drop" or "pcgrad"; see `balance`.
        weights: w_t by teacher; 1 where not given.
        momentum: of the running means of "normalised".
        drop: probability with which "drop" leaves a teacher out.

    Raises:
        ConfigError: an option has an impossible value, or a grid cannot be resampled.
    """

    readouts: Mapping[str, str] = {
        "pooled": "the backbone's own descriptor",
        "spatial": "the map pooled to 2 x 2, side by side",
        "predictions": "the predicted descriptors of all teachers, side by side",
    }
    """Names that `readout` takes, each with what it is. All alignments have these three."""

    def __init__(
        self,
        student: StudentShape,
        spaces: Mapping[str, SpaceTarget],
        *,
        stored: Callable[[str], StoredSpace] | None = None,
        dense_weight: float = 0.3,
        match: Literal["teacher", "student"] = "teacher",
        targets: Literal["standardise", "phis", "none"] = "standardise",
        balance: Literal["fixed", "normalised", "drop", "pcgrad"] = "fixed",
        weights: Mapping[str, float] | None = None,
        momentum: float = 0.99,
        drop: float = 0.5,
    ) -> None:
        super().__init__()
        if not spaces:
            raise ConfigError("an alignment needs at least one space; align.spaces names none")
        if match not in ("teacher", "student"):
            raise ConfigError(f"align.match={match}: valid are teacher, student")
        if not 0 <= dense_weight < float("inf"):
            raise ConfigError(f"align.dense_weight={dense_weight}: a weight is at least 0")
        self.student_dim, self.student_grid = student.token_dim, student.grid
        self.pooled_dim = student.pooled_dim
        self.spaces = dict(spaces)
        self.dense_weight, self.match = dense_weight, match
        grids = dense_spaces(spaces)
        self.dense = list(grids)
        self.descriptors = descriptor_spaces(spaces)
        self.grids = nn.ModuleDict()
        for name, grid in grids.items():
            if dense_weight:
                _check_grids(name, grid, student.grid, match)
            ends = (student.grid, grid) if match == "teacher" else (grid, student.grid)
            self.grids[module_key(name)] = GridResample(*ends)
        self.quarters = GridPool(student.grid, (2, 2))
        self.units = nn.ModuleDict(
            {
                module_key(name): build_units(targets, space.dim, stored and partial(stored, name))
                for name, space in spaces.items()
            }
        )
        teachers = dict.fromkeys(space.teacher for space in spaces.values())
        self.balance = build_balance(balance, list(teachers), weights, momentum=momentum, drop=drop)

    @property
    def required_spaces(self) -> list[str]:
        """Spaces whose tokens `forward` reads: the trainer fetches these and no others."""
        return self._required()

    def _required(self) -> list[str]:
        if self.dense_weight:
            return list(self.spaces)
        return list(dict.fromkeys(self.descriptors.values()))

    @property
    def lives_inside(self) -> bool:
        """Whether the student's own features need this alignment: it writes into the backbone."""
        return False

    def run_student(self, student: Runs, pixels: Tensor) -> StudentOutput:
        """Run the student as this alignment needs it, in training and afterwards.

        Args:
            pixels: [B, 3, H, W] float, normalised.
        """
        return student(pixels)

    @abstractmethod
    def predict(self, output: StudentOutput, *, dense: bool) -> Predictions:
        """Predictions of the targets.

        Args:
            output: the student's tokens [B, N, C] and descriptor [B, P].
            dense: whether the token predictions are wanted.
        """

    def forward(self, output: StudentOutput, targets: Mapping[str, Target]) -> AlignmentOutput:
        """The loss on one batch.

        Args:
            output: what `run_student` gave: tokens [B, N, C], descriptor [B, P], ...
            targets: tokens [B, N_s, D_s] as stored, per space of `required_spaces`.

        Raises:
            DataError: tokens are not those of the grids that the alignment was built for.
        """
        converted: dict[str, Target] = {
            name: self.units[module_key(name)](targets[name]) for name in self.required_spaces
        }
        by_teacher: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        for label, teacher, weight, loss in self.terms(output, converted):
            losses[label] = loss.detach()
            weighted = loss if weight == 1 else weight * loss
            before = by_teacher.get(teacher)
            by_teacher[teacher] = weighted if before is None else before + weighted
        return AlignmentOutput(self.balance(by_teacher, output.ends()), losses, by_teacher)

    def terms(self, output: StudentOutput, targets: Mapping[str, Target]) -> Iterator[Term]:
        """The terms of the loss; every teacher has at least one.

        Args:
            targets: tokens [B, N_s, D_s] in the units of `align.targets`.
        """
        yield from self.compared(self.predict(output, dense=bool(self.dense_weight)), targets)

    def compared(self, predicted: Predictions, targets: Mapping[str, Target]) -> Iterator[Term]:
        """The terms that all alignments have: each descriptor's, then each dense space's."""
        for label, space in self.descriptors.items():
            prediction = predicted.descriptors[label].unsqueeze(1)
            loss = self.descriptor_loss(label, prediction, self.descriptor_target(label, targets))
            yield Term(label, self.spaces[space].teacher, 1.0, loss)
        for space in self.dense if self.dense_weight else ():
            prediction, target = self.matched(space, predicted.dense[space], targets[space])
            loss = self.dense_loss(space, prediction, target)
            yield Term(space, self.spaces[space].teacher, self.dense_weight, loss)

    def descriptor_target(self, label: str, targets: Mapping[str, Target]) -> Target:
        """d [B, 1, D] of a descriptor's label: the space's token, or the mean of its tokens."""
        space = self.descriptors[label]
        target = targets[space]
        if self.spaces[space].grid is None:
            return target
        return floats(target).mean(1, keepdim=True)

    def descriptor_loss(self, label: str, prediction: Tensor, target: Target) -> Tensor:
        """l of a predicted descriptor [B, 1, D] and its target [B, 1, D]."""
        return token_loss(prediction, target)

    def dense_loss(self, space: str, prediction: Tensor, target: Target) -> Tensor:
        """l of predicted tokens [B, N, D] and their targets [B, N, D], on one grid."""
        return token_loss(prediction, target)

    def matched(self, space: str, prediction: Tensor, target: Target) -> tuple[Tensor, Target]:
        """A prediction on the student's grid and its target on one grid, as `match` says."""
        resample: Any = self.grids[module_key(space)]
        if self.match == "teacher":
            return resample(prediction), target
        if resample.matrix is None:
            return prediction, target
        values = floats(target)
        with torch.autocast(values.device.type, enabled=False):  # it would round the targets
            return prediction, resample(values)

    def standardised(self, space: str, prediction: Tensor) -> Tensor:
        """A prediction [..., D] in the units of the store, whatever `targets` it was learnt in."""
        units: Any = self.units[module_key(space)]
        values: Tensor = units.standardised(prediction)
        return values

    def readout(self, output: StudentOutput, kind: str = "pooled") -> Tensor:
        """The feature that an evaluation uses, [B, K] float.

        Args:
            output: what `run_student` gave.

        Raises:
            ConfigError: the alignment has no readout of that name.
        """
        self._check_readout(kind)
        return self._readout(output, kind)

    def readout_parameters(self, kind: str = "pooled") -> int:
        """Parameters that a readout needs beside the student's own.

        Raises:
            ConfigError: the alignment has no readout of that name.
        """
        self._check_readout(kind)
        found = {
            id(parameter): parameter.numel()
            for part in self._readout_parts(kind)
            for parameter in (part.parameters() if isinstance(part, nn.Module) else (part,))
        }
        return sum(found.values())

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are to stay undecayed."""
        return undecayed(self)

    def _readout(self, output: StudentOutput, kind: str) -> Tensor:
        if kind == "pooled":
            return output.pooled
        if kind == "spatial":
            return self.quarters(output.tokens).flatten(1)
        return torch.cat(list(self.predict(output, dense=False).descriptors.values()), dim=-1)

    def _readout_parts(self, kind: str) -> Iterable[nn.Module | nn.Parameter]:
        """Modules and parameters that a readout uses."""
        return ()

    def _check_readout(self, kind: str) -> None:
        if kind not in self.readouts:
            raise ConfigError(
                f"readout {kind!r}: {type(self).__name__} has {', '.join(self.readouts)}"
            )


def token_loss(prediction: Tensor, target: Target, mask: Tensor | None = None) -> Tensor:
    """0.9 (1 - cos) + 0.1 smooth-L1 (beta 1, mean over dimensions), averaged over all tokens.

    Computed in float32 whatever the prediction is, autocast or not, and without a float copy of
    codes. The weights are Theia's (Shang et al. 2024, arXiv:2407.20179).

    Args:
        prediction: [B, N, D] float.
        target: [B, N, D].
        mask: [B, N] bool, True where a token counts; all where not given.

    Returns:
        Scalar float32 (float64 for a float64 prediction).
    """
    tokens, scales, gain = target if isinstance(target, Codes) else (target, None, None)
    with torch.autocast(prediction.device.type, enabled=False):
        terms = alignment_loss(prediction, tokens, scales, gain=gain, mask=mask)
    return torch.lerp(terms.cosine, terms.smooth_l1, 0.1)


def _check_grids(name: str, teacher: Grid, student: Grid, match: str) -> None:
    source, target = (student, teacher) if match == "teacher" else (teacher, student)
    if source == (1, 1) != target:
        whose = "the student's" if match == "teacher" else f"{name}'s"
        raise ConfigError(
            f"align: {name} has a grid of {teacher[0]} x {teacher[1]} and the student one of "
            f"{student[0]} x {student[1]}: {whose} single token cannot be resampled to a grid; "
            "choose a larger student.size, another align.match, or align.dense_weight=0"
        )
