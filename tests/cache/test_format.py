"""cache_format.md is enough: a store is checked and decoded here from the document alone.

Nothing of the package reads anything in the decoder below: only zarr or tensorstore, NumPy, and
the formulas of the document. The store of every format version is kept and must be read for ever.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import jsonschema
import make_golden
import numpy as np
import pytest
import tensorstore
import zarr
from preceptor.benchmarks.small_store import extract
from preceptor.cache import Cache
from preceptor.cache.encodings import ENCODINGS
from preceptor.cache.layout import Layout
from small_stores import CORRUPT, ROWS, SPACES, make_plan, tokens_of, write_store

GOLDEN = {
    version: Path(__file__).parent / name
    for version, name in ((1, "golden"), (2, "golden_2"), (3, "golden_3"))
}
DOCUMENT = (Path(__file__).parents[2] / "cache_format.md").read_text()
VALID = np.array([row for row in range(ROWS) if row not in CORRUPT])

ReadArray = Callable[[Path], np.ndarray]


def by_zarr(path: Path) -> np.ndarray:
    return np.asarray(zarr.open_array(path, mode="r")[...])


def by_tensorstore(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec).result().read().result())


# -- the document's section 5, `Decoded`, and section 4 ------------------------------------------


def decode(space: Path, read: ReadArray) -> np.ndarray:
    """float32 ``[rows, N, D]``; rows that are holes come out as NaN or nonsense."""
    attributes = json.loads((space / "zarr.json").read_text())["attributes"]
    codes, dim = read(space / "codes"), attributes["dim"]
    if attributes.get("predicted"):
        codes = restored(codes, read(space / "weights"), attributes["grid"])
    f32 = np.float32
    with np.errstate(invalid="ignore"):
        if attributes["encoding"] == "fp16":
            z = codes.astype(f32)
        elif attributes["encoding"] in ("int8", "compact"):
            z = codes.astype(f32) * read(space / "scales").astype(f32)[..., None]
        else:
            scales = read(space / "scales").astype(f32)
            z = np.zeros((*codes.shape[:-1], dim), f32)
            for d in range(dim):
                byte = codes[..., d // 2]
                nibble = byte // 16 if d % 2 else byte % 16
                z[..., d] = (nibble.astype(f32) - 8) * scales[..., d // 64]
        return z * read(space / "std") + read(space / "mean")


def predicted(codes: np.ndarray, weights: np.ndarray, d: int) -> np.ndarray:
    """int64 ``[rows, N]``: what is predicted of dimension d, from codes before its block."""
    block = -(-codes.shape[-1] // 4)
    before = slice(0, block * (d // block))
    total = (codes[..., before].astype(np.int64) * weights[d, before].astype(np.int64)).sum(-1)
    return np.clip(np.rint(total / 128).astype(np.int64), -127, 127)


def from_neighbours(left: np.ndarray, weights: np.ndarray, grid: list[int] | None) -> np.ndarray:
    """int64 ``[rows, N, D]``: what is predicted of r from r of the tokens beside."""
    told = np.zeros(left.shape, np.int64)
    for n in range(left.shape[-2] if grid else 0):
        y, x = divmod(n, grid[1])
        for b, a in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if (y + x) % 2 and 0 <= b < grid[0] and 0 <= a < grid[1]:
                told[..., n, :] += left[..., b * grid[1] + a, :] * np.diag(weights).astype(np.int64)
    return np.rint(told / 512).astype(np.int64)


def restored(stored: np.ndarray, weights: np.ndarray, grid: list[int] | None) -> np.ndarray:
    codes = stored.astype(np.int64)
    codes = (codes + from_neighbours(codes, weights, grid) + 127) % 255 - 127
    for d in range(codes.shape[-1]):
        codes[..., d] = (codes[..., d] + predicted(codes, weights, d) + 127) % 255 - 127
    return codes


# -- the document's section 5, encoders, in plain loops over float32 ------------------------------


def up16(y: np.float32) -> np.float16:
    half = np.float16(y)
    return half if np.float32(half) >= y else np.nextafter(half, np.float16(np.inf))


def scale(y: np.float32) -> np.float16:
    return up16(min(max(y, np.float32(2.0**-24)), np.float32(65504)))


def encode(name: str, z: np.ndarray, h: float = 0.125) -> tuple[np.ndarray, Any]:
    """Codes and scales of one token, float32 ``[D]``; h: the step that the space states."""
    f32 = np.float32
    p = f32(np.abs(z).max())
    if name == "fp16":
        return z.astype(np.float16), None
    if name == "int4":
        z = np.concatenate([z, np.zeros(-len(z) % 64, f32)])
        scales = [scale(f32(np.abs(g).max()) / f32(7)) for g in z.reshape(-1, 64)]
        codes = [int(np.clip(np.rint(v / f32(scales[d // 64])), -7, 7)) for d, v in enumerate(z)]
        pairs = zip(codes[::2], codes[1::2], strict=True)
        return np.array([low + 8 + 16 * (high + 8) for low, high in pairs], np.uint8), scales
    step = p / f32(127)
    if name == "compact":
        u = z / p if p > 0 else z
        q = [*(u * u), *[f32(0)] * (2 ** int(np.ceil(np.log2(len(u)))) - len(u))]
        while len(q) > 1:
            q = [a + b for a, b in zip(q[: len(q) // 2], q[len(q) // 2 :], strict=True)]
        step = max(p * np.sqrt(q[0] / f32(len(u))) * f32(h), step)
    s = scale(step)
    return np.clip(np.rint(z / f32(s)), -127, 127).astype(np.int8), s


READERS = pytest.mark.parametrize("read", [by_zarr, by_tensorstore])
EACH_VERSION = pytest.mark.parametrize("version", GOLDEN)


@EACH_VERSION
@READERS
def test_the_golden_store_decodes_by_the_document(read: ReadArray, version: int) -> None:
    expected = json.loads((GOLDEN[version] / "expected.json").read_text())
    valid = np.array(expected["valid"])
    store = GOLDEN[version] / "store"
    assert json.loads((store / "manifest.json").read_text())["version"] == version
    assert (read(store / "rows/valid") == valid).all()
    keys = [bytes(key).rstrip(b"\0").decode() for key in read(store / "rows/key")]
    assert keys == [f"clé{row}" for row in range(5)]
    assert read(store / "rows/label").tolist() == [-1, 0, 1, 2, 3]
    for name, values in expected["decoded"].items():
        assert (decode(store / "spaces" / name, read)[valid] == np.array(values)).all(), name


@EACH_VERSION
def test_the_golden_store_is_read(version: int) -> None:
    expected = json.loads((GOLDEN[version] / "expected.json").read_text())
    cache = Cache.open(GOLDEN[version] / "store")
    assert cache.valid.tolist() == expected["valid"]
    used = {space.encoding for space in cache.spaces.values()}
    assert used == (set(ENCODINGS) if version == 1 else {"compact", "int8"})
    specs = [space.spec for space in cache.spaces.values() if space.encoding == "compact"]
    assert {spec.predicted for spec in specs} == ({False} if version == 1 else {False, True})
    assert {spec.step for spec in specs} == ({15 / 128, 40 / 128, None} if version == 3 else {None})
    for name, values in expected["decoded"].items():
        tokens = cache[name].read(np.flatnonzero(cache.valid))
        assert (cache[name].decode(tokens).numpy() == np.array(values)).all(), name
        assert cache[name].statistics().count == 4 * cache[name].spec.tokens


@EACH_VERSION
def test_a_store_of_an_earlier_release_is_encoded_as_it_was(version: int, tmp_path: Path) -> None:
    make_golden.write(version, tmp_path)
    for space in make_golden.SPACES[version]:
        for part in ("codes", "scales") if space.encoding != "fp16" else ("codes",):
            ours, theirs = (
                by_zarr(root / "store/spaces" / space.id / part)
                for root in (tmp_path, GOLDEN[version])
            )
            assert ours.tobytes() == theirs.tobytes(), (space.id, part)


@READERS
def test_a_store_decodes_by_the_document_to_what_the_reader_gives(
    finished: Path, read: ReadArray
) -> None:
    cache = Cache.open(finished)
    for name, space in cache.spaces.items():
        ours = space.decode(space.read(VALID)).numpy()
        theirs = decode(finished / "spaces" / name, read)[VALID]
        assert ours.tobytes() == theirs.tobytes(), name


@pytest.mark.parametrize("step", [15 / 128, None])
def test_the_document_s_encoders_give_the_stored_bits(
    finished: Path, tmp_path: Path, step: float | None
) -> None:
    if step is None:  # as stores of version 2 have it
        finished = tmp_path / "store"
        write_store(finished, make_plan([replace(space, step=None) for space in SPACES]))
    cache = Cache.open(finished)
    version = json.loads((finished / "manifest.json").read_text())["version"]
    assert version == (2 if step is None else 3)
    for name, space in cache.spaces.items():
        entry = json.loads((finished / "spaces" / name / "zarr.json").read_text())["attributes"]
        assert entry.get("step") == (step if space.encoding == "compact" else None)
        tokens = space.read(VALID[:3])
        z = (tokens_of(space.spec, VALID[:3]) - space.mean.numpy()) / space.std.numpy()
        for row in range(3):
            pairs = [encode(space.encoding, token, entry.get("step", 0.125)) for token in z[row]]
            codes = np.stack([pair[0] for pair in pairs])
            if space.spec.predicted:
                weights = by_zarr(finished / "spaces" / name / "weights")
                told = [predicted(codes, weights, d) for d in range(codes.shape[-1])]
                left = (codes - np.stack(told, -1) + 127) % 255 - 127
                left = left - from_neighbours(left, weights, space.grid)
                codes = ((left + 127) % 255 - 127).astype(np.int8)
            stored = tokens.codes[row].numpy()
            assert codes[:, : stored.shape[-1]].tobytes() == stored.tobytes(), name
            if tokens.scales is not None:
                scales = np.array([pair[1] for pair in pairs], np.float16)
                assert scales.tobytes() == tokens.scales[row].numpy().tobytes(), name


def canonical_sha256(document: dict[str, Any]) -> str:
    body = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("kind", ["golden 1", "golden 2", "golden 3", "fresh", "pixels"])
def test_hashes_and_checksums_are_those_of_the_document(
    kind: str, finished: Path, tmp_path: Path
) -> None:
    root = {"fresh": finished, "pixels": tmp_path / "store"}.get(kind)
    root = root or GOLDEN[int(kind[-1])] / "store"
    if kind == "pixels":
        extract(root)
    schemas = {
        name: json.loads(text)
        for name, text in re.findall(r"```json schema=(\w+)\n(.*?)```", DOCUMENT, re.S)
    }
    manifest = json.loads((root / "manifest.json").read_text())
    jsonschema.validate(manifest, schemas["manifest"])
    assert manifest["sha256"] == canonical_sha256(manifest)
    shards = -(-manifest["rows"] // manifest["shard_rows"])
    units = ["rows", *(teacher["name"] for teacher in manifest["teachers"])]
    for unit in [*units, *(["pixels"] if "pixels" in manifest else [])]:
        done = json.loads((root / f"commits/{unit}/complete.json").read_text())
        jsonschema.validate(done, schemas["completion"])
        assert done["sha256"] == canonical_sha256(done)
        for shard in range(shards):
            raw = (root / f"commits/{unit}/{shard}.json").read_bytes()
            assert hashlib.sha256(raw).hexdigest() == done["records"][shard]
            record = json.loads(raw)
            jsonschema.validate(record, schemas["commit"])
            assert record["sha256"] == canonical_sha256(record)
            assert record["configuration"] == done["configuration"]
            for path, entry in record["files"].items():
                check_file(root, path, shard, entry)
    for teacher in manifest["teachers"]:
        for space in teacher["spaces"]:
            folder = root / "spaces" / teacher["name"] / space["name"]
            names = ("mean", "std", *(["weights"] if "predicted" in space else []))
            raw = b"".join(by_zarr(folder / name).tobytes() for name in names)
            assert hashlib.sha256(raw).hexdigest() == space["calibration"]["sha256"]


def check_file(root: Path, path: str, shard: int, entry: dict[str, Any]) -> None:
    shape = json.loads((root / path / "zarr.json").read_text())["shape"]
    raw = (root / path / f"c.{shard}{'.0' * (len(shape) - 1)}").read_bytes()
    assert len(raw) == entry["bytes"]
    assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
    sums = [int(entry["chunks"][at : at + 8], 16) for at in range(0, len(entry["chunks"]), 8)]
    offset = 0
    if path.startswith("rows/"):
        starts, ends = [0], [len(raw)]
    else:  # chunks lie in order, with gaps of a few zeros, then the index
        codecs = json.loads((root / path / "zarr.json").read_text())["codecs"]
        metadata = json.loads((root / path / "zarr.json").read_text())
        outer = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        chunks = outer // codecs[0]["configuration"]["chunk_shape"][0]
        index = np.frombuffer(raw[-16 * chunks - 4 : -4], "<u8").reshape(-1, 2)[: len(sums)]
        starts, ends = index[:, 0].tolist(), index.sum(1).tolist()
        assert ends[-1] == len(raw) - 16 * chunks - 4
    for start, end, value in zip(starts, ends, sums, strict=True):
        assert 0 <= start - offset < 4096
        assert raw[offset:start] == bytes(start - offset)
        assert google_crc32c.value(raw[start : end - 4]) == value
        assert int.from_bytes(raw[end - 4 : end], "little") == value
        offset = end


def attributes_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Attributes by node path, as section 3 has them; of the nodes that have any."""
    found = {"": {name: manifest[name] for name in ("format", "version")}}
    if "pixels" in manifest:
        found["pixels/"] = {"interpolation": manifest["pixels"]["interpolation"]}
    for teacher in manifest["teachers"]:
        for space in teacher["spaces"]:
            path = f"spaces/{teacher['name']}/{space['name']}/"
            found[path] = {name: space[name] for name in space if name != "calibration"}
            for part in ("codes/", "scales/"):
                found[path + part] = {name: space[name] for name in ("encoding", "grid", "dim")}
    return found


