"""Images in class folders, against torchvision's ImageFolder, and what is refused of them."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preceptor.cache.samples import SampleIndex
from preceptor.errors import DataError
from torchvision.datasets import ImageFolder


def picture(value: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (6, 7 + value % 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes; a folder within one, a name with dots, an extension in capitals."""
    path = tmp_path / "train"
    names = ("b/2.png", "b/10.png", "a/x.y.png", "a/deep/z.png", "a/q.JPEG", "c-1/é.webp")
    for number, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"JPEG": "JPEG", "webp": "WEBP"}.get(name.rpartition(".")[2], "PNG")
        (path / name).write_bytes(picture(number, kind))
    (path / "a/.hidden.png").write_bytes(b"x")
    return path


def test_images_and_labels_are_those_of_torchvision(root: Path) -> None:
    index = SampleIndex.from_shards(str(root))
    theirs = ImageFolder(str(root), is_valid_file=lambda name: ".hidden" not in name)
    expected = {
        os.path.relpath(path, root).rpartition(".")[0]: (path, n) for path, n in theirs.samples
    }
    assert set(index.keys) == set(expected)
    assert index.keys == ["a/deep/z", "a/q", "a/x.y", "b/10", "b/2", "c-1/é"]
    for i, key in enumerate(index.keys):
        path, label = expected[key]
        assert index.labels[i] == label
        assert index.read(i) == Path(path).read_bytes()
        ours, other = np.asarray(index.image(i)), np.asarray(theirs.loader(path))
        assert np.array_equal(ours, other)
    assert index.describe()["order"] == {"kind": "folder"}
    size = sum(Path(path).stat().st_size for path, _ in theirs.samples)
    assert index.describe()["shards"] == [{"name": ".", "bytes": size, "samples": 6}]


def test_the_same_wherever_it_lies_and_in_any_process(root: Path, tmp_path: Path) -> None:
    index = SampleIndex.from_shards(str(root))
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    again = SampleIndex.from_shards(f"{moved}/")
    assert (again.keys, again.sha256) == (index.keys, index.sha256)
    mixed = pickle.loads(pickle.dumps(again.permuted(3)))  # noqa: S301 (our own bytes)
    assert sorted(mixed.keys) == index.keys
    assert mixed.keys != index.keys
    for i, key in enumerate(mixed.keys):
        assert mixed.read(i) == again.read(again.keys.index(key))
    (moved / "b/2.png").write_bytes(picture(77) + b"more")
    assert SampleIndex.from_shards(moved).sha256 != index.sha256


def test_a_tar_of_the_folder_has_the_same_keys(root: Path, tmp_path: Path) -> None:
    """So a store that was made from either can be trained with the other."""
    (root / "a/x.y.png").unlink()  # a shard's key ends at the first dot
    index = SampleIndex.from_shards(root)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i, key in enumerate(index.keys):
            for kind, raw in (("png", index.read(i)), ("cls", str(index.labels[i]).encode())):
                header = tarfile.TarInfo(f"{key}.{kind}")
                header.size = len(raw)
                tar.addfile(header, io.BytesIO(raw))
    packed = SampleIndex.from_shards(tmp_path / "s.tar")
    assert packed.keys == index.keys
    assert packed.labels.tolist() == index.labels.tolist()


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "more").mkdir()
    index = SampleIndex.from_shards(tmp_path, members=("json",))
    assert index.keys == ["0", "1", "2"]
    assert index.labels.tolist() == [-1, -1, -1]
    assert index.ignored == ("notes.txt",)
    assert index.member(0, "json", 10) is None


def test_what_cannot_be_read_as_a_folder_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder .*train is named among 2 sources"):
        SampleIndex.from_shards([str(root), "x.tar"])
    (root / "stray.png").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"images beside class folders, such as 'stray.png'"):
        SampleIndex.from_shards(root)
    (root / "stray.png").unlink()
    (root / "b/2.webp").write_bytes(picture(1, "WEBP"))
    with pytest.raises(DataError, match=r"two images 'b/2'"):
        SampleIndex.from_shards(root)
    (root / "b/2.webp").unlink()
    (root / "d").mkdir()
    (root / "d/x.bmp").write_bytes(b"BM")
    with pytest.raises(DataError, match=r"class folder .*train/d holds no image"):
        SampleIndex.from_shards(root)
    (root / "d/x.bmp").unlink()
    (root / "d").rmdir()
    (root / "b/loop").symlink_to(root)
    with pytest.raises(DataError, match="is a link to a folder that it lies in"):
        SampleIndex.from_shards(root)
    (root / "b/loop").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no sample in folder .*empty; expected images \(jpg"):
        SampleIndex.from_shards(tmp_path / "empty")


def test_images_that_change_or_go_are_named(root: Path) -> None:
    index = SampleIndex.from_shards(root)
    at = index.keys.index("b/2")
    (root / "b/2.png").write_bytes(picture(9))
    with pytest.raises(DataError, match=r"image .*b/2\.png has changed since it was listed"):
        index.image(at)
    (root / "b/2.png").unlink()
    with pytest.raises(DataError, match=r"cannot read image .*b/2\.png: No such file"):
        index.image(at)
    (root / "b/10.png").write_bytes(b"no image")
    damaged = SampleIndex.from_shards(root)
    with pytest.raises(DataError, match=r"'b/10' in folder .*train .*cannot be decoded: [^<]*;"):
        damaged.image(damaged.keys.index("b/10"))


def test_the_folder_above_those_of_the_classes_is_refused(root: Path, tmp_path: Path) -> None:
    """Its labels would be those of train and val."""
    (root / "a/x.y.png").unlink()
    for name in ("one", "two"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "v.png").write_bytes(picture(3))
    told = r"\(train, val\) would be the classes, .* name .*such as .*/train$"
    with pytest.raises(DataError, match=told):
        SampleIndex.from_shards(tmp_path)
    assert sorted(set(SampleIndex.from_shards(root).labels.tolist())) == [0, 1, 2]
    assert SampleIndex.from_shards(tmp_path / "val").labels.tolist() == [0, 1]


def test_images_may_lie_in_one_folder_of_their_class(tmp_path: Path) -> None:
    """As in Tiny ImageNet."""
    for number, name in enumerate(("n01", "n02", "n02")):
        folder = tmp_path / name / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(number))
    index = SampleIndex.from_shards(tmp_path)
    theirs = ImageFolder(str(tmp_path))
    assert index.labels.tolist() == [label for _, label in theirs.samples] == [0, 1, 1]
