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


def together(verb: str, store: Path, shards: str, *options: str) -> subprocess.CompletedProcess:
    """The verb as `tiny_store.run` gives it, in two processes."""
    code = (
        "import sys; from pathlib import Path; from preceptor.tests.extract.tiny_store import run; "
        "verb, store, *rest = sys.argv[1:]; sys.exit(run(verb, Path(store), *rest))"
    )
    script = store.parent / "verb.py"
    script.write_text(code)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), verb, str(store), shards, *options),
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
    # The damaged image is in the second shard, which the second process extracts.
    assert [("im006" in problem) for problem in summary["damaged_images"]] == [True]
    assert summary["rows_extracted"] == summary["rows"] == COUNT
    assert f"{COUNT} rows extracted now" in done.stdout
    assert done.stdout.count("rows extracted") == 1
    assert "extract, 1 of 2: 7/7 rows" in done.stderr  # shards 0 and 2 of 4, 4 and 3 rows

    third = teachers(third="other_vit")
    assert run("add", store, shards, third) == 0
    done = together("add", both, shards, third)
    assert done.returncode == 0, done.stderr
    assert contents(both) == contents(store)
    assert json.loads(Path(f"{both}.add.json").read_text())["rows_extracted"] == COUNT


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
