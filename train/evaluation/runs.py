"""The runs that are scored: what each is called, and which are seeds of one another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ...cache.documents import digest
from ...cache.durable import file_sha256
from ..alignment import Alignment
from ..checkpoint import ALIGNMENT, AVERAGE, BEST, load_model
from ..students import MODEL, WEIGHTS, Student

CONFIG = "config.yaml"
"""A run's configuration, in its own folder."""


@dataclass(frozen=True)
class Run:
    """A finished run of preceptor train."""

    folder: Path
    student: Student
    alignment: Alignment
    model: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Load what preceptor train wrote.

        Raises:
            DataError: the folder holds no finished run, or its files do not fit each other.
        """
        return cls(folder, *load_model(folder))

    @property
    def kept(self) -> str:
        """Which weights these are, where the run kept them in a folder within its own."""
        name = self.folder.absolute().name
        return name if name in (AVERAGE, BEST) and not (self.folder / CONFIG).exists() else ""

    @property
    def home(self) -> Path:
        """The run's own folder."""
        return self.folder.absolute().parent if self.kept else self.folder

    @property
    def weights(self) -> dict[str, str]:
        """What determines its features."""
        return {name: file_sha256(self.folder / name) for name in (WEIGHTS, ALIGNMENT, MODEL)}

    @property
    def family(self) -> str:
        """Equal for runs that differ in their seed alone; empty where that cannot be told."""
        path = self.home / CONFIG
        if not path.exists():
            return ""
        config = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(config, dict):
            return ""
        free = ("seed", "out", "workers", "resume", "log", "keep")
        told = {key: value for key, value in config.items() if key not in free}
        if self.kept:
            told["weights"] = self.kept  # of the same run as its last ones, but no second seed
        return digest(json.loads(json.dumps(told)))

    @property
    def fresh(self) -> dict[str, Any]:
        """The student's options with random weights, also where it started from a file or from the
        hub."""
        return {**self.model["student"], "pretrained": False, "checkpoint": None}

    @property
    def untrained(self) -> str:
        """Equal for runs whose students have the same random weights."""
        return digest({"student": self.fresh, "seed": self.model["seed"]})


def distinct_names(runs: Sequence[Run]) -> dict[Path, str]:
    """A name for each run: its folder's last part, with as many before it as tell it from others;
    for weights within a run's folder its name and theirs.

    Args:
        runs: of different folders.
    """
    ways = {run.folder: run.folder.absolute().parts for run in runs}
    homes = {run.folder: run.home.absolute().parts for run in runs}
    found = {}
    for folder, way in ways.items():
        home = homes[folder]
        inside = len(way) - len(home)
        rivals = [other for other in homes.values() if other != home]
        parts = 1
        while any(other[-parts:] == home[-parts:] for other in rivals) or any(
            other != way and other[-parts - inside :] == way[-parts - inside :]
            for other in ways.values()
        ):
            parts += 1
        found[folder] = str(Path(*way[-parts - inside :]))
    return found


def repeats(runs: Sequence[Run]) -> dict[Path, Path]:
    """Runs of the configuration and the seed of another one, copies of it or not: folder -> folder
    of the first. They are no further seeds."""
    first: dict[tuple[str, int], Path] = {}
    found = {}
    for run in runs:
        if family := run.family:
            folder = first.setdefault((family, run.model["seed"]), run.folder)
            if folder != run.folder:
                found[run.folder] = folder
    return found
