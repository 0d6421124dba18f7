"""The comparison made of real runs, end to end."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from preceptor.benchmarks import method
from preceptor.benchmarks.comparison import runs, timing
from preceptor.benchmarks.comparison.bed import Bed
from preceptor.benchmarks.comparison.plan import Plan
from preceptor.benchmarks.comparison.runs import load_trained
from preceptor.benchmarks.comparison.variants import STUDENTS, choose, variants
from preceptor.benchmarks.testbed import shards
from preceptor.train.batch import normalise

TASKS = ("letters", "pose", "masks", "instances")
"""Those of the fixture `bed`."""


def test_runs_are_made_once_and_reported(bed, tmp_path, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.setitem(STUDENTS, "cnn", (*STUDENTS["cnn"], "recipe.batch_size=16"))
    arguments = [
        "--bed", str(bed), "--out", str(tmp_path), "--students", "cnn", "--seeds", "1",
        "--steps", "2", "--json", str(tmp_path / "method.json"),
    ]  # fmt: skip
    chosen = "model_token,regression,supervised,random,ours_no_stream"  # of the ViT, the last one
    method.main([*arguments, "--variants", chosen])
    found = json.loads((tmp_path / "method.json").read_text())
    summary = found["summary"]["cnn"]
    assert set(summary["means"]) == {"model_token", "regression", "supervised", "random"}
    assert summary["best_rival"]["name"] == "regression"
    assert set(summary["teachers"]) == {"letters", "pose", "materials"}
    assert set(summary["cosines"]["end"]) == {"letters~pose", "letters~materials", "pose~materials"}
    assert all(-1 <= value <= 1 for value in summary["cosines"]["end"].values())
    # The difference, once more by hand from what the two runs left.
    runs = [
        json.loads((tmp_path / "cnn" / name / "s0" / "result.json").read_text())["scores"]
        for name in ("model_token", "regression")
    ]
    by_hand = []
    for task in TASKS:
        best = [max(run[task].values(), key=lambda score: score["validation"]) for run in runs]
        by_hand.append(best[0]["test"] - best[1]["test"])
    assert summary["best_rival"]["mean"] == pytest.approx(np.mean(by_hand))

    # The untrained student's batch norms have the statistics of the pool.
    floor, _ = load_trained(Bed(bed), tmp_path / "cnn" / "random" / "s0", "random", 0)
    pool = torch.from_numpy(Bed(bed).pixels["pool"])
    assert len(pool) == 128
    with torch.no_grad():
        seen = floor.model.conv1[0](normalise(pool, torch.device("cpu")))
    torch.testing.assert_close(floor.model.conv1[1].running_mean, seen.mean((0, 2, 3)))

    # What is there is not done again; a new variant joins the table.
    before = (tmp_path / "cnn" / "regression" / "s0" / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0)
    method.main([*arguments, "--variants", "regression,only_pose", "--time"])
    printed = capsys.readouterr().out
    assert printed.count("$ preceptor train") == 1
    assert (tmp_path / "cnn" / "regression" / "s0" / "result.json").stat().st_mtime_ns == before
    everything = json.loads((tmp_path / "method.json").read_text())
    again = everything["summary"]["cnn"]
    assert set(again["company"]["pose"]) == {"joint", "alone"}
    assert len(again["inference_ms"]) == 4
    for times in again["inference_ms"].values():
        assert set(times) == {*timing.timed(variants([]), "cnn"), timing.READ}
        assert times["model_token"]["ratio"] == 1
        assert all(own["ms"] > 0 and own["quartiles_ms"][0] > 0 for own in times.values())

    # A run of other options is refused, and told where it is reported.
    path = tmp_path / "cnn" / "regression" / "s0" / "config.yaml"
    whole = path.read_text()
    assert everything["other_options"] == {}
    path.write_text(whole.replace("clip: 3.0", "clip: 1.0"))
    with pytest.raises(SystemExit, match=r"regression/s0 was trained with recipe.clip=1.0, not 3"):
        method.main([*arguments, "--variants", "regression"])
    method.main([*arguments, "--report"])
    told = json.loads((tmp_path / "method.json").read_text())["other_options"]
    assert told == {"cnn/regression/s0": {"recipe.clip": [1.0, 3.0]}}
    path.write_text(whole)

    # What every run is given is part of the plan; labels alone do not heed it.
    given = [*arguments, "--out", str(tmp_path_factory.mktemp("given"))]
    of_all = ["--option", "recipe.clip=1.0"]
    with pytest.raises(SystemExit, match="supervised heeds no --option"):
        method.main([*given, *of_all, "--variants", "supervised"])
    method.main([*given, *of_all, "--variants", "regression"])
    given_all = json.loads((tmp_path / "method.json").read_text())
    assert given_all["protocol"]["options"] == ["recipe.clip=1.0"]
    assert given_all["other_options"] == {}
    with pytest.raises(SystemExit, match=r"regression/s0 was trained with recipe.clip=1.0, not 3"):
        method.main([*given, "--variants", "regression"])

    # The finished runs in one file give the same report without their folders, and are not done
    # again; a folder's own run counts before the file's.
    kept = tmp_path / "runs.jsonl"
    method.main([*arguments, "--report", "--runs", str(kept)])
    of_folders = json.loads((tmp_path / "method.json").read_text())
    assert len(kept.read_text().splitlines()) == 5
    capsys.readouterr()
    elsewhere = [*arguments, "--out", str(tmp_path / "elsewhere"), "--runs", str(kept)]
    method.main([*elsewhere, "--variants", "regression,only_letters"])
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$")]
    assert ["only_letters" in line for line in commands] == [True]
    assert len(kept.read_text().splitlines()) == 6
    found = json.loads((tmp_path / "method.json").read_text())
    assert found["other_options"] == {}
    for name, expected in of_folders["summary"]["cnn"]["against"].items():
        told = found["summary"]["cnn"]["against"][name]
        assert told["mean"] == pytest.approx(expected["mean"], abs=1e-4)
        assert told["over_tasks"] == pytest.approx(expected["over_tasks"], abs=1e-4)
    whole = kept.read_text()
    kept.write_text(whole.replace('"recipe.clip":3.0', '"recipe.clip":1.0'))
    with pytest.raises(SystemExit, match=r"cnn/regression/s0 was trained with recipe.clip=1.0"):
        method.main([*elsewhere, "--variants", "regression"])
    kept.write_text(whole.replace('"steps":2', '"steps":3', 1))
    with pytest.raises(SystemExit, match=r"runs.jsonl, line 1: a run with steps=3"):
        method.main([*elsewhere, "--report"])
    kept.write_text(whole[:-20])
    with pytest.raises(SystemExit, match=r"runs.jsonl, line 6 is no finished run"):
        method.main([*elsewhere, "--report"])
    shutil.rmtree(tmp_path / "elsewhere")
    capsys.readouterr()

    # What the cache costs: the first views of the very store that has one for every step.
    method.main([*arguments, "--variants", "none", "--stores", "fp16,views1,online"])
    commands = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("$ preceptor train")
    ]
    caches = [re.search(r"cache=\S*/(\S+)", line)[1] for line in commands]
    assert caches == ["pool-fp16", "pool-random1", "pool-random1"]
    assert [" views=1 " in line for line in commands] == [False, True, False]
    found = json.loads((tmp_path / "method.json").read_text())["stores"]["cnn"]
    assert set(found) == {"fp16", "views1", "online"}
    assert found["views1"]["difference"]["mean"] == pytest.approx(
        found["views1"]["mean"] - found["online"]["mean"]
    )

    losses = [
        np.mean(list(json.loads(path.read_text())["losses"].values()))
        for path in (
            tmp_path / "stores" / name / "cnn/regression/s0/result.json"
            for name in ("views1", "online")
        )
    ]
    assert found["views1"]["held_out_difference"]["mean"] == pytest.approx(losses[0] - losses[1])
    assert found["views1"]["held_out_loss"] == pytest.approx(losses[0])

    # Judged on a bed whose tasks have changed since: told, and judged anew without training.
    for path in tmp_path.glob("**/s0/result.json"):
        if "supervised" not in path.parts:
            kept = json.loads(path.read_text())
            path.with_suffix(".before").write_text(json.dumps(kept))
            stale = {**kept, "bed": "another", "scores": {}}
            if "random" in path.parts:  # of before batch norms were settled, on these tasks
                stale |= {"bed": kept["bed"], "settled": None, "cosines": {}}
            path.write_text(json.dumps(stale))
    with pytest.raises(SystemExit, match="judged on other images"):
        method.main([*arguments, "--report"])
    capsys.readouterr()
    plan = Plan(Bed(bed), tmp_path, 2, bed / "stores" / "pool", shards.pattern(bed / "pool"))
    method.compare(plan, ["cnn"], choose("regression,random", variants([])), [0])
    assert "$ preceptor" not in capsys.readouterr().out
    method.main([*arguments, "--judge"])
    assert "$ preceptor" not in capsys.readouterr().out
    before = list(tmp_path.glob("**/result.before"))
    assert len(before) == 7
    for path in before:
        assert json.loads(path.with_suffix(".json").read_text()) == json.loads(path.read_text())

    with pytest.raises(SystemExit, match="not 3: choose another --out"):
        method.main([*arguments[:-4], "--steps", "3", "--report"])


def test_the_seconds_of_a_training_are_those_of_all_its_starts(bed, tmp_path, monkeypatch):
    pool = shards.pattern(bed / "pool")
    plan = Plan(Bed(bed), tmp_path, 2, bed / "stores" / "pool", pool)
    variant = variants([])["regression"]

    def stopped(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            runs.run(plan, "cnn", "regression", variant, 0)
    path = plan.folder("cnn", "regression", 0) / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "seconds": 5000.0}))  # as if it had been a long one
    found = runs.run(plan, "cnn", "regression", variant, 0)
    assert found["seconds"]["train"] == 5000
    assert 5000 < found["seconds"]["all"] < 6000


def test_a_folder_without_a_bed_is_told(tmp_path):
    with pytest.raises(SystemExit, match=r"make\.py"):
        method.main(["--bed", str(tmp_path), "--report"])
