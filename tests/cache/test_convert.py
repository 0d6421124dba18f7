"""Converted stores against encoding the decoded tokens, and against the files they came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from preceptor.benchmarks.faults import flip
from preceptor.benchmarks.small_store import (
    ROWS,
    TEACHERS,
    add,
    batch,
    calibrate,
    contents,
    extract,
    fill,
    plan,
    some_weights,
    tokens,
)
from preceptor.cache import Cache, StorePlan, StoreWriter, TeacherRecord
from preceptor.cache.convert import convert_store
from preceptor.cache.encodings import encoding
from preceptor.cache.encodings.compact import Compact
from preceptor.cache.mend import repair_store
from preceptor.cache.report import draw
from preceptor.cache.verify import verify_store
from preceptor.errors import ConfigError, StoreError

GOLDEN = Path(__file__).parent / "golden" / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convert") / "store"
    extract(path)
    return path


def test_shards_without_a_single_token_are_converted(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", plan())
    calibrate(writer)
    for shard, units in writer.pending():
        rows = batch(shard * 8, min(shard * 8 + 8, ROWS))
        rows.valid[:] = False
        spaces = [space for unit in units for space in plan().spaces_of(unit)]
        with writer.shard(shard, units) as out:
            none = {s.id: np.zeros((0, s.tokens, s.dim), np.float32) for s in spaces}
            out.append(rows, none, np.zeros((0, 5, 3, 3), np.uint8))
    writer.finish()
    for name in ("fp16", "int8", "compact", "int4"):
        convert_store(tmp_path / "store", tmp_path / name, name)
        assert verify_store(tmp_path / name).whole
        assert not Cache.open(tmp_path / name).valid.any()
    with pytest.raises(StoreError, match="no row with tokens"):
        draw(tmp_path / "store", tmp_path / "x.png")


def test_a_store_is_not_converted_into_itself(store: Path) -> None:
    before = contents(store)
    for out in (store, store / "int4", store / "spaces/vit/../x"):
        with pytest.raises(ConfigError, match="name another directory"):
            convert_store(store, out, "int4")
        with pytest.raises(ConfigError, match="name another directory"):
            convert_store(f"file://{store}", f"file://{out}", "int4")
    assert contents(store) == before


def test_a_link_that_leads_in_a_circle_is_no_place_for_a_store(store: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match="loop cannot be made"):
        convert_store(store, tmp_path / "loop", "int4")


def test_every_token_is_the_decoded_one_encoded_again(store: Path, tmp_path: Path) -> None:
    for name in ("int4", "compact", "fp16"):
        out = tmp_path / name
        convert_store(store, out, name)
        assert verify_store(out).whole
        before, after = Cache.open(store), Cache.open(out)
        rows = np.flatnonzero(after.valid)
        how = encoding(name)
        for space in after.spaces:
            assert after[space].encoding == name
            z = before[space].read(rows).standardised().numpy()
            expected = before[space].read(rows).restored().parts
            if before[space].encoding != name:
                expected = how.encode(z)
            for part, values in after[space].read(rows).restored().parts.items():
                np.testing.assert_array_equal(values.numpy(), np.asarray(expected[part]))
            live = tokens(after[space].spec, rows)
            error = np.abs(after[space].decode(after[space].read(rows)).numpy() - live)
            bounds = [encoding(e).bound(z) for e in {name, before[space].encoding}]
            # three times: the bound of decoded values stands for that of the live ones
            assert (error <= 3 * sum(bounds) * after[space].std.numpy() + 1e-4).all()
            np.testing.assert_array_equal(
                after[space].statistics().mean, before[space].statistics().mean
            )
        assert list(after.keys) == list(before.keys)
        for fact in ("labels", "valid", "sizes", "boxes", "flips"):
            np.testing.assert_array_equal(getattr(after, fact), getattr(before, fact))


def test_chosen_spaces_alone_change_and_other_teachers_keep_their_bytes(
    store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert_store(store, out, "compact", ["vit/patch"])
    assert verify_store(out).whole
    before, after = contents(store), contents(out)
    for name in before:
        if name.startswith(("rows/", "spaces/cnn/", "commits/cnn/", "commits/rows/")):
            assert after[name] == before[name], name
    assert after["spaces/vit/cls/codes/c.0.0.0"] == before["spaces/vit/cls/codes/c.0.0.0"]
    identity = Cache.open(out).plan.teacher("vit").identity
    assert identity == {**TEACHERS[0].identity, "converted": {"patch": ["int8"]}}


def test_an_unpredicted_store_becomes_a_predicted_one_without_loss(tmp_path: Path) -> None:
    before = Cache.open(GOLDEN)
    assert json.loads((GOLDEN / "manifest.json").read_text())["version"] == 1
    out = tmp_path / "out"
    convert_store(GOLDEN, out, "compact", ["vit/dense"])
    convert_store(GOLDEN, out, "compact", ["vit/dense"])  # once more does nothing
    assert verify_store(out).whole
    assert json.loads((out / "manifest.json").read_text())["version"] == 2
    after, rows = Cache.open(out), np.flatnonzero(before.valid)
    assert after["vit/dense"].spec.predicted
    for name, space in before.spaces.items():
        ours, theirs = (one[name].decode(one[name].read(rows)) for one in (after, before))
        assert ours.numpy().tobytes() == theirs.numpy().tobytes(), name
        assert space.encoding == after[name].encoding


def test_weights_are_kept_and_never_fitted_twice(tmp_path: Path) -> None:
    source = tmp_path / "source"
    extract(source)
    convert_store(source, tmp_path / "one", "fp16", ["cnn/cls"])
    theirs, ours = Cache.open(source)["cnn/patch"], Cache.open(tmp_path / "one")["cnn/patch"]
    assert theirs.prediction is not None
    assert ours.prediction is not None
    assert (ours.prediction.weights == theirs.prediction.weights).all()
    files = [contents(tmp_path / "one"), contents(source)]
    name = "spaces/cnn/patch/codes/c.0.0.0"
    assert files[0][name] == files[1][name]
    # another program, or another machine, may have rounded a weight to another integer
    out = tmp_path / "two"
    writer = StoreWriter.open_or_create(out, replace_encoding(source, "vit/patch"))
    mine = some_weights(writer.plan.spaces["vit/patch"])
    space = Cache.open(source)["vit/patch"]
    sides = space.mean.numpy(), space.std.numpy()
    writer.calibrate("vit/patch", *sides, rows_used=4, weights=mine)
    convert_store(source, out, "compact", ["vit/patch"])
    found = Cache.open(out)["vit/patch"]
    assert found.prediction is not None
    assert (found.prediction.weights == torch.from_numpy(mine)).all()
    bound = encoding("compact").bound(space.read([0, 1]).standardised())
    error = found.read([0, 1]).standardised() - space.read([0, 1]).standardised()
    assert (error.abs() <= bound).all()


def earlier() -> TeacherRecord:
    """The small store's teacher ``cnn`` of a release that stated no step."""
    spaces = tuple(replace(space, step=None) for space in TEACHERS[1].spaces)
    return replace(TEACHERS[1], spaces=spaces)


