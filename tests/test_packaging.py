"""What is installed: the rooms and their configuration, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"cache", "configs", "extract", "kernels", "options", "train"}
OUTSIDE = {"build", "outputs", "examples", "benchmarks", "tests", "preceptor.egg-info"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel that a copy of the working tree builds."""
    folder = tmp_path_factory.mktemp("wheel")
    outside = {ROOT / name for name in OUTSIDE}
    shutil.copytree(
        ROOT,
        folder / "tree",
        ignore=lambda path, names: [
            name
            for name in names
            if Path(path, name) in outside or name.startswith((".", "__pycache__"))
        ],
    )
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "-w", str(folder), str(folder / "tree")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_rooms_and_their_configuration(wheel: set[str]) -> None:
    files = {name.removeprefix("preceptor/") for name in wheel if name.startswith("preceptor/")}
    expected = {
        str(file.relative_to(ROOT))
        for room in ROOMS
        for file in (ROOT / room).rglob("*")
        if file.suffix in (".py", ".yaml", ".json") and "__pycache__" not in file.parts
    } | {file.name for file in ROOT.glob("*.py")}
    assert files == expected | {"py.typed"}


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert len(tops) == 2
    assert "preceptor" in tops
    assert any(top.endswith(".dist-info") for top in tops)
