"""How many processes decode images, how ranks find each other, and how long they wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Client

import pytest
import torch
from lightning_fabric.accelerators import MPSAccelerator
from omegaconf import OmegaConf
from preceptor import cli
from preceptor.benchmarks import torture_train
from preceptor.engine import decoders, launch, lost_decoder
from preceptor.errors import ConfigError
from preceptor.train.ablate import job

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("cores", "variables", "expected"),
    [
        (12, {}, 12),
        (1, {}, 1),
        (96, {}, 16),
        (96, {**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, 12),
        (4, {**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, 1),
        (96, {**SLURM, "SLURM_CPUS_PER_TASK": "7"}, 7),
        (32, {**SLURM, "SLURM_NTASKS_PER_NODE": "4"}, 8),
    ],
)
def test_workers_auto_is_a_share_of_the_cores(monkeypatch, cores, variables, expected):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert decoders("auto") == expected
    assert decoders(0) == 0
    assert decoders(40) == 40


def test_a_process_of_a_pool_does_not_take_all_cores():
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert pool.submit(decoders, "auto").result() == 2


def test_a_run_of_an_ablation_knows_that_its_launcher_is_a_pool(monkeypatch, tmp_path):
    pool = "import sys; from preceptor.engine import decoders; sys.exit(decoders('auto') != 2)"
    started = subprocess.run

    def instead(command, **how):
        return started([sys.executable, "-c", pool], **how).returncode, None

    monkeypatch.setattr(job, "_run", instead)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(job, "in_pool", lambda: True)
    assert job.run_apart(tmp_path).startswith("was stopped")  # its status is 0


@pytest.mark.parametrize("workers", [None, "many", -1, True, 1.5])
def test_other_numbers_of_workers_are_refused(workers):
    with pytest.raises(ConfigError, match="expected auto, or a whole number"):
        decoders(workers)


@pytest.mark.parametrize("error", ["ConfigError('no')", "ValueError('no')", "KeyboardInterrupt"])
def test_who_has_failed_among_others_of_nccl_does_not_wait_for_them(tmp_path, error):
    """NCCL's leave, at the interpreter's end, waits for processes that wait for this one."""
    script = tmp_path / "fail.py"
    script.write_text(
        "import atexit, threading; from unittest import mock; from preceptor import cli, engine\n"
        "from preceptor.errors import ConfigError\n"
        "atexit.register(threading.Event().wait)\n"
        "group = engine.torch.distributed\n"
        "with (\n"
        f"    mock.patch.object(cli.Verb, 'run', side_effect={error}),\n"
        "    mock.patch.object(group, 'is_initialized', return_value=True),\n"
        "    mock.patch.object(group, 'get_backend', return_value='nccl'),\n"
        "):\n"
        "    cli.main(['info', 'cache=x'])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == (130 if error == "KeyboardInterrupt" else 1)
    assert {"ConfigError('no')": "info: no\n", "KeyboardInterrupt": "interrupted\n"}.get(
        error, "ValueError: no\n"
    ) in done.stderr


def test_processes_wait_as_long_as_they_are_told(tmp_path):
    """The default group of two processes has the time that was asked for."""
    script = tmp_path / "wait.py"
    script.write_text(
        "from datetime import timedelta; from pathlib import Path; import preceptor\n"
        "import torch.distributed as dist; from omegaconf import OmegaConf\n"
        "from preceptor.engine import gathered, launch\n"
        "root = Path(preceptor.__file__).parent\n"
        "engine = OmegaConf.load(root / 'configs' / 'engine' / 'cpu.yaml')\n"
        "fabric = launch(engine, patience=timedelta(days=7))\n"
        "def days():  # no name may hold the group when the interpreter ends\n"
        "    group = dist.distributed_c10d._get_default_group()\n"
        "    return group._get_backend(fabric.device).options._timeout.days\n"
        "told = [days(), gathered(fabric, fabric.global_rank)]\n"
        "Path(__file__).with_suffix(f'.{fabric.global_rank}').write_text(str(told))\n"
    )
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run([sys.executable, *run, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [script.with_suffix(f".{rank}").read_text() for rank in "01"] == ["[7, [0, 1]]"] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_one_process_goes_first_and_holds_nobody_up(tmp_path, fails):
    """The second finds what the first has kept; and it ends as well where the first one fails."""
    script = tmp_path / "first.py"
    script.write_text(
        "from pathlib import Path; import preceptor; from omegaconf import OmegaConf\n"
        "from preceptor.engine import gathered, launch, one_first\n"
        "root = Path(preceptor.__file__).parent\n"
        "fabric = launch(OmegaConf.load(root / 'configs' / 'engine' / 'cpu.yaml'))\n"
        "kept = Path(__file__).with_suffix('.kept')\n"
        "try:\n"
        "    with one_first(fabric):\n"
        "        found = kept.exists()\n"
        "        kept.touch()\n"
        f"        assert fabric.global_rank or not {fails}, 'the first one fails'\n"
        "except AssertionError as error:\n"
        "    found = str(error)\n"
        "told = gathered(fabric, found)\n"
        "Path(__file__).with_suffix(f'.{fabric.global_rank}').write_text(str(told))\n"
    )
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *run, str(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = str(["the first one fails" if fails else False, True])
    assert [script.with_suffix(f".{rank}").read_text() for rank in "01"] == [told] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is CUDA then")
def test_auto_is_no_accelerator_that_was_never_tried(monkeypatch):
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    engine = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    assert launch(OmegaConf.create({**engine, "precision": "auto"})).device.type == "cpu"


@pytest.mark.parametrize("exact", [None, "16-mixed"])
def test_a_precision_of_gpus_is_not_replaced_by_another_in_silence(exact):
    """What a manifest says of its teachers would not be how they were run."""
    engine = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    asked = OmegaConf.create({**engine, "precision": "bf16-mixed" if exact else "16-mixed"})
    with pytest.raises(ConfigError, match=r"16-mixed: .* say engine.precision=bf16-mixed or 32-"):
        launch(asked, exact=exact)


def test_a_device_that_is_not_there_is_told_in_this_program_s_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = {"accelerator": "cuda", "devices": "auto", "num_nodes": 1, "strategy": "auto"}
    with pytest.raises(ConfigError, match=r"no CUDA device to be used \(torch .*engine=auto takes"):
        launch(OmegaConf.create({**engine, "precision": "bf16-mixed"}))


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_who_is_left_by_another_process_says_so(tmp_path, end):
    """By the command line, instead of a traceback of the library that joins them."""
    script = tmp_path / "left.py"
    script.write_text(
        "import os, sys; from datetime import timedelta\n"
        "from torch import distributed\n"
        "from preceptor import cli, engine\n"
        "rank, file = int(sys.argv[1]), sys.argv[2]\n"
        "distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank,\n"
        "    world_size=2, timeout=timedelta(minutes=2))\n"
        "distributed.barrier()\n"
        "if rank:\n"
        f"    {end}\n"
        "def work(config):\n"
        "    if config.picture:\n"
        "        raise RuntimeError('a bug')\n"
        "    distributed.barrier()\n"
        "cli.Verb.run = lambda verb, config: work(config)\n"
        "status = cli.main(['info', 'cache=a']), cli.main(['info', 'cache=a', 'picture=b'])\n"
        "print(status, flush=True)\n"
        "os._exit(0)\n"
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen([*command, "1", str(tmp_path / "store")]):
        done = subprocess.run(
            [*command, "0", str(tmp_path / "store")], capture_output=True, text=True
        )
    assert done.stdout == "(1, 1)\n", done.stderr
    left, _, bug = done.stderr.partition("Traceback")
    assert "preceptor info: another process of this run has ended or cannot be reached" in left
    assert "RuntimeError: a bug" in bug


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("a bug"),
    ],
    ids=["a device's", "the machine's", "not that"],
)
def test_too_little_memory_is_no_traceback(monkeypatch, capsys, error):
    def full(*_):
        raise error

    monkeypatch.setattr(cli.Verb, "run", full)
    assert cli.main(["info", "cache=a"]) == 1
    said = capsys.readouterr().err
    if str(error) == "a bug":
        assert "Traceback" in said
    else:
        assert "Traceback" not in said
        assert said == (
            f"preceptor info: there is not enough memory ({error}): lower batch_size, where the "
            "command has it, or free what other programs hold\n"
        )


def test_slurm_starts_the_ranks(tmp_path):
    """Two processes with the variables that srun sets find each other and the engine's default."""
    script = (
        "from omegaconf import OmegaConf; import preceptor, torch, pathlib, sys\n"
        "from preceptor.engine import launch\n"
        "root = pathlib.Path(preceptor.__file__).parent\n"
        "fabric = launch(OmegaConf.load(root / 'configs' / 'engine' / 'cpu.yaml'))\n"
        "total = fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op='sum')\n"
        "print(fabric.world_size, float(total))\n"
    )
    port = str(torture_train.free_port())
    ranks = []
    for rank in "01":
        slurm = {
            "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2",
            "SLURM_PROCID": rank, "SLURM_LOCALID": "0", "SLURM_NODEID": rank,
            "SLURM_JOB_ID": "4", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                env={**os.environ, **slurm},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
            )
        )
    for rank in ranks:
        out, errors = rank.communicate()
        assert rank.returncode == 0, errors
        assert out.split()[-2:] == ["2", "3.0"]


