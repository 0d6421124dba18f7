"""What the launching code hands to the kernels, compiled for a chip that is not there."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from chip import chip
from preceptor.kernels import autotune, availability, triton_launch, triton_loss
from preceptor.train.settings import without_kernels


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """What was compiled and timed here must not be found by a run on a device."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def attend(batch, rows, count, dim, dtype, norm_eps=None, offset=0):
    """Forward and backward pass over tokens that lie ``offset`` elements into their storage."""
    floating = torch.bfloat16 if dtype == torch.int8 else dtype
    storage = torch.zeros(batch * count * dim + offset, dtype=dtype)
    tokens = storage[offset:].view(batch, count, dim)
    query = torch.zeros(batch, rows, dim, dtype=floating)
    weight = torch.ones(batch, count) if dtype == torch.int8 else None
    y, lse, gain, mean = triton_launch.forward(query, tokens, weight, norm_eps)
    triton_launch.backward(
        torch.ones_like(y), torch.ones_like(lse), query, tokens,
        weight if norm_eps is None else gain, None if norm_eps is None else mean,
        y, lse, dtype != torch.int8,
    )  # fmt: skip


# Triton makes constants of integers that are 1 and compiles other code for aligned pointers.
@pytest.mark.parametrize(
    ("shape", "dtype", "norm_eps", "offset"),
    [
        ((1, 1, 1, 4), torch.int8, 1e-5, 0),
        ((1, 1, 1, 1), torch.float32, 1e-5, 0),
        ((1, 1, 1, 192), torch.bfloat16, None, 1),
        ((1, 2, 130, 48), torch.float16, 1e-5, 3),
        ((2, 17, 3, 48), torch.int8, None, 4),
        ((1, 1, 70, 50), torch.int8, None, 1),
    ],
    ids=str,
)
def test_compiles_for_numbers_that_are_one_and_for_unaligned_storage(
    shape, dtype, norm_eps, offset
):
    with chip(90) as launches, autotune.only(0):
        attend(*shape, dtype, norm_eps, offset)
    names = [launch.kernel for launch in launches]
    assert names[0] == "attend_forward"
    assert "attend_backward_query" in names
    assert ("attend_backward_tokens" in names) == (dtype != torch.int8)
    assert ("merge_parts" in names) == (launches[0].settings["SPLITS"] > 1)
    for launch in launches:
        assert 0 < launch.grid[0] < 2**31
        assert len(launch.grid) == 1


