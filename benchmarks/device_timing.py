"""Times, peak memory and ceilings on a CPU or a CUDA device; needs torch alone."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark on a device."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, help="calls a measurement; 1 on CPU, 10 on CUDA")
    parser.add_argument("--tiny", action="store_true", help="see that all runs; times mean nothing")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    return parser


def chosen(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line, with the defaults of their device; sets torch's threads.

    Raises:
        SystemExit: there is no such device.
    """
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available; use --device cpu")
    options.repeats = options.repeats or (10 if options.device == "cuda" else 1)
    torch.set_num_threads(options.threads)
    return options


def describe(device: str) -> dict[str, Any]:
    """The device and the versions in words."""
    found: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device == "cuda":
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["name"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_bytes"] = properties.total_memory
        found["processors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda
        found["driver"] = driver_version()
    else:
        found["name"] = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
            found["name"] = models[0].split(":", 1)[1].strip() if models else found["name"]
        found["clock"] = "processor time of all threads"
        found["threads"] = torch.get_num_threads()
        found["load_average"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return found


def driver_version() -> str | None:
    """Of NVIDIA's kernel module, from its tool or its file in /proc."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    module = Path("/proc/driver/nvidia/version")
    try:
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", module.read_text())
    except OSError:
        return None
    return found[1] if found else None


def seconds(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of one call, over ``repeats`` of them in a row.

    On a CPU the processor time of all threads, which other programs do not lengthen; where threads
    wait for each other without spinning (OMP_WAIT_POLICY=passive) it is the work that was done.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    begin = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - begin) / repeats


def captured(works: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """All works in a row as one CUDA graph, whose replay costs the host a single launch.

    What is timed is then the device's work alone, however long Python takes to ask for it.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for work in works:
            work()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return graph.replay


def copies_beyond_caches(nbytes: int, device: str) -> int:
    """How many inputs of this size to take in turns so that none is still in the L2 cache."""
    if device != "cuda":
        return 1
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return max(1, -(-3 * properties.L2_cache_size // nbytes))


def alternate(
    works: Mapping[str, Callable[[], Any]], device: str, rounds: int, repeats: int, calls: int = 1
) -> dict[str, dict[str, float]]:
    """Median, least and quartiles of the seconds of each work, all measured in turns.

    Args:
        calls: how many calls one run of a work stands for; the seconds are of one of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            samples[name].append(seconds(work, device, repeats) / calls)
    result = {}
    for name, values in samples.items():
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        result[name] = {
            "median_s": statistics.median(values),
            "min_s": min(values),
            "quartiles_s": [quartiles[0], quartiles[2]],
        }
    return result


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """Bytes allocated at the highest point of a call, above what was there before it."""
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    held = peak = 0
    results: Any = profile.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of copying a tensor much larger than the caches."""
    count = (1 << 28) if device == "cuda" else (1 << 26)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(seconds(lambda: target.copy_(source), device, 5) for _ in range(5))
    return 2 * source.nbytes / best


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product."""
    size = 8192 if device == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    a @ b
    best = min(seconds(lambda: a @ b, device, 3) for _ in range(5))
    return 2 * size**3 / best


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    texts = [[str(c) for c in columns], *[[_text(v) for v in row] for row in rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
    lines = []
    for row in texts:
        cells = [
            text.ljust(width) if i < 1 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes the result so far: a run that is stopped keeps what it measured."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes the result, and prints its summary as one last line."""
    write(path, result)
    print(json.dumps({"summary": result["summary"]}))
