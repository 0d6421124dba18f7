"""Kept lists of shards against a walk of the headers, whatever happens to either."""

from __future__ import annotations

import io
import os
import tarfile
import time
import warnings

import numpy as np
import pytest
from preceptor.cache import tars
from preceptor.cache.samples import SampleIndex, list_samples
from preceptor.cache.shard_list import FOLDER, SETTLED

OLD = time.time_ns() - 2 * SETTLED


def write(path, keys, changed=OLD, pad=0):
    """A tar of PNG members (of no picture: listing does not decode) whose change lies back."""
    with tarfile.open(path, "w") as tar:
        for number, key in enumerate(keys):
            for kind, data in (("png", b"x" * (5 + number + pad)), ("cls", b"%d" % number)):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    os.utime(path, ns=(changed, changed))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "lists"
    monkeypatch.setenv(FOLDER, str(folder))
    return folder


@pytest.fixture
def walks(monkeypatch):
    """Paths of the shards whose headers were walked."""
    seen, members = [], tars.members

    def watched(path, file, *rest):
        seen.append(path)
        return members(path, file, *rest)

    monkeypatch.setattr(tars, "members", watched)
    return seen


def listed(paths, **options):
    index = SampleIndex.from_shards([str(path) for path in paths], **options)
    return index.keys, index.labels.tolist(), [index.read(i) for i in range(len(index))]


def test_a_second_start_walks_no_headers_and_lists_the_same(tmp_path, folder, walks):
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    write(paths[0], ["n01/one", "two", "d\udcffr\u00e9"])  # one name that is not UTF-8
    write(paths[1], ["four"])
    first = listed(paths)
    assert first[0] == ["n01/one", "two", "d\udcffr\u00e9", "four"]
    assert first[1:] == ([0, 1, 2, 0], [b"x" * n for n in (5, 6, 7, 5)])
    assert walks == [str(path) for path in paths]
    assert listed(paths) == first
    assert listed(paths[1:]) == ([first[0][3]], [0], [b"xxxxx"])
    assert len(walks) == 2
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_shard_that_has_changed_is_walked_again(tmp_path, folder, walks, change):
    path = tmp_path / "a.tar"
    write(path, ["one", "two"])
    listed([path])
    size = path.stat().st_size
    if change == "size":
        write(path, [f"k{n:03d}" for n in range(40)])
        assert path.stat().st_size != size
    else:
        write(path, ["six", "ten"], changed=OLD + 1)
        assert path.stat().st_size == size
    keys, _, _ = listed([path])
    assert keys[0] in ("k000", "six")
    assert len(walks) == 2
    assert len(list(folder.iterdir())) == 1


def test_a_shard_of_now_is_not_kept(tmp_path, folder, walks):
    path = tmp_path / "a.tar"
    for changed in (time.time_ns(), time.time_ns() + 100 * SETTLED):
        write(path, ["one"], changed=changed)
        assert listed([path]) == listed([path])
    assert len(walks) == 4
    assert not folder.exists()


def test_lists_with_further_members_and_of_packed_shards_are_not_kept(tmp_path, folder, walks):
    path = tmp_path / "a.tar"
    write(path, ["one"])
    for _ in range(2):
        index = SampleIndex.from_shards(str(path), members=["cls"])
        assert index.member(0, "cls", 9) == b"0"
    packed = tmp_path / "b.tar.gz"
    with tarfile.open(packed, "w:gz") as tar, tarfile.open(path) as plain:
        for member in plain.getmembers():
            tar.addfile(member, plain.extractfile(member))
    os.utime(packed, ns=(OLD, OLD))
    assert listed([packed]) == listed([packed])
    assert len(walks) == 4
    assert not folder.exists()


def test_a_damaged_list_is_made_again(tmp_path, folder, walks):
    path = tmp_path / "a.tar"
    write(path, ["one", "two"])
    true = listed([path])
    (kept,) = folder.iterdir()
    sound = kept.read_bytes()
    random = np.random.default_rng(0)
    used = 0
    for place in range(0, len(sound), 3):
        bad = bytearray(sound)
        bad[place] ^= 1 << int(random.integers(8))
        kept.write_bytes(bad)
        before = len(walks)
        assert listed([path]) == true
        used += len(walks) == before
    assert used < len(sound) / 3  # the archive's own times and attributes may flip unseen
    for size in (0, 1, len(sound) // 2, len(sound) - 1):
        kept.write_bytes(sound[:size])
        assert listed([path]) == true
        assert kept.read_bytes() == sound


def test_a_list_of_another_shard_is_not_taken(tmp_path, folder):
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    write(paths[0], ["one"])
    write(paths[1], ["two"])
    listed(paths)
    first, second = folder.iterdir()
    swapped = first.read_bytes(), second.read_bytes()
    second.write_bytes(swapped[0])
    first.write_bytes(swapped[1])
    assert listed(paths)[0] == ["one", "two"]


def test_where_nothing_can_be_kept_that_is_told_once(tmp_path, folder, walks):
    folder.write_text("a file")
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    write(paths[0], ["one"])
    write(paths[1], ["two"])
    with pytest.warns(UserWarning, match=rf"cannot be kept in {folder}.*set {FOLDER}") as told:
        assert listed(paths)[0] == ["one", "two"]
    assert len(told) == 1


def test_lists_can_be_forgone(tmp_path, monkeypatch, walks):
    monkeypatch.setenv(FOLDER, "")
    path = tmp_path / "a.tar"
    write(path, ["one"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert listed([path]) == listed([path])
    assert len(walks) == 2
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    listed([path])
    assert len(list((tmp_path / "cache" / "preceptor" / "shard_lists").iterdir())) == 1


def test_what_is_passed_by_is_told_with_its_number_also_from_a_kept_list(
    tmp_path, folder, walks, capsys
):
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for path, label in zip(paths, (b"3", None), strict=True):
        with tarfile.open(path, "w") as tar:
            kinds = {tarfile.DIRTYPE: "d", tarfile.SYMTYPE: "l.png", tarfile.FIFOTYPE: "f"}
            for kind, name in kinds.items():  # a folder is nothing to tell of
                member = tarfile.TarInfo(f"{path.stem}/{name}")
                member.type, member.linkname = kind, "x.png"
                tar.addfile(member)
            for key in ("x", "y"):
                parts = {"png": b"x"} | ({"cls": label} if label else {})
                for kind, data in parts.items():
                    member = tarfile.TarInfo(f"{path.stem}/{key}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        os.utime(path, ns=(OLD, OLD))
    for _ in range(2):
        assert list_samples([str(path) for path in paths]).labels.tolist() == [3, 3, -1, -1]
        told = capsys.readouterr().err
        assert "warning: 4 members of the tars are links or no regular files" in told
        assert "such as 'a/l.png'" in told
        assert "2 of 4 images lack a label though others have, such as 'b/x' in shard" in told
        assert told.count("warning") == 2
    assert len(walks) == 2
    list_samples([str(path) for path in paths], quiet=True)
    assert not capsys.readouterr().err


def test_shards_without_any_labels_are_nothing_to_tell(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("x.png")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    assert list_samples(tmp_path / "a.tar").labels.tolist() == [-1]
    assert not capsys.readouterr().err
