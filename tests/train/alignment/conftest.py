"""A student whose output is given, four spaces of two teachers, and their targets."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from preceptor.train.alignment import build_alignment
from preceptor.train.alignment.base import Space
from preceptor.train.stages import Stage, StageTokens
from preceptor.train.students import StudentOutput

SPACES = {
    "cnn/map": Space("cnn", 4, 24, (2, 2)),
    "cnn/pool": Space("cnn", 1, 24, None),
    "vit/patch": Space("vit", 30, 16, (5, 6)),
    "vit/cls": Space("vit", 1, 16, None),
}


@dataclass
class GivenStudent:
    """Leaves where a student has features: what reaches it is what arrives at them.

    The hidden image's tokens shift by the mask token, so that it has a gradient.
    """

    batch: int = 5
    seed: int = 0
    dtype: torch.dtype = torch.float32
    token_dim: int = 20
    grid: tuple[int, int] = (3, 3)
    pooled_dim: int = 12
    patch_dim: int | None = 8
    stages: tuple[Stage, ...] = (
        Stage("first", 8, (6, 7), 0, "NCHW"),
        Stage("second", 10, (4, 4), 2, "NLC"),
        Stage("last", 20, (3, 3), 2, "NLC"),
    )
    passes: list[dict] = field(default_factory=list)

    def __call__(self, pixels, *, stages=(), interaction=None, mask=None, mask_token=None):
        generator = torch.Generator().manual_seed(self.seed + len(self.passes))
        self.passes.append({"mask": mask, "mask_token": mask_token})

        def leaf(*shape):
            values = torch.randn(self.batch, *shape, generator=generator, dtype=torch.float64)
            return values.to(self.dtype).requires_grad_()

        tokens, pooled = leaf(9, 20), leaf(12)
        features = {
            n: (leaf(s.prefix, s.dim), leaf(s.grid[0] * s.grid[1], s.dim))
            for n, s in enumerate(self.stages)
        }
        carried, written = None, 0
        if interaction is not None:
            carried = interaction.begin(self.batch)
            for number in interaction.stages:
                whole = torch.cat(features[number], 1)
                carried, update = interaction.visit(number, carried, whole)
                assert update.shape == whole.shape
                written = written + update.mean((1, 2)).unsqueeze(1)
            pooled, tokens = pooled + written, tokens + written.unsqueeze(1)
            if torch.is_grad_enabled():
                pooled.retain_grad()
        if mask_token is not None:
            tokens = tokens + mask_token.sum()
        read = {n: StageTokens(*features[n]) for n in stages}
        return StudentOutput(tokens, self.grid, pooled, read, carried)


@pytest.fixture
def student() -> GivenStudent:
    return GivenStudent()


@pytest.fixture
def given_student():
    return GivenStudent


@pytest.fixture
def spaces():
    return dict(SPACES)


@pytest.fixture
def targets() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(5, space.tokens, space.dim, generator=generator)
        for name, space in SPACES.items()
    }


@pytest.fixture
def build(student):
    """Builds an alignment of the four spaces (or others) for the given student, from one seed."""

    def make(name: str, spaces=None, stored=None, **options):
        torch.manual_seed(0)
        return build_alignment({"name": name, **options}, student, spaces or SPACES, stored)

    return make


@pytest.fixture
def run(student):
    """The student's output as an alignment asks for it."""

    def observe(alignment, student=student):
        student.passes.clear()
        return alignment.run_student(student, torch.zeros(student.batch, 3, 6, 6))

    return observe
