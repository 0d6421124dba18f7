"""The committed launch configurations: what they must satisfy for any width."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from preceptor.kernels import autotune, triton_backward, triton_forward, triton_launch

KINDS = st.sampled_from([(1, 1), (4, 1), (1, 2), (1, 4)])


@given(st.integers(1, 2048), KINDS, st.sampled_from(["forward", "backward"]))
def test_chunks_cover_every_width(dim, kind, kernel):
    lanes, itemsize = kind
    width = -(-dim // lanes)
    for tile in autotune.row_tiles(kernel, width, lanes, itemsize):
        chunk, count = tile["DC"], tile["NC"]
        assert chunk >= (16 if width <= 16 else 32)
        assert chunk & (chunk - 1) == 0
        assert (count - 1) * chunk < width <= count * chunk
        assert tile["EVEN"] == (width == count * chunk)
        assert count * lanes <= 48
        # Parts of a sample's tokens are multiples of 64.
        assert 64 % tile["BN"] == 0


@given(st.integers(1, 512), KINDS, st.sampled_from(["forward", "backward"]))
def test_every_chip_has_a_configuration(quarter, kind, kernel):
    lanes, itemsize = kind
    width = 4 * quarter // lanes
    tiles = autotune.row_tiles(kernel, width, lanes, itemsize)

    def needs(tile):
        return autotune.shared_bytes(kernel, tile, lanes, itemsize)

    # The least that a chip with a fused path has (sm_86, sm_89, sm_120), sm_80, sm_90.
    for limit in (99 << 10, 163 << 10, 227 << 10):
        kept = autotune.fitting(tiles, needs, limit)
        assert kept
        assert all(needs(tile) <= limit for tile in kept)


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        (triton_forward.attend_forward, {"BM", "BN", "DC", "NC", "EVEN", "RELOAD", "WHOLE"}),
        (
            triton_backward.attend_backward_query,
            {"BM", "BN", "DC", "NC", "EVEN", "RELOAD", "WHOLE"},
        ),
        (triton_backward.attend_backward_tokens, {"BN", "BD", "BK"}),
    ],
)
def test_configurations_name_arguments_of_their_kernel(kernel, names):
    tiles = autotune.token_tiles(2) if "BK" in names else autotune.row_tiles("forward", 768, 1, 2)
    for tile in tiles:
        assert set(tile) == names | {"num_warps", "num_stages"}
    assert names <= set(kernel.arg_names)
    for key in ("rows", "dim", "NORM"):
        assert key in kernel.arg_names


@pytest.mark.parametrize("tokens", [torch.int8, torch.bfloat16])
def test_a_smaller_batch_is_not_timed_anew(monkeypatch, tokens):
    """Though its tokens are split into other parts, so that they fill the device."""
    keys, splits = [], []

    def recorded(kernel, grid, tiles, arguments, constants, key):
        values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
        splits.append(constants.get("SPLITS"))
        keys[-1].append((kernel.fn.__name__, tiles, [(name, values[name]) for name in key]))

    class Unlaunched:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: None

    monkeypatch.setattr(autotune, "launch", recorded)
    monkeypatch.setattr(triton_launch, "merge_parts", Unlaunched())
    floats = tokens.is_floating_point
    for batch in (64, 5, 1):
        keys.append([])
        query = torch.zeros(batch, 16, 64, dtype=torch.bfloat16)
        stored = torch.zeros(batch, 256, 64, dtype=tokens)
        weight = None if floats else torch.ones(batch, 256)
        y, lse, gain, mean = triton_launch.forward(query, stored, weight, 1e-5)
        triton_launch.backward(y, lse, query, stored, gain, mean, y, lse, floats)
    assert len({repr(key) for key in keys}) == 1
    assert len(keys[0]) == (3 if floats else 2)
    assert len(set(splits)) > 2


def test_forcing_a_configuration_ends_with_its_context():
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append(constants["BM"])

    tiles = autotune.frozen([{"BM": 16}, {"BM": 32}])
    for position in (1, 2, 3):
        with autotune.only(position):
            autotune.launch(Kernel(), lambda tile: (tile["BM"],), tiles, (), {}, ("rows",))
    assert launched == [32, 16, 32]
    assert not autotune._FORCED
