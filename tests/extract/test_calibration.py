"""The standardisation that a store is begun with, through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache
from preceptor.cli import main
from preceptor.extract import calibration
from preceptor.extract.images import ViewBatch
from preceptor.extract.runner import TeacherRunner
from preceptor.tests.conftest import COUNT
from preceptor.tests.extract.timm_store import corrupted, options


def test_calibration_can_be_taken_from_another_store(
    shards: str, teachers: list[str], store: Path, tmp_path: Path
) -> None:
    more = [f"calibration.store={store}", "order=permuted"]
    assert main(["extract", *options(shards, teachers, tmp_path / "store", *more)]) == 0
    theirs, ours = Cache.open(store), Cache.open(tmp_path / "store")
    position = {key: row for row, key in enumerate(theirs.keys)}
    rows = np.array([position[key] for key in ours.keys])
    assert rows.tolist() != list(range(COUNT))
    for name, space in ours.spaces.items():
        expected = theirs[name].decode(theirs[name].read(rows))
        found = space.decode(space.read(np.arange(COUNT)))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=5e-2)


def test_calibration_can_be_taken_from_a_converted_store(
    shards: str, teachers: list[str], store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "fp16"
    assert main(["convert", f"cache={store}", f"out={other}", "encoding=fp16"]) == 0
    arguments = options(shards, teachers, tmp_path / "store", f"calibration.store={other}")
    assert main(["extract", *arguments]) == 0
    found, expected = contents(tmp_path / "store"), contents(store)
    assert found.keys() == expected.keys()
    other = {name for name in found if found[name] != expected[name]}  # fp16 has no prediction
    assert all("manifest" in name or "/vit/" in name for name in other)


def test_what_is_no_number_in_the_calibration_is_told_with_its_image(
    shards: str, teachers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = TeacherRunner.tokens

    def overflowing(self: TeacherRunner, batch: ViewBatch, *rest: Any) -> dict[str, torch.Tensor]:
        found = plain(self, batch, *rest)
        for place, key in enumerate(batch.rows.keys):
            if key == "im004":
                found["vit/patch"] = found["vit/patch"].clone()
                found["vit/patch"][place, 3, 5] = float("inf")
        return found

    monkeypatch.setattr(TeacherRunner, "tokens", overflowing)
    arguments = options(shards, teachers, tmp_path / "store", "calibration.images=11")
    assert main(["extract", *arguments]) == 1
    told = capsys.readouterr().err
    assert "teacher vit gives tokens of space patch that are not finite for image 'im004'" in told
    assert "s-0.tar, row 4 in shard 1 of the store" in told
    assert "on_corrupt=skip" in told


def test_a_calibration_without_one_sound_image_says_what_is_wrong_with_them(
    shards: str,
    teachers: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damaged = corrupted(shards, tmp_path)
    monkeypatch.setattr(calibration, "sample_rows", lambda rows, wanted, seed: [6])
    arguments = options(damaged, teachers, tmp_path / "store", "on_corrupt=skip")
    assert main(["extract", *arguments]) == 1
    message = capsys.readouterr().err
    assert "no image of the calibration's sample of 1 can be used" in message
    assert "im006" in message
    assert "calibration.images=N" in message
