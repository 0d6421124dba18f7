"""Photographs and cells made here, so that the bed can be tested without its large packages."""

from __future__ import annotations

import numpy as np
import pytest
from preceptor.benchmarks.testbed import sources


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
