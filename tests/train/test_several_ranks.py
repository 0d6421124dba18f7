"""Runs of two ranks, by the command that a user would type."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Ranks = Callable[..., "subprocess.CompletedProcess[str]"]

WITHOUT = ("align.residual=false", "align.width=16", "align.hidden=16")
"""No loss reads the pooled feature, nor the norm that makes it."""


@pytest.fixture
def two_ranks(bed, tmp_path: Path) -> Ranks:
    """Trains a small student that has weights between its last map and its pooled feature."""

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = (
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "preceptor", "train", f"cache={bed.cache}", f"data.shards={bed.shards}",
            f"out={tmp_path / 'run'}", "student=vit_micro", "student.options.depth=1",
            "student.options.embed_dim=24", "recipe=short", "recipe.steps=3",
            "recipe.batch_size=8", "recipe.checkpoint_every=0", "log.to=[]", "engine=cpu",
            "workers=0", *options,
        )  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True)

    return run


def test_weights_that_no_loss_reads_are_named_with_the_way_out(two_ranks):
    done = two_ranks(*WITHOUT)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("preceptor train: ")]
    assert len(told) in (1, 2), done.stderr  # the first rank's end may end the other one
    for line in told:
        assert "reads nothing of student.model.fc_norm.weight, student.model.fc_norm.bias," in line
        assert "engine.strategy=ddp_find_unused_parameters_true" in line
    assert "RuntimeError" not in done.stderr


def test_weights_that_no_loss_reads_are_left_alone_by_the_way_out(two_ranks, tmp_path):
    done = two_ranks(*WITHOUT, "engine.strategy=ddp_find_unused_parameters_true")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["ranks"]) == (3, 2)
