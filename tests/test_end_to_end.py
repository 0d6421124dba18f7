"""The whole job through the command line, on a handful of images: extract, sweep, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from preceptor.cli import main


@pytest.mark.parametrize("student", ["resnet10t", "vit_micro"])
def test_extract_sweep_and_evaluate(
    student: str,
    shards: str,
    teachers: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    images = f"data.shards='{shards}'"
    assert (
        main(
            ["extract", *teachers, images, f"cache={store}", "shard_rows=8", "group_rows=4",
             "calibration.images=11", "workers=0", "engine=cpu"]
        )
        == 0
    )  # fmt: skip
    assert (
        main(
            ["train", images, f"cache={store}", f"student={student}", "recipe=short",
             "align=model_token,regression", "recipe.steps=3", "recipe.batch_size=4", "workers=0",
             "engine=cpu", f"out='{tmp_path}/${{align.name}}'", "-m"]
        )
        == 0
    )  # fmt: skip
    for align in ("model_token", "regression"):
        summary = json.loads((tmp_path / align / "summary.json").read_text())
        assert summary["steps"] == 3
        assert np.isfinite(summary["loss"])
        assert list((tmp_path / align / "logs").glob("events.out.tfevents.*"))
    shards_of = f"'{shards}'"
    assert (
        main(
            ["eval", f"train.cache={store}", f"train.shards={shards_of}", f"test.cache={store}",
             f"test.shards={shards_of}", f"students=[{tmp_path}/model_token,{tmp_path}/regression]",
             f"out={tmp_path}/eval", "workers=0", "engine=cpu", "knn.k=1"]
        )
        == 0
    )  # fmt: skip
    rows = json.loads((tmp_path / "eval" / "summary.json").read_text())["rows"]
    assert {row["kind"] for row in rows} == {"student", "teacher", "untrained"}
    # The test images are the training images here, so the nearest neighbour is the image itself.
    assert {row["knn"] for row in rows} == {1.0}
    printed = capsys.readouterr()
    assert "untrained" in printed.out
    assert "warning: train.shards and test.shards are the same images" in printed.err