def test_codes_that_are_copied_keep_their_step(tmp_path: Path) -> None:
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    extract(old, earlier())
    extract(new, TEACHERS[1])
    assert [Cache.open(path)["cnn/patch"].spec.step for path in (old, new)] == [None, 15 / 128]
    convert_store(old, out, "fp16", ["cnn/cls"])
    assert Cache.open(out)["cnn/patch"].spec.step is None
    name = "spaces/cnn/patch/codes/c.0.0.0"
    assert contents(out)[name] == contents(old)[name] != contents(new)[name]
    before = contents(out)
    with pytest.raises(StoreError, match=r"another configuration: only this.*patch\]\.step"):
        convert_store(new, out, "fp16", ["cnn/cls"])
    assert contents(out) == before


def test_a_conversion_that_an_earlier_release_began_goes_on_as_it_was_begun(
    store: Path, tmp_path: Path
) -> None:
    out, plan = tmp_path / "out", replace_encoding(store, "vit/patch")
    begun = [
        replace(one, spaces=tuple(replace(s, step=None) for s in one.spaces))
        if one.name == "vit"
        else one
        for one in plan.teachers
    ]
    StoreWriter.open_or_create(out, replace(plan, teachers=tuple(begun)))
    convert_store(store, out, "compact", ["vit/patch"])
    good, found = contents(out), Cache.open(out)["vit/patch"]
    assert found.spec.step is None
    z = Cache.open(store)["vit/patch"].read([0, 9]).standardised()
    ours, theirs = found.read([0, 9]).restored().parts, Compact(1 / 8).encode(z)
    assert all(torch.equal(part, theirs[name]) for name, part in ours.items())
    assert not torch.equal(theirs["scales"], encoding("compact").encode(z)["scales"])
    flip(out / "spaces/vit/patch/codes/c.1.0.0", np.random.default_rng(0))
    verify_store(out).save()
    convert_store(store, out, "compact", ["vit/patch"])
    assert contents(out) == good


