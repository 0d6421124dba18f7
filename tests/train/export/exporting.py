"""The command `preceptor export` as tests configure it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from ..conftest import compose

IMAGES = str(Path(__file__).parents[3] / "examples/data/fashion-mnist/test-000000.tar.gz")


def config(folder: Path, *overrides: str) -> DictConfig:
    return compose("export", f"run={folder}", *overrides)
