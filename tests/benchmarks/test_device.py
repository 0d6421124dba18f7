"""The benchmarks of the kernels: what they leave where they are stopped."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["cross_attention", "alignment_loss"])
def test_a_run_that_is_stopped_keeps_what_it_measured(monkeypatch, tmp_path, name):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # the scripts set it for good
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script, timing = importlib.import_module(name), importlib.import_module("device_timing")
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 1.0)
    tiny = script.TINY if name == "cross_attention" else script.TINY["tiny"]
    monkeypatch.setattr(script, "SIZES", {"cpu": {"first": tiny, "second": tiny}})
    measure, sizes = script.measure, []

    def stopped(size, *rest):
        sizes.append(size)
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return measure(size, *rest)

    monkeypatch.setattr(script, "measure", stopped)
    options = ["--rounds", "1", "--no-compile", "--threads", str(torch.get_num_threads())]
    options += ["--kinds", "cached"] if name == "cross_attention" else []
    monkeypatch.setattr(sys, "argv", [name, *options, "--json", str(tmp_path / "found.json")])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["results"]) == len(found["summary"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
