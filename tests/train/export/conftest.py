"""Runs to export."""

from __future__ import annotations

from pathlib import Path

import pytest
from preceptor.train.loop import train

from ..conftest import SMALL_CNN, Bed, compose

VIT = ("student=vit_micro", "student.options.depth=2", "student.options.embed_dim=48")


@pytest.fixture(scope="session")
def runs(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs: a CNN with model tokens and a ViT with regression."""
    folder = tmp_path_factory.mktemp("runs")
    model_token = ("align=model_token", "align.layers=1", "align.width=32")
    for name, student, align in (
        ("cnn", SMALL_CNN, model_token),
        ("vit", VIT, ("align=regression",)),
    ):
        train(
            compose(
                "train", f"cache={bed.cache}", f"data.shards={bed.shards}", f"out={folder / name}",
                "student.size=32", *student, *align, "recipe=short", "recipe.steps=4",
                "recipe.batch_size=16", "recipe.ema=0.9", "engine=cpu", "workers=0",
            )
        )  # fmt: skip
    return folder
