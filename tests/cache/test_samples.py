"""The index of samples against WebDataset's own reading of the same shards."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import resource
import struct
import tarfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from preceptor.cache import tars
from preceptor.cache.samples import SampleIndex, list_samples
from preceptor.errors import DamagedImageError, DataError

Member = tuple[str, bytes]


def encoded(value: int = 0, kind: str = "PNG", size: tuple[int, int] = (5, 4)) -> bytes:
    rng = np.random.default_rng(value)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: list[Member], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def simple(first: int, count: int) -> list[Member]:
    members: list[Member] = []
    for i in range(first, first + count):
        members += [(f"dir/{i:04d}.png", encoded(i)), (f"dir/{i:04d}.cls", str(i % 7).encode())]
    return members


def from_webdataset(paths: list[Path]) -> list[dict]:
    stream = wds.WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False)
    return list(stream)


names = st.from_regex(r"\A([a-z_]{1,3}/)?[a-z0-9_-]{1,5}\Z")
kinds = st.sampled_from(["jpg", "JPEG", "png", "webp"])
extras = st.sets(st.sampled_from(["cls", "txt", "seg.png", "json"]))
samples = st.lists(
    st.tuples(names, kinds, extras, st.binary(max_size=1500), st.integers(0, 10**6)),
    max_size=12,
    unique_by=lambda sample: sample[0],
)


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(samples, min_size=1, max_size=3),
    mode=st.sampled_from(["w", "w:gz", "w:xz"]),
)
def test_random_shards_read_as_webdataset_reads_them(
    shards: list[list], mode: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    paths, seen = [], set()
    for number, listed in enumerate(shards):
        members: list[Member] = [("__meta__/info.json", b"{}"), ("noextension", b"x")]
        for key, kind, others, data, label in listed:
            if key in seen:
                continue
            seen.add(key)
            members.append((f"{key}.{kind}", data))
            members += [(f"{key}.{k}", str(label).encode()) for k in sorted(others)]
        paths.append(write_tar(folder / f"{number}.tar", members, mode))
    if not seen:
        with pytest.raises(DataError, match="no sample"):
            SampleIndex.from_shards(paths)
        return
    index = SampleIndex.from_shards(paths, members=("json", "seg.png"))
    expected = from_webdataset(paths)
    assert index.keys == [sample["__key__"] for sample in expected]
    assert index.labels.tolist() == [int(sample.get("cls", b"-1")) for sample in expected]
    for i, sample in enumerate(expected):
        image = next(sample[k] for k in ("jpg", "jpeg", "png", "webp") if k in sample)
        assert index.read(i) == image
        for kind in ("json", "seg.png"):
            assert index.member(i, kind, max_bytes=99) == sample.get(kind)
    permuted = index.permuted(3)
    assert sorted(permuted.keys) == sorted(index.keys)
    for i, key in enumerate(permuted.keys):
        old = index.keys.index(key)
        assert permuted.read(i) == index.read(old)
        assert permuted.labels[i] == index.labels[old]
        assert permuted.member(i, "json", 99) == index.member(old, "json", 99)


def test_a_member_that_is_too_long_is_refused(tmp_path: Path) -> None:
    members = [*simple(0, 1), ("dir/0000.json", b"[" + b" " * 98 + b"]")]
    index = SampleIndex.from_shards(write_tar(tmp_path / "x.tar", members), members=("json",))
    assert index.member(0, "json", max_bytes=100) == members[-1][1]
    with pytest.raises(
        DataError, match=r"\.json of sample 'dir/0000' in .*100 bytes, more than 99"
    ):
        index.member(0, "json", max_bytes=99)


def test_braces_expand_and_images_decode(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"train-{number:03d}.tar", simple(10 * number, 4))
    index = SampleIndex.from_shards(str(tmp_path / "train-{000..002}.tar"))
    assert len(index) == 12
    assert SampleIndex.from_shards(str(tmp_path / "train-*.tar")).sha256 == index.sha256
    assert index.keys[4] == "dir/0010"
    assert index.labels[4] == 10 % 7
    truth = np.asarray(Image.open(io.BytesIO(encoded(10))))
    assert np.array_equal(np.asarray(index.image(4)), truth)
    described = index.describe()
    assert [shard["name"] for shard in described["shards"]] == [
        f"train-00{n}.tar" for n in range(3)
    ]
    assert [shard["samples"] for shard in described["shards"]] == [4, 4, 4]
    assert described["shards"][0]["bytes"] == (tmp_path / "train-000.tar").stat().st_size
    assert described["count"] == 12
    assert described["sha256"] == index.sha256


def test_hash_depends_on_names_order_sizes_and_labels(tmp_path: Path) -> None:
    base = simple(0, 3)
    write_tar(tmp_path / "a.tar", base)
    first = SampleIndex.from_shards(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", base)
    hashes = {first.sha256, SampleIndex.from_shards(tmp_path / "a.tar").sha256}
    assert len(hashes) == 1
    write_tar(tmp_path / "b.tar", base)
    hashes.add(SampleIndex.from_shards(tmp_path / "b.tar").sha256)
    changes = [
        base[2:] + base[:2],
        [("dir/9999.png", base[0][1]), *base[2:]],
        [(base[0][0], base[0][1] + b"\0"), *base[1:]],
        [base[0], (base[1][0], b"6"), *base[2:]],
    ]
    for members in changes:
        write_tar(tmp_path / "a.tar", members)
        hashes.add(SampleIndex.from_shards(tmp_path / "a.tar").sha256)
    hashes.add(first.permuted(1).sha256)
    assert first.permuted(1).keys != first.keys
    assert len(hashes) == 7


def test_permutation_depends_on_seed_and_keys_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", simple(0, 30))
    write_tar(tmp_path / "b.tar", simple(30, 30))
    forward = SampleIndex.from_shards([tmp_path / "a.tar", tmp_path / "b.tar"])
    backward = SampleIndex.from_shards([tmp_path / "b.tar", tmp_path / "a.tar"])
    assert forward.permuted(5).keys == backward.permuted(5).keys
    assert forward.permuted(5).keys != forward.permuted(6).keys
    assert forward.permuted(5).keys != forward.keys
    # A fixed point of the format: stores name rows by this order.
    assert [int(key[-4:]) for key in forward.permuted(5).keys[:6]] == [48, 10, 25, 0, 42, 33]
    assert forward.permuted(5).describe()["order"] == {"kind": "hashed", "seed": 5}


def _read_in_child(index: SampleIndex, queue: multiprocessing.Queue) -> None:
    queue.put([index.read(i) for i in range(len(index))])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_reads_agree_over_threads_forks_and_pickles(tmp_path: Path, mode: str) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", simple(20 * n, 20), mode) for n in range(4)]
    index = SampleIndex.from_shards(paths).permuted(1)
    expected = [index.read(i) for i in range(len(index))]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(index.read, range(len(index)))) == expected
    pickled = pickle.dumps(index)
    assert len(pickled) < 40_000  # the bytes of the images stay behind
    copy = pickle.loads(pickled)  # noqa: S301 (our own bytes)
    assert [copy.read(i) for i in range(len(copy))] == expected
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(index, queue)) for _ in range(2)]
    for child in children:
        child.start()
    for _ in children:
        assert queue.get(timeout=60) == expected
    for child in children:
        child.join()
    assert [index.read(i) for i in range(len(index))] == expected


def test_more_shards_than_open_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_descriptor", lru_cache(8)(tars._descriptor.__wrapped__))
    paths = [write_tar(tmp_path / f"{n}.tar", simple(n, 1)) for n in range(90)]
    index = SampleIndex.from_shards(paths)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(index.read, [*range(90)] * 3))
    assert read == [encoded(n) for n in range(90)] * 3
    assert len(os.listdir("/proc/self/fd")) <= before + 8
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert max(64, tars.OPEN_SHARDS) <= max(64, limit // 4)  # room for the store and the sockets


def test_missing_and_unusable_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.tar: No such file"):
        SampleIndex.from_shards(tmp_path / "absent.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.tar is empty"):
        SampleIndex.from_shards(tmp_path / "empty.tar")
    (tmp_path / "text.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match=r"text\.tar is damaged or no tar file"):
        SampleIndex.from_shards(tmp_path / "text.tar")
    for url in ("pipe:cat x.tar", "ftp://host/x.tar", "hdfs://bucket/{0..3}.tar"):
        with pytest.raises(DataError, match="neither a local file nor at an address"):
            SampleIndex.from_shards(url)
    with pytest.raises(DataError, match="no shard matches"):
        SampleIndex.from_shards(str(tmp_path / "val-*.tar"))
    for nothing in ("", []):
        with pytest.raises(DataError, match="no shard is named"):
            SampleIndex.from_shards(nothing)
    with pytest.raises(DataError, match="cannot be expanded"):
        SampleIndex.from_shards("x-{0..3.tar")
    write_tar(tmp_path / "bare.tar", [("readme", b"")])
    with pytest.raises(DataError, match="no sample in shard"):
        SampleIndex.from_shards(tmp_path / "bare.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_every_truncation_is_noticed(tmp_path: Path, mode: str) -> None:
    whole = write_tar(tmp_path / "whole.tar", simple(0, 2), mode).read_bytes()
    members_end = 8 * 512 if mode == "w" else len(whole)
    cut = tmp_path / "cut.tar"
    for length in range(1, members_end, 64 if mode == "w" else 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar"):
            SampleIndex.from_shards(cut)
    for boundary in (512, 1024, 2048, 4096):
        cut.write_bytes(whole[: min(boundary, members_end - 1)])
        with pytest.raises(DataError, match=r"cut\.tar"):
            SampleIndex.from_shards(cut)


def test_damaged_header_between_samples_is_not_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", simple(0, 3))
    data = bytearray(path.read_bytes())
    data[4 * 512 + 150] ^= 0x55  # in the checksum of the third header
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar is cut short or damaged at byte 2048"):
        SampleIndex.from_shards(path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_joined_by_cat_are_refused(tmp_path: Path, mode: str) -> None:
    """Readers of tars stop at the first one's end."""
    parts = [write_tar(tmp_path / f"{n}.tar", simple(n, 3), mode).read_bytes() for n in (0, 3)]
    (tmp_path / "both.tar").write_bytes(b"".join(parts))
    with pytest.raises(DataError, match=r"both\.tar goes on after its end at byte 6144"):
        SampleIndex.from_shards(tmp_path / "both.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"1")], "'a' in shard .* has no image"),
        ([("a.png", b""), ("a.jpg", b"")], "'a' in shard .* has images png and jpg"),
        ([("a.png", b""), ("a.png", b"")], "'a' in shard .* has two members .png"),
        ([("a.png", b""), ("b.png", b""), ("a.png", b"")], "key 'a' in shard .* occurs before"),
        ([("a.png", b""), ("b.png", b""), ("a.cls", b"1")], "'a' in shard .* has no image"),
        ([("n01440764.tar", b"")], "'n01440764' in shard .* no image .* A tar of tars, .* unpack"),
        ([("a.png", b""), ("a.cls", b"cat")], "label a.cls in shard .* is 'cat'"),
        ([("a.png", b""), ("a.cls", b"-1")], "label a.cls in shard .* is '-1'"),
        ([("a.png", b""), ("a.cls", b"1" * 70)], "label a.cls in shard .* is 70 bytes"),
    ],
)
def test_malformed_samples_are_named(tmp_path: Path, members: list[Member], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SampleIndex.from_shards(write_tar(tmp_path / "x.tar", members))


def test_key_twice_over_two_shards(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / name, simple(0, 1)) for name in ("a.tar", "b.tar")]
    with pytest.raises(DataError, match=r"'dir/0000' in shard .*b\.tar occurs before.*a\.tar"):
        SampleIndex.from_shards(paths)