def replace_encoding(source: Path, name: str) -> StorePlan:
    """The plan of a conversion to compact."""
    plan = Cache.open(source).plan
    teachers = []
    for teacher in plan.teachers:
        spaces = tuple(
            replace(space, encoding="compact") if space.id == name else space
            for space in teacher.spaces
        )
        history = {s.name: ["int8"] for s, t in zip(teacher.spaces, spaces, strict=True) if s != t}
        identity = {**teacher.identity, **({"converted": history} if history else {})}
        teachers.append(replace(teacher, spaces=spaces, identity=identity))
    return replace(plan, teachers=tuple(teachers))


KILLED_FIVE_TIMES = """
import os, sys
from preceptor.benchmarks.torture_cache import Doomed, in_child
from preceptor.cache.convert import convert_store
def work(last):
    with Doomed(last):
        convert_store(sys.argv[1], sys.argv[2], "int4")
for last in (10, 150, 250, 350, 150):
    child = in_child(lambda: work(last))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(store: Path, tmp_path: Path) -> None:
    convert_store(store, tmp_path / "good", "int4")
    good = contents(tmp_path / "good")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED_FIVE_TIMES, str(store), str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-9"] * 5
    with pytest.raises(StoreError):
        Cache.open(out)
    convert_store(store, out, "int4")
    assert contents(out) == good


def test_shards_that_another_process_converts_meanwhile_stay_as_they_are(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, space = tmp_path / "out", Cache.open(store).plan.teachers[0].spaces[0].id
    pending = StoreWriter.pending
    inodes = {}

    def late(writer: StoreWriter, units: tuple[str, ...]) -> object:
        todo = pending(writer, units)
        monkeypatch.setattr(StoreWriter, "pending", pending)
        convert_store(store, out, "int4", [space])
        inodes.update({name: (out / name).stat().st_ino for name in contents(out)})
        return todo

    monkeypatch.setattr(StoreWriter, "pending", late)
    convert_store(store, out, "int4", [space])
    assert {name: (out / name).stat().st_ino for name in contents(out)} == inodes


def test_damage_that_verify_found_is_converted_again(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_store(store, out, "int4")
    good = contents(out)
    flip(out / "spaces/vit/patch/codes/c.1.0.0", np.random.default_rng(0))
    verify_store(out).save()
    convert_store(store, out, "int4")
    assert contents(out) == good


def test_verify_condemns_no_shard_of_an_interrupted_conversion(store: Path, tmp_path: Path) -> None:
    """Until a teacher is finished, verify looks for moments, which only an extraction leaves."""
    out = tmp_path / "out"
    convert_store(store, out, "int4", ["vit/patch"])  # the CNN's shards are copied
    good = contents(out)
    for unit in ("vit", "cnn"):
        for folder in (out, out / "spare"):
            (folder / "commits" / unit / "complete.json").unlink()
    written = {path: path.stat().st_ino for path in (out / "spaces").rglob("c.*")}
    with pytest.raises(
        StoreError, match="run the `preceptor convert`, or the `preceptor add`, that"
    ):
        Cache.open(out)
    report = verify_store(out)
    report.save()
    assert report.unfinished == ["cnn", "vit"]
    assert not report.damaged
    convert_store(store, out, "int4", ["vit/patch"])
    assert contents(out) == good
    assert {path: path.stat().st_ino for path in (out / "spaces").rglob("c.*")} == written


def test_a_damaged_source_and_a_strange_target_are_refused(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    extract(copy)
    flip(copy / "rows/label/c.1", np.random.default_rng(0))
    with pytest.raises(StoreError, match=r"shard 1 of rows.*label"):
        convert_store(copy, tmp_path / "out", "int4", ["vit/cls"])
    convert_store(store, tmp_path / "int4", "int4")
    with pytest.raises(StoreError, match="made by another configuration"):
        convert_store(store, tmp_path / "int4", "fp16")
    with pytest.raises(StoreError, match="no space 'vit/pach'"):
        convert_store(store, tmp_path / "other", "int4", ["vit/pach"])
    with pytest.raises(StoreError, match="no encoding 'int5'"):
        convert_store(store, tmp_path / "other", "int5")
    assert not os.path.exists(tmp_path / "other")


def test_a_conversion_leaves_alone_what_its_store_has_got_since(
    tmp_path: Path,
) -> None:
    """Damage of it is none of the conversion's, either."""
    source, out = tmp_path / "source", tmp_path / "out"
    extract(source, TEACHERS[0])
    convert_store(source, out, "int4")
    add(out, TEACHERS[1])
    good = contents(out)
    flip(out / "spaces/vit/patch/codes/c.1.0.0", np.random.default_rng(0))
    flip(out / "spaces/cnn/patch/codes/c.0.0.0", np.random.default_rng(0))
    (out / "commits/cnn/1.json").unlink()
    verify_store(out).save()
    convert_store(source, out, "int4")
    assert verify_store(out).shards == [("cnn", 0), ("cnn", 1)]
    repair_store(out, [("cnn", 0), ("cnn", 1)], fill)
    assert contents(out) == good