def test_a_decoder_that_ends_while_it_hands_a_batch_over_is_a_lost_one():
    """Of its death torch may hear by a connection that has ended, before it hears the signal."""
    loader = {"__name__": "torch.utils.data.dataloader"}
    exec("def taken(take, *given):\n    return take(*given)", loader)
    ours, theirs = Pipe()
    theirs.close()
    for take, *given in ((ours.recv,), (Client, "/nowhere/socket")):
        with pytest.raises((EOFError, FileNotFoundError)) as raised:
            loader["taken"](take, *given)
        assert "a process that decodes images was ended" in str(lost_decoder(raised.value))
        with pytest.raises((EOFError, FileNotFoundError)) as raised:
            take(*given)  # for another process than a decoder
        assert lost_decoder(raised.value) is None

    def refused():
        raise ConnectionResetError("a bucket's")

    with pytest.raises(ConnectionResetError) as raised:
        loader["taken"](refused)
    assert lost_decoder(raised.value) is None


def test_what_is_told_of_an_error_is_not_disturbed_by_a_decoder_s_death(monkeypatch, capsys):
    def heard(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    def dies_late(name, error):
        os.kill(os.getpid(), signal.SIGCHLD)
        print("told")

    def work(verb, config):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.Verb, "run", work)
    monkeypatch.setattr(cli, "_tell_of_a_bug", dies_late)
    before = signal.signal(signal.SIGCHLD, heard)
    try:
        assert cli.main(["info", "cache=a"]) == 1
        os.kill(os.getpid(), signal.SIGCHLD)  # nor is the end of the process
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert "told" in capsys.readouterr().out