@pytest.mark.parametrize("gained", [False, True])
def test_loss_compiles_for_one_token_and_unaligned_storage(gained):
    codes = torch.zeros(2 * 50 + 1, dtype=torch.int8)[1:].view(1, 2, 50)
    gain = torch.ones(51)[1:] if gained else None
    with chip(90) as launches:
        for count in (1, 2):
            p, scale = torch.zeros(1, count, 50, dtype=torch.bfloat16), torch.ones(1, count)
            triton_loss.forward(p, codes[:, :count], scale, gain, 0.5)
            losses, statistics = torch.ones(2, 1, count), torch.ones(3, 1, count)
            triton_loss.backward(p, codes[:, :count], scale, gain, statistics, losses, 0.5)
    assert [launch.grid for launch in launches] == [(1,), (1,), (2,), (2,)]


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 130, 48), (2, 3, 0, 48), (0, 3, 5, 48)], ids=str)
def test_fake_results_are_laid_out_like_the_real_ones(shape, dtype, norm_eps):
    batch, rows, count, dim = shape

    def call():
        tokens = torch.zeros(batch, count, dim, dtype=dtype)
        # As a shared query arrives: one row block for all samples.
        query = torch.zeros(rows, dim, dtype=torch.bfloat16).expand(batch, -1, -1)
        weight = torch.ones(batch, count) if dtype == torch.int8 else None
        ops = torch.ops.preceptor
        forward = ops.cross_attention(query, tokens, weight, norm_eps, True)
        y, lse, gain, mean, p = forward
        if norm_eps is None:
            gain, mean = weight, None
        backward = ops.cross_attention_backward(
            y, lse, query, tokens, gain, mean, y, lse, p, dtype != torch.int8, True
        )
        scale, prediction = weight, tokens.transpose(0, 1).contiguous().transpose(0, 1)
        prediction = prediction.to(torch.bfloat16)
        losses = []
        for gain in (None, torch.ones(dim)):
            loss, statistics = ops.alignment_loss(prediction, tokens, scale, gain, 1.0, True)
            gradient = ops.alignment_loss_backward(
                prediction, tokens, scale, gain, statistics, loss, 1.0, True
            )
            losses += [loss, statistics, gradient]
        return [*forward, *backward, *losses]

    with chip(90, kernels=()):
        real = call()
    with FakeTensorMode():
        fake = call()
    for ours, theirs in zip(fake, real, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()


@pytest.fixture
def two_configurations(monkeypatch):
    tiles = autotune.frozen(autotune.row_tiles("forward", 12, 4, 1)[:1] * 2)
    other = {**dict(tiles[1]), "num_warps": 4}
    tiles = (tiles[0], *autotune.frozen([other]))
    monkeypatch.setattr(triton_launch, "fitting_tiles", lambda *arguments: tiles)
    monkeypatch.setattr(autotune, "_TUNED", {})
    autotune._tuner.cache_clear()
    yield [dict(tile)["num_warps"] for tile in tiles]
    autotune._tuner.cache_clear()


def forward_warps(arch=90, rows=2):
    with chip(arch) as launches:
        query = torch.zeros(1, rows, 48, dtype=torch.bfloat16)
        codes = torch.zeros(1, 3, 48, dtype=torch.int8)
        triton_launch.forward(query, codes, torch.ones(1, 3), None)
    return [launch.settings["num_warps"] for launch in launches]


def test_each_case_is_timed_once(two_configurations):
    first, second = two_configurations
    # Both are timed, and the winner, here the first, is run.
    assert forward_warps() == [first, second, first]
    assert forward_warps() == [first]
    assert forward_warps(rows=3) == [first, second, first]
    assert forward_warps(arch=80) == [first, second, first]


def test_what_was_timed_is_found_on_disk(two_configurations):
    forward_warps()
    autotune._tuner.cache_clear()
    autotune._TUNED.clear()
    assert forward_warps() == [two_configurations[0]]


def test_nothing_is_timed_while_a_graph_is_captured(two_configurations, monkeypatch):
    first, second = two_configurations
    monkeypatch.setattr(autotune, "_capturing", lambda: True)
    assert forward_warps() == [first]
    monkeypatch.setattr(autotune, "_capturing", lambda: False)
    assert forward_warps() == [first, second, first]
    monkeypatch.setattr(autotune, "_capturing", lambda: True)
    assert forward_warps() == [first]


def test_deterministic_algorithms_take_the_first_configuration(two_configurations):
    torch.use_deterministic_algorithms(True)
    try:
        assert forward_warps() == [two_configurations[0]]
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_beyond_32_bit_offsets_are_copied():
    far = torch.empty_strided((2, 5, 8), (8, 2**29, 1), device="meta")
    assert triton_launch._addressable(far).is_contiguous()
    near = torch.empty_strided((2, 4, 8), (8, 2**29, 1), device="meta")
    assert triton_launch._addressable(near) is near
    assert triton_launch._addressable(near.transpose(1, 2)).is_contiguous()


def test_samples_beyond_32_bit_offsets_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    query = torch.empty(1, 2, 2048, device="meta")
    for count, refused in ((2**20 - 1, False), (2**20, True)):
        tokens = torch.empty(1, count, 2048, device="meta", dtype=torch.int8)
        reason = availability.why_not_triton(query, tokens)
        assert (reason is not None) == refused
        assert not refused or "2^31" in reason


@pytest.mark.parametrize(
    ("capability", "refused"), [((7, 5), True), ((8, 0), False), ((12, 0), False)], ids=str
)
def test_a_chip_that_triton_does_not_support_is_refused(monkeypatch, capability, refused):
    major, minor = capability
    for needed in ("_HAS_COMPILER", "_HAS_HEADERS"):
        monkeypatch.setattr(availability, needed, True)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(major=major, minor=minor),
    )
    with FakeTensorMode():
        query, tokens = (torch.empty(1, 2, 64, device="cuda") for _ in range(2))
    reason = availability.why_not_triton(query, tokens)
    assert (reason is not None) == refused
    assert not refused or "capability 8.0, got 7.5" in reason


def test_float32_products_follow_torchs_setting_whichever_way_it_is_made():
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        for old, found in (("high", "tf32"), ("highest", "tf32x3")):
            torch.set_float32_matmul_precision(old)
            assert triton_launch.float32_precision() == found
        for new, found in (("tf32", "tf32"), ("ieee", "tf32x3"), ("none", "tf32x3")):
            matmul.fp32_precision = new
            assert triton_launch.float32_precision() == found
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


def test_a_chip_of_little_shared_memory_gets_what_fits(monkeypatch):
    query, tokens = torch.zeros(32, 6, 1536), torch.zeros(32, 5, 1536)
    used = []
    for limit in (48 << 10, 99 << 10):
        with chip(80, kernels=()):
            monkeypatch.setattr(triton_launch, "shared_limit", lambda device, most=limit: most)
            monkeypatch.setattr(
                autotune, "launch", lambda kernel, grid, tiles, *rest, **k: used.extend(tiles)
            )
            triton_launch.forward(query.bfloat16(), tokens.bfloat16(), None, None)
    assert used
    assert all(dict(tile)["RELOAD"] for tile in used)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("_SWITCHED_OFF", True, "PRECEPTOR_NO_TRITON"),
        ("_HAS_COMPILER", False, "a C compiler"),
        ("_HAS_HEADERS", False, "Python.h"),
        # A number as that of an AMD device passes for a capability.
        ("torch.version.hip", "7.0", "NVIDIA"),
    ],
)
def test_a_chip_that_cannot_or_may_not_start_kernels_says_why(name, value, told, monkeypatch):
    found = SimpleNamespace(major=9, minor=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    for needed in ("_HAS_COMPILER", "_HAS_HEADERS"):
        monkeypatch.setattr(availability, needed, True)
    with FakeTensorMode():
        query, tokens = (torch.empty(1, 2, 64, device="cuda") for _ in range(2))
    device = torch.device("cuda", 0)
    assert availability.why_not_triton(query, tokens) is None
    assert without_kernels(device) is None is without_kernels(torch.device("cpu"))
    whose = torch.version if "." in name else availability
    monkeypatch.setattr(whose, name.rpartition(".")[2], value)
    reason = availability.why_not_triton(query, tokens)
    assert reason is not None
    assert told in reason
    assert (
        without_kernels(device)
        == f"torch's own operations stand in for the kernels: Triton {reason}"
    )
