"""Every GPU test and benchmark of the repository, on the machine's CUDA device, as one JSON file.

Needs torch, triton and pytest; the package need not be installed, nor the checkout's folder have a
certain name, and nothing is downloaded. Without a CUDA device it says so and fails.

    python benchmarks/gpu.py              # writes benchmarks/results/<device>.json
    python benchmarks/gpu.py --rehearse   # the same over tiny tensors, without a device

A rehearsal runs the kernels in Triton's interpreter, which wants numpy too (below 2.4 for Triton
3.6); it measures nothing, and writes rehearsal.json to a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import checkout

# What each part may take, in seconds: together less than ten minutes.
LIMITS = {"tests": 200, "warm": 130, "cross_attention": 200, "alignment_loss": 60}


class Shard:
    """A pytest plugin that keeps every n-th test: compiling kernels takes most of their time."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = items[self.index :: self.count]


def run_tests(index: int, count: int) -> int:
    """One share of the tests marked gpu, with the package imported from the checkout."""
    import pytest

    checkout.ensure_importable()
    folder = checkout.ROOT / "tests" / "kernels"
    options = ["-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "--import-mode=importlib"]
    # Neither the repository's settings nor its root package, whose plugins may not be installed.
    options += ["-c", os.devnull, "--rootdir", str(folder), "--confcutdir", str(folder)]
    options += ["-o", "markers=gpu: needs CUDA"]
    status = int(pytest.main([*options, str(folder / "test_gpu.py")], [Shard(index, count)]))
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status


def run(name: str, commands: list[list[str]], limit: float) -> dict[str, Any]:
    """Runs the commands of one part side by side; all output is shown, that of failures kept."""
    start = time.perf_counter()
    deadline = start + limit
    folder = checkout.ROOT / "benchmarks"
    # Files, since pipes that nobody reads would stop the processes.
    outputs = [Path(tempfile.mkstemp(prefix="gpu-")[1]) for _ in commands]
    running = []
    for command, output in zip(commands, outputs, strict=True):
        with output.open("w") as file:
            running.append(
                subprocess.Popen(
                    [sys.executable, *command], cwd=folder, stdout=file, stderr=subprocess.STDOUT
                )
            )
    found: dict[str, Any] = {"status": 0}
    for process, output, command in zip(running, outputs, commands, strict=True):
        try:
            status = process.wait(max(0.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = 124
        text = output.read_text(encoding="utf-8", errors="replace")
        output.unlink()
        print(text, flush=True)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text):
            found[word] = found.get(word, 0) + int(number)
        if status:
            found["status"] = status
            found.setdefault("failures", []).append({"command": command, "output": text[-4000:]})
            print(f"{name}: {' '.join(command)} ended with status {status}", file=sys.stderr)
    found["seconds"] = round(time.perf_counter() - start, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shard", type=int, nargs=2, help="run this share of the tests only")
    parser.add_argument("--folder", type=Path, help="of the results; benchmarks/results")
    parser.add_argument("--parts", nargs="*", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--rehearse", action="store_true", help="without a device, tiny tensors")
    options = parser.parse_args()
    if options.rehearse:
        # Read by the kernels' package and by the tests, here and in the processes below.
        os.environ.update(TRITON_INTERPRET="1", PRECEPTOR_REHEARSAL="1")
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available: GPU tests and benchmarks were not run")
    if options.shard:
        raise SystemExit(run_tests(*options.shard))

    import cross_attention
    import device_timing as timing

    if options.rehearse:
        kind, device, extra = "cpu", "rehearsal", ["--tiny", "--no-compile"]
        sizes, rounds = ["tiny"], "1"
        folder = options.folder or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    else:
        kind, extra = "cuda", []
        device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        sizes, rounds = list(cross_attention.SIZES["cuda"]), "5"
        folder = options.folder or checkout.ROOT / "benchmarks" / "results"
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**timing.describe(kind), "parts": {}, "summary": {}}
    parts = result["parts"]
    shards = max(1, min(12, (os.cpu_count() or 2) - 2))
    commands = [["gpu.py", "--shard", str(index), str(shards)] for index in range(shards)]
    if options.rehearse:
        commands = [[*command, "--rehearse"] for command in commands]
    if "tests" in options.parts:
        parts["tests"] = run("tests", commands, LIMITS["tests"])
    # Everything is compiled first, side by side, so that the timed run finds it on disk.
    if "warm" in options.parts:
        bench = ["cross_attention.py", "--device", kind, *extra, "--warm", "--sizes"]
        parts["warm"] = run("warm", [[*bench, size] for size in sizes], LIMITS["warm"])
    for name in ("cross_attention", "alignment_loss"):
        if name not in options.parts:
            continue
        written = folder / f".{name}.json"
        written.unlink(missing_ok=True)
        command = [f"{name}.py", "--device", kind, *extra]
        command += ["--rounds", rounds, "--json", str(written)]
        if name == "cross_attention":
            command += ["--png", str(folder / f"{device}.png")]
        parts[name] = run(name, [command], LIMITS[name])
        if written.exists():
            result[name] = json.loads(written.read_text(encoding="utf-8"))
            result["summary"][name] = result[name]["summary"]
            written.unlink()
    path = folder / f"{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    print(json.dumps({"summary": result["summary"]}))
    failed = [name for name, found in result["parts"].items() if found["status"]]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