@pytest.mark.parametrize("kind", ["golden 1", "golden 2", "golden 3", "pixels"])
def test_metadata_is_that_of_the_document(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "store" if kind == "pixels" else GOLDEN[int(kind[-1])] / "store"
    if kind == "pixels":
        extract(root)
    manifest = json.loads((root / "manifest.json").read_text())
    attributes = attributes_of(manifest)
    spelled = re.findall(r'^    (\{"name": "(\w+)".*\})$', DOCUMENT, re.MULTILINE)
    codecs = {name: json.loads(text) for text, name in spelled}
    groups = set()
    for path in root.rglob("zarr.json"):
        node = path.relative_to(root).as_posix().removesuffix("zarr.json")
        found = json.loads(path.read_bytes())
        assert (found.pop("zarr_format"), found.pop("attributes")) == (3, attributes.get(node, {}))
        if found.pop("node_type") == "group":
            groups.add(node)
            assert not found
            continue
        chain, chunk = found["codecs"], found["chunk_grid"]["configuration"]["chunk_shape"]
        if chain[0]["name"] == "sharding_indexed":
            inner = chain[0]["configuration"]
            index = {"index_codecs": [codecs["bytes"], codecs["crc32c"]], "index_location": "end"}
            rest = {"chunk_shape": [inner["chunk_shape"][0], *chunk[1:]], "codecs": inner["codecs"]}
            assert chain == [{"name": "sharding_indexed", "configuration": {**rest, **index}}]
            chain = inner["codecs"]
        predicted = "predicted" in attributes.get(node.removesuffix("codes/"), {})
        for codec in chain:
            if codec["name"] == "zstd" and predicted and node.endswith("/codes/"):
                assert codec["configuration"]["level"] == 1
                codec["configuration"]["level"] = 3
            assert codec == codecs[codec["name"]]
        assert found == {
            "shape": [found["shape"][0], *chunk[1:]],
            "data_type": found["data_type"],
            "fill_value": found["fill_value"],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": found["codecs"],
            "storage_transformers": [],
        }
    named = re.findall(r"^    (\S*)zarr\.json +(?:root )?group", DOCUMENT, re.MULTILINE)
    assert groups == {
        group.replace("/T/", f"/{teacher['name']}/").replace("/S/", f"/{space['name']}/")
        for teacher in manifest["teachers"]
        for space in teacher["spaces"]
        for group in named
    }


def test_the_document_names_every_array_and_encoding() -> None:
    layout = Layout(Cache.open(GOLDEN[3] / "store").plan)
    for name in [*layout.row_arrays(), "codes", "scales", "mean", "std", "weights", "covariance"]:
        assert name in DOCUMENT
    for name in ENCODINGS:
        assert f"- **{name}**:" in DOCUMENT