def test_a_conversion_goes_on_without_what_its_source_has_got_or_lost_since(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    extract(source, TEACHERS[0])
    convert_store(source, out, "int4")
    good = contents(out)
    writer = add(source, TEACHERS[1])
    (out / "spaces/vit/patch/codes/c.1.0.0").unlink()
    convert_store(source, out, "int4")
    assert contents(out) == good
    assert "out was begun without cnn/patch, cnn/cls, which is left out" in capsys.readouterr().err
    with pytest.raises(StoreError, match="begun without cnn/cls: name another directory"):
        convert_store(source, out, "int4", ["vit/patch", "vit/cls", "cnn/cls"])
    with pytest.raises(StoreError, match="another configuration"):
        convert_store(source, out, "fp16")
    writer.drop("vit")
    with pytest.raises(StoreError, match="begun without cnn/patch, cnn/cls"):
        convert_store(source, out, "int4")
    extract(tmp_path / "both")
    convert_store(tmp_path / "both", tmp_path / "all", "int4")
    good = contents(tmp_path / "all")
    StoreWriter.open(tmp_path / "both").drop("vit")
    StoreWriter.open(tmp_path / "both").drop("pixels")
    (tmp_path / "all/spaces/cnn/patch/codes/c.1.0.0").unlink()
    convert_store(tmp_path / "both", tmp_path / "all", "int4")
    assert contents(tmp_path / "all") == good
