"""One run in a process of its own: signals that reach it, and notices of a cluster."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from preceptor.train.ablate import job
from preceptor.train.ablate.stopping import SIGNALS, PoolStop
from submitit import LocalExecutor
from submitit.helpers import Checkpointable


@pytest.fixture
def in_place_of_a_run(tmp_path, monkeypatch):
    """A folder whose run is a program; what ends it or its parent is blocked and can be awaited."""

    def make(program: str) -> Path:
        script = tmp_path / "script"
        script.write_text(
            f"#!{sys.executable}\nimport os, signal, sys\nfrom pathlib import Path\n"
            "ends = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, ends)\n"
            f"got = Path(sys.argv[-1], 'got')\n{program}"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(script))
        monkeypatch.delenv("SLURM_STEP_ID", raising=False)
        folder = tmp_path / "run"
        folder.mkdir()
        return folder

    def unhandled(number, frame):
        pytest.fail(f"{signal.Signals(number).name} was not for the run")

    before = {number: signal.signal(number, unhandled) for number in SIGNALS}
    yield make
    assert {number: signal.getsignal(number) for number in before} == dict.fromkeys(
        before, unhandled
    )
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_passed_on_and_the_run_is_waited_for(in_place_of_a_run, number):
    folder = in_place_of_a_run(
        f"os.kill(os.getppid(), {int(number)})\n"
        "first = signal.sigwait(ends)\n"
        # What a terminal sends goes to a group, and the parent is not in this one.
        "got.write_text(f'{int(first)} {os.getpgrp() == os.getpid()}')\n"
    )
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
        job.run_apart(folder)
    if number != signal.SIGINT:
        assert stopped.value.code == 128 + number
    assert (folder / "got").read_text() == f"{int(number)} True"
    assert "was stopped and is saved" in (job.read_failure(folder) or "")


def test_nothing_is_begun_after_a_signal_that_a_run_finished_under(in_place_of_a_run):
    folder = in_place_of_a_run(
        "os.kill(os.getppid(), signal.SIGTERM)\ngot.with_name('result.json').write_text('{}')\n"
    )
    with pytest.raises(SystemExit):
        job.run_apart(folder)
    assert job.read_failure(folder) is None


def test_a_second_signal_kills_the_run(in_place_of_a_run):
    folder = in_place_of_a_run(
        "for _ in range(2):\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "    got.write_text(str(int(signal.sigwait(ends))))\n"
        "got.write_text('two')\n"
    )
    with pytest.raises(KeyboardInterrupt):
        job.run_apart(folder)
    assert (folder / "got").read_text() == str(int(signal.SIGINT))
    assert "was ended by SIGKILL" in (job.read_failure(folder) or "")


def test_in_a_step_of_slurm_the_signal_is_not_sent_twice(in_place_of_a_run, monkeypatch):
    sent = []
    monkeypatch.setattr(job.subprocess.Popen, "send_signal", lambda self, n: sent.append(n))
    folder = in_place_of_a_run(
        "for process in (os.getppid(), os.getpid()):\n    os.kill(process, signal.SIGTERM)\n"
        "signal.sigwait(ends)\n"
    )
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(SystemExit):
        job.run_apart(folder)
    assert sent == []


@pytest.mark.parametrize("step", [None, "0"])
def test_a_notice_goes_to_who_handles_it_after_the_run_has_saved(
    in_place_of_a_run, monkeypatch, step
):
    """As submitit does, which then submits the job again; Slurm tells the run as well."""
    saved = []

    def again(number, frame):
        saved.append((folder / "got").exists())
        raise SystemExit(7)

    before = signal.signal(signal.SIGUSR2, again)
    both = [
        "os.kill(os.getppid(), signal.SIGTERM)",
        "os.kill(os.getpid(), signal.SIGUSR2)",
    ]
    program = [
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})",
        *(both if step else []),
        "os.kill(os.getppid(), signal.SIGUSR2)",
        "got.write_text(str(int(signal.sigwait({signal.SIGUSR2}))))",
    ]
    folder = in_place_of_a_run("\n".join(program))
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    try:
        with pytest.raises(SystemExit, match="7"):
            job.run_apart(folder)
        assert signal.getsignal(signal.SIGUSR2) is again
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert saved == [True]
    assert (folder / "got").read_text() == str(int(signal.SIGUSR2))


class Run(Checkpointable):
    """What submitit is given: a run whose process is another program."""

    def __call__(self, folder: Path, program: str) -> str | None:
        sys.executable = program
        return job.run_apart(folder)


def test_submitit_submits_a_run_that_has_saved_again(tmp_path):
    """With its own processes in place of Slurm's jobs."""
    program, folder = tmp_path / "program", tmp_path / "run"
    program.write_text(
        f"#!{sys.executable}\nimport os, signal, sys\nfrom pathlib import Path\n"
        "folder = Path(sys.argv[-1])\n"
        "if (folder / 'saved').exists():\n"
        "    (folder / 'result.json').write_text('{}')\n"
        "    sys.exit()\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\n"
        "os.kill(os.getppid(), signal.SIGUSR2)\n"
        "signal.sigwait({signal.SIGUSR2})\n"
        "(folder / 'saved').touch()\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    executor = LocalExecutor(tmp_path / "jobs", max_num_timeout=1)
    executor.update_parameters(timeout_min=60)  # so that the notice is of another job's coming
    submitted = executor.submit(Run(), folder, str(program))
    assert submitted.result() is None
    assert (folder / "saved").exists()
    assert (folder / job.RESULT).exists()
    assert not (folder / job.FAILURE).exists()


@pytest.mark.parametrize("step", [None, "0"])
def test_a_run_of_a_pool_is_asked_once(in_place_of_a_run, monkeypatch, step):
    """Where srun signals it already, the pool does not."""
    folder = in_place_of_a_run(
        "asked = signal.sigtimedwait(ends, 3)\ngot.write_text(str(asked and asked.si_signo))\n"
    )
    PoolStop(folder.parent)._ask(signal.SIGTERM, None)
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    assert job._run_for_a_pool([sys.executable, str(folder)], folder) == (0, None)
    assert (folder / "got").read_text() == str(None if step else int(signal.SIGTERM))


def test_runs_of_a_pool_stop_when_its_process_is_ended(tmp_path):
    """As joblib's do: the run in flight is asked to save, and none is begun after it."""
    told, run, pool = (tmp_path / name for name in ("told", "run", "pool.py"))
    os.mkfifo(told)
    run.write_text(
        f"#!{sys.executable}\nimport os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        f"fifo = open({str(told)!r}, 'w')\n"
        "print('begun', file=fifo, flush=True)\n"
        "asked = signal.sigtimedwait({signal.SIGTERM}, 60)\n"  # one that never comes fails here
        "print(asked and asked.si_signo, file=fifo, flush=True)\n"
    )
    run.chmod(run.stat().st_mode | stat.S_IXUSR)
    pool.write_text(
        "import multiprocessing, sys\nfrom pathlib import Path\n"
        "def work(folder):\n"
        "    from preceptor.train.ablate import job\n"
        f"    ours = open({str(told)!r}, 'w')  # the reader sees its end with this process's\n"
        f"    sys.executable = {str(run)!r}\n"
        "    for name in ('one', 'two'):\n"
        "        (folder / name).mkdir()\n"
        "        try:\n"
        "            job.run_apart(folder / name)\n"
        "        except SystemExit as stopped:\n"  # which joblib hands over and goes on
        "            print(stopped.code, file=ours, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    spawned = multiprocessing.get_context('spawn')\n"
        "    spawned.Process(target=work, args=(Path(sys.argv[1]),)).start()\n"
    )
    process = subprocess.Popen([sys.executable, str(pool), str(tmp_path)])
    with told.open() as fifo:
        assert fifo.readline() == "begun\n"
        process.terminate()
        process.wait()
        assert fifo.read().split() == ["15", "143", "143"]
    assert "was stopped and is saved" in (job.read_failure(tmp_path / "one") or "")
    assert list((tmp_path / "two").iterdir()) == []
