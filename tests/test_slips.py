"""What a shell, or a slip of the hand, makes of a command, and output that nobody reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import preceptor
import pytest
from preceptor.cache.pictures import Panel, draw_panels
from preceptor.cli import VERBS, main
from preceptor.errors import ConfigError, PreceptorWarning
from preceptor.options import check_options, compose_options, readable

ROOT = Path(preceptor.__file__).parent
GOLDEN = ROOT / "tests/cache/golden_3/store"


def test_a_range_that_the_shell_took_apart_is_refused() -> None:
    given = subprocess.run(
        ["bash", "-c", "printf '%s\\n' data.shards=x-{000..003}.tar"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.shards is given 4 times: a range is quoted"):
        check_options("extract", readable(["cache=c", *given]))
    # The last of others counts, as in a script that hands on what it was given.
    config = compose_options("extract", ["cache=c", "data.shards=x.tar", "seed=1", "seed=2"])
    assert config.seed == 2


@pytest.mark.parametrize(
    "option", ["cache=", "out=''", "data.shards=", "student.model=", "log.project="]
)
def test_an_empty_value_is_refused(option: str) -> None:
    """An unset variable would fill the current folder, or name nothing."""
    with pytest.raises(ConfigError, match=rf"{option.split('=')[0]}= is empty"):
        check_options("train", ["cache=c", option])


@pytest.mark.parametrize("given", ["cache=odd/sté", "cache=ストア", "cache=st öre/a,b"])
def test_letters_with_accents_are_as_good_as_others(given: str) -> None:
    options = readable(["data.shards=x.tar", given])
    if "," in given:
        with pytest.raises(ConfigError, match="letters with accents is quoted"):
            check_options("train", options)
        return
    assert compose_options("train", options).cache == given.partition("=")[2]


@pytest.mark.parametrize(
    "flag", ["--hlp", "--version", "--verbose", "-x", "--cfg=job", "--resolve"]
)
def test_a_flag_that_is_not_there_is_told(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "cache=c", flag]) == 1
    assert f"there is no flag {flag}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_a_sweep_leaves_its_file_under_outputs(verb: str) -> None:
    config = (ROOT / f"configs/{verb}.yaml").read_text()
    assert "sweep: {dir: outputs/multirun" in config or "sweep: {dir: '${out}'" in config


def test_output_need_not_be_read_to_its_end() -> None:
    """As `preceptor info | head` ends: without a word, and with the status of SIGPIPE."""
    there, end = os.pipe()
    os.close(there)
    with os.fdopen(end, "wb") as unread:
        command = [sys.executable, "-m", "preceptor", "info", f"cache={GOLDEN}"]
        done = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_package_s_own_warnings_are_what_they_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(*_: object) -> None:
        warnings.warn("lists cannot be kept", PreceptorWarning, stacklevel=1)
        raise ConfigError("no more")

    monkeypatch.setattr("preceptor.cli.check_options", warn)
    assert main(["info", "cache=c"]) == 1
    assert capsys.readouterr().err == "warning: lists cannot be kept\npreceptor info: no more\n"


def test_fabric_s_start_does_not_import_torchmetrics() -> None:
    code = (
        "import sys, preceptor.engine; assert 'torchmetrics' not in sys.modules; "
        "from lightning_fabric.utilities import imports; import torchmetrics; "
        "torchmetrics.MeanMetric; sys.exit(not imports._TORCHMETRICS_GREATER_EQUAL_1_0_0)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_training_s_start_does_not_import_scikit_learn() -> None:
    code = (
        "import sys, preceptor.engine, preceptor.train.loop; "
        "sys.exit(bool({'sklearn', 'scipy.stats', 'torchmetrics'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are markup to rich, and dollars mathematics to matplotlib."""
    store = tmp_path / "run[v2] :smile:"
    shutil.copytree(GOLDEN, store)
    assert main(["info", f"cache='{store}'"]) == 0
    assert f"{store}: complete" in capsys.readouterr().out
    colours = np.zeros((1, 2, 2, 3))
    draw_panels(tmp_path / "odd.png", [Panel("a$b_{$", colours)], {0: "$\\frac{$"})
    assert (tmp_path / "odd.png").stat().st_size > 0


@pytest.mark.parametrize("verb", ["info", "verify", "drop", "convert", "train"])
def test_a_name_that_cannot_be_is_no_traceback(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "drop": ["teacher=x"],
        "convert": ["out=o", "encoding=int8"],
        "train": ["data.shards=x.tar"],
    }
    assert main([verb, f"cache={tmp_path}/{'x' * 300}", *more.get(verb, [])]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"preceptor {verb}: {tmp_path}/xxx")
    assert told.count("\n") == 1
