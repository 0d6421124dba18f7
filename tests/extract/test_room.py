"""A store's file system that has too little room, through the command line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from preceptor.cli import main
from preceptor.tests.extract.timm_store import options


def test_a_lack_of_room_is_told_with_both_figures_and_refuses_nothing(
    shards: str, teachers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain, free = shutil.disk_usage, [0]

    def usage(path: Any) -> Any:
        return SimpleNamespace(free=free[0]) if "store" in str(path) else plain(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    command = ["extract", *options(shards, teachers, tmp_path / "store", "pixels.size=512")]
    assert main(command) == 0
    told = capsys.readouterr().err
    told_of = re.search(
        r"store needs up to ([0-9.]+) MiB more, and its file system has 0.00 MiB", told
    )
    assert told_of is not None
    assert 11 * 3 * 512**2 / 2**20 < float(told_of[1]) < 16  # the pixels, and the tokens
    assert main(command) == 0  # nothing is to be written
    free[0] = 2**40
    assert main([one.replace("/store", "/store2") for one in command]) == 0
    assert "iB free" not in capsys.readouterr().err
