"""Scenes with every kind of label, the stores made from them, and students that all is asked of."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from preceptor.cache.samples import SampleIndex
from preceptor.cache.views import ViewPolicy
from preceptor.train.evaluation.run import evaluate
from preceptor.train.loop import train

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


TASKS = (
    "+tasks.position={kind: regression, label: ['json:x', 'json:y']}",
    "+tasks.square={kind: dense, label: mask.png, size: 16}",
    "+tasks.height={kind: dense_regression, label: mask.png, size: 16, unknown: 255}",
)
ALL = (
    "protocols=all", "fewshot.shots=[1,5]", "knn.k=5", "intervals.resamples=50", *TASKS,
    "robustness.corruptions=[contrast,jpeg]", "robustness.severities=[1,5]",
    "linear.strengths=[0.1]", "robustness.strengths=[0.1]",
)  # fmt: skip


@pytest.fixture(scope="session")
def runs(scenes, tmp_path_factory):
    """Two students of one recipe that differ in their seed."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for seed in (0, 1):
        with initialize_config_module("preceptor.configs", version_base="1.3"):
            config = compose(
                "train",
                [
                    f"cache={scenes[0].cache}", f"data.shards={scenes[0].shards}", "engine=cpu",
                    f"out={folder}/cnn-s{seed}", f"seed={seed}", "student=resnet_micro",
                    "student.options.channels=[8,8,16,16]", "student.size=32", "workers=0",
                    "align=regression", "recipe=short", "recipe.steps=6", "recipe.batch_size=16",
                ],
            )  # fmt: skip
        train(config)
        found.append(f"{folder}/cnn-s{seed}")
    return found


@pytest.fixture(scope="session")
def whole(runs, scenes, tmp_path_factory):
    """Every protocol once: (result, overrides, folder of the output)."""
    out = tmp_path_factory.mktemp("whole")
    overrides = [
        f"train.cache={scenes[0].cache}", f"train.shards={scenes[0].shards}",
        f"test.cache={scenes[1].cache}", f"test.shards={scenes[1].shards}",
        f"students=[{','.join(runs)}]", f"out={out}", "engine=cpu", "workers=0", *ALL,
    ]  # fmt: skip

    def again(*more: str):
        with initialize_config_module("preceptor.configs", version_base="1.3"):
            return evaluate(compose("eval", [*overrides, *more]))

    return again(), again, out
