"""Manifests, records and completions: they round-trip, and no changed byte passes."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache, StoreWriter
from preceptor.cache.commit import Commit, Completion, FileRecord
from preceptor.cache.documents import canonical, difference, digest, sealed
from preceptor.cache.encodings import ENCODINGS
from preceptor.cache.manifest import Calibration, Manifest
from preceptor.cache.mend import repair_store
from preceptor.cache.plan import SpaceSpec, StorePlan, TeacherRecord, plan_difference
from preceptor.cache.rows import decode_keys
from preceptor.cache.verify import verify_store
from preceptor.errors import StoreError
from small_stores import SPACES, facts_of, make_plan

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,12}", fullmatch=True).filter(
    lambda name: name != "rows"
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
NAN = b'{"format": "preceptor-cache", "version": 1, "x": NaN, "sha256": ""}'
HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    teachers, calibrations = [], {}
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        spaces = []
        for space in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
            grid = draw(st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)))
            tokens = grid[0] * grid[1] if grid else 1
            dim, how = draw(st.integers(1, 2000)), draw(st.sampled_from(list(ENCODINGS)))
            plain = draw(st.booleans()) and how == "compact"
            step = draw(st.none() | st.integers(1, 127).map(lambda k: k / 128))
            spaces.append(SpaceSpec(name, space, tokens, dim, grid, how, plain, step))
            if draw(st.booleans()):
                calibrations[spaces[-1].id] = Calibration(draw(st.integers(1, 99)), draw(HEX))
        identity = draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3))
        teachers.append(TeacherRecord(name, tuple(spaces), identity))
    group = draw(st.integers(1, 50))
    plan = StorePlan(
        samples={"sha256": draw(HEX)},
        views=draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
        rows=draw(st.integers(1, 10**9)),
        shard_rows=group * draw(st.integers(1, 9)),
        group_rows=group,
        teachers=tuple(teachers),
    )
    return Manifest(plan, calibrations, "preceptor test")


@settings(max_examples=30, deadline=None)
@given(manifests())
def test_a_manifest_round_trips(manifest: Manifest) -> None:
    raw = manifest.to_bytes()
    again = Manifest.from_bytes(raw, "manifest.json")
    assert again.to_bytes() == raw
    assert again == manifest or canonical(again.plan.rows_json()) == canonical(
        manifest.plan.rows_json()
    )
    for unit in manifest.plan.units:
        assert again.configuration(unit) == manifest.configuration(unit)


def edited(manifest: Manifest, **changes: object) -> bytes:
    """Its bytes with other members of the last space, or another version, sealed again."""
    body = json.loads(manifest.to_bytes())
    body.pop("sha256")
    version = changes.pop("version", body["version"])
    body["teachers"][-1]["spaces"][0].update(changes)
    return sealed({**body, "version": version})


def forms() -> list[Manifest]:
    """The same store as versions 1, 2 and 3 have it."""
    second = [replace(space, step=None) for space in SPACES]
    first = [replace(space, plain=space.encoding == "compact") for space in second]
    assert not any(space.predicted for space in first)
    return [Manifest(make_plan(spaces)) for spaces in (first, second, SPACES)]


def test_a_store_states_the_least_version_that_reads_it() -> None:
    first, second, third = forms()
    assert [json.loads(m.to_bytes())["version"] for m in (first, second, third)] == [1, 2, 3]
    for unit, distinct in (("rows", 1), ("vit", 1), ("cnn", 3)):
        assert len({m.configuration(unit) for m in (first, second, third)}) == distinct

    def again(manifest: Manifest, **changes: object) -> SpaceSpec:
        return Manifest.from_bytes(edited(manifest, **changes), "here").plan.spaces["cnn/map"]

    assert again(first, predicted=True, version=2) == second.plan.spaces["cnn/map"]
    assert again(second, step=0.1171875, version=3) == third.plan.spaces["cnn/map"]
    assert third.plan.spaces["cnn/map"].step == 15 / 128


def test_the_form_of_an_encoding_is_the_store_s_affair() -> None:
    for store in forms():
        for ours in forms():
            assert plan_difference(store.plan, ours.plan) is None
            found = plan_difference(store.plan, ours.plan, kept=["cnn/map"])
            assert (found is None) == (store == ours)
    other = [replace(space, dim=8) if space.name == "map" else space for space in SPACES]
    assert "dim is 9 in the store" in str(plan_difference(forms()[1].plan, make_plan(other)))
    other = [replace(space, encoding="int8") if space.name == "map" else space for space in SPACES]
    assert "encoding" in str(plan_difference(forms()[1].plan, make_plan(other)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 1}, "version is 1 and should be 3"),
        ({"version": 2}, "version is 2 and should be 3"),
        ({"version": 4}, "reads versions 1 to 3"),
        ({"step": 0.1}, "step is 0.1 in a space"),
        ({"step": 0.0}, "step is 0.0"),
        ({"step": 1}, "step is 1 "),
        ({"step": True}, "step is True"),
        ({"step": None}, "step is None"),
        ({"step": "1/8"}, "step is '1/8'"),
        ({"predicted": False}, "predicted is False"),
        ({"predicted": "yes"}, "predicted is 'yes'"),
        ({"encoding": "int8"}, "predicted is True in a space of the encoding int8"),
        ({"encoding": "int5"}, "no encoding 'int5'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict, why: str) -> None:
    raw = edited(Manifest(make_plan()), **changes)
    with pytest.raises(StoreError, match=why):
        Manifest.from_bytes(raw, "here")


def test_a_sample_has_one_view_where_no_number_is_stated() -> None:
    counts = [replace(make_plan(), views=views).views_a_sample for views in ({}, {"count": 3})]
    assert counts == [1, 3]


def test_no_other_encoding_has_a_step() -> None:
    raw = edited(forms()[0], encoding="int8", step=0.125)
    with pytest.raises(StoreError, match=r"step is 0\.125 in a space of the encoding int8"):
        Manifest.from_bytes(raw, "here")


DAMAGE: dict[str, Callable[[dict], object]] = {
    "rows as text": lambda m: m.update(rows="42"),
    "rows with a fraction": lambda m: m.update(rows=42.5),
    "rows as truth": lambda m: m.update(rows=True),
    "no rows": lambda m: m.update(rows=0),
    "no room for keys": lambda m: m.update(key_bytes=0),
    "a float for a version": lambda m: m.update(version=2.0),
    "no teachers": lambda m: m.update(teachers=None),
    "teachers by name": lambda m: m.update(teachers={}),
    "samples as a list": lambda m: m.update(samples=[1]),
    "views as text": lambda m: m.update(views="center"),
    "writer as a number": lambda m: m.update(writer=4),
    "pixels of nothing": lambda m: m.update(pixels=None),
    "pixels with one side": lambda m: m.update(pixels={"size": [3], "interpolation": "box"}),
    "pixels by magic": lambda m: m.update(pixels={"size": [3, 3], "interpolation": "magic"}),
    "a teacher more": lambda m: m["teachers"][0].update(note="x"),
    "identity as a list": lambda m: m["teachers"][0].update(identity=[1]),
    "spaces as text": lambda m: m["teachers"][0].update(spaces="ab"),
    "a grid of one side": lambda m: m["teachers"][0]["spaces"][0].update(grid=[6]),
    "a grid below zero": lambda m: m["teachers"][0]["spaces"][0].update(grid=[-2, -3]),
    "dim with a fraction": lambda m: m["teachers"][0]["spaces"][0].update(dim=70.5),
    "a space more": lambda m: m["teachers"][0]["spaces"][0].update(note="x"),
    "half a calibration": lambda m: m["teachers"][0]["spaces"][0].update(calibration={"rows": 1}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_manifest_that_the_document_s_schema_refuses_is_refused(name: str) -> None:
    """The seal is right: another program may have written it."""
    body = json.loads(Manifest(make_plan()).to_bytes())
    body.pop("sha256")
    text = (Path(__file__).parents[2] / "cache_format.md").read_text(encoding="utf-8")
    found = re.search(r"```json schema=manifest\n(.*?)```", text, re.DOTALL)
    assert found is not None
    judge = jsonschema.Draft202012Validator(json.loads(found[1]))
    judge.validate(json.loads(sealed(body)))
    DAMAGE[name](body)
    raw = sealed(body)
    # to JSON Schema 42.0 and 42 are one number, to hashes they are not
    assert not judge.is_valid(json.loads(raw)) or name == "a float for a version"
    with pytest.raises(StoreError, match="here"):
        Manifest.from_bytes(raw, "here")


def test_members_that_a_later_release_adds_are_ignored_and_kept(store: Path) -> None:
    """Section 11 of the document: verify is content with them, and no change loses them."""
    for name in ("manifest.json", "spare/manifest.json"):
        body = json.loads((store / name).read_bytes())
        body.pop("sha256")
        (store / name).write_bytes(sealed({**body, "depth": {"bits": 12}}))
    (store / "commits/depth").mkdir()  # a unit that such a member states
    assert Cache.open(store)["vit/patch"].read([0]).codes.shape == (1, 6, 70)
    assert verify_store(store).whole
    StoreWriter.open(store).drop("cnn")
    assert json.loads((store / "manifest.json").read_bytes())["depth"] == {"bits": 12}
    assert verify_store(store).whole


def test_how_documents_are_spaced_does_not_matter_where_their_copies_agree(store: Path) -> None:
    good = contents(store)
    names = ("manifest.json", "commits/vit/complete.json")
    for name in names:
        for path in (store / name, store / "spare" / name):
            path.write_text(json.dumps(json.loads(path.read_bytes())), encoding="utf-8")
    zarr = store / "spaces/vit/patch/codes/zarr.json"
    zarr.write_text(json.dumps(json.loads(zarr.read_bytes())), encoding="utf-8")
    assert verify_store(store).whole
    for name in names:  # but where they differ, one of them was changed
        (store / name).write_bytes(good[name])
    found = {problem.file for problem in verify_store(store).problems}
    assert found == {f"spare/{name}" for name in names}
    repair_store(store, [], None)
    assert contents(store) == good


@settings(max_examples=80, deadline=None)
@given(manifests(), st.data())
def test_no_flipped_bit_of_a_manifest_passes(manifest: Manifest, data: st.DataObject) -> None:
    raw = bytearray(manifest.to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        again = Manifest.from_bytes(bytes(raw), "manifest.json")
    except StoreError:
        return
    assert again.to_bytes() == manifest.to_bytes()  # white space alone was changed


@settings(max_examples=60, deadline=None)
@given(
    files=st.dictionaries(
        NAMES,
        st.builds(
            FileRecord,
            st.integers(0, 2**60),
            HEX,
            st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple),
        ),
    ),
    key=st.text(max_size=8),
    sizes=st.lists(st.integers(0, 3), max_size=20),
)
def test_records_and_completions_round_trip(files, key: str, sizes: list[int]) -> None:
    commit = Commit("vit", 3, "c" * 64, 16, 15, key, key, files, {"patch": "d" * 64})
    assert Commit.from_bytes(commit.to_bytes(), "3.json") == commit
    done = Completion("vit", "c" * 64, ("e",) * len(sizes), {"codes": tuple(sizes)}, {"a": 3})
    assert Completion.from_bytes(done.to_bytes(), "complete.json") == done


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", [1]),
        ("tokens", {"a": "many"}),
        ("tokens", {"a": 1.5}),
        ("statistics", {"a": 3}),
        ("note", "x"),
        ("statistics", None),
        ("records", "ab"),
        ("exact", 1),
        ("sizes", {"a": [3]}),
        ("sizes", {"a": [[4, 2]]}),
        ("sizes", {"a": [["4", 1]]}),
        ("sizes", {"a": [[4, True]]}),
        ("sizes", {"a": [[4, 2**60]]}),  # nor is memory asked for it
        ("sizes", {"a": [[4, 2], [4, -1]]}),
    ],
)
def test_a_completion_that_the_document_s_schema_refuses_is_refused(
    name: str, value: object
) -> None:
    body = json.loads(Completion("vit", "c", ("a",), {"x": (4,)}).to_bytes())
    body.pop("sha256")
    with pytest.raises(StoreError, match="here lacks or misstates a member"):
        Completion.from_bytes(sealed({**body, name: value}), "here")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("note", "x"),
        ("statistics", {"a": 3}),
        ("files", {"a": {"bytes": 4, "sha256": "c", "chunks": "0000000A"}}),
        ("files", {"a": {"bytes": 4, "sha256": "c", "chunks": "00000000 "}}),
        ("files", {"a": {"bytes": 4, "sha256": "c", "chunks": "00000000", "note": "x"}}),
    ],
)
def test_a_record_that_the_document_s_schema_refuses_is_refused(name: str, value: object) -> None:
    body = json.loads(Commit("vit", 0, "c", 1, 1, "a", "a", {}).to_bytes())
    body.pop("sha256")
    with pytest.raises(StoreError, match="here lacks or misstates a member"):
        Commit.from_bytes(sealed({**body, name: value}), "here")


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"null", b"\xff", b'{"sha256": 1}', NAN, b"[" * 100000, b'"format"']
)
def test_what_is_no_document_is_refused(raw: bytes) -> None:
    for parse in (Manifest.from_bytes, Commit.from_bytes, Completion.from_bytes):
        with pytest.raises(StoreError, match="here"):
            parse(raw, "here")


def test_the_configuration_hash_is_the_documented_one() -> None:
    manifest = Manifest(make_plan())
    body = json.loads(manifest.to_bytes())
    assert body["version"] == 3
    members = ("format", "samples", "views", "rows", "shard_rows", "group_rows", "key_bytes")
    rows = {"version": 1, **{name: body[name] for name in members}}
    text = json.dumps(rows, sort_keys=True, separators=(",", ":")).encode()
    assert manifest.configuration("rows") == hashlib.sha256(text).hexdigest()
    teacher = {"rows": manifest.configuration("rows"), "teacher": body["teachers"][0]}
    assert manifest.configuration("vit") == digest(teacher)


def test_a_configuration_is_hashed_once_and_again_after_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, hashed = Manifest(make_plan()), list[object]()
    monkeypatch.setattr(
        "preceptor.cache.manifest.digest", lambda value: (hashed.append(value), digest(value))[1]
    )
    units = manifest.plan.units
    before = [manifest.configuration(unit) for unit in units * 3]
    assert before == before[: len(units)] * 3
    assert len(hashed) == len(units) == 3

    def now(changed: Manifest) -> list[bool]:
        fresh = [changed.configuration(unit) for unit in units]
        assert fresh == [
            Manifest(changed.plan, changed.calibrations).configuration(u) for u in units
        ]
        return [one == other for one, other in zip(fresh, before, strict=False)]

    calibrated = manifest.calibrated("vit/patch", Calibration(7, "ab" * 32))
    assert now(calibrated) == [True, False, True]
    assert now(replace(manifest, plan=replace(manifest.plan, views={}))) == [False] * 3
    assert calibrated != manifest
    again = pickle.loads(pickle.dumps(manifest))  # noqa: S301
    assert again == manifest == Manifest(make_plan())
    assert now(again) == [True] * 3


@pytest.mark.parametrize("value", [float("inf"), float("nan"), {1, 2}, b"raw"])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        TeacherRecord("vit", make_plan().teachers[0].spaces, {"mean": value}).as_json()


def test_differences_name_both_sides() -> None:
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert difference({"a": 1}, {"a": 2}) == "a is 1 in the store and 2 in this configuration"
    assert difference({"a": {"b": 1}}, {"a": {}}) == "only the store has a.b"
    assert difference({}, {"c": 1}) == "only this configuration has c"
    left = {"teachers": [{"name": "vit", "size": 224}]}
    right = {"teachers": [{"name": "vit", "size": 112}]}
    assert difference(left, right) == (
        "teachers[vit].size is 224 in the store and 112 in this configuration"
    )
    assert difference({"a": 1}, {"a": True}) is not None
    assert difference({"a": True}, {"a": 1.0}) is not None
    assert difference({"a": [1]}, {"a": [1.0]}) is None


def test_lists_of_other_lengths_differ_by_what_one_side_has() -> None:
    def named(*names: str) -> dict:
        return {"a": [{"name": name, "long": "x" * 100} for name in names]}

    only = "only the store has a[t]"
    assert difference(named("s", "t"), named("s")) == only
    assert difference(named("s"), named("s", "t")) == only.replace(
        "the store", "this configuration"
    )
    assert difference(named("t", "s", "u"), named("s", "v")) == (
        "only the store has a[t], a[u], only this configuration has a[v]"
    )
    assert difference(named(*"pqrstu"), named("p")) == (
        "only the store has a[q], a[r], a[s] and 2 more"
    )
    assert "in the store and" in str(difference(named("s", "s"), named("s")))
    assert difference({"a": [1, 2]}, {"a": [1]}) == (
        "a is [1, 2] in the store and [1] in this configuration"
    )


@pytest.mark.parametrize("name", ["", "rows", "../up", "a/b", ".hidden", "é", "x" * 65])
def test_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(StoreError):
        SpaceSpec(name, "patch", 4, 8, (2, 2))
    with pytest.raises(StoreError):
        SpaceSpec("vit", name, 4, 8, (2, 2))


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(StoreError, match="does not hold 5 tokens"):
        SpaceSpec("vit", "patch", 5, 8, (2, 2))
    with pytest.raises(StoreError, match="does not hold 5 tokens"):
        SpaceSpec("vit", "cls", 5, 8, None)
    for step in (0.1, 0, 1.0, -0.5):
        with pytest.raises(StoreError, match=r"multiple of 1/128 between 0 and 1"):
            SpaceSpec("vit", "cls", 1, 8, None, "compact", step=step)
    with pytest.raises(StoreError, match="multiple"):
        make_plan(shard_rows=1000, group_rows=32)
    with pytest.raises(StoreError, match="at least one row"):
        make_plan(rows=0)
    teacher = make_plan().teachers[0]
    with pytest.raises(StoreError, match="named twice"):
        StorePlan({}, {}, 1, 4, 4, (teacher, teacher))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=9).filter(lambda key: "\0" not in key), min_size=1))
def test_keys_round_trip(keys: list[str]) -> None:
    facts = facts_of(np.arange(len(keys)))
    facts.keys = [key.encode("utf-8", "replace").decode() for key in keys]
    assert decode_keys(facts.arrays(64)["key"]) == facts.keys
