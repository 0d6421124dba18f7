"""The expected error that info states, against the error that encoding really made."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from preceptor.benchmarks.faults import flip
from preceptor.benchmarks.small_store import batch, contents, extract, fill_shard
from preceptor.cache import Cache, SpaceSpec, StorePlan, StoreWriter, TeacherRecord
from preceptor.cache.report import describe, draw, fidelity, first_percentile
from preceptor.cache.statistics import CalibrationSums, calibration

ROWS = 16


def features(dim: int) -> torch.Tensor:
    """Tokens with dimensions of very different size, offsets, and some large tokens."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 16, dim, generator=random)
    x *= torch.logspace(-1, 1, dim)
    x[:, ::7] *= 4
    return x + torch.randn(dim, generator=random)


def store_of(path: Path, x: torch.Tensor, encoding: str, grid: tuple[int, int] | None) -> Cache:
    """A finished store of tokens [rows, N, D], calibrated on all of them."""
    rows, tokens, dim = x.shape
    space = SpaceSpec("t", "s", tokens, dim, grid, encoding)
    plan = StorePlan({"count": rows}, {}, rows, rows, 1, (TeacherRecord("t", (space,), {}),))
    writer = StoreWriter.open_or_create(path, plan)
    sums = CalibrationSums(x.reshape(-1, dim).mean(0))
    sums.add(x)
    writer.calibrate(space.id, *calibration(sums), rows_used=rows)
    facts = batch(0, rows)
    facts.valid[:] = True
    with writer.shard(0, ("rows", "t")) as out:
        out.append(facts, {space.id: x})
    writer.finish()
    return Cache.open(path)


def test_codes_that_went_over_as_they_were_add_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, rows = (
        store_of(tmp_path / "store", features(128), "int4", (4, 4))["t/s"],
        np.arange(ROWS),
    )
    alone = fidelity(space, rows)
    monkeypatch.setattr(type(space), "earlier", ("int4",))
    assert fidelity(space, rows) == alone
    monkeypatch.setattr(type(space), "earlier", ("int4", "int8"))  # decoded in between
    twice = fidelity(space, rows)
    assert alone is not None
    assert twice is not None
    assert twice["relative_error"] == pytest.approx(2**0.5 * alone["relative_error"], rel=0.01)


@pytest.mark.parametrize(
    ("encoding", "rectified"),
    [
        ("fp16", False),
        ("int8", False),
        ("compact", False),
        ("int4", False),
        ("int8", True),
        ("compact", True),
    ],
)
def test_expected_error_is_the_measured_one(encoding: str, rectified: bool, tmp_path: Path) -> None:
    x = features(128)
    if rectified:
        x = (x - x.quantile(0.85, dim=-1, keepdim=True)).clamp_min(0)
    stored = store_of(tmp_path / "store", x, encoding, (4, 4))["t/s"]
    told = fidelity(stored, np.arange(ROWS))
    assert told is not None
    found = stored.decode(stored.read(np.arange(ROWS))).double()
    truth = x.double()
    error = float((found - truth).norm() / truth.norm())
    z, z_found = (truth - stored.mean) / stored.std, (found - stored.mean) / stored.std
    error_z = float((z_found - z).norm() / z.norm())
    cosine = torch.cosine_similarity(found, truth, -1).flatten().quantile(0.01)
    # half floats round in steps that double with every power of two: at most twice too wide
    slack = 1.0 if encoding == "fp16" else 0.1
    assert error == pytest.approx(told["relative_error"], rel=slack)
    assert error_z == pytest.approx(told["relative_error_standardised"], rel=slack)
    assert 1 - float(cosine) == pytest.approx(1 - told["p1_cosine"], rel=0.35, abs=1e-6)


