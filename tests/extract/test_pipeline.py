"""Stage 1 end to end, against timm and torchvision alone, plain zarr, and a killed process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import webdataset
import zarr
from lightning_fabric import Fabric
from PIL import Image
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache, SampleIndex
from preceptor.cache.shard_writer import ShardWriter
from preceptor.cli import main
from preceptor.errors import DataError, StoreError
from preceptor.extract.pipeline import check_same_folder, key_room
from preceptor.tests.conftest import COUNT, SIZE
from preceptor.tests.extract.timm_store import corrupted, options


def live(shards: str, model: str, weights: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [rows, N, D] and descriptors [rows, D] without any code of this package."""
    network = timm.create_model(
        model, pretrained=False, **({"img_size": SIZE} if "vit" in model else {})
    )
    state = safetensors.torch.load_file(str(weights))
    if "pos_embed" in state:
        state["pos_embed"] = timm.layers.resample_abs_pos_embed(
            state["pos_embed"], [SIZE // 16, SIZE // 16], num_prefix_tokens=1
        )
    network.load_state_dict(state)
    network.eval()
    data = timm.data.resolve_model_data_config(network)
    resample = getattr(Image.Resampling, data["interpolation"].upper())
    mean, std = torch.tensor(data["mean"]), torch.tensor(data["std"])
    inputs = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pil"):
        image = sample["png"].convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        small = image.resize((SIZE, SIZE), resample, box=(left, top, left + side, top + side))
        inputs.append((torch.from_numpy(np.asarray(small).copy()) / 255.0 - mean) / std)
    with torch.no_grad():
        features = network.forward_features(torch.stack(inputs).permute(0, 3, 1, 2))
        descriptor = network.forward_head(features, pre_logits=True)
    tokens = features[:, 1:] if features.ndim == 3 else features.flatten(2).transpose(1, 2)
    return tokens, descriptor


def vit_weights(teachers: Sequence[str]) -> Path:
    return Path(teachers[1]).parent / "vit_tiny_patch16_224.safetensors"


def test_every_row_decodes_within_the_bound_of_the_live_features(
    shards: str, teachers: list[str], store: Path
) -> None:
    cache = Cache.open(store)
    weights = Path(teachers[1]).parent
    for name, model in (("cnn", "resnet10t"), ("vit", "vit_tiny_patch16_224")):
        tokens, descriptor = live(shards, model, weights / f"{model}.safetensors")
        for space, expected in zip(
            [s for s in cache.spaces.values() if s.spec.teacher == name],
            (tokens, descriptor.unsqueeze(1)),
            strict=True,
        ):
            read = space.read(np.arange(COUNT))
            error = (space.decode(read).double() - expected.double()).abs()
            # Half a code, in units of the standardised dimension, and the rounding of float32.
            half = read.scales.double().unsqueeze(-1) * space.std.double() / 2
            slack = 1e-4 * expected.double().abs().max()
            assert bool((error <= half + slack).all()), space.spec.id


def test_the_prediction_is_fitted_to_the_calibration_sample(
    shards: str, teachers: list[str], store: Path
) -> None:
    cache = Cache.open(store)
    tokens, _ = live(shards, "vit_tiny_patch16_224", vit_weights(teachers))
    chosen = np.sort(np.random.default_rng([0, 0xCA11]).permutation(COUNT)[:10])
    x = tokens[chosen].double().numpy().reshape(-1, tokens.shape[-1])
    mean, std = x.mean(0), (((x - x.mean(0)) ** 4).mean(0) / 3) ** 0.25
    space = cache["vit/patch"]
    np.testing.assert_allclose(space.mean, mean, rtol=1e-4, atol=1e-4 * std.max())
    np.testing.assert_allclose(space.std, std, rtol=1e-4)
    z = (x - mean) / std
    prediction = space.prediction
    assert prediction is not None
    weights = prediction.weights.tril(-1)
    predicted = np.flatnonzero(weights.any(1))
    assert len(predicted) > 5
    for d in predicted:
        known = z[:, : 48 * (d // 48)]
        ridge = known.T @ known / len(z) + 0.03 * np.eye(known.shape[1])
        exact = np.linalg.solve(ridge, known.T @ z[:, d] / len(z))
        # the store's sample came in other batches: a value near a half may round either way
        assert np.abs(weights[d, : known.shape[1]].numpy() - 128 * exact).max() < 0.51
    assert cache["cnn/map"].prediction is None


def test_plain_zarr_sees_the_same_numbers(store: Path) -> None:
    cache = Cache.open(store)
    group = zarr.open_group(store, mode="r")
    for name, space in cache.spaces.items():
        arrays = group[f"spaces/{name}"]
        read = space.read(np.arange(COUNT))
        np.testing.assert_array_equal(arrays["codes"][:], read.codes.numpy())
        np.testing.assert_array_equal(arrays["scales"][:], read.scales.numpy())


def test_keys_labels_and_views_are_those_of_the_images(shards: str, store: Path) -> None:
    cache = Cache.open(store)
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert list(cache.keys) == [sample["__key__"] for sample in samples]
    assert cache.labels.tolist() == [sample["cls"] for sample in samples]
    for sample, box in zip(samples, cache.boxes, strict=True):
        left, top, right, bottom = box.tolist()
        assert right - left == bottom - top == min(sample["png"].size)


KILL_AFTER_FIRST_SHARD = """
import os, signal, sys
from preceptor.cache.shard_writer import ShardWriter
from preceptor.cli import main
plain = ShardWriter.commit
def commit(self):
    plain(self)
    os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.commit = commit
main(sys.argv[1:])
"""


def digests(store: Path) -> dict[str, str]:
    return {
        str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file()
    }


def test_killed_after_the_first_shard_and_resumed_gives_a_byte_identical_store(
    shards: str, teachers: list[str], store: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    arguments = ["extract", *options(shards, teachers, path)]
    killed = subprocess.run(
        [sys.executable, "-c", KILL_AFTER_FIRST_SHARD, *arguments], capture_output=True, text=True
    )
    assert killed.returncode == -9, killed.stderr
    with pytest.raises(Exception, match="preceptor extract"):
        Cache.open(path)
    before = {name: os.stat(path / name).st_mtime_ns for name in digests(path) if "/c." in name}
    assert before
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "store.extract.json").read_text())
    assert summary["rows_extracted"] == COUNT - 4
    assert digests(path) == digests(store)
    written_again = [n for n in before if os.stat(path / n).st_mtime_ns != before[n]]
    assert not written_again


def test_a_shard_that_cannot_be_committed_is_named_and_can_be_done_later(
    shards: str,
    teachers: list[str],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, plain = tmp_path / "store", ShardWriter._commit

    def fails(self: ShardWriter, unit: str) -> None:
        if (self._shard, unit) == (1, "vit"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_commit", fails)
        assert main(["extract", *options(shards, teachers, path)]) == 1
    assert re.search("shard 1 of vit: .*Input/output error", capsys.readouterr().err)
    assert not (path / "commits/vit/1.json").exists()
    assert main(["extract", *options(shards, teachers, path)]) == 0
    assert digests(path) == digests(store)


def test_a_summary_that_cannot_be_kept_is_no_failure(
    shards: str, teachers: list[str], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = store.with_name("store.extract.json")
    before = summary.read_text()
    summary.unlink()
    summary.mkdir()
    try:
        assert main(["extract", *options(shards, teachers, store)]) == 0
    finally:
        summary.rmdir()
        summary.write_text(before)
    told = capsys.readouterr()
    assert "store.extract.json cannot be written: Is a directory; the store is whole" in told.err
    assert "0 rows extracted now" in told.out


def test_a_store_may_be_named_by_the_address_of_its_file(
    shards: str, teachers: list[str], store: Path
) -> None:
    before = digests(store)
    summary = store.with_name("store.extract.json")
    summary.unlink()
    address = f"file://{store}"
    arguments = [one.replace(str(store), address) for one in options(shards, teachers, store)]
    assert main(["extract", *arguments]) == 0
    assert digests(store) == before
    found = json.loads(summary.read_text())
    assert found["store"] == address
    assert found["bytes"] == sum(len(raw) for raw in contents(store).values())


def test_a_finished_store_is_left_alone(
    shards: str, teachers: list[str], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(store)
    assert main(["extract", *options(shards, teachers, store)]) == 0
    assert digests(store) == before
    assert "0 rows extracted now" in capsys.readouterr().out


def test_a_store_of_another_configuration_is_refused_with_both_sides(
    shards: str, teachers: list[str], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", *options(shards, teachers, store, "views.crop=0.5")]) == 1
    message = capsys.readouterr().err
    assert "crop" in message
    assert "0.5" in message
    assert "1.0" in message


def test_a_corrupt_image_is_named_and_stops(
    shards: str, teachers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = corrupted(shards, tmp_path)
    arguments = options(damaged, teachers, tmp_path / "store", "calibration.images=11")
    assert main(["extract", *arguments]) == 1
    message = capsys.readouterr().err
    assert "im006" in message
    assert "s-1.tar" in message
    assert "on_corrupt=skip" in message


def test_a_corrupt_image_is_skipped_when_asked_and_counted(
    shards: str, teachers: list[str], tmp_path: Path, store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damaged = corrupted(shards, tmp_path)
    arguments = options(damaged, teachers, tmp_path / "store", "on_corrupt=skip")
    assert main(["extract", *arguments]) == 0
    summary = json.loads((tmp_path / "store.extract.json").read_text())
    assert summary["rows_invalid"] == 1
    assert len(summary["damaged_images"]) == len(summary["damage"]) == 1
    assert summary["damaged_images"][0] in summary["damage"][0]
    assert "im006" in summary["damaged_images"][0]
    assert main(["extract", *arguments]) == 0  # which has nothing to do, and met no image
    again = json.loads((tmp_path / "store.extract.json").read_text())
    assert again["damaged_images"] == summary["damaged_images"]
    assert again["damage"] == []
    capsys.readouterr()
    there = options(damaged, teachers, tmp_path / "store/rows/..", "on_corrupt=skip")
    assert main(["extract", *there]) == 0
    named = f"1 row without tokens, named in {tmp_path / 'store.extract.json'}\n"
    assert capsys.readouterr().out.endswith(named)
    cache = Cache.open(tmp_path / "store")
    assert np.flatnonzero(~np.asarray(cache.valid)).tolist() == [6]
    with pytest.raises(Exception, match="im006"):
        cache["cnn/map"].read(np.array([5, 6]))


def test_an_image_that_cannot_be_read_is_no_damaged_image(
    shards: str, teachers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A row is left out for good only for what its bytes are."""
    store = tmp_path / "store"
    whole = SampleIndex.read

    def gone(index: SampleIndex, i: int, *rest: Any) -> bytes:
        if index.keys[i] == "im006":
            raise DataError("cannot read shard s-1.tar: Input/output error")
        return whole(index, i, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(SampleIndex, "read", gone)
        arguments = options(shards, teachers, store, "on_corrupt=skip", "workers=0")
        assert main(["extract", *arguments]) == 1
    message = capsys.readouterr().err
    assert "s-1.tar: Input/output error" in message
    assert "skip" not in message
    assert main(["extract", *arguments]) == 0
    assert Cache.open(store).valid.all()


def test_a_missing_shard_and_an_unknown_teacher_are_named(
    shards: str, teachers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    missing = shards.replace("{0..1}", "{0..2}")
    assert main(["extract", *options(missing, teachers, store)]) == 1
    assert "s-2.tar" in capsys.readouterr().err
    unknown = options(shards, teachers, store, "teachers.cnn.source=timm:resnet10q")
    assert main(["extract", *unknown]) == 1
    assert "resnet10q" in capsys.readouterr().err
    assert not store.exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("calibration.images=0", "calibration.images=0: expected a positive number"),
        ("batch_size=0", "batch_size=0: expected a positive number"),
        ("engine.precision=64-true", "teachers run in 32-true, bf16-mixed, 16-mixed or auto"),
    ],
)
def test_options_out_of_range_are_told(
    shards: str, teachers: list[str], tmp_path: Path, option: str, expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["extract", *options(shards, teachers, tmp_path / "store", option)]) == 1
    assert expected in capsys.readouterr().err


SECOND_IS_LATE = """
import os, sys, time
from preceptor.cache import StoreWriter
from preceptor.cli import main
plain = StoreWriter.pending
def pending(self, units=None):
    last = time.monotonic() + 60
    while os.environ["RANK"] == "1" and time.monotonic() < last:
        if os.path.exists(f"{self.path}/commits/vit/2.json"): break
        time.sleep(0.1)
    return plain(self, units)
StoreWriter.pending = pending
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_make_the_store_that_one_makes(
    shards: str, teachers: list[str], store: Path, tmp_path: Path
) -> None:
    """Though the second looks what there is to do only when the first has done its share."""
    (tmp_path / "late.py").write_text(SECOND_IS_LATE)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    arguments = [
        str(tmp_path / "late.py"), "extract", *options(shards, teachers, tmp_path / "store")
    ]  # fmt: skip
    # The sums of a matrix product depend on how many threads share it.
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [*run, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "store") == digests(store)


@pytest.mark.parametrize(
    ("lengths", "room"), [([5, 128], 128), ([129], 192), ([192, 7], 192), ([193], 256)]
)
def test_keys_of_any_length_are_stored(lengths: list[int], room: int) -> None:
    index = SimpleNamespace(keys=["é" * (length // 2) + "x" * (length % 2) for length in lengths])
    assert key_room(index) == room


@pytest.mark.parametrize("key", ["", "a\0b", "caf\udce9"])
def test_keys_that_cannot_be_stored_are_named_before_any_work(key: str) -> None:
    index = SimpleNamespace(keys=["fine", key], where=lambda row: f"number {row}")
    with pytest.raises(DataError, match="number 1 is not UTF-8"):
        key_room(index)


@pytest.mark.parametrize("shared", [True, False])
def test_machines_must_share_the_folder_of_a_store(tmp_path: Path, shared: bool) -> None:
    """Each would extract everything, and the first find at the end that most is not there."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys; from pathlib import Path; import preceptor\n"
        "from omegaconf import OmegaConf\n"
        "from preceptor.engine import launch; from preceptor.errors import ConfigError\n"
        "from preceptor.extract.pipeline import check_same_folder\n"
        "engine = Path(preceptor.__file__).parent / 'configs' / 'engine' / 'cpu.yaml'\n"
        "fabric = launch(OmegaConf.load(engine))\n"
        f"folder = Path(__file__).parent / ('both' if {shared} else str(fabric.global_rank))\n"
        "folder.mkdir(exist_ok=True)\n"
        "told = 'nothing'\n"
        "try: check_same_folder(fabric, f'file://{folder}')\n"
        "except ConfigError as error: told = str(error)\n"
        "Path(__file__).with_suffix(f'.{fabric.global_rank}').write_text(told)\n"
    )
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run([sys.executable, *run, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank in "01":
        told = script.with_suffix(f".{rank}").read_text()
        assert told == "nothing" if shared else "another folder for process 1 than" in told
    assert not list(tmp_path.glob("*/.seen-*"))


def test_a_folder_that_takes_no_file_is_told(tmp_path: Path) -> None:
    first = SimpleNamespace(world_size=2, global_rank=0, broadcast=lambda token: token)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/\.seen-\w+ cannot be written: Not a directory"):
        check_same_folder(cast("Fabric", first), f"file://{tmp_path}/file")
