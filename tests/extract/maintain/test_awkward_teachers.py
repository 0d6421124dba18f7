"""Teachers whose tokens hardly move, are mostly zeros, tiny or of very different sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache
from preceptor.cli import main
from preceptor.tests.extract.tiny_store import run

CALL = "call:preceptor.tests.extract.awkward_teachers"
NAMES = ("dark", "still", "trembling", "sparse", "faint", "massive")


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    group = tmp_path_factory.mktemp("groups") / "teachers"
    group.mkdir()
    (group / "awkward.yaml").write_text(
        "".join(f"{name}: {{source: '{CALL}:{name}'}}\n" for name in NAMES)
    )
    return ["--config-dir", str(group.parent), "teachers=awkward"]


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
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "other.yaml").write_text(
        f"dark: {{source: '{CALL}:still'}}\nstill: {{source: '{CALL}:dark'}}\n"
        f"trembling: {{source: '{CALL}:still'}}\n"
    )
    options = ["--config-dir", str(tmp_path), "teachers=other", "sample=5"]
    assert run("verify", made, shards, *options) == 1
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
