"""Processes of their own, in which Triton is imported as its interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).parents[2]


def test_triton_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", str(FOLDER)]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_rehearsal_of_the_run_on_a_device(tmp_path):
    """What `make gpu` runs, over tiny tensors: its processes, options, paths and result."""
    pytest.importorskip("triton")
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--rehearse"]
    # As where the package is not installed: nothing but the checkout is importable.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"capture_output": True, "text": True, "check": False, "cwd": tmp_path}
    options["env"] = {**environment, "OMP_NUM_THREADS": "1"}
    parts = ["warm", "cross_attention", "alignment_loss"]
    done = subprocess.run([*script, "--folder", str(tmp_path), "--parts", *parts], **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    written = json.loads((tmp_path / "rehearsal.json").read_text())
    assert set(written["parts"]) == set(parts)
    assert written["torch"]
    assert written["triton"]
    for name in parts[1:]:
        assert written["summary"][name]
        for entry in entries_of(written[name]["results"]):
            assert set(entry["failed"]) <= {"flex"}
    # Some of the tests that a device would run.
    done = subprocess.run([*script, "--shard", "1", "18"], **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def entries_of(results):
    return results if isinstance(results, list) else results.values()
