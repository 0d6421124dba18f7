"""Scenes with every kind of label, and the stores made from them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from preceptor.cache.samples import SampleIndex
from preceptor.cache.views import ViewPolicy

sys.path.insert(0, str(Path(__file__).parent))  # for labelled_scenes and scored

from labelled_scenes import Scenes, members, write_tar


@pytest.fixture(scope="session")
def scenes(tmp_path_factory, make_store) -> tuple[Scenes, Scenes]:
    """60 scenes to learn from and 36 to be judged on."""
    folder, found = tmp_path_factory.mktemp("scenes"), []
    for stem, count, seed in (("learn", 60, 0), ("judge", 36, 1)):
        random = np.random.default_rng(seed)
        samples = {f"{stem}-{n:03d}": members(n, random) for n in range(count)}
        shards = write_tar(folder / f"{stem}.tar", samples)
        index = SampleIndex.from_shards(shards)
        make_store(folder / stem, index, ViewPolicy(name="center"))
        found.append(Scenes(shards, str(folder / stem)))
    return found[0], found[1]
