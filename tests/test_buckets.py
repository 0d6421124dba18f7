"""Images and stores in a bucket, through the command line and with worker processes.

Commands run as processes with a limit of time: what reads a bucket in a forked process hangs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
from preceptor.benchmarks.small_store import contents
from preceptor.cli import main
from preceptor.tests.s3_server import client_of, environment, moody_s3

SHARDS = "s3://bucket/in/s-{0..1}.tar"
STUDENT = ("student=resnet_micro", "student.options.channels=[8,8,16,16]")
SHORT = ("recipe=short", "recipe.steps=3", "recipe.batch_size=4", "align=regression", "log.to=[]")


@pytest.fixture(scope="module")
def store(shards: str, teachers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of local shards, with pixels."""
    path = tmp_path_factory.mktemp("local") / "store"
    assert main(["extract", *extraction(shards, teachers, path), "workers=0"]) == 0
    return path


@pytest.fixture(scope="module")
def endpoint(shards: str, store: Path) -> Iterator[str]:
    with moody_s3() as (_, endpoint):
        client = client_of(endpoint)
        client.create_bucket(Bucket="bucket")
        for path in Path(shards).parent.glob("*.tar"):
            client.put_object(Bucket="bucket", Key=f"in/{path.name}", Body=path.read_bytes())
        for name, raw in contents(store).items():
            client.put_object(Bucket="bucket", Key=f"store/{name}", Body=raw)
        yield endpoint


def extraction(shards: str, teachers: list[str], path: Path) -> list[str]:
    return [
        *teachers, f"data.shards='{shards}'", f"cache={path}", "order=permuted", "shard_rows=8",
        "group_rows=4", "calibration.images=11", "pixels.size=32", "engine=cpu",
    ]  # fmt: skip


def command(endpoint: str, *arguments: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "preceptor", *arguments],
        env={**os.environ, **environment(endpoint)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, told = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        raise
    assert process.returncode == 0, told


def test_a_store_from_a_bucket_is_that_from_the_disk(
    endpoint: str, store: Path, teachers: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "store"
    command(endpoint, "extract", *extraction(SHARDS, teachers, path), "workers=1")
    assert contents(path) == contents(store)


def test_a_student_learns_from_images_in_a_bucket(
    endpoint: str, store: Path, shards: str, tmp_path: Path
) -> None:
    options = ["train", f"cache={store}", *STUDENT, "student.size=48", *SHORT, "engine=cpu"]
    command(endpoint, *options, f"data.shards='{SHARDS}'", "workers=1", f"out={tmp_path}/far")
    assert main([*options, f"data.shards='{shards}'", "workers=0", f"out={tmp_path}/near"]) == 0
    far, near = (
        safetensors.torch.load_file(tmp_path / name / "student.safetensors")
        for name in ("far", "near")
    )
    assert all((far[name] == near[name]).all() for name in near)


@pytest.mark.parametrize("shards_from", ["store", "disk"])
def test_a_student_learns_from_a_store_in_a_bucket(
    endpoint: str, shards: str, shards_from: str, tmp_path: Path
) -> None:
    """With k-NN of images on the way, that the store or worker processes give."""
    options = {"store": ("data.shards=null", "student.size=32"), "disk": (f"data.shards='{shards}'",
               "student.size=48")}[shards_from]  # fmt: skip
    command(
        endpoint, "train", "cache=s3://bucket/store", *options, *STUDENT, *SHORT, "workers=1",
        "engine=cpu", "log.knn_every=2", "log.knn_neighbours=1", f"out={tmp_path}/run",
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
