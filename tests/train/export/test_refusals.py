"""What is not exported: mistakes, damage, and forms that do not compute what the student does."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from preceptor.errors import ConfigError, DataError, ExportError
from preceptor.train.export import hub, run

from .exporting import IMAGES, config


def test_a_form_that_differs_is_not_kept(runs, tmp_path):
    wanted = (f"check.shards={IMAGES}", "check.tolerance=1e-12", "formats=[onnx]")
    with pytest.raises(ExportError, match=r"backbone\.onnx does not compute .* more than"):
        run.export(config(runs / "vit", *wanted, f"out={tmp_path / 'out'}"))
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_not_a_number_is_never_what_the_student_computes(tmp_path):
    right = {name: torch.ones(2, 3) for name in ("pooled", "grid", "readout/pooled")}
    for bad in right:
        wrong = {**right, bad: torch.full((2, 3), torch.nan)}
        artefact = run.Artefact(
            "a.onnx",
            lambda path: path.touch(),
            lambda path, found=wrong: lambda pixels: found,
            right,
        )
        check = OmegaConf.create({"images": 2, "tolerance": 1e-4})
        with pytest.raises(ExportError, match=f"a.onnx does not compute .*: {bad} differs by nan"):
            run._written(artefact, tmp_path, torch.zeros(2, 3, 4, 4), check)


def test_a_form_named_twice_is_written_once_for_whoever_the_umask_lets_read(runs, tmp_path):
    before = os.umask(0o022)
    try:
        run.export(config(runs / "vit", f"out={tmp_path / 'out'}", "formats=[timm,timm]"))
    finally:
        os.umask(before)
    for file in ("model.safetensors", "config.json", "README.md"):
        assert stat.S_IMODE((tmp_path / "out/timm" / file).stat().st_mode) == 0o644, file


def test_mistakes_are_told_and_leave_nothing(runs, tmp_path, monkeypatch):
    def told(error: type[Exception], match: str, folder: Path, *overrides: str) -> None:
        with pytest.raises(error, match=match) as caught:
            run.export(config(folder, "formats=[timm]", f"out={tmp_path / 'out'}", *overrides))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    told(DataError, "holds no trained student .*: run preceptor train with out=", tmp_path)
    (tmp_path / "stopped/checkpoints").mkdir(parents=True)
    told(DataError, "it was stopped, and the same preceptor train goes on", tmp_path / "stopped")
    told(ConfigError, "formats=.*tflite.*valid are timm, onnx, program", runs / "vit",
         "formats=[tflite]")  # fmt: skip
    told(ConfigError, r"write a list, formats=\[onnx\]", runs / "vit", "formats=onnx")
    told(ConfigError, "units=mm: valid are teacher, standardised", runs / "vit", "units=mm")
    told(ConfigError, "weights=mean: valid are last, ema, best", runs / "vit", "weights=mean")
    told(DataError, "weights=best: .* it has last, ema", runs / "vit", "weights=best")
    shutil.copytree(runs / "vit", tmp_path / "of-pixels")
    settings = OmegaConf.load(runs / "vit/config.yaml")
    OmegaConf.save({**settings, "data": {"shards": None}}, tmp_path / "of-pixels/config.yaml")
    told(DataError, r"compare on: .* no pixels.*check\.shards=.*check\.images=0",
         tmp_path / "of-pixels")  # fmt: skip
    told(DataError, r"images to compare on.*check\.shards", runs / "vit", "check.shards=/no.tar")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    told(ConfigError, r"pip install 'preceptor\[export\]'", runs / "vit", "formats=[onnx]")
    monkeypatch.undo()

    for file in ("student.safetensors", "alignment.safetensors", "summary.json", "model.json"):
        damaged = tmp_path / f"damaged-{file}"
        shutil.copytree(runs / "vit", damaged)
        content = (damaged / file).read_bytes()
        (damaged / file).write_bytes(content[: len(content) // 2])
        told(DataError, file.replace(".", r"\."), damaged)

    told(ConfigError, "run=.*/ema holds .*: say run=.*/vit weights=ema", runs / "vit/ema")
    (tmp_path / "file").touch()
    told(ConfigError, r"out=.*file/out cannot be made: Not a directory", runs / "vit",
         f"out={tmp_path / 'file/out'}")  # fmt: skip

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "write_folder", full)
        told(ExportError, "cannot be written: No space left.*nothing was kept", runs / "vit")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        run.export(config(runs / "vit", f"out={tmp_path / 'out'}"))
