"""An ablation whose runs are done side by side, by joblib's processes, is asked to stop."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from preceptor.train.ablate.stopping import SIGNALS, PoolStop, stop_asked

RUN = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
fifo = open(TOLD, 'w')
print('begun', file=fifo, flush=True)
asked = signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, 60)  # one that never comes fails here
more = signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, 2)
print('saved' if asked and not more else f'{asked} {more}', file=fifo, flush=True)
"""
POOL = """
import signal, sys
from pathlib import Path
from joblib import Parallel, delayed
from preceptor.train.ablate import job
from preceptor.train.ablate.stopping import PoolStop

def work(folder):
    sys.executable = RUN
    folder.mkdir()
    return job.run_apart(folder)

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started this ignores
    runs = Path(sys.argv[1])
    with PoolStop(runs) as stop:
        found = Parallel(n_jobs=2)(
            delayed(work)(runs / str(number)) for number in range(3)
        )
    print(*found, sep='\\n')
    job.raise_for(stop.asked)
"""


@pytest.mark.parametrize("whom", ["all", "one"])
def test_runs_are_saved_and_waited_for(whom: str, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the terminal, idle ones too; SIGTERM the ablation alone."""
    told, run, pool = (tmp_path / name for name in ("told", "run", "pool.py"))
    os.mkfifo(told)
    run.write_text(f"#!{sys.executable}\nTOLD = {str(told)!r}\n{RUN}")
    run.chmod(run.stat().st_mode | stat.S_IXUSR)
    pool.write_text(f"RUN = {str(run)!r}\n{POOL}")
    runs = tmp_path / "runs"
    runs.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(pool), str(runs)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    begun = 2
    with told.open() as fifo:
        assert [fifo.readline() for _ in range(begun)] == ["begun\n"] * begun
        if whom == "all":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        out, err = process.communicate()
        assert fifo.read().split() == ["saved"] * begun, err
    assert process.returncode == (-signal.SIGINT if whom == "all" else 128 + signal.SIGTERM), err
    answers = out.splitlines()
    assert sum("was stopped and is saved" in answer for answer in answers) == begun
    assert sum("was not begun" in answer for answer in answers) == 1
    assert "the runs in flight are being saved" in err
    assert not stop_asked(runs / "0")


def test_what_was_there_before_is_there_again(tmp_path: Path) -> None:
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, in a background
    try:
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        with PoolStop(tmp_path):
            assert signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT]
        assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
    finally:
        signal.signal(signal.SIGINT, found)


def test_a_second_signal_acts_as_before(tmp_path: Path) -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with PoolStop(tmp_path) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_asked(tmp_path / "run")
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.asked, got) == (signal.SIGTERM, [signal.SIGTERM])
    finally:
        signal.signal(signal.SIGTERM, before)
