"""Teachers whose tokens hardly move, are mostly zeros, tiny or of very different sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache
from preceptor.cache.durable import Staged
from preceptor.cli import main
from preceptor.errors import StoreError
from preceptor.tests.extract.tiny_store import run

CALL = "call:preceptor.tests.extract.awkward_teachers"
NAMES = ("dark", "still", "trembling", "sparse", "faint", "massive")


def chosen(folder: Path, teachers: str) -> list[str]:
    """The options of a choice of teachers, written to a folder."""
    (folder / "teachers").mkdir()
    (folder / "teachers" / "of_test.yaml").write_text(teachers)
    return ["--config-dir", str(folder), "teachers=of_test"]


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    teachers = "".join(f"{name}: {{source: '{CALL}:{name}'}}\n" for name in NAMES)
    return chosen(tmp_path_factory.mktemp("groups"), teachers)


@pytest.fixture(scope="module")
def made(shards: str, choice: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("awkward") / "store"
    assert run("extract", path, shards, *choice) == 0
    return path


def strict_json(path: Path) -> Any:
    """JSON without NaN and infinity, which only Python writes and reads."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{path}: {word}"))


def test_the_same_teachers_agree_with_their_store(
    made: Path, shards: str, choice: list[str]
) -> None:
    # other batches than those of the extraction
    assert run("verify", made, shards, *choice, "sample=7", "batch_size=2") == 0
    spaces = strict_json(made.with_name("store.verify.json"))["live"]["spaces"]
    assert len(spaces) == 2 * len(NAMES)
    for name, space in spaces.items():
        assert space["agrees"]
        if not name.startswith("massive"):
            assert space["cosine"] > 0.999, name


def test_another_teacher_does_not_agree_with_a_store_of_tokens_that_are_all_alike(
    made: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers = (
        f"dark: {{source: '{CALL}:still'}}\nstill: {{source: '{CALL}:dark'}}\n"
        f"trembling: {{source: '{CALL}:still'}}\n"
    )
    assert run("verify", made, shards, *chosen(tmp_path, teachers), "sample=5") == 1
    told = capsys.readouterr().err
    for name in ("dark", "still", "trembling"):
        assert f"{name}/patch, {name}/cls" in told


def test_info_describes_and_draws_them(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"cache={made}", f"json={tmp_path}/a.json", f"picture={tmp_path}/a.png"]
    assert main(["info", *given]) == 0
    assert "nan" not in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 0
    for space in strict_json(tmp_path / "a.json")["spaces"].values():
        assert 0 <= space["fidelity"]["relative_error"] < 0.05


def test_small_dimensions_beside_massive_ones_are_kept(made: Path) -> None:
    for space in Cache.open(made).spaces.values():
        if space.spec.teacher == "massive":
            small = np.delete(np.arange(12), [3, 10])
            assert (space.std[small] < 0.1).all()


def test_a_shard_is_extracted_again_to_the_same_bytes(
    made: Path, shards: str, choice: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(made)
    for name in NAMES:
        (made / f"spaces/{name}/patch/codes/c.1.0.0").unlink()
    assert run("repair", made, shards, *choice) == 0
    assert "to the same bytes" in capsys.readouterr().out
    after = contents(made)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("teacher", "space", "given", "stated"),
    [
        ("flat", "cls", "(2, 12)", "(2, 1, 12)"),
        ("broad", "patch", "(2, 16, 24)", "(2, 16, 12)"),
        ("lacking", "patch", "not there", "(2, 16, 12)"),
        ("generous", "map", "(2, 16, 12)", "not there"),
    ],
)
def test_a_teacher_that_gives_other_tokens_than_it_states_is_told(
    teacher: str,
    space: str,
    given: str,
    stated: str,
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = chosen(tmp_path, f"mine: {{source: '{CALL}:{teacher}'}}\n")
    assert run("extract", tmp_path / "store", shards, *options) == 1
    told = capsys.readouterr().err
    assert f"teacher mine: its space {space} is {given} for 2 images" in told
    assert f"by its attribute `spaces` {stated}" in told


@pytest.mark.parametrize("encoding", ["fp16", "int8"])
def test_images_too_far_from_a_borrowed_calibration_are_told_with_the_way_out(
    encoding: str,
    made: Path,
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Calibrated on the images of a store that hardly differ."""
    options = chosen(tmp_path, f"still: {{source: '{CALL}:stray', encoding: {encoding}}}\n")
    borrowed = f"calibration.store={made}"
    assert run("extract", tmp_path / "store", shards, *options, borrowed, "on_corrupt=stop") == 1
    told = capsys.readouterr().err
    assert f"too far from the calibrated mean for the encoding {encoding}" in told
    assert "calibration of more images" in told
    assert "would hold" not in told  # no encoding would


def test_a_store_of_which_no_row_has_tokens_is_told(
    made: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = chosen(tmp_path, f"still: {{source: '{CALL}:stray'}}\n")
    assert run("extract", tmp_path / "store", shards, *options, f"calibration.store={made}") == 1
    told = capsys.readouterr().err
    assert "none of its 11 rows has tokens" in told
    assert "the tokens of still/patch are too far from the calibrated mean" in told


def test_teachers_agree_with_a_store_that_was_converted_twice(
    made: Path, shards: str, choice: list[str], tmp_path: Path
) -> None:
    """What an encoding took the next one does not bring back, and the error to expect says so."""
    coarse, fine = tmp_path / "coarse", tmp_path / "fine"
    assert main(["convert", f"cache={made}", f"out={coarse}", "encoding=int4"]) == 0
    assert main(["convert", f"cache={coarse}", f"out={fine}", "encoding=fp16"]) == 0
    assert run("verify", fine, shards, *choice, "sample=10") == 0
    spaces = strict_json(tmp_path / "fine.verify.json")["live"]["spaces"]
    found = spaces["faint/patch"]
    assert found["relative_error_standardised"] > 0.02
    assert found["relative_error_standardised"] == pytest.approx(
        found["expected_standardised"], rel=0.3
    )


@pytest.mark.parametrize("cut", [4, 7])
def test_a_calibration_cut_short_goes_on_to_the_same_store(
    cut: int, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the rows that all teachers have tokens of, whenever the manifest was written last."""
    options = chosen(
        tmp_path, f"choosy: {{source: '{CALL}:choosy'}}\nmassive: {{source: '{CALL}:massive'}}\n"
    )
    assert run("extract", tmp_path / "good", shards, *options) == 0
    publish, manifests = Staged.publish, iter(range(1, 100))

    def full(file: Staged) -> None:
        if file.final.name == "manifest.json" and next(manifests) >= cut:
            raise StoreError("no space left")
        publish(file)

    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(Staged, "publish", full)
        run("extract", store, shards, *options)
    assert run("extract", store, shards, *options) == 0
    assert contents(store) == contents(tmp_path / "good")
    frozen = Cache.open(store).manifest.calibrations
    assert len({one.rows for one in frozen.values()}) == 1
    assert 0 < frozen["massive/patch"].rows < 5
