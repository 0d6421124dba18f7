"""verify, repair, add, drop and info through the command line, on a store of real extraction."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from omegaconf import OmegaConf
from PIL import Image
from preceptor.benchmarks.faults import flip
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache, SampleIndex, StoreWriter
from preceptor.cache.manifest import read_manifest
from preceptor.cache.plan import TeacherRecord
from preceptor.cli import main
from preceptor.errors import DataError, StoreError
from preceptor.extract import maintain
from preceptor.tests.extract.tiny_store import CALL, COUNT, run, teachers


def test_verify_names_the_damage_and_repair_extracts_exactly_that(
    shards: str,
    configs: Path,
    good: dict[str, bytes],
    store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify", f"cache={store}"]) == 0
    assert "whole" in capsys.readouterr().out
    random = np.random.default_rng(0)
    for name in (
        "spaces/vit/patch/codes/c.1.0.0",
        "rows/label/c.2",
        "spaces/cnn/cls/mean/c.0",
        "manifest.json",
    ):
        flip(store / name, random)
    (store / "commits/cnn/0.json").unlink()
    assert main(["verify", f"cache={store}"]) == 1
    message = capsys.readouterr().err
    for part in (
        "shard 1 of vit: spaces/vit/patch/codes/c.1.0.0",
        "shard 2 of rows",
        "shard 0 of cnn",
        "spaces/cnn/cls/mean/c.0 is missing or damaged",
        "preceptor repair",
    ):
        assert part in message
    report = json.loads(Path(f"{store}.verify.json").read_text())
    assert report["shards"] == {"cnn": [0], "rows": [2], "vit": [1]}
    untouched = {n: (store / n).stat().st_mtime_ns for n in good if "/c.0" in n and "vit" in n}
    assert run("repair", store, shards, "--config-dir", str(configs), "teachers=tiny") == 0
    assert "3 of them to the same bytes" in capsys.readouterr().out
    assert contents(store) == good
    assert all((store / n).stat().st_mtime_ns == time for n, time in untouched.items())
    assert not Path(f"{store}.verify.json").exists()
    assert main(["verify", f"cache={store}"]) == 0


def earlier(teacher: TeacherRecord, *, plain: bool) -> TeacherRecord:
    """The record that releases made which stated no step, or none and no prediction."""
    spaces = (replace(s, plain=plain and s.predicted, step=None) for s in teacher.spaces)
    return replace(teacher, spaces=tuple(spaces))


@pytest.mark.parametrize(("plain", "version"), [(True, 1), (False, 2)])
def test_a_store_begun_by_an_earlier_release_goes_on_as_it_was_begun(
    plain: bool, version: int, shards: str, configs: Path, store: Path, tmp_path: Path
) -> None:
    begun, tiny = tmp_path / "begun", ("--config-dir", str(configs), "teachers=tiny")
    plan = Cache.open(store).plan
    assert plan.version == 3
    forms = tuple(earlier(teacher, plain=plain) for teacher in plan.teachers)
    StoreWriter.open_or_create(begun, replace(plan, teachers=forms))
    assert run("extract", begun, shards, *tiny) == 0
    good, manifest = contents(begun), json.loads((begun / "manifest.json").read_text())
    assert manifest["version"] == version
    assert all("step" not in s for t in manifest["teachers"] for s in t["spaces"])
    assert eighths(begun, "vit/patch")
    assert not eighths(store, "vit/patch")

    flip(begun / "spaces/vit/patch/codes/c.1.0.0", np.random.default_rng(0))
    (begun / "spaces/vit/cls/scales/c.2.0").unlink()
    assert main(["verify", f"cache={begun}"]) == 1
    assert run("repair", begun, shards, *tiny) == 0
    assert contents(begun) == good
    (begun / "commits/vit/0.json").unlink()
    assert run("extract", begun, shards, *tiny) == 0
    assert contents(begun) == good
    assert run("verify", begun, shards, *tiny, "sample=8") == 0
    live = json.loads((tmp_path / "begun.verify.json").read_text())["live"]["spaces"]["vit/patch"]
    assert live["expected_standardised"] == pytest.approx(1 / 8 / 12**0.5, rel=0.02)
    assert live["relative_error_standardised"] == pytest.approx(1 / 8 / 12**0.5, rel=0.1)
    assert main(["info", f"cache={begun}", f"json={tmp_path / 'info.json'}"]) == 0
    told = json.loads((tmp_path / "info.json").read_text())["spaces"]["vit/patch"]
    assert told["levels"] == "steps of 1/8 rms, zstd"


def eighths(store: Path, name: str) -> bool:
    """Whether scales are an eighth of the root mean square of tokens, rather than 15/128 of it."""
    cache = Cache.open(store)
    tokens = cache[name].read(np.flatnonzero(cache.valid))
    assert tokens.scales is not None
    rms = tokens.standardised().double().square().mean(-1).sqrt()
    part = float((tokens.scales.double() / rms).median())
    assert min(abs(part - 1 / 8), abs(part - 15 / 128)) < 0.001
    return abs(part - 1 / 8) < 0.001


def test_a_teacher_that_an_earlier_release_was_adding_is_added_as_it_began(
    shards: str, store: Path, tmp_path: Path
) -> None:
    third = f"teachers={{third: {{source: '{CALL}:vit', encoding: compact}}}}"
    now = tmp_path / "now"
    shutil.copytree(store, now)
    assert run("add", now, shards, third) == 0
    record = Cache.open(now).plan.teacher("third")
    StoreWriter.open(store).add(earlier(record, plain=False))
    assert run("add", store, shards, third) == 0
    assert {space.step for space in record.spaces} == {15 / 128}
    assert {space.step for space in Cache.open(store).plan.teacher("third").spaces} == {None}
    assert eighths(store, "third/patch")
    assert not eighths(now, "third/patch")
    assert not eighths(store, "vit/patch")
    assert main(["verify", f"cache={store}"]) == 0


def test_rows_are_repaired_from_the_images_they_were_made_from_or_not_at_all(
    shards: str, configs: Path, good: dict[str, bytes], store: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (store / "rows/label/c.0").unlink()
    next((store / "spaces/cnn").rglob("c.0.*")).unlink()
    whole = SampleIndex.read

    def overwritten(index: SampleIndex, i: int, *rest: Any) -> bytes:
        return b"no image" if index.keys[i] == "im001" else whole(index, i, *rest)

    repair = ("repair", store, shards, "--config-dir", str(configs), "teachers=tiny")
    with monkeypatch.context() as patch:
        patch.setattr(SampleIndex, "read", overwritten)
        assert run(*repair) == 1
    message = capsys.readouterr().err
    assert "shard 0 of rows: its rows (keys 'im000' to 'im003', 1 of them without" in message
    assert run(*repair) == 0
    assert contents(store) == good


def test_repair_without_a_report_verifies_first_and_asks_for_what_it_needs(
    shards: str, good: dict[str, bytes], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("repair", store, shards) == 0
    assert "nothing to repair" in capsys.readouterr().out
    (store / "spare/manifest.json").unlink()
    assert main(["repair", f"cache={store}"]) == 0
    assert contents(store) == good
    flip(store / "spaces/vit/patch/codes/c.1.0.0", np.random.default_rng(0))
    assert main(["repair", f"cache={store}"]) == 1
    assert "the teachers vit of" in capsys.readouterr().err
    assert main(["repair", f"cache={store}", teachers(vit="vit")]) == 1
    assert "data.shards=" in capsys.readouterr().err
    assert run("repair", store, shards, teachers(vit="other_vit")) == 1
    message = capsys.readouterr().err
    assert "seed 1" in message
    assert "seed 2" in message
    other = shards.replace("s-0", "other")
    with webdataset.TarWriter(other) as tar:
        tar.write({"__key__": "a", "png": b"x", "cls": "1"})
    assert run("repair", store, other, teachers(vit="vit")) == 1
    assert "are not the images" in capsys.readouterr().err
    assert run("repair", store, shards, teachers(vit="vit")) == 0  # the cnn is not needed
    assert contents(store) == good


def test_a_store_of_another_program_s_samples_or_views_is_refused(shards: str, store: Path) -> None:
    plan = read_manifest(store).plan
    config = OmegaConf.create({"cache": str(store), "data": {"shards": shards}})
    assert len(maintain._images(config, plan)[0]) == COUNT
    with pytest.raises(DataError, match=r"are not the images that .* was made from"):
        maintain._images(config, replace(plan, samples={"count": COUNT}))
    with pytest.raises(DataError, match=r"are not the images that .* was made from"):
        maintain._images(config, replace(plan, samples={**plan.samples, "order": "by hand"}))
    with pytest.raises(StoreError, match="zoom is no member"):
        maintain._images(config, replace(plan, views={**plan.views, "zoom": 2}))


def test_live_teachers_agree_or_are_told_apart(
    shards: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = teachers(cnn="cnn", vit="vit")
    assert run("verify", store, shards, both, "sample=8") == 0
    live = json.loads(Path(f"{store}.verify.json").read_text())["live"]
    assert live["rows"] == 8
    for name, space in live["spaces"].items():
        # Truth by hand: the encodings' errors are known to be near 0.6 and 4 per cent.
        low, high = (0.01, 0.06) if name.startswith("vit") else (0.001, 0.01)
        assert low < space["relative_error_standardised"] < high, name
        assert space["relative_error_standardised"] == pytest.approx(
            space["expected_standardised"], rel=0.25
        )
        assert space["p1_cosine"] > 0.99
    assert run("verify", store, shards, teachers(vit="other_vit"), "sample=8") == 1
    assert "vit/patch, vit/cls of the live teachers differ" in capsys.readouterr().err
    assert run("verify", store, shards, teachers(vit="wide_vit"), "sample=8") == 1
    assert "dim" in capsys.readouterr().err


def test_images_that_cannot_be_read_any_more_are_named_by_verify(
    shards: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("add", store, shards, "pixels.size=16") == 0
    harmed = tmp_path / "s-0.tar"
    raw = bytearray(Path(shards).read_bytes())
    for key in (2, 9):
        at = raw.index(f"im{key:03d}.png".encode()) + 512  # past the tar's header
        raw[at : at + 8] = bytes(8)
    harmed.write_bytes(raw)
    capsys.readouterr()
    assert run("verify", store, str(harmed), teachers(vit="vit"), f"sample={COUNT}") == 1
    message = capsys.readouterr().err
    for part in ("2 of the 10 images", "cannot be read any more", "im002", "im009"):
        assert part in message
    assert "Traceback" not in message


def test_add_and_drop_touch_no_other_file(
    shards: str, configs: Path, good: dict[str, bytes], store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    inodes = {name: (store / name).stat().st_ino for name in good}
    assert run("add", store, shards, teachers(third="other_vit")) == 0
    assert main(["verify", f"cache={store}"]) == 0
    added = contents(store)
    manifests = {"manifest.json", "spare/manifest.json"}
    for name in good:
        if name not in manifests:
            assert added[name] == good[name], name
            assert (store / name).stat().st_ino == inodes[name], f"{name} was written again"
    cache = Cache.open(store)
    assert cache.teachers == ("cnn", "vit", "third")
    assert cache["third/patch"].shape == (COUNT, 16, 20)
    assert run("add", store, shards, teachers(third="other_vit")) == 0  # nothing left to do
    assert contents(store) == added
    assert run("extract", store, shards, "--config-dir", str(configs), "teachers=tiny") == 1
    assert "only the store has teachers[third]" in capsys.readouterr().err
    assert run("add", store, shards, teachers(third="vit")) == 1
    assert "another teacher third" in capsys.readouterr().err
    assert main(["drop", f"cache={store}", "teacher=thrid"]) == 1
    assert "thrid" in capsys.readouterr().err
    assert main(["drop", f"cache={store}", "teacher=third"]) == 0
    assert contents(store) == good
    assert main(["drop", f"cache={store}", "teacher=vit"]) == 0
    assert main(["verify", f"cache={store}"]) == 0
    assert main(["drop", f"cache={store}", "teacher=cnn"]) == 1
    assert "only teacher" in capsys.readouterr().err


def test_what_an_interrupted_drop_left_is_told_and_removed(
    good: dict[str, bytes], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drop", f"cache={store}", "teacher=vit"]) == 0
    dropped = contents(store)
    for name in good:
        if name.startswith(("spaces/vit/patch/codes", "commits/vit/0")):
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_bytes(good[name])
    assert main(["verify", f"cache={store}"]) == 1
    assert "preceptor drop teacher=vit" in capsys.readouterr().err
    assert main(["drop", f"cache={store}", "teacher=vit"]) == 0
    assert contents(store) == dropped


def test_convert_then_repair_says_to_convert_again(
    shards: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "converted"
    assert main(["convert", f"cache={store}", f"out={out}", "encoding=int4"]) == 0
    before = contents(out)
    flip(out / "spaces/vit/patch/codes/c.1.0.0", np.random.default_rng(0))
    (out / "manifest.json").unlink()
    assert main(["verify", f"cache={out}"]) == 1
    assert run("repair", out, shards) == 1  # once the small file is there again
    told = capsys.readouterr().err
    assert "the codes of vit in" in told
    assert f"run `preceptor verify cache={out}`, then that `preceptor convert`" in told
    assert main(["verify", f"cache={out}"]) == 1
    assert main(["convert", f"cache={store}", f"out={out}", "encoding=int4"]) == 0
    assert contents(out) == before
    assert main(["convert", f"cache={store}", f"out={store}", "encoding=int4"]) == 1
    assert "another directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "options", "expected"),
    [
        ("verify", ["threads=0"], "threads must be at least 1"),
        ("verify", ["sample=-5"], "sample=-5: how many rows to compare"),
        ("convert", ["out={store}/x", "encoding=int4"], "name another directory"),
        ("convert", ["out={store}-2", "encoding=int4", "spaces=[]"], "spaces=[] names none"),
        ("convert", ["out={store}-2", "encoding=int4", "spaces=vit/x"], "no space 'vit/x'"),
        ("convert", ["out=null", "encoding=int4"], "out=null: expected text"),
        ("drop", ["teacher=7"], "teacher=7: expected text"),
        ("info", ["json=/nowhere/x.json"], "json=/nowhere/x.json: there is no such folder"),
        ("info", ["picture=x.foo"], "name a .png file"),
        ("info", ["json=/"], "/ cannot be written: Is a directory"),
        ("add", ["teachers={a: 3}"], "teachers.a needs a source"),
    ],
)  # fmt: skip
def test_mistaken_options_are_told(
    verb: str, options: list[str], expected: str, store: Path, good: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [option.replace("{store}", str(store)) for option in options]
    assert main([verb, f"cache={store}", *given]) == 1
    assert expected in capsys.readouterr().err
    assert contents(store) == good


@pytest.mark.parametrize("verb", ["verify", "repair", "add", "drop"])
def test_what_cannot_be_done_from_afar_is_told(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["teacher=vit"] if verb == "drop" else []
    options += [teachers(vit="vit")] if verb == "add" else []
    assert main([verb, "cache=s3://bucket/store", *options]) == 1
    assert "s3://bucket/store is remote" in capsys.readouterr().err


def test_a_store_beside_which_nothing_can_be_written_is_verified(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(f"{store}.verify.json").mkdir()
    assert main(["verify", f"cache={store}"]) == 0
    assert "whole" in (told := capsys.readouterr().out)
    assert "the report was not kept" in told
    flip(store / "spaces/vit/patch/codes/c.1.0.0", np.random.default_rng(0))
    assert main(["verify", f"cache={store}"]) == 1
    assert "shard 1 of vit" in (told := capsys.readouterr().err)
    assert "The report was not kept" in told


def test_info_of_whole_and_unfinished_stores(
    shards: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, picture = tmp_path / "info.json", tmp_path / "tokens.png"
    assert main(["info", f"cache={store}", f"json={told}", f"picture={picture}"]) == 0
    text = capsys.readouterr().out
    for part in ("complete", "vit/patch", "16 (4x4)", "compact", "1 without tokens"):
        assert part in text
    found = json.loads(told.read_text())
    assert found["complete"]
    assert found["rows_valid"] == COUNT - 1
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert found["bytes"] == size
    assert Image.open(picture).size[0] > 200
    (store / "commits/vit/1.json").unlink()
    shutil.rmtree(store / "spare/commits/vit")
    (store / "commits/vit/complete.json").unlink()
    assert main(["info", f"cache={store}", f"json={told}"]) == 0
    text = capsys.readouterr().out
    for part in ("NOT COMPLETE", "vit: 1 of 3 shards missing (1)", "preceptor extract"):
        assert part in text
    found = json.loads(told.read_text())
    assert found["missing"] == {"vit": {"shards": [1], "finished": False}}
    assert "fidelity" in found["spaces"]["cnn/patch"]
    assert "fidelity" not in found["spaces"]["vit/patch"]
    assert main(["info", f"cache={tmp_path / 'nowhere'}"]) == 1
    assert "holds no store" in capsys.readouterr().err
