"""A folder that one process works in at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from preceptor.cli import main
from preceptor.train.claim import NAME, claimed, holder

HOLDS = """
import sys
from pathlib import Path
from preceptor.train.claim import claimed
with claimed(Path(sys.argv[1])) as other:
    print(other, flush=True)
    sys.stdin.read()
"""
IN_TURN = """
import os, sys
from pathlib import Path
from preceptor.train.claim import claimed
folder, had = Path(sys.argv[1]), 0
while had < 200:
    with claimed(folder) as other:
        if other is None:
            os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))  # fails beside another
            os.unlink(folder / "alone")
            had += 1
"""


@contextmanager
def held(folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """While open, another process works in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], env={**os.environ, **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "None\n"
    try:
        yield process
    finally:
        process.communicate()


def test_who_works_in_a_folder_is_told_and_a_killed_one_does_no_longer(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    for job, told in (
        ({}, ""),
        ({"SLURM_JOB_ID": "7"}, ", Slurm's job 7"),
        (
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"},
            ", Slurm's job 7_2",
        ),
    ):
        with held(folder, **job) as process:
            expected = f"process {process.pid} on {socket.gethostname()}{told}"
            assert holder(folder) == expected
            with claimed(folder) as other:
                assert other == expected
            assert holder(folder) == expected  # who was not let in takes nothing away
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert holder(folder) is None
            with claimed(folder) as other:
                assert other is None


def test_workers_that_outlive_a_killed_process_hold_nothing(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        "from preceptor.train.claim import claimed\n"
        "with claimed(Path(sys.argv[1])):\n"
        "    worker = os.fork()\n"
        "    if worker:\n        print(worker, flush=True)\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    assert holder(tmp_path) is not None
    process.kill()
    process.wait()
    os.kill(worker, 0)  # it is there
    assert holder(tmp_path) is None
    process.communicate()


def test_nothing_stays_behind(tmp_path: Path) -> None:
    with claimed(tmp_path / "new"):
        assert (tmp_path / "new" / NAME).exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    with claimed(tmp_path / "old"), claimed(tmp_path / "made"):
        (tmp_path / "made" / "result").touch()
    assert {path.name for path in tmp_path.rglob("*")} == {"old", "made", "result"}
    assert holder(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_many_processes_are_never_in_it_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_TURN, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, told = process.communicate()
        assert process.returncode == 0, told


def test_without_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with held(tmp_path):
        monkeypatch.setattr(fcntl, "flock", refused)
        with claimed(tmp_path) as other:
            assert other is None


def test_a_second_training_in_one_folder_is_refused(bed, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", f"cache={bed.cache}", f"data.shards={bed.shards}", f"out={out}",
                 "student=resnet_micro", "student.size=32", "recipe=short", "recipe.steps=1",
                 "recipe.batch_size=8", "engine=cpu", "workers=0"]  # fmt: skip
    with held(out) as process:
        before = set(out.iterdir())
        assert main(arguments) == 1
        told = capsys.readouterr().err
        assert f"{out} is being worked in by process {process.pid} on" in told
        assert "wait for it or stop it, or choose another out=..." in told
        assert set(out.iterdir()) == before
    assert main(arguments) == 0
    (tmp_path / "file").touch()
    assert main([*arguments, f"out={tmp_path / 'file' / 'run'}"]) == 1
    assert f"{tmp_path / 'file' / 'run'} cannot be written to" in capsys.readouterr().err
    assert main([*arguments, f"out={tmp_path / 'file'}"]) == 1
    assert f"{tmp_path / 'file'} cannot be written to: it is a file" in capsys.readouterr().err
    before = {file: file.read_bytes() for file in Path(bed.cache).rglob("*") if file.is_file()}
    assert main([*arguments, f"out={bed.cache}"]) == 1
    assert f"{bed.cache} is a store of targets" in capsys.readouterr().err
    assert before == {f: f.read_bytes() for f in Path(bed.cache).rglob("*") if f.is_file()}
