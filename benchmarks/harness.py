"""What the benchmarks share: the machine in words, cold files, medians, tables, JSON."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from preceptor.progress import plain_console
from rich.table import Table

T = TypeVar("T")


def machine(packages: Sequence[str] = ("numpy", "torch")) -> dict[str, Any]:
    """Processor, cores this process may use, and versions."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    """None of a package that is only on the path, which has left no record of its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cold(paths: Iterable[Path]) -> None:
    """Drop files and everything below directories from the page cache, as far as that goes."""
    os.sync()
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                fd = os.open(file, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def rate(work: Callable[[], int], seconds: float) -> float:
    """Units a second: ``work`` returns how many it did, and is repeated for some seconds."""
    done, start = 0, time.perf_counter()
    while True:
        done += work()
        spent = time.perf_counter() - start
        if spent >= seconds:
            return done / spent


def undisturbed(
    work: Callable[[], int], seconds: float, patience: Patience, most: float = 0.05
) -> float:
    """As `rate`, measured again while other processes took over ``most`` of the cores meanwhile.

    What cannot be had within the patience is taken as it is; `Patience.disturbed` counts it.
    """
    while True:
        before, start = patience.others(), time.perf_counter()
        speed = rate(work, seconds)
        spent = time.perf_counter() - start
        share = (patience.others() - before) / spent / (os.cpu_count() or 1)
        if share <= most:
            return speed
        if patience.left <= 0:
            patience.disturbed += 1
            return speed
        patience.left -= spent


@dataclass
class Patience:
    """How long a benchmark measures again, in all, while it shares the machine.

    Attributes:
        left: seconds.
        disturbed: measurements that were taken although others were at work.
    """

    left: float
    disturbed: int = 0

    @staticmethod
    def others() -> float:
        """CPU seconds of all processes but this one and its finished children since the start;
        of none where the system does not tell."""
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split()[1:9]
        except OSError:
            return 0.0
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return busy - (own.user + own.system + own.children_user + own.children_system)


def side_by_side(work: Callable[..., T], items: Sequence[Sequence[Any]], workers: int) -> list[T]:
    """What `work` gives for the arguments of every item, in order, from several processes.

    Args:
        work: a function of a module; the processes are copies of this one and use no device.
        workers: how many; 1 works here.
    """
    if workers <= 1 or len(items) < 2:
        return [work(*item) for item in items]
    copies = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=copies) as pool:
        return list(pool.map(work, *zip(*items, strict=True)))


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on standard output."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_text(value) for value in row))
    plain_console(width=120).print(table)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """The result as JSON, and its summary on standard output."""
    print(json.dumps({"summary": result["summary"]}, indent=2))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
