"""What all runs of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .bed import Bed


@dataclass(frozen=True)
class Plan:
    """What all runs of a comparison share.

    Attributes:
        bed: the test bed.
        out: folder of the runs.
        steps: optimiser steps of every run.
        store: of the pool, that students learn from.
        shards: its images.
    """

    bed: Bed
    out: Path
    steps: int
    store: Path
    shards: str

    def folder(self, student: str, name: str, seed: int) -> Path:
        return self.out / student / name / f"s{seed}"


def plain(config: Any) -> dict[str, Any]:
    """A part of a composed configuration as a plain mapping."""
    return dict(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
