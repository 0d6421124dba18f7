"""Photographs and cells made here, so that the bed can be tested without its large packages."""

from __future__ import annotations

import numpy as np
import pytest
from preceptor.benchmarks.testbed import make, sources, training


def _photographs(split):
    random = np.random.default_rng(sources.SPLITS.index(split))
    return {
        f"made-here/{split}-{i}": random.integers(0, 255, (60, 70, 3), dtype=np.uint8)
        for i in range(2)
    }


def _cells(split):
    random = np.random.default_rng(10 + sources.SPLITS.index(split))
    names = [f"cell/{split}-{i}" for i in range(12)]
    return names, random.integers(0, 255, (12, 64, 64), dtype=np.uint8), np.arange(12) % 4


@pytest.fixture
def made_here(monkeypatch):
    monkeypatch.setattr(sources, "photographs", _photographs)
    monkeypatch.setattr(sources, "cells", _cells)


PLAN = make.Plan(
    pool=128,
    heldout=20,
    share=0.1,
    tasks=("letters", "pose", "masks", "instances"),
    packaged=False,
    course=training.Course(images=128, epochs=1),
)


@pytest.fixture(scope="session")
def plan():
    """Of the fixture `bed`."""
    return PLAN


@pytest.fixture(scope="session")
def bed(tmp_path_factory):
    """A bed of four kinds of task and three specialists that have learnt next to nothing."""
    out = tmp_path_factory.mktemp("bed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "photographs", _photographs)
        patch.setattr(sources, "cells", _cells)
        make.make(out, PLAN)
    return out
