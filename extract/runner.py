"""Teachers over the views of given rows: decoded, computed, and handed to the shards of a store."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from ..cache import PixelSpec, SampleIndex, StoreWriter, ViewPolicy
from ..cache.commit_thread import CommitThread
from ..cache.plan import PIXELS
from ..cache.room import bytes_to_come, lack_of_room
from ..cache.shard_writer import ShardWriter
from ..engine import decoders
from ..errors import ConfigError, DataError, PreceptorError
from ..pixels import normalise
from ..progress import ProgressLine
from .images import Geometry, ViewBatch, ViewDataset, batched, geometry, view_batches
from .storable import Computed, StoredRows, Target
from .teachers import Teacher
from .teachers.base import named, refuse_other_shapes
from .turns import WorkList, await_others


class TeacherRunner:
    """Runs every teacher over the views of given rows, on the device Fabric chose."""

    def __init__(
        self,
        fabric: Fabric,
        teachers: Sequence[Teacher],
        index: SampleIndex,
        policy: ViewPolicy,
        config: DictConfig,
    ) -> None:
        self.fabric, self.teachers = fabric, teachers
        self.index, self.policy = index, policy
        self.batch_size, self.workers = int(config.batch_size), decoders(config.workers)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: expected a positive number")
        self.max_pixels = int(config.data.max_pixels)
        self.skip_corrupt = config.on_corrupt == "skip"
        self.rows_extracted = 0
        for teacher in teachers:
            doing = f"its move to {fabric.device}" if teacher.own_code else None
            with named(teacher.name, doing=doing):
                teacher.to(fabric.device)

    def batches(
        self,
        rows: Iterable[Sequence[int]],
        pixels: PixelSpec | None = None,
        order: Iterable[int] | None = None,
    ) -> Iterable[ViewBatch]:
        """Decode the given lists of rows; a damaged image stops the run unless skipping is on, one
        that cannot be read always does.

        Args:
            pixels: a further geometry, beside those of the teachers.
            order: numbers of the lists that are wanted, as `view_batches` takes it.
        """
        geometries = [geometry(teacher.preprocessing) for teacher in self.teachers]
        if pixels is not None:
            geometries.append((pixels.size, pixels.interpolation))
        dataset = ViewDataset(self.index, self.policy, geometries, list(rows), self.max_pixels)
        pin = self.fabric.device.type == "cuda"
        for batch in view_batches(dataset, self.workers, pin=pin, order=order):
            if batch.unread is not None:
                raise DataError(batch.unread)
            if batch.problems and not self.skip_corrupt:
                raise DataError(
                    f"{batch.problems[0]} (on_corrupt=skip leaves such images out and counts them)"
                )
            yield batch

    @torch.inference_mode()
    def tokens(self, batch: ViewBatch, only: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Every space `teacher/name` of a batch's valid rows as float32 [v, N, D] on the device.

        Raises:
            TeacherError: a teacher gives other spaces or shapes than it states.
        """
        found: dict[str, Tensor] = {}
        sent: dict[Geometry, Tensor] = {}  # teachers of one geometry share the copy
        for teacher in self.teachers:
            if only is not None and teacher.name not in only:
                continue
            prepared = teacher.preprocessing
            shape = geometry(prepared)
            pixels = batch.pixels[shape]
            if not len(pixels):
                for space in teacher.spaces:
                    found[f"{teacher.name}/{space.name}"] = torch.empty(0, space.tokens, space.dim)
                continue
            if shape not in sent:
                sent[shape] = pixels.to(self.fabric.device, non_blocking=True)
            inputs = normalise(sent[shape], prepared.mean, prepared.std, self.fabric.device)
            doing = f"its network, for {len(pixels)} images," if teacher.own_code else None
            with self.fabric.autocast(), named(teacher.name, doing=doing):
                spaces = teacher(inputs)
                refuse_other_shapes(teacher, spaces, len(pixels))
            for name, tokens in spaces.items():
                # The user's own code may give the same memory again for the next batch, or compute
                # elsewhere.
                found[f"{teacher.name}/{name}"] = tokens.detach().to(
                    self.fabric.device, torch.float32, copy=teacher.own_code
                )
        return found

    def fill(self, writer: StoreWriter) -> list[str]:
        """Extract pending shards, as many as others leave to this process; returns the damaged
        images' names. A collective.

        A shard is encoded to its end, written and read back while the teachers run for the next
        one.
        Processes take shard after shard from one list; the first shows how far all of them are.
        """
        rank = self.fabric.global_rank
        # One list is shared out: who looked late would miss what the others have committed by then.
        pending = self.fabric.broadcast(writer.pending() if rank == 0 else [])
        if rank == 0 and (lack := lack_of_room(writer.path, bytes_to_come(writer.plan, pending))):
            print(f"warning: {lack}", file=sys.stderr)
        problems: list[str] = []
        # Batches never cross a shard and always start at its first row: a shard's bytes do not
        # depend on where an earlier run was stopped, nor on who does it.
        steps: list[_Step] = []
        ranges: list[range] = []  # of each shard's steps
        for shard, units in pending:
            lists = batched(writer.plan.rows_of(shard), self.batch_size)
            ranges.append(range(len(steps), len(steps) + len(lists)))
            steps += [_Step(shard, units, numbers) for numbers in lists]
        work = WorkList(self.fabric, len(pending))
        coming: deque[_Step] = deque()  # taken, and being decoded

        def order() -> Iterator[int]:
            for taken in work:
                for number in ranges[taken]:
                    coming.append(steps[number])
                    yield number

        pixels = writer.plan.pixels if any(PIXELS in units for _, units in pending) else None
        stream = iter(self.batches([step.numbers for step in steps], pixels, order()))
        line = ProgressLine("extract", sum(len(step.numbers) for step in steps), "rows")
        stored = StoredRows(writer)
        teachers = {unit for _, units in pending for unit in units}
        targets = {
            name: Target(space, writer.frozen(name, self.fabric.device))
            for name, space in writer.plan.spaces.items()
            if space.teacher in teachers
        }
        out: ShardWriter | None = None

        def keep(step: _Step, computed: Computed) -> None:
            nonlocal out
            found = computed.settled(
                self.index, stored, views=self.policy.count, skip=self.skip_corrupt
            )
            shown = None
            if pixels is not None and PIXELS in step.units:
                views = found.batch.pixels[pixels.size, pixels.interpolation]
                shown = views.permute(0, 2, 3, 1).numpy()
            if out is None:
                out = writer.shard(step.shard, step.units, self.fabric.device)
            out.append(found.batch.rows, found.tokens, shown)
            problems.extend(found.batch.problems)
            self.rows_extracted += len(found.numbers)
            done = work.advance(len(found.numbers))
            if rank == 0:
                line.advance(done - line.done)
            if out.full:
                commits.commit(out)
                out = None

        with line if rank == 0 else contextlib.nullcontext():
            with CommitThread() as commits:
                before: tuple[_Step, Computed] | None = None
                while True:
                    try:
                        batch = next(stream, None)
                        if batch is None:
                            break
                        step = coming.popleft()
                        tokens = self.tokens(batch, step.units)
                        computed = Computed.of(step.numbers, batch, tokens, targets)
                    except PreceptorError:
                        if before is not None:  # it may be the last of a shard, which is whole then
                            keep(*before)
                        raise
                    # the device is at these rows while those before them, which may be the last of
                    # another shard, are looked at
                    if before is not None:
                        keep(*before)
                    before = step, computed
                if before is not None:
                    keep(*before)
            await_others(self.fabric)
            if rank == 0:
                line.advance(work.advance(0) - line.done)
        return problems


@dataclass(frozen=True)
class _Step:
    """Rows of a shard that the teachers see together, and the units that the shard lacks."""

    shard: int
    units: tuple[str, ...]
    numbers: Sequence[int]
