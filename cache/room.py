"""How many bytes of a store are still to be written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from .layout import Layout
from .plan import StorePlan


def bytes_to_come(plan: StorePlan, pending: Iterable[tuple[int, Sequence[str]]]) -> int:
    """Bytes of shards that are pending, as if nothing could be compressed, and of their moments,
    which lie beside them until the store is finished.

    Args:
        pending: shards with the units that they lack, as ``StoreWriter.pending`` has them.
    """
    layout = Layout(plan)
    row_bytes = {
        unit: sum(spec.row_bytes for spec in layout.unit_arrays(unit).values())
        for unit in plan.units
    }
    moments = {
        unit: sum(8 * (1 + s.dim + s.dim * (s.dim + 1) // 2) for s in plan.spaces_of(unit))
        for unit in plan.units
    }
    return sum(
        plan.rows_in(shard) * row_bytes[unit] + moments[unit]
        for shard, units in pending
        for unit in units
    )


def lack_of_room(path: Path, wanted: int) -> str | None:
    """A sentence where a store's file system has not so many bytes free; None where it has, or does
    not say."""
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return None
    if wanted <= free:
        return None
    unit, size = ("GiB", 2**30) if wanted >= 2**30 else ("MiB", 2**20)
    return (
        f"{path} needs up to {wanted / size:,.2f} {unit} more, and its file system has "
        f"{free / size:,.2f} {unit} free: shards that do not fit are not written, and the same "
        "command goes on with them once there is room"
    )
