"""Runs that are done side by side have a device each."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import torch
from preceptor.train.ablate import job
from preceptor.train.ablate.devices import VISIBLE, own_device, visible_devices


def test_runs_beside_one_another_have_the_devices_in_turn(tmp_path):
    with ExitStack() as stack:
        given = [stack.enter_context(own_device(tmp_path, ["4", "7"])) for _ in range(4)]
    assert [one[VISIBLE] for one in given] == ["4", "7", "4", "7"]
    with own_device(tmp_path, ["4", "7"]) as again:
        assert again == {VISIBLE: "4"}


def test_a_process_that_was_killed_holds_no_device(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from preceptor.train.ablate.devices import own_device\n"
        f"with own_device(Path({str(tmp_path)!r}), ['0', '1']) as own:\n"
        "    print(own, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline().strip() == str({VISIBLE: "0"})
        with own_device(tmp_path, ["0", "1"]) as own:
            assert own == {VISIBLE: "1"}
        other.kill()
        other.wait()
    with own_device(tmp_path, ["0", "1"]) as own:
        assert own == {VISIBLE: "0"}


def test_one_device_needs_no_choice(tmp_path):
    for devices in ([], ["0"]):
        with own_device(tmp_path, devices) as own:
            assert own == {}
    assert not list(tmp_path.iterdir())


def test_devices_are_those_that_were_made_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(VISIBLE, raising=False)
    assert visible_devices() == ["0", "1"]
    monkeypatch.setenv(VISIBLE, "GPU-a,GPU-b")
    assert visible_devices() == ["GPU-a", "GPU-b"]


def test_the_run_of_a_pool_is_given_its_device(tmp_path, monkeypatch):
    """By the process that a pool's process starts for it."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    seen = []
    monkeypatch.setattr(job.multiprocessing, "parent_process", lambda: subprocess)
    monkeypatch.setattr(job, "leave_to_the_pool", lambda: None)
    monkeypatch.setattr(job, "_left_alone", lambda: False)
    monkeypatch.setattr(job, "visible_devices", lambda: ["3", "5"])

    def run(command, folder, env, **options):
        seen.append(env.get(VISIBLE))
        (folder / job.RESULT).write_text("{}")
        return 0, None

    monkeypatch.setattr(job, "_run_for_a_pool", run)
    with own_device(folder.parent, ["3", "5"]):
        assert job.run_apart(folder) is None
    assert seen == ["5"]