def test_shard_changed_after_listing_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", simple(0, 2))
    index = SampleIndex.from_shards(path)
    write_tar(path, simple(1, 5))
    with pytest.raises(DataError, match="changed since it was listed"):
        index.read(0)
    path.unlink()
    with pytest.raises(DataError, match="cannot read shard"):
        index.read(0)


def test_compressed_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preceptor.cache.tars.MAX_UNPACKED", 30_000)
    zeros = [("z.png", bytes(9_000))]
    first = write_tar(tmp_path / "a.tar", zeros, "w:gz")
    second = write_tar(tmp_path / "b.tar", [("y.png", bytes(25_000))], "w:gz")
    assert SampleIndex.from_shards(first).read(0) == zeros[0][1]
    with pytest.raises(DataError, match=r"b\.tar brings the compressed shards over 30,000 bytes"):
        SampleIndex.from_shards([first, second])


def test_images_are_bounded_and_damage_is_named(tmp_path: Path) -> None:
    whole = encoded(0, "JPEG", (64, 64))
    small = encoded(0)
    header = b"IHDR" + struct.pack(">II", 40_000, 30_000) + small[24:29]
    bomb = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    gif = io.BytesIO()
    Image.new("L", (4, 4)).save(gif, "GIF")
    members = [
        ("good.jpg", whole),
        ("cut.jpg", whole[: len(whole) // 2]),
        ("bomb.png", bomb),
        ("text.png", b"not an image"),
        ("none.png", b""),
        ("gif.png", gif.getvalue()),
    ]
    index = SampleIndex.from_shards(write_tar(tmp_path / "x.tar", members))
    assert index.image(0).size == (64, 64)
    with pytest.raises(DataError, match=r"more than [0-9,]+ pixels: .* raise max_pixels \(data"):
        index.image(2)
    for i in range(1, len(index)):
        with pytest.raises(DataError, match=rf"'{index.keys[i]}' in shard .*x\.tar"):
            index.image(i)
    with pytest.raises(
        DataError, match=r"64 x 64, more than 4,095 pixels: .* raise max_pixels \(data"
    ):
        index.image(0, max_pixels=4095)


def test_a_user_s_limit_stands_above_pillow_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow refuses more than twice its own, and warns of more than that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    index = SampleIndex.from_shards(
        write_tar(tmp_path / "x.tar", [("a.png", encoded(size=(60, 60)))])
    )
    with pytest.raises(DamagedImageError, match="60 x 60, more than 3,599 pixels"):
        index.image(0, max_pixels=3599)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert index.image(0, max_pixels=3600).size == (60, 60)


def test_modes_become_rgb(tmp_path: Path) -> None:
    deep = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    sources = {
        "grey": Image.fromarray((deep >> 8).astype(np.uint8)),
        "deep": Image.fromarray(deep),
        "palette": Image.new("RGB", (64, 64), (255, 0, 0)).convert("P"),
        "alpha": Image.new("RGBA", (64, 64), (9, 8, 7, 0)),
    }
    members = []
    for key, image in sources.items():
        file = io.BytesIO()
        image.save(file, "PNG")
        members.append((f"{key}.png", file.getvalue()))
    index = SampleIndex.from_shards(write_tar(tmp_path / "x.tar", members))
    grey, deep_, palette, alpha = (np.asarray(index.image(i)) for i in range(4))
    assert grey.shape == (64, 64, 3)
    assert np.array_equal(grey[..., 0], deep >> 8)
    assert np.array_equal(deep_, grey)
    assert (palette == (255, 0, 0)).all()
    assert (alpha == (9, 8, 7)).all()


def test_orientation_and_transparent_palettes_are_passed_by_in_silence(tmp_path: Path) -> None:
    turned, clear = io.BytesIO(), io.BytesIO()
    orientation = Image.Exif()
    orientation[0x112] = 6  # to be shown turned by a quarter
    Image.new("RGB", (16, 8), (200, 0, 0)).save(turned, "JPEG", exif=orientation)
    palette = Image.new("RGB", (8, 8), (255, 0, 0)).convert("P")
    palette.save(clear, "PNG", transparency=bytes([0, 128, *[255] * 254]))
    members = [("turned.jpg", turned.getvalue()), ("clear.png", clear.getvalue())]
    index = SampleIndex.from_shards(write_tar(tmp_path / "x.tar", members))
    assert index.image(0).size == (16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (np.asarray(index.image(1)) == (255, 0, 0)).all()


@pytest.mark.parametrize(("count", "quiet", "shown"), [(32, False, True), (32, True, False),
                                                      (31, False, False)])  # fmt: skip
def test_many_shards_are_listed_with_a_progress_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, quiet: bool, shown: bool
) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", simple(n, 1)) for n in range(count)]
    index = list_samples(paths, quiet=quiet)
    assert index.keys == SampleIndex.from_shards(paths).keys
    assert ("list shards: 32/32 shards" in capsys.readouterr().err) == shown


def test_progress_counts_shards(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", simple(n, 1)) for n in range(3)]
    seen: list[tuple[int, int]] = []
    SampleIndex.from_shards(paths, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
