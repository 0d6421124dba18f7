"""The test bed as a comparison reads it: pixels and labels in memory, teachers from stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache import Cache, SampleIndex
from ...errors import DataError
from ...train.alignment.base import descriptor_spaces
from ...train.evaluation.features import quarters
from ..testbed import shards
from ..testbed.stores import TASKS, pool_store

PARTS = ("train", "validation", "test")
LOOK = 800
"""Images of the pool that the label-free reduction of widths is fitted on."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model gives for images, float32.

    Attributes:
        vectors: [n, K] by readout.
        map: [n, N, C], its tokens on a grid.
        grid: (rows, columns).
    """

    vectors: dict[str, NDArray[np.float32]]
    map: NDArray[np.float32]
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False)
class OnDemand(Mapping[str, Outputs]):
    """A model's outputs by image set, computed whenever they are asked for: those of all sets at
    once would be gigabytes.

    Attributes:
        names: of the sets.
        make: gives the outputs of one.
    """

    names: Sequence[str]
    make: Callable[[str], Outputs]

    def __getitem__(self, name: str) -> Outputs:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Bed:
    """A folder that `benchmarks/testbed/make.py` has finished."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """``bed.json``.

        Raises:
            DataError: the bed is not whole.
        """
        path = self.folder / "bed.json"
        if not path.exists():
            raise DataError(
                f"{self.folder} holds no finished test bed: python benchmarks/testbed/make.py "
                f"--out {self.folder}"
            )
        return dict(json.loads(path.read_text(encoding="utf-8")))

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]:
        return self.facts["tasks"]

    @property
    def identity(self) -> str:
        """SHA-256 of the hashes of all its images and labels: what a figure is a figure of."""
        digests = json.dumps(self.facts["digests"], sort_keys=True)
        return hashlib.sha256(digests.encode()).hexdigest()

    def sets(self) -> dict[str, str]:
        """Folder of every image set that models are asked about: the look, and all parts."""
        parts = {f"{task}/{part}": f"tasks/{task}/{part}" for task in self.tasks for part in PARTS}
        return {"pool": "pool", **parts}

    @cached_property
    def labels(self) -> dict[str, shards.Labels]:
        """By ``TASK/PART``."""
        return {
            name: shards.read_labels(self.folder / folder)
            for name, folder in self.sets().items()
            if name != "pool"
        }

    @cached_property
    def pixels(self) -> dict[str, NDArray[np.uint8]]:
        """uint8 [n, size, size, 3] by ``pool`` (its first `LOOK` images) and ``TASK/PART``."""
        found = {}
        for name, folder in self.sets().items():
            store, rows = self.rows(name)
            if store.pixels is not None:
                found[name] = store.read_pixels(rows).numpy()
                continue
            index = SampleIndex.from_shards(shards.pattern(self.folder / folder))
            images = [index.image(i, 10**6).convert("RGB") for i in range(len(rows))]
            found[name] = np.stack([np.asarray(image) for image in images])
        return found

    def rows(self, name: str) -> tuple[Cache, NDArray[np.int64]]:
        """The store that holds an image set, and its rows there, of the pool `LOOK`."""
        facts, folder = self.facts["plan"], self.sets()[name]
        if name == "pool":
            store = self._store(pool_store(facts["encoding"]))
            return store, np.arange(min(LOOK, len(store)))
        if not facts.get("one_store"):
            store = self._store(folder)
            return store, np.arange(len(store))
        store = self._store(TASKS)
        prefix = folder.replace("/", "-") + "-"
        own = [row for row, key in enumerate(store.keys) if key.startswith(prefix)]
        return store, np.array(own)

    def _store(self, name: str) -> Cache:
        return Cache.open(self.folder / "stores" / name)

    def teacher(self, teacher: str) -> Mapping[str, Outputs]:
        """A teacher's features of every image set, from the stores."""
        names = list(self.sets())
        return OnDemand(names, lambda name: self._teacher(*self.rows(name), teacher))

    @cached_property
    def teachers(self) -> list[str]:
        store, _ = self.rows("pool")
        return list(dict.fromkeys(store[name].spec.teacher for name in store.spaces))

    def _teacher(self, store: Cache, rows: NDArray[np.int64], teacher: str) -> Outputs:
        specs = {
            space: store[space].spec
            for space in store.spaces
            if store[space].spec.teacher == teacher
        }
        (descriptor,) = descriptor_spaces(specs).values()
        dense = next(space for space, spec in specs.items() if spec.grid is not None)
        grid = specs[dense].grid
        assert grid is not None
        tokens = store[dense].decode(store[dense].read(rows)).float()
        vector = store[descriptor].decode(store[descriptor].read(rows)).float().mean(1)
        vectors = {"pooled": vector.numpy(), "spatial": quarters(tokens, grid).numpy()}
        return Outputs(vectors, tokens.numpy(), grid)
