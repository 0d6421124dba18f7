"""Making a store: created once, continued after any interruption, finished when whole."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import StoreError
from ..version import __version__
from .commit import COMMITS, committed, is_whole
from .constants import (
    calibration_files,
    calibration_sha256,
    calibration_sides,
    calibration_values,
    constant_bytes,
)
from .copies import best_manifest, stray_units
from .durable import (
    TEMPORARY,
    directory_lock,
    holds,
    make_directory,
    read_whole,
    remove_directory,
    remove_torn,
    sync_directory,
    write_whole,
)
from .encodings import encoding
from .finish import finish_unit
from .layout import Layout, node_bytes
from .manifest import MANIFEST, Calibration, Manifest, read_manifest
from .plan import PIXELS, ROWS, PixelSpec, SpaceSpec, StorePlan, TeacherRecord, plan_difference
from .shard_writer import PARTIAL, ShardWriter
from .source import local_path
from .spare import SPARE, lost_manifest, write_twice
from .stored_valid import stored_valid
from .waiting import waiting


class StoreWriter:
    """Writes a local store; any number of processes may write different shards of one store.

    Make one by :meth:`open_or_create` or :meth:`open`.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._layout = Layout(manifest.plan)
        self._frozen: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    @classmethod
    def open_or_create(
        cls, path: str | Path, plan: StorePlan, kept: Collection[str] = ()
    ) -> StoreWriter:
        """Begin the store of a plan, or continue it in the forms of encodings that it has.

        Args:
            kept: ids of spaces whose codes come from elsewhere: their form must be the plan's.

        Raises:
            StoreError: the store there was made by another configuration (both sides named), the
                directory holds something else, or it cannot be written.
        """
        path = local_path(path, "writing")
        if (path / MANIFEST).exists():
            writer = cls.open(path)
            writer.refuse_other(writer.plan, plan, kept)
            return writer
        for space in plan.spaces.values():
            encoding(space.encoding)
        try:
            make_directory(path)
            names = {entry.name for entry in path.iterdir()} - _OURS
            strangers = {name for name in names if not name.endswith(TEMPORARY)}
        except OSError as error:
            raise StoreError(f"{path} cannot hold a store: {error.strerror}") from error
        if strangers:
            raise StoreError(
                f"{path} holds other things ({', '.join(sorted(strangers)[:3])}) and no store: "
                "give a new directory"
            )
        with directory_lock(path):
            if not (path / MANIFEST).exists():
                if copy := lost_manifest(path):  # of whatever configuration: not to be overwritten
                    raise StoreError(f"{path / MANIFEST} is missing; {copy}")
                manifest = Manifest(plan, writer=f"preceptor {__version__}")
                layout = Layout(plan)
                _make_nodes(path, list(layout.root_nodes()))
                for unit in plan.units:
                    _make_unit(path, layout, unit)
                write_twice(path, MANIFEST, manifest.to_bytes())
                sync_directory(path.parent)
                remove_torn(path)  # of a process that died before there was a manifest
                return cls(path, manifest)
        return cls.open_or_create(path, plan, kept)  # another process made it meanwhile

    @classmethod
    def open(cls, path: str | Path) -> StoreWriter:
        """Continue the store that is there, whatever its plan; removes torn temporary files."""
        path = local_path(path, "changing")
        try:
            manifest = read_manifest(path)
        except StoreError as error:
            if copy := lost_manifest(path):
                wrong = error if (path / MANIFEST).exists() else f"{path / MANIFEST} is missing"
                raise StoreError(f"{wrong}; {copy}") from error
            raise
        writer = cls(path, manifest)
        _make_nodes(path, list(writer._layout.root_nodes()))
        for unit in manifest.plan.units:
            _make_unit(path, writer._layout, unit)
        remove_torn(path)
        return writer

    def refuse_other(self, plan: StorePlan, ours: StorePlan, kept: Collection[str] = ()) -> None:
        """Refuse a plan that is not the store's, or not what ``plan`` has of that.

        Raises:
            StoreError: both sides are named.
        """
        if found := plan_difference(plan, ours, kept):
            raise StoreError(
                f"{self.path} was made by another configuration: {found}; give the configuration "
                "that made it, or another path"
            )

    @property
    def plan(self) -> StorePlan:
        return self.manifest.plan

    @property
    def uncalibrated(self) -> list[SpaceSpec]:
        """Spaces whose standardisation is not frozen yet."""
        spaces = self.plan.spaces
        return [space for name, space in spaces.items() if name not in self.manifest.calibrations]

    def calibrate(
        self,
        space_id: str,
        mean: np.ndarray,
        std: np.ndarray,
        *,
        rows_used: int,
        weights: np.ndarray | None = None,
    ) -> None:
        """Freeze the standardisation of a space and, where it is predicted, the prediction.

        Args:
            mean, std: ``[D]``, kept as float32; see ``statistics.calibration``.
            rows_used: how many rows they were measured on.
            weights: int8 ``[D, D]`` of a predicted space; see ``statistics.prediction``. None:
                zeros, every code is stored as it is.

        Raises:
            StoreError: an unknown space, values that cannot standardise or predict, or a second,
                other calibration.
        """
        one = {"mean": mean, "std": std, "rows_used": rows_used, "weights": weights}
        self.calibrate_all({space_id: one})

    def calibrate_all(self, measured: Mapping[str, Mapping[str, Any]]) -> None:
        """As :meth:`calibrate`, of several spaces at once: interrupted, none of them is frozen.

        Args:
            measured: by space id the other arguments.
        """
        found: dict[str, tuple[dict[str, np.ndarray], Calibration]] = {}
        for space_id, given in measured.items():
            if space_id not in self.plan.spaces:
                raise StoreError(f"{self.path} has no space {space_id!r}")
            space = self.plan.spaces[space_id]
            sides = calibration_sides(space, given["mean"], given["std"], given.get("weights"))
            frozen = Calibration(given["rows_used"], calibration_sha256(sides))
            found[space_id] = sides, frozen
        with directory_lock(self.path):
            self.manifest = read_manifest(self.path)  # another process may have calibrated
            for space_id, (_, frozen) in found.items():
                if self.manifest.calibrations.get(space_id, frozen) != frozen:
                    raise StoreError(
                        f"{space_id} in {self.path} is calibrated already, with other values: a "
                        "calibration is frozen"
                    )
            new = {
                name: one for name, one in found.items() if name not in self.manifest.calibrations
            }
            manifest = self.manifest
            for space_id, (sides, frozen) in new.items():
                arrays = self._layout.calibration_arrays(self.plan.spaces[space_id])
                for name, spec in arrays.items():
                    write_twice(self.path, spec.file(0), constant_bytes(spec, sides[name]))
                manifest = manifest.calibrated(space_id, frozen)
            if new:
                write_twice(self.path, MANIFEST, manifest.to_bytes())
                self.manifest = manifest

    def calibration(self, space_id: str) -> dict[str, np.ndarray]:
        """What is frozen of a space: ``mean`` and ``std``, float32 ``[D]``, and, where it is
        predicted, ``weights``, int8 ``[D, D]``.

        Raises:
            StoreError: not calibrated, or the arrays are damaged.
        """
        frozen = self.manifest.calibrations.get(space_id)
        space = self.plan.spaces[space_id]
        if frozen is None:
            raise self.lacks_calibration(space)
        raw = {}
        for name in calibration_files(self._layout, space):
            try:
                raw[name] = read_whole(self.path / name)
            except FileNotFoundError:
                raise StoreError(f"{self.path / name} is missing: run `preceptor repair`") from None
        return calibration_values(self._layout, space, raw, frozen)

    def lacks_calibration(self, space: SpaceSpec) -> StoreError:
        """What to tell of a space that only the command that began it can calibrate."""
        return StoreError(
            f"{space.id} in {self.path} is not calibrated yet: run the "
            f"{self.plan.begun_by([space.teacher])} that began it again, or remove it with "
            f"`preceptor drop cache={self.path} teacher={space.teacher}`"
        )

    def pending(self, units: Collection[str] | None = None) -> list[tuple[int, tuple[str, ...]]]:
        """(shard, its units without a whole committed shard), for every shard that has such.

        A committed shard whose files are missing or of another length counts as pending.

        Args:
            units: look at these alone.
        """
        units = self.plan.units if units is None else units
        lacking = {unit: set(range(self.plan.shards)) - self._whole(unit) for unit in units}
        todo = []
        for shard in range(self.plan.shards):
            missing = tuple(unit for unit in units if shard in lacking[unit])
            if missing:
                todo.append((shard, missing))
        return todo

    def _whole(self, unit: str) -> set[int]:
        return {
            shard
            for shard in committed(self.path, unit)
            if is_whole(self.path, self.manifest, self._layout, unit, shard)
        }

    def stored_valid(self, shard: int) -> NDArray[np.bool_] | None:
        """Which rows of a shard are valid, bool ``[rows]``, as its committed units have it; None:
        none of them can tell yet. See :func:`stored_valid.stored_valid`."""
        return stored_valid(self.path, self.manifest, shard)

    def frozen(self, space_id: str, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """:meth:`calibration` on a device, where it is read and copied to once: a copy to a GPU
        waits for all that the GPU has to do."""
        key = (space_id, str(device))
        if key not in self._frozen:
            found = self.calibration(space_id)
            self._frozen[key] = {
                name: torch.from_numpy(side).to(device) for name, side in found.items()
            }
        return self._frozen[key]

    def shard(
        self, shard: int, units: Sequence[str], device: torch.device | str = "cpu"
    ) -> ShardWriter:
        """A context that takes the rows of one shard for some units; see :class:`ShardWriter`.

        Args:
            device: where most tokens will come from.

        Raises:
            StoreError: no such shard or unit, or a space of it is not calibrated.
        """
        if not 0 <= shard < self.plan.shards:
            raise StoreError(f"{self.path} has shards 0 to {self.plan.shards - 1}, not {shard}")
        if not units:
            raise StoreError(f"shard {shard}: no units were named")
        spaces = [space for unit in units for space in self.plan.spaces_of(unit)]
        calibrations = {space.id: self.frozen(space.id, device) for space in spaces}
        return ShardWriter(self.path, self.manifest, shard, tuple(units), calibrations)

    def finish(self, units: Collection[str] | None = None) -> None:
        """Merge the statistics and seal every unit; the store can then be read.

        Args:
            units: these alone.

        Raises:
            StoreError: shards are pending (named), or statistics are damaged.
        """
        units = self.plan.units if units is None else units
        todo = self.pending(units)
        if todo:
            shards = ", ".join(str(shard) for shard, _ in todo[:8])
            raise StoreError(
                f"{self.path} is not whole: {len(todo)} of {self.plan.shards} shards are not "
                f"committed ({shards}{', ...' if len(todo) > 8 else ''})"
            )
        shards = f"{self.plan.shards:,} shards"
        with waiting(f"{self.path}: the statistics of {shards} are merged, and the store sealed"):
            for unit in units:
                finish_unit(self.path, self.manifest, unit)
        with contextlib.suppress(OSError):  # of a unit that was added meanwhile there may be some
            (self.path / PARTIAL).rmdir()

    def add(self, teacher: TeacherRecord) -> None:
        """Add a teacher to the plan; its shards are then pending, the others' stay as they are.

        Raises:
            StoreError: a teacher of that name is there already with another record.
        """
        for space in teacher.spaces:
            encoding(space.encoding)
        with directory_lock(self.path):
            manifest = read_manifest(self.path)
            plan = replace(manifest.plan, teachers=(*manifest.plan.teachers, teacher))
            remove_unit(self.path, teacher.name)  # what an interrupted drop left of another
            _make_unit(self.path, Layout(plan), teacher.name)
            self._replace(replace(manifest, plan=plan))

    def add_pixels(self, pixels: PixelSpec) -> None:
        """Add the pixels of the views to the plan; their shards are then pending.

        Raises:
            StoreError: the store has pixels already, or a teacher of that name.
        """
        with directory_lock(self.path):
            manifest = read_manifest(self.path)
            if manifest.plan.pixels is not None:
                raise StoreError(f"{self.path} has pixels already: drop them first")
            plan = replace(manifest.plan, pixels=pixels)
            remove_unit(self.path, PIXELS)
            _make_unit(self.path, Layout(plan), PIXELS)
            self._replace(replace(manifest, plan=plan))

    def drop(self, unit: str) -> None:
        """Remove a teacher, or the pixels: from the manifest first, then the files. So is removed,
        too, what an interrupted change has left of one.

        Raises:
            StoreError: there is no such teacher.
        """
        with directory_lock(self.path):
            manifest = best_manifest(self.path) or read_manifest(self.path)
            if unit not in stray_units(self.path, manifest):
                manifest = _without(manifest, unit)
            self._replace(manifest)  # of strays, too: one copy of the manifest may still name them
            remove_unit(self.path, unit)

    def _replace(self, manifest: Manifest) -> None:
        write_twice(self.path, MANIFEST, manifest.to_bytes())
        self.manifest = manifest
        self._layout = Layout(manifest.plan)
        self._frozen.clear()  # a teacher that is dropped and added again has another
        _make_nodes(self.path, list(self._layout.root_nodes()))  # they state the version


def _without(manifest: Manifest, unit: str) -> Manifest:
    before = manifest.plan
    if unit == PIXELS and before.pixels is not None:
        return replace(manifest, plan=replace(before, pixels=None))
    gone = before.teacher(unit)
    left = tuple(other for other in before.teachers if other is not gone)
    ids = {space.id for space in gone.spaces}
    kept = {key: one for key, one in manifest.calibrations.items() if key not in ids}
    return replace(manifest, plan=replace(before, teachers=left), calibrations=kept)


def remove_unit(root: Path, unit: str) -> None:
    """Remove all files of a unit that the manifest does not name (any more).

    Raises:
        StoreError: some cannot be removed.
    """
    for name in (COMMITS, "spaces", PARTIAL):
        remove_directory(root / SPARE / name / unit)
        remove_directory(root / name / unit)
    if unit == PIXELS:
        remove_directory(root / PIXELS)


_OURS = {"zarr.json", "spaces", ROWS, PIXELS, COMMITS, PARTIAL, SPARE, MANIFEST}


def _make_unit(path: Path, layout: Layout, unit: str) -> None:
    _make_nodes(path, list(layout.nodes(unit)))
    make_directory(path / COMMITS / unit)


def _make_nodes(path: Path, nodes: list[tuple[str, object]]) -> None:
    for name, metadata in nodes:
        make_directory(path / name)
        file, raw = path / name / "zarr.json", node_bytes(metadata)
        if not holds(file, raw):
            write_whole(file, raw)
