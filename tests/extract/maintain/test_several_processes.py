"""Commands under torchrun: what two processes make together is what one makes alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from preceptor.benchmarks.small_store import contents
from preceptor.cli import main
from preceptor.tests.extract.tiny_store import COUNT, run, teachers

PLAIN = (
    "import sys; from pathlib import Path; from preceptor.tests.extract.tiny_store import run; "
    "verb, store, *rest = sys.argv[1:]; sys.exit(run(verb, Path(store), *rest))"
)


def together(
    verb: str, store: Path, shards: str, *options: str, script: str = PLAIN
) -> subprocess.CompletedProcess:
    """The verb as `tiny_store.run` gives it, in two processes."""
    file = store.parent / "verb.py"
    file.write_text(script)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(file), verb, str(store), shards, *options),
        ],
        capture_output=True,
        text=True,
    )


def test_two_processes_extract_and_add_what_one_does(
    shards: str, configs: Path, good: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    tiny = ("--config-dir", str(configs), "teachers=tiny")
    done = together("extract", both, shards, *tiny)
    assert done.returncode == 0, done.stderr
    assert contents(both) == good
    summary = json.loads(Path(f"{both}.extract.json").read_text())
    assert [("im006" in problem) for problem in summary["damaged_images"]] == [True]
    assert summary["rows_extracted"] == summary["rows"] == COUNT
    assert f"{COUNT} rows extracted now" in done.stdout
    assert done.stdout.count("rows extracted") == 1
    assert f"extract: {COUNT}/{COUNT} rows" in done.stderr

    third = teachers(third="other_vit")
    assert run("add", store, shards, third) == 0
    done = together("add", both, shards, third)
    assert done.returncode == 0, done.stderr
    assert contents(both) == contents(store)
    assert json.loads(Path(f"{both}.add.json").read_text())["rows_extracted"] == COUNT


ONE_IS_SLOW = """
import os, sys, time
from pathlib import Path
from preceptor.extract.runner import TeacherRunner
from preceptor.tests.extract.tiny_store import run
plain, store, rank = TeacherRunner.tokens, Path(sys.argv[2]), int(os.environ["RANK"])
begun = Path(f"{store}.begun")
def until(what):
    last = time.monotonic() + 60
    while not what():
        if time.monotonic() > last: os._exit(3)
        time.sleep(0.05)
def tokens(self, batch, only=None):
    if rank == 1:
        until(begun.exists)
    elif "rows" in only:  # not the calibration
        begun.touch()
        until(lambda: len(list(store.glob("commits/rows/*.json"))) >= 2)
    return plain(self, batch, only)
TeacherRunner.tokens = tokens
sys.exit(run(sys.argv[1], store, *sys.argv[3:]))
"""


def test_one_process_does_what_a_slow_one_leaves(
    shards: str, configs: Path, good: dict[str, bytes], tmp_path: Path
) -> None:
    """The first process is not through with its first batch before two of three shards are there;
    dealt out, two of them would be its own."""
    both = tmp_path / "both"
    tiny = ("--config-dir", str(configs), "teachers=tiny")
    done = together("extract", both, shards, *tiny, script=ONE_IS_SLOW)
    assert done.returncode == 0, done.stderr
    assert contents(both) == good


@pytest.mark.parametrize("verb", ["verify", "repair", "eval", "ablate", "export"])
def test_what_takes_one_process_says_so(
    verb: str,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    eval_of = [f"{side}.{key}={store}" for side in ("train", "test") for key in ("cache", "shards")]
    given = {"eval": eval_of, "export": [f"run={store}"]}.get(verb, [f"cache={store}"])
    assert main([verb, *given]) == 1
    assert "start it without torchrun" in capsys.readouterr().err
