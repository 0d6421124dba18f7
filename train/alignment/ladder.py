"""Ladder: projectors at several depths of the student, summed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..stages import choose_stages
from ..students import StudentOutput
from .base import Alignment, Predictions, Runs, StudentShape
from .grids import GridPool, GridResample
from .heads import descriptor_mlp
from .spaces import SpaceTarget, module_key


class Ladder(Alignment):
    """A ladder of projectors: every chosen depth has its say about every space.

    With the student's descriptor p [B, P], its tokens S [B, N, C], and at depth l of `depths` the
    tokens h_l [B, N_l, C_l] and a descriptor p_l [B, C_l]:

        d^_t = A_t(p) + sum_l A_tl(p_l)          x^_s = B_s(S) + sum_l B_sl(R_l h_l)

    A and B are LayerNorm, Linear, GELU, Linear; `hidden` is the hidden width at the end of the
    backbone, `rung` at a depth. p_l is the class token where the depth has class or register tokens
    and the mean token elsewhere; R_l brings h_l to the student's final grid (means over windows
    where the depth's is larger, interpolation where it is smaller) before the projector, so that
    large maps cost little.

    UNIC's ladder (Sariyildiz et al. 2024, arXiv:2408.05088), which was made for ViTs of one width;
    the map R_l and the mean token carry it over to CNNs. Its teacher dropping is ``balance: drop``,
    the default here. UNIC's depths are all blocks.

    Args:
        depths: how many depths before the last, or their numbers; see `stages.choose_stages`.
        hidden: hidden width of the projectors at the end of the backbone.
        rung: hidden width of a depth's projectors.
        balance: as in `Alignment`, with another default.
        **options: those of `Alignment`.
    """

    def __init__(
        self,
        student: StudentShape,
        spaces: Mapping[str, SpaceTarget],
        *,
        depths: int | Sequence[int] = 2,
        hidden: int = 512,
        rung: int = 128,
        balance: Literal["fixed", "normalised", "drop", "pcgrad"] = "drop",
        **options: Any,
    ) -> None:
        super().__init__(student, spaces, balance=balance, **options)
        self.depths = choose_stages(student.stages, depths, "depths", before_last=True)
        self.heads, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        self.resamples = nn.ModuleDict()
        rungs = [("end", self.pooled_dim, student.token_dim, hidden)]
        for depth in self.depths:
            stage = student.stages[depth]
            rungs.append((str(depth), stage.dim, stage.dim, rung))
            self.resamples[str(depth)] = _between(stage.grid, student.grid)
        for name, pooled_dim, token_dim, width in rungs:
            for label, space in self.descriptors.items():
                head = descriptor_mlp(pooled_dim, width, spaces[space].dim)
                self.heads[_key(label, name)] = head
            for space in self.dense if self.dense_weight else ():
                projector = descriptor_mlp(token_dim, width, spaces[space].dim)
                self.projectors[_key(space, name)] = projector

    def run_student(self, student: Runs, pixels: Tensor) -> StudentOutput:
        return student(pixels, stages=self.depths)

    def predict(self, output: StudentOutput, *, dense: bool) -> Predictions:
        rungs = [("end", output.pooled, output.tokens)]
        for depth in self.depths:
            prefix, tokens = output.stages[depth]
            pooled = prefix[:, 0] if prefix.shape[1] else tokens.mean(1)
            if dense:
                tokens = self.resamples[str(depth)](tokens)
            rungs.append((str(depth), pooled, tokens))
        descriptors: dict[str, Tensor] = {}
        maps: dict[str, Tensor] = {}
        for name, pooled, tokens in rungs:
            for label in self.descriptors:
                _add(descriptors, label, self.heads[_key(label, name)](pooled))
            for space in self.dense if dense else ():
                _add(maps, space, self.projectors[_key(space, name)](tokens))
        return Predictions(descriptors, maps)

    def _readout_parts(self, kind: str) -> Iterable[nn.Module | nn.Parameter]:
        return (self.heads,) if kind == "predictions" else ()


def _key(space: str, rung: str) -> str:
    return f"{module_key(space)}@{rung}"


def _between(source: tuple[int, int], target: tuple[int, int]) -> nn.Module:
    if source[0] >= target[0] and source[1] >= target[1]:
        return GridPool(source, target)
    return GridResample(source, target)


def _add(total: dict[str, Tensor], name: str, part: Tensor) -> None:
    total[name] = total[name] + part if name in total else part
