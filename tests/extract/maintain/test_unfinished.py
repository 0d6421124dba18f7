"""Stores that were begun and not finished, and commands that must not begin one."""

from __future__ import annotations

from pathlib import Path

import pytest
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache, StoreWriter
from preceptor.cache.durable import Staged
from preceptor.cli import main
from preceptor.errors import StoreError
from preceptor.extract import maintain
from preceptor.tests.extract.tiny_store import CALL, run, teachers


@pytest.fixture
def choice(tmp_path: Path) -> list[str]:
    """The choices of teachers ``cnn``, ``vit`` and ``other``, of which each is one."""
    folder = tmp_path / "configs" / "teachers"
    folder.mkdir(parents=True)
    for name, line in (("cnn", "cnn: cnn"), ("vit", "vit: vit"), ("other", "vit: other_vit")):
        teacher, _, function = line.partition(": ")
        (folder / f"{name}.yaml").write_text(f"{teacher}: {{source: '{CALL}:{function}'}}\n")
    return ["--config-dir", str(folder.parent)]


BEGIN = ("shard_rows=4", "group_rows=2", "on_corrupt=skip", "calibration.images=6")


def arguments(store: Path, shards: str, *options: str) -> list[str]:
    given = [f"cache={store}", f"data.shards='{shards}'", "batch_size=3", "workers=0", "engine=cpu"]
    return [*given, *options]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("calibration.images=0", "calibration.images=0: expected a positive number"),
        ("calibration.store={other}", "has no space vit/patch; it has"),
        ("calibration.store={store}", "was made by another vit: its weights is"),
    ],
)
def test_a_calibration_that_cannot_be_leaves_no_store_behind(
    wrong: str, told: str, shards: str, store: Path, tmp_path: Path, choice: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Corrected, the command may well have another teacher, for which a begun one is no place."""
    lacks = tmp_path / "lacks"
    assert main(["extract", *choice, "teachers=cnn", *BEGIN, *arguments(lacks, shards)]) == 0
    option, made = wrong.format(other=lacks, store=store), tmp_path / "made"
    command = [*choice, "teachers=other", *BEGIN[:3], option, *arguments(made, shards)]
    assert main(["extract", *command]) == 1
    assert told in capsys.readouterr().err
    assert not made.exists()
    before = contents(lacks)
    assert main(["add", *arguments(lacks, shards, teachers(vit="other_vit"), option)]) == 1
    assert told in capsys.readouterr().err
    assert contents(lacks) == before


def test_verify_says_how_a_begun_store_is_finished(
    shards: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun"
    StoreWriter.open_or_create(begun, Cache.open(store).plan)
    assert main(["verify", f"cache={begun}"]) == 1
    told = capsys.readouterr().err
    assert told.count("3 shards of") == 3  # rows, and two teachers
    assert "3 shards of cnn not extracted yet" in told
    assert "preceptor extract" in told
    assert "preceptor repair" not in told
    for file in (store / "commits").glob("*/complete.json"):
        file.unlink()
        (store / "spare" / file.relative_to(store)).unlink()
    assert main(["verify", f"cache={store}"]) == 1
    told = capsys.readouterr().err
    assert "preceptor repair" in told  # the moments of its shards are gone
    (begun / "spaces/vit/zarr.json").unlink()
    assert main(["verify", f"cache={begun}"]) == 1
    assert "preceptor repair" in capsys.readouterr().err


def test_verify_says_so_of_a_store_that_was_cut_short(
    shards: str, tmp_path: Path, choice: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def cut(writer: StoreWriter) -> None:
        raise StoreError("cut short")

    path = tmp_path / "store"
    command = ["extract", *choice, "teachers=vit", *BEGIN, *arguments(path, shards)]
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", cut)
        assert main(command) == 1
    assert main(["verify", f"cache={path}"]) == 1
    told = capsys.readouterr().err
    assert "the unit was not finished" in told
    assert "preceptor extract" in told
    assert "preceptor repair" not in told
    assert main(command) == 0
    assert main(["verify", f"cache={path}"]) == 0


def refuse(*given: object) -> None:
    raise StoreError("no space left")


def cut_between_the_manifests(store: Path, shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin to add ``third``; its entry gets into the copy of the manifest alone."""
    publish = Staged.publish

    def full(file: Staged) -> None:
        (refuse if file.final == store / "manifest.json" else publish)(file)

    with monkeypatch.context() as patch:
        patch.setattr(Staged, "publish", full)
        assert run("add", store, shards, teachers(third="other_vit")) == 1
    assert b"third" in (store / "spare/manifest.json").read_bytes()


@pytest.mark.parametrize("repaired", [False, True])
def test_an_addition_that_has_hardly_begun_is_taken_back(
    repaired: bool, shards: str, store: Path, good: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cut_between_the_manifests(store, shards, monkeypatch)
    assert main(["verify", f"cache={store}"]) == 1
    dropping = f"`preceptor drop cache={store} teacher=third`"
    assert dropping in (told := capsys.readouterr().err)
    assert f"preceptor repair cache={store}" in told
    if repaired:  # no teacher is needed
        assert main(["repair", f"cache={store}"]) == 0
        assert dropping in capsys.readouterr().out
        assert Cache.open(store).teachers == ("cnn", "vit")
        assert main(["verify", f"cache={store}"]) == 1
        assert dropping in (told := capsys.readouterr().err)
        assert "preceptor repair" not in told
    assert main(["drop", f"cache={store}", "teacher=third"]) == 0
    assert main(["verify", f"cache={store}"]) == 0
    assert contents(store) == good


def test_repair_of_a_teacher_that_was_never_calibrated_says_how_it_is_finished_or_dropped(
    shards: str, store: Path, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    third = teachers(third="other_vit")
    with monkeypatch.context() as patch:
        patch.setattr(maintain, "calibrate", refuse)
        assert run("add", store, shards, third) == 1
    capsys.readouterr()
    for given in ([], [third]):
        assert run("repair", store, shards, *given) == 1
        told = capsys.readouterr().err
        assert "third/patch" in told
        assert "run the `preceptor extract` or `preceptor add` that began it" in told
        assert f"`preceptor drop cache={store} teacher=third`" in told
    assert main(["drop", f"cache={store}", "teacher=third"]) == 0
    assert contents(store) == good


def test_verify_says_that_a_conversion_finishes_what_one_has_begun(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of the teachers that it copies, whose moments it has not."""
    command = [f"cache={store}", f"out={tmp_path / 'out'}", "encoding=int4", "spaces=[vit/patch]"]
    assert main(["convert", *command]) == 0
    good = contents(tmp_path / "out")
    for file in (tmp_path / "out").rglob("complete.json"):
        file.unlink()
    assert main(["verify", f"cache={tmp_path / 'out'}"]) == 1
    told = capsys.readouterr().err
    assert "finish it with the `preceptor convert`" in told
    assert "preceptor repair" not in told
    assert main(["convert", *command]) == 0
    assert contents(tmp_path / "out") == good
