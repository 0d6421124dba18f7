"""Shard files against those that zarr-python writes, byte for byte, and damaged indices."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd
from preceptor.cache.layout import ArraySpec, node_bytes
from preceptor.cache.sharding import alignment, parse_index, shard_file
from preceptor.cache.zstd_frames import content_length
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, TransposeCodec, ZstdCodec

SPECS = {
    "raw": ArraySpec("a", "int8", (16, 3, 5), (16, 3, 5), (4, 3, 5), -128),
    "scales": ArraySpec("a", "float16", (16, 3), (16, 3), (4, 3), float("nan")),
    "channel-zstd": ArraySpec("a", "int8", (16, 3, 5), (16, 3, 5), (4, 3, 5), -128, "channel-zstd"),
    "large": ArraySpec("a", "int8", (16, 65, 253), (16, 65, 253), (4, 65, 253), -128),
    "large zstd": ArraySpec(
        "a", "int8", (16, 65, 253), (16, 65, 253), (4, 65, 253), -128, "channel-zstd"
    ),
    "zstd of level 1": ArraySpec(
        "a", "int8", (16, 3, 5), (16, 3, 5), (4, 3, 5), -128, "channel-zstd", level=1
    ),
    "plain": ArraySpec("a", "int64", (16,), (16,), None, -(2**63)),
    "plain zstd": ArraySpec("a", "uint8", (16, 9), (16, 9), None, 255, "zstd"),
}
EACH = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def values_for(spec: ArraySpec) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.integers(0, 100, spec.shape).astype(spec.dtype)


@EACH
def test_a_file_is_what_zarr_python_would_write(spec: ArraySpec, tmp_path: Path) -> None:
    values = values_for(spec)
    chain = [BytesCodec(endian="little")]
    if spec.codec == "channel-zstd":
        chain = [TransposeCodec(order=(2, 0, 1)), *chain]
    if "zstd" in spec.codec:
        chain.append(ZstdCodec(level=3, checksum=True))
    chain.append(Crc32cCodec())
    (tmp_path / "a").mkdir()
    (tmp_path / "a/zarr.json").write_bytes(node_bytes(spec.metadata()))
    array = zarr.open_array(tmp_path / "a", mode="r+")
    codecs = array.metadata.codecs
    if spec.group is not None:
        (sharding,) = codecs
        assert isinstance(sharding, ShardingCodec)
        assert sharding.chunk_shape == spec.group
        codecs = sharding.codecs
    assert [codec.to_dict()["name"] for codec in codecs] == [c.to_dict()["name"] for c in chain]
    array[:] = values
    theirs = (tmp_path / spec.file(0)).read_bytes()
    buffers, sums = shard_file(spec, values)
    ours = b"".join(bytes(buffer) for buffer in buffers)
    assert len(sums) == spec.chunks_a_shard
    if spec.group is None:
        assert ours == theirs
        return
    # zarr-python may order the chunks otherwise and leaves no gaps: compare chunk by chunk
    indices = [
        parse_index(spec, raw[-spec.index_bytes :], len(raw), spec.chunks_a_shard)
        for raw in (ours, theirs)
    ]
    at, gaps = 0, b""
    for mine, other in zip(*indices, strict=True):
        assert ours[mine[0] : mine.sum()] == theirs[other[0] : other.sum()]
        assert mine[0] % alignment(spec) == 0
        gaps += ours[at : mine[0]]
        at = int(mine.sum())
    assert gaps == bytes(len(ours) - len(theirs))
    assert at == len(ours) - spec.index_bytes
    assert bool(gaps) == (spec.chunk_bytes >= 1 << 16)
    # and other libraries read a file with gaps
    (tmp_path / spec.file(0)).write_bytes(ours)
    kvstore = {"driver": "file", "path": str(tmp_path / "a")}
    third = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    for reader in (zarr.open_array(tmp_path / "a", mode="r"), third.read().result()):
        assert (np.asarray(reader[...]) == values).all()


@EACH
def test_chunks_decode_to_what_they_were(spec: ArraySpec) -> None:
    values = values_for(spec)
    chunk = values[: spec.chunk[0]]
    raw = np.frombuffer(bytes(spec.encode_chunk(chunk)), np.uint8)
    assert (spec.decode_chunk(raw) == chunk).all()
    with pytest.raises(ValueError):
        spec.decode_chunk(raw[:-1])


@EACH
@pytest.mark.parametrize("more", [-4, -1, 1, 4])
def test_a_chunk_of_another_length_is_refused(spec: ArraySpec, more: int) -> None:
    """Sound frames of fewer bytes too: what they leave of the chunk would be arbitrary memory."""
    whole = values_for(spec)[: spec.chunk[0]].tobytes()
    other = whole[:more] if more < 0 else whole + bytes(more)
    stored = other if spec.fixed_size else Zstd(level=3, checksum=True).encode(other)
    with pytest.raises(ValueError, match=f"{len(other)} bytes instead of {len(whole)}"):
        spec.decode_chunk(np.frombuffer(stored, np.uint8))


def test_a_chunk_of_several_frames_is_read() -> None:
    """Another writer may stream it."""
    spec = SPECS["channel-zstd"]
    chunk = values_for(spec)[: spec.chunk[0]]
    raw = chunk.transpose(2, 0, 1).tobytes()
    frames = b"".join(Zstd(level=1, checksum=True).encode(part) for part in (raw[:99], raw[99:]))
    assert (spec.decode_chunk(np.frombuffer(frames, np.uint8)) == chunk).all()


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.binary(max_size=400), st.integers(1, 900)), min_size=1, max_size=3),
    level=st.sampled_from([1, 3, 19]),
    checksum=st.booleans(),
)
def test_frames_state_their_length(
    parts: list[tuple[bytes, int]], level: int, checksum: bool
) -> None:
    """Fields of one byte to four, and blocks of one repeated byte."""
    whole = [part * count for part, count in parts]
    frames = b"".join(Zstd(level=level, checksum=checksum).encode(part) for part in whole)
    raw = np.frombuffer(frames, np.uint8)
    assert content_length(raw) == sum(map(len, whole))
    assert content_length(raw[:-1]) is None


def test_frames_of_any_length_are_refused_before_room_is_made() -> None:
    spec = SPECS["channel-zstd"]
    bomb = np.frombuffer(Zstd(level=1).encode(bytes(1 << 26)), np.uint8).copy()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"67108864 bytes instead of {spec.chunk_bytes}"):
            spec.decode_chunk(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_changed_index_is_taken_for_whole(data: st.DataObject) -> None:
    spec = SPECS["channel-zstd"]
    values = values_for(spec)[: 4 * data.draw(st.integers(1, 4))]
    file = b"".join(bytes(buffer) for buffer in shard_file(spec, values)[0])
    chunks = len(values) // 4
    index = bytearray(file[-spec.index_bytes :])
    entries = parse_index(spec, bytes(index), len(file), chunks)
    assert entries.sum(1).max() == len(file) - spec.index_bytes
    index[data.draw(st.integers(0, len(index) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError):
        parse_index(spec, bytes(index), len(file), chunks)
    for other in range(1, 5):
        if other != chunks:
            with pytest.raises(ValueError):
                parse_index(spec, file[-spec.index_bytes :], len(file), other)
