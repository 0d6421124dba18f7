"""A network and a loop that are not preceptor's, and the README's lines of Python."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import preceptor
import pytest
import torch
from preceptor.cache import Cache
from preceptor.cli import main
from preceptor.errors import ConfigError
from preceptor.examples import own_network
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, shards: str, teachers: list[str]) -> str:
    path = tmp_path_factory.mktemp("own") / "store"
    options = ["calibration.images=6", "workers=0", "engine=cpu", "batch_size=4"]
    assert main(["extract", *teachers, f"data.shards='{shards}'", f"cache={path}", *options]) == 0
    return str(path)


def run(store: str, shards: str, out: Path, *options: str) -> dict[str, Any]:
    sides = ("--cache", store, "--shards", shards, "--test-cache", store, "--test-shards", shards)
    return own_network.main([*sides, "--batch", "4", "--out", str(out), *options])


@pytest.mark.parametrize("align", ["regression", "model_token"])
def test_a_network_of_one_s_own_learns_by_alignments_that_read_its_output(
    align: str, store: str, shards: str, tmp_path: Path
) -> None:
    found = run(store, shards, tmp_path, "--align", align, "--steps", "40")
    assert found["loss"]["last"] < 0.9 * found["loss"]["first"]
    assert set(found["scores"]) == {"knn", "linear"}


def test_what_is_saved_is_the_network_alone_and_what_was_judged(
    store: str, shards: str, tmp_path: Path
) -> None:
    found = run(store, shards, tmp_path, "--steps", "10")
    umask = os.umask(0)
    os.umask(umask)
    mode = (tmp_path / "network.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o666 & ~umask
    network = own_network.OwnNetwork()
    network.load_state_dict(load_file(tmp_path / "network.safetensors"))
    side = own_network.opened(store, shards)
    scores = own_network.judge(own_network.AsStudent(network), side, side, torch.device("cpu"))
    assert {score.key: score.value for score in scores} == found["scores"]


@pytest.mark.parametrize(("align", "why"), [("masked", "does not know mask"), ("ladder", "depths")])
def test_alignments_that_look_inside_it_are_refused(
    align: str, why: str, store: str, shards: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why):
        run(store, shards, tmp_path, "--align", align, "--steps", "1")


def test_the_readme_s_python_is_what_it_says(store: str) -> None:
    text = (Path(preceptor.__file__).parent / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for theirs, ours in (
        ('"/nvme/in1k"', repr(store)),
        ("dinov2_b/patch", "vit/patch"),
        ("clip_b16/embedding", "vit/cls"),
        ('"cuda"', '"cpu"'),
        ("256", "2"),
        ("world=8", "world=2"),
    ):
        assert theirs in block, theirs
        block = block.replace(theirs, ours)
    found: dict[str, Any] = {}
    exec(block, found)
    cache = Cache.open(store)
    space = cache["vit/patch"]
    assert found["features"].shape == (3, *space.shape[1:])
    assert torch.equal(found["features"], space.decode(space.read([7, 3, 3])))
    rows = found["batch"].rows
    assert found["keys"] == [cache.keys[int(row)] for row in rows]
    assert torch.equal(found["z"], space.read(rows).standardised())
    assert np.isfinite(found["mean"]).all()