@pytest.mark.parametrize("encoding", ["fp16", "int8", "compact", "int4"])
@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_tokens_that_are_all_alike_lose_nothing(
    encoding: str, constant: float, tmp_path: Path
) -> None:
    """A dead space must be told of in numbers: JSON has no NaN."""
    x = constant * torch.arange(1, 6).expand(6, 4, 5).float()
    space = store_of(tmp_path / "store", x, encoding, (2, 2))["t/s"]
    assert torch.equal(space.decode(space.read(np.arange(6))), x)
    told = fidelity(space, np.arange(6))
    assert told is not None
    assert told["relative_error"] < 1e-6
    assert told["relative_error_standardised"] == 0
    assert told["p1_cosine"] == pytest.approx(1)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("shape", "grid"), [((1, 1, 4), (1, 1)), ((2, 1, 3), (1, 1)), ((3, 4, 5), (2, 2))]
)
def test_few_tokens_and_tokens_that_are_all_alike_can_be_drawn(
    shape: tuple[int, int, int], grid: tuple[int, int], tmp_path: Path
) -> None:
    varied = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for number, x in enumerate((varied, torch.ones(shape))):
        store_of(tmp_path / f"{number}", x, "int8", grid)
        draw(tmp_path / f"{number}", tmp_path / f"{number}.png")
        assert Image.open(tmp_path / f"{number}.png").size[0] > 0


@pytest.mark.parametrize("count", [1, 13, 40])
def test_the_expected_error_is_that_of_all_rows_at_once(
    count: int, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.flatnonzero(cache.valid)[:count]
    assert len(rows) == count
    for name, space in cache.spaces.items():
        told = fidelity(space, rows)
        with monkeypatch.context() as patch:
            patch.setattr("preceptor.cache.report.AT_ONCE", count)
            assert told == pytest.approx(fidelity(space, rows), rel=1e-12), name
        tokens = space.read(rows)
        z, x = tokens.standardised(), space.decode(tokens).double()
        square, z = space.spec.how.bound(z).expand(z.shape).double() ** 2 / 3, z.double()
        errors = (square * space.std.double() ** 2).sum(-1), (x**2).sum(-1)
        assert told == pytest.approx({
            "relative_error": float((errors[0].sum() / errors[1].sum()).sqrt()),
            "relative_error_standardised": float((square.sum() / (z**2).sum()).sqrt()),
            "p1_cosine": float((1 + errors[0] / errors[1]).rsqrt().quantile(0.01)),
            "rows": count,
        }, rel=1e-6), name  # fmt: skip


def test_more_values_than_a_quantile_takes() -> None:
    values = torch.arange((1 << 24) + 5, dtype=torch.float32)
    assert first_percentile(values) == pytest.approx((1 << 24) / 100, abs=1)


def test_damage_that_info_meets_is_told_beside_the_rest(tmp_path: Path) -> None:
    extract(tmp_path / "store")
    flip(tmp_path / "store/spaces/vit/patch/codes/c.0.0.0", np.random.default_rng(0))
    found = describe(tmp_path / "store")
    assert found["complete"]
    assert "damaged in shard 0 of vit" in found["problem"]
    assert "fidelity" not in found["spaces"]["vit/patch"]
    assert found["spaces"]["cnn/patch"]["fidelity"]["relative_error"] > 0
    flip(tmp_path / "store/rows/valid/c.0", np.random.default_rng(0))
    assert "damaged in shard 0 of rows" in describe(tmp_path / "store")["problem"]


def test_bytes_and_missing_shards(tmp_path: Path) -> None:
    path = tmp_path / "store"
    extract(path)
    found = describe(path)
    files = contents(path)
    for name, space in found["spaces"].items():
        own = [raw for file, raw in files.items() if file.startswith(f"spaces/{name}/")
               and "/c." in file and file.split("/")[3] in ("codes", "scales")]  # fmt: skip
        assert space["bytes"] == sum(map(len, own))
    assert found["complete"]
    assert found["missing"] == {}


def test_a_store_named_by_an_address_of_files(tmp_path: Path) -> None:
    path = tmp_path / "store"
    extract(path)
    for whole in (True, False):
        if not whole:
            (path / "commits/vit/complete.json").unlink()
            shutil.rmtree(path / "spare/commits/vit")
        named = describe(f"file://{path}")
        assert {**describe(path), "store": named["store"]} == named
        assert named["complete"] == whole
        assert named["bytes"] == sum(map(len, contents(path).values()))
    assert named["missing"] == {"vit": {"shards": [], "finished": False}}


def test_a_store_that_was_only_begun(tmp_path: Path) -> None:
    path = tmp_path / "store"
    whole = extract(tmp_path / "whole").plan
    writer = StoreWriter.open_or_create(path, whole)
    found = describe(path)
    assert not found["complete"]
    assert found["missing"]["rows"] == {"shards": [0, 1], "finished": False}
    fill_shard(writer, 1, ("rows",))
    assert describe(path)["missing"]["rows"]["shards"] == [0]
    assert "preceptor extract" in str(describe(path)["problem"])
