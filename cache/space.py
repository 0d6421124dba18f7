"""One space of an open store, and what all its spaces share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch

from ..errors import StoreError
from .buffers import BufferPool
from .commit import Completion
from .constants import (
    calibration_files,
    calibration_values,
    statistics_files,
    statistics_values,
)
from .encodings.prediction import Prediction
from .facts import Keys, RowFacts
from .gather import Destination, Gatherer, by_group
from .layout import ArraySpec, Layout
from .manifest import Manifest
from .opening import read_files
from .plan import SpaceSpec, StorePlan
from .shard_index import ChunkReader
from .source import Source
from .statistics import Moments
from .tokens import Tokens

_IDLE_BYTES = 256 << 20


@contextmanager
def _named(location: str) -> Iterator[None]:
    """Errors about a file of a store say of which."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{location}: {error}") from None


class OpenStore:
    """The parts of an open store that its spaces and its batches share.

    Attributes:
        source: where its files come from.
        manifest: what it is made of and from.
        completions: the seals of the units that were opened.
        chunks: checked chunks.
        gatherer: from chunks to rows.
        buffers: memory for rows that are asked for by number.
        facts: facts about rows.
    """

    def __init__(
        self, source: Source, manifest: Manifest, completions: Mapping[str, Completion]
    ) -> None:
        self.source = source
        self.manifest = manifest
        self.completions = completions
        self.layout = Layout(manifest.plan)
        self.chunks = ChunkReader(source, manifest, completions)
        self.gatherer = Gatherer(self.chunks)
        self.buffers = BufferPool(idle_bytes=_IDLE_BYTES)
        self.facts = RowFacts(self.chunks, self.layout, source.parallel)
        self.keys = Keys(self.facts)

    @property
    def plan(self) -> StorePlan:
        return self.manifest.plan

    @cached_property
    def valid(self) -> np.ndarray:
        """bool ``[rows]``: whether a row has tokens."""
        return self.facts.all("valid") == 1  # neither a fill value nor anything else

    def checked_rows(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        """Row numbers as int64 ``[n]``.

        Raises:
            StoreError: outside the store, or without tokens (the first is named with its key).
        """
        wanted = np.asarray(rows.cpu() if isinstance(rows, torch.Tensor) else rows)
        if wanted.size == 0:
            return np.zeros(0, np.int64)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise StoreError(
                f"rows must be one axis of integers, not {wanted.dtype} of shape {wanted.shape}"
            )
        wanted = wanted.astype(np.int64)
        outside = (wanted < 0) | (wanted >= self.plan.rows)
        if outside.any():
            raise StoreError(
                f"row {int(wanted[outside][0])} is outside {self.source.location} with "
                f"{self.plan.rows} rows"
            )
        if not self.valid[wanted].all():
            row = int(wanted[~self.valid[wanted]][0])
            raise StoreError(
                f"row {row} (key {self.keys[row]!r}) of {self.source.location} has no tokens, its "
                "image was corrupt: leave out the rows where cache.valid is False"
            )
        return wanted

    def read(
        self,
        unit: str,
        arrays: Mapping[str, ArraySpec],
        rows: Sequence[int] | np.ndarray | torch.Tensor,
        threads: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Rows of some arrays of a unit, in the order asked for.

        Raises:
            StoreError: a row outside the store or without data, or damage by shard and group.
        """
        wanted = self.checked_rows(rows)
        place = Destination(unit, arrays, len(wanted), max(len(wanted), 1), self.buffers)
        groups = list(by_group(wanted, self.plan.shard_rows, self.plan.group_rows))
        threads = threads or self.source.parallel
        if threads > 1 and len(groups) > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda group: self.gatherer.fill(place, group), groups))
        else:
            for group in groups:
                self.gatherer.fill(place, group)
        for at, array in place.holes().items():
            raise self.chunks.hole(unit, int(wanted[at]), array)
        return place.pop(0)


class Space:
    """One space of an open store.

    Attributes:
        spec: name, tokens, dim, grid, encoding.
        mean, std: float32 ``[D]``: the frozen standardisation.
        prediction: of its codes; None where nothing is predicted.
    """

    def __init__(self, store: OpenStore, spec: SpaceSpec) -> None:
        self.spec = spec
        self._store = store
        self._arrays = store.layout.space_arrays(spec)
        frozen = store.manifest.calibrations[spec.id]
        raw = read_files(store.source, calibration_files(store.layout, spec))
        with _named(store.source.location):
            values = calibration_values(store.layout, spec, raw, frozen)
        self.mean, self.std = torch.from_numpy(values["mean"]), torch.from_numpy(values["std"])
        self.prediction = (
            Prediction.needed(values["weights"], spec.grid) if "weights" in values else None
        )

    def __repr__(self) -> str:
        return f"Space({self.id!r}, shape={self.shape}, encoding={self.spec.encoding!r})"

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, tokens, dim)."""
        return self._store.plan.rows, self.spec.tokens, self.spec.dim

    @property
    def grid(self) -> tuple[int, int] | None:
        return self.spec.grid

    @property
    def encoding(self) -> str:
        return self.spec.encoding

    @property
    def earlier(self) -> tuple[str, ...]:
        """Encodings that its tokens had before, where the store was converted; first first."""
        identity = self._store.plan.teacher(self.spec.teacher).identity
        return tuple(identity.get("converted", {}).get(self.spec.name, ()))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the codes."""
        return getattr(torch, self._arrays["codes"].dtype)

    def read(
        self, rows: Sequence[int] | np.ndarray | torch.Tensor, threads: int | None = None
    ) -> Tokens:
        """The encoded tokens of rows.

        Args:
            rows: 1-d integers in any order; repetitions are allowed.
            threads: threads that read groups; None: 2, or 16 for a remote store.

        Returns:
            Tokens with rows in the order asked for. Every group that holds one of them is read
            whole, because its checksum covers all of its rows. The memory is used again when
            nothing refers to it any more.

        Raises:
            StoreError: a row outside the store or without tokens, or damage by shard and group.
        """
        parts = self._store.read(self.spec.teacher, self._arrays, rows, threads)
        return Tokens.from_parts(parts, self.spec.encoding, self.spec.dim, self.prediction)

    def decode(self, tokens: Tokens) -> torch.Tensor:
        """Tokens in the teacher's own units: float32 ``[b, N, D]``."""
        z = tokens.standardised()
        return z * self.std.to(z.device) + self.mean.to(z.device)

    def statistics(self) -> Moments:
        """Exact mean and covariance (float64) of all valid rows' tokens, before encoding.

        Raises:
            StoreError: the arrays are damaged.
        """
        store, spec = self._store, self.spec
        done = store.completions[spec.teacher]
        raw = read_files(store.source, statistics_files(store.layout, spec))
        with _named(store.source.location):
            mean, covariance = statistics_values(
                store.layout, spec, raw, done.statistics[spec.name]
            )
        count = done.tokens[spec.name]
        return Moments(count, mean, covariance * count)
