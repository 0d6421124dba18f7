"""Messages about images that are named in another way than they can be: what they say to write."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest
from preceptor.cache.samples import SampleIndex
from preceptor.errors import DataError


def tar(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            file.addfile(member, io.BytesIO(b"1"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["000.tar", "001.tar", "002.tar"], "/{000..002}.tar"),
        (["x-8.tar", "x-9.tar"], "/x-{8..9}.tar"),
        (["in/t-2k_09.tar", "in/t-2k_10.tar"], "/in/t-2k_{09..10}.tar"),
        (["000.tar", "002.tar"], "/*.tar"),
        (["a.tar", "b.tar"], "/*.tar"),
        (["a0.tar", "b1.tar"], "/*.tar"),
        (["a.tar"], "/a.tar"),
    ],
)
def test_of_a_folder_of_tars_it_is_their_names(
    names: list[str], expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tars"
    for number, name in enumerate(names):
        tar(folder / name, f"{number}.png")
    (folder / "sizes.json").write_text("{}")
    with pytest.raises(DataError, match=r"no sample in folder .*data\.shards=") as caught:
        SampleIndex.from_shards(folder)
    found = re.search(r"data\.shards='(.*)'", str(caught.value))
    assert found is not None
    assert found[1] == f"{folder}{expected}"
    assert SampleIndex.from_shards(found[1]).keys == [str(n) for n in range(len(names))]


def test_of_names_with_several_dots_it_is_one_dot(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", *(f"d.x/img.{n:03d}.v1.jpg" for n in range(100)))
    told = (
        r"sample 'd\.x/img' .*has no image .*000\.v1\.jpg, .*, \.\.\.\); expected .*"
        r"instead of d\.x/img\.000\.v1\.jpg write d\.x/img_000_v1\.jpg"
    )
    with pytest.raises(DataError, match=told) as caught:
        SampleIndex.from_shards(tmp_path / "a.tar")
    assert len(str(caught.value)) < 500
    tar(tmp_path / "b.tar", "d.x/img_000_v1.jpg")
    assert SampleIndex.from_shards(tmp_path / "b.tar").keys == ["d.x/img_000_v1"]
