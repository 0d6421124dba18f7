"""One shard in the making: rows come in, codes stay in memory, whole files go out."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ..errors import StoreError
from .commit import (
    COMMITS,
    Commit,
    Completion,
    FileRecord,
    is_whole,
    read_commit,
    record_name,
)
from .copies import best_completion
from .durable import Staged, directory_lock, make_directory, sync_directory, write_whole
from .encoded import Encoded
from .encodings.base import largest_magnitude
from .encodings.prediction import Prediction
from .layout import Layout, pad_to_chunks
from .manifest import Manifest
from .plan import PIXELS, ROWS, SpaceSpec
from .rows import RowBatch
from .sharding import shard_file, shard_file_as_sealed
from .statistics import Accumulator, Moments

PARTIAL = "partial"
_BLOCK = 1 << 18


class ShardWriter:
    """Collects the rows of one shard for some units and commits them.

    Used as a context: leaving it without an exception closes and commits it. That writes each
    array's file once, syncs it, reads it back, and renames it into place, then does the same for
    the commit record of every unit. Leaving it by an exception leaves nothing behind.
    :class:`CommitThread` does the same beside the caller.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        shard: int,
        units: tuple[str, ...],
        calibrations: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        self._path = path
        self._manifest = manifest
        self._layout = Layout(manifest.plan)
        self._shard = shard
        self._units = units
        self._rows = manifest.plan.rows_in(shard)
        self._filled = 0
        self._keys: list[str] = []
        self._valid = 0
        self._row_values = {
            name: pad_to_chunks(spec, self._rows)
            for name, spec in self._layout.row_arrays().items()
        }
        self._spaces = [space for unit in units for space in manifest.plan.spaces_of(unit)]
        self._pixels = None
        if manifest.plan.pixels is not None and PIXELS in units:
            self._pixels = pad_to_chunks(self._layout.pixel_array(), self._rows)
        self._values = {
            space.id: {
                name: pad_to_chunks(spec, self._rows)
                for name, spec in self._layout.space_arrays(space).items()
            }
            for space in self._spaces
        }
        self._calibrations = dict(calibrations)
        self._moments = {
            space.id: Accumulator(self._calibrations[space.id]["mean"]) for space in self._spaces
        }
        self._measured: dict[str, Callable[[], Moments]] = {}
        self._coming: deque[Encoded] = deque()

    @property
    def full(self) -> bool:
        """Whether all rows were appended."""
        return self._filled == self._rows

    def append(
        self, rows: RowBatch, tokens: Mapping[str, Any], pixels: np.ndarray | None = None
    ) -> None:
        """Encode the next rows.

        Of tokens on a CUDA device the codes are copied while it goes on, and placed by the next
        call or :meth:`commit`, which then also raises for them.

        Args:
            rows: facts about b rows.
            tokens: by space id, every space of the units' teachers: float ``[v, N, D]`` of the v
                valid rows, a torch tensor on any device or a NumPy array.
            pixels: uint8 ``[v, height, width, 3]`` of the valid rows, where ``pixels`` is one of
                the units; otherwise None.

        Raises:
            DataError: tokens that are not finite, or beyond what the encoding can hold.
            StoreError: too many rows, wrong shapes, missing or unknown spaces.
        """
        stored, at = self._checked(rows, tokens)
        keys = [key for key, valid in zip(rows.keys, stored["valid"], strict=True) if valid]
        self._keep_pixels(pixels, at)
        before = len(self._coming)
        for space in self._spaces:
            self._encode(space, tokens[space.id], at, keys)
        # the device is at these rows while those before them are placed
        self._land(but=len(self._coming) - before)
        self._keep(rows, stored)

    def append_encoded(self, rows: RowBatch, parts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Take rows whose tokens are encoded already; their shard then records no statistics.

        Args:
            parts: by space id and component name, ``[v, ...]`` of the v valid rows.

        Raises:
            StoreError: too many rows, missing or unknown spaces.
        """
        stored, at = self._checked(rows, parts)
        for space in self._spaces:
            for name, buffer in self._values[space.id].items():
                buffer[at] = parts[space.id][name]
        self._moments = {}
        self._keep(rows, stored)

    def _checked(
        self, rows: RowBatch, tokens: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The rows' stored form, and the places of the valid ones in the shard."""
        stored = rows.arrays(self._manifest.plan.key_bytes)
        end = self._filled + len(rows)
        if end > self._rows:
            raise StoreError(f"shard {self._shard} takes {self._rows} rows, not {end}")
        wanted = {space.id for space in self._spaces}
        if set(tokens) != wanted:
            raise StoreError(
                f"shard {self._shard} wants tokens of {sorted(wanted)}, not of {sorted(tokens)}"
            )
        return stored, self._filled + np.flatnonzero(stored["valid"])

    def _keep(self, rows: RowBatch, stored: Mapping[str, np.ndarray]) -> None:
        start, end = self._filled, self._filled + len(rows)
        for name, values in stored.items():
            self._row_values[name][start:end] = values
        self._leave_out(start + np.flatnonzero(stored["valid"] == 0))
        self._keys += rows.keys
        self._valid += int(stored["valid"].sum())
        self._filled = end

    def _leave_out(self, at: np.ndarray) -> None:
        """Fill values where rows have nothing."""
        if not len(at):
            return
        for space in self._spaces:
            for name, spec in self._layout.space_arrays(space).items():
                self._values[space.id][name][at] = spec.fill
        if self._pixels is not None:
            self._pixels[at] = self._layout.pixel_array().fill

    def _keep_pixels(self, pixels: np.ndarray | None, at: np.ndarray) -> None:
        if self._pixels is None and pixels is None:
            return
        wanted = None if self._pixels is None else (len(at), *self._pixels.shape[1:])
        given = None if pixels is None else pixels.shape
        if self._pixels is None or pixels is None or given != wanted or pixels.dtype != np.uint8:
            raise StoreError(
                f"shard {self._shard} wants pixels of shape {wanted} as uint8, not {given}"
            )
        self._pixels[at] = pixels

    def _encode(self, space: SpaceSpec, given: Any, at: np.ndarray, keys: list[str]) -> None:
        x = given if isinstance(given, torch.Tensor) else torch.from_numpy(np.asarray(given))
        if x.shape != (len(at), space.tokens, space.dim):
            raise StoreError(
                f"{space.id}: tokens of {len(at)} valid rows must have shape "
                f"{(len(at), space.tokens, space.dim)}, not {tuple(x.shape)}"
            )
        if not len(at):
            return
        block = len(at)
        if x.device.type == "cpu":  # temporaries that stay in the processor's cache
            block = max(1, _BLOCK // (space.tokens * space.dim))
        for start in range(0, len(at), block):
            part = slice(start, start + block)
            self._encode_block(space, x[part].detach().float(), at[part], keys[part])

    def _encode_block(
        self, space: SpaceSpec, x: torch.Tensor, at: np.ndarray, keys: list[str]
    ) -> None:
        frozen = self._calibrations[space.id]
        if frozen["mean"].device != x.device:
            frozen = {name: side.to(x.device) for name, side in frozen.items()}
            self._calibrations[space.id] = frozen
        z = (x - frozen["mean"]) / frozen["std"]
        parts = space.how.encode(z)
        if "weights" in frozen:
            prediction = Prediction(frozen["weights"], space.grid)
            parts["codes"] = prediction.residuals(parts["codes"])
        self._moments[space.id].add(x)
        found = Encoded(space, at, keys, largest_magnitude(z)[..., 0], parts)
        if found.under_way:
            self._coming.append(found)
        else:
            self._place(found)

    def _land(self, but: int = 0) -> None:
        """Place what a device has encoded, but for the last so many blocks."""
        while len(self._coming) > but:
            self._place(self._coming[0])
            self._coming.popleft()  # not before: what was refused must never be passed over

    def _place(self, found: Encoded) -> None:
        for name, values in found.wait().items():
            self._values[found.space.id][name][found.at] = values

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            self.commit()

    def close(self) -> None:
        """End the filling, on the thread that did it; does not wait for a device.

        Raises:
            StoreError: rows are missing.
        """
        if not self.full:
            raise StoreError(
                f"shard {self._shard} got {self._filled} of its {self._rows} rows; nothing was "
                "committed"
            )
        self._measured |= {space: sums.sent() for space, sums in self._moments.items()}
        self._moments = {}

    def commit(self) -> None:
        """Commit every unit of a closed shard, on any thread, and let go of the codes.

        Waits for what a device is still copying, which is then not in the way of its next work.

        Raises:
            DataError: as :meth:`append`.
            StoreError: the rows are not those of the store, or a unit's files cannot be written;
                that unit and those after it are pending as before.
        """
        try:
            self._land()
            self._refuse_other_rows()
            for unit in self._units:
                try:
                    self._commit(unit)
                except (StoreError, OSError) as error:
                    raise StoreError(f"shard {self._shard} of {unit}: {error}") from error
        finally:
            self._row_values, self._values, self._pixels = {}, {}, None
            self._measured = {}
            self._coming.clear()

    def _refuse_other_rows(self) -> None:
        """Tokens of a teacher must belong to the rows that the store already has."""
        if ROWS in self._units:
            return
        try:
            commit = read_commit(self._path, self._manifest, self._layout, ROWS, self._shard)
        except StoreError:
            return  # not committed yet: whoever commits the rows is compared with the index hash
        for name, spec in self._layout.row_arrays().items():
            raw = shard_file(spec, self._row_values[name])[1]
            if tuple(raw) != commit.files[spec.path].chunks:
                raise StoreError(
                    f"shard {self._shard}: {name} of the rows (keys {self._keys[0]!r} to "
                    f"{self._keys[-1]!r}) is not what the store has (keys {commit.first_key!r} to "
                    f"{commit.last_key!r}): use the images and views that it was made from, "
                    "and the same data.max_pixels"
                )

    def _commit(self, unit: str) -> None:
        with ExitStack() as undo:
            staged: list[Staged] = []
            files: dict[str, FileRecord] = {}
            sealed = best_completion(self._path, self._manifest, unit)
            for path, spec in self._layout.unit_arrays(unit).items():
                length = None if sealed is None else sealed.sizes[path][self._shard]
                buffers, sums = shard_file_as_sealed(spec, self._buffer(path), length)
                file = self._stage(self._path / spec.file(self._shard), buffers, undo)
                staged.append(file)
                files[path] = FileRecord(file.bytes, file.sha256, tuple(sums))
            for file in staged:
                file.verify()
            moments = {
                space: self._measured[space.id]().packed().tobytes()
                for space in self._spaces
                if space.teacher == unit and space.id in self._measured
            }
            statistics = {
                space.name: hashlib.sha256(raw).hexdigest() for space, raw in moments.items()
            }
            record = Commit(
                unit,
                self._shard,
                self._manifest.configuration(unit),
                self._rows,
                self._valid,
                self._keys[0],
                self._keys[-1],
                files,
                statistics,
            )
            if unit == ROWS and sealed is not None:
                self._refuse_other_record(record, sealed)
            self._publish(unit, staged, moments, record)

    def _refuse_other_record(self, record: Commit, sealed: Completion) -> None:
        """What is repaired must be the rows that were there: the tokens of all teachers are theirs,
        and rows depend on the images alone, not on a device."""
        if hashlib.sha256(record.to_bytes()).hexdigest() != sealed.records[self._shard]:
            invalid = self._rows - self._valid
            raise StoreError(
                f"its rows (keys {self._keys[0]!r} to {self._keys[-1]!r}, {invalid} of them "
                "without a sound image) are not those that the store was made with: bring back the "
                "images as they were then"
            )

    @staticmethod
    def _stage(final: Path, buffers: Iterable[Any], undo: ExitStack) -> Staged:
        file = Staged(final, buffers)
        undo.callback(file.discard)
        return file

    def _publish(
        self, unit: str, staged: list[Staged], moments: Mapping[SpaceSpec, bytes], record: Commit
    ) -> None:
        """Rename everything into place, unless another process has committed the shard.

        Moments are written under the lock, for whoever finishes the unit removes their folder.
        """
        name = self._path / record_name(unit, self._shard)
        with directory_lock(self._path / COMMITS / unit):
            if is_whole(self._path, self._manifest, self._layout, unit, self._shard):
                return
            try:
                # a record that is no longer true must not outlive its files
                name.unlink(missing_ok=True)
                for space, raw in moments.items():
                    file = self._path / partial_name(space, self._shard)
                    make_directory(file.parent)
                    write_whole(file, raw)
                for one in staged:
                    one.publish()
                for directory in {one.final.parent for one in staged}:
                    sync_directory(directory)
                write_whole(name, record.to_bytes())
            except BaseException:
                with suppress(OSError):  # whose name may not be durable
                    name.unlink(missing_ok=True)
                raise

    def _buffer(self, path: str) -> np.ndarray:
        parent, _, name = path.rpartition("/")
        if parent == ROWS:
            return self._row_values[name]
        if path == PIXELS and self._pixels is not None:
            return self._pixels
        return self._values[parent.removeprefix("spaces/")][name]


def partial_name(space: SpaceSpec, shard: int) -> str:
    """Path of a shard's packed moments, kept until the store is finished."""
    return f"{PARTIAL}/{space.teacher}/{space.name}.{shard}.f64"
