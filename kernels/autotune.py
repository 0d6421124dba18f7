"""Launch configurations: a small committed set, pruned by what the device holds, then timed.

The set comes from the compiler's report of registers, spills and shared memory, which
tests/kernels/resources.json keeps. Triton's own autotuner picks the fastest for each width, number
of rows and kind of call, and keeps the answer in its cache on disk. Where torch is told to use
deterministic algorithms the first configuration that fits is taken instead, so that results do not
depend on what was measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

# Triton's interpreter has no device to time.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_FORCED: list[int] = []
_WHOLE: list[bool] = []
# What was chosen in this process, by an autotuner and the values that it chose by.
_TUNED: dict[tuple[Any, ...], Tile] = {}

# Tokens up to which one block may hold a whole sample, within `whole_samples`: two tiles of their
# scores fill the registers.
MOST_WHOLE = 256

Tile = dict[str, Any]
Shape = tuple[int, int, int, int]
FrozenTiles = tuple[tuple[tuple[str, Any], ...], ...]


def chunk_of(width: int, ceiling: int, most: int) -> int:
    """The chunk DC in which a token's ``width`` elements are read: a power of two.

    The largest one up to ``ceiling`` that divides the width, unless that makes more than ``most``
    chunks (each is an unrolled product); then the smallest one that makes few enough. Chunks of 16
    are for widths of no more: three of them, for 192 codes, take many more registers than two of
    32.
    """
    least = 16 if width <= 16 else 32
    exact = ceiling
    while exact > least and width % exact:
        exact //= 2
    if width % exact == 0 and width // exact <= most:
        return exact
    chunk = least
    while chunk * most < width:
        chunk *= 2
    return chunk


def blocks(count: int, size: int) -> int:
    """How many blocks of ``size`` hold ``count``; Triton's own `cdiv` takes long to call."""
    return -(-count // size)


def block_of(count: int | None) -> int:
    """The block that holds so many tokens, a power of two; 0 where none does or none may."""
    if not _WHOLE or not count or count > MOST_WHOLE:
        return 0
    return max(16, triton.next_power_of_2(count))


def row_tiles(
    kernel: str, width: int, lanes: int, itemsize: int, block: int = 0, most: int = 64
) -> list[Tile]:
    """Configurations of "forward" or "backward" for tokens of ``width`` elements, best guess first.

    Args:
        width: elements of a token: channels, or words of four codes with ``lanes`` = 4.
        itemsize: bytes of one token channel.
        block: tokens of a block that holds a whole sample; 0 for none.
        most: rows of such a block.
    """
    # float32 products are three, and codes that cannot be read as words come byte by byte.
    whole = block and (itemsize == 2 or lanes == 4)
    return [
        *(_whole_tiles(width * lanes, block, most) if whole else []),
        *_streamed_tiles(kernel, width, lanes, itemsize),
    ]


def _whole_tiles(dim: int, block: int, most: int) -> list[Tile]:
    chunk = 64 if dim > 32 else 32
    return [
        {
            "BM": rows, "BN": block, "DC": chunk, "NC": blocks(dim, chunk),
            "EVEN": dim % chunk == 0, "RELOAD": False, "WHOLE": True,
            "num_warps": 8, "num_stages": 3,
        }
        for rows in (64, 32, 16)
        if rows <= most
    ]  # fmt: skip


def _streamed_tiles(kernel: str, width: int, lanes: int, itemsize: int) -> list[Tile]:
    held, again = _shapes(kernel, width * lanes, lanes, itemsize)
    tiles = []
    for shapes, reload in ((held, False), (again, True)):
        if reload:
            chunk = chunk_of(width, 64, 12 if lanes == 4 else 24)
        elif lanes == 4:
            chunk = chunk_of(width, 64, 4)
        else:
            chunk = chunk_of(width, 512 // max(itemsize, 2), 8)
        tiles += [
            {
                "BM": rows,
                "BN": tokens,
                "DC": chunk,
                "NC": blocks(width, chunk),
                "EVEN": width % chunk == 0,
                "RELOAD": reload,
                "WHOLE": False,
                "num_warps": warps,
                "num_stages": stages,
            }
            for rows, tokens, warps, stages in shapes
        ]
    return tiles


def _shapes(kernel: str, dim: int, lanes: int, itemsize: int) -> tuple[list[Shape], list[Shape]]:
    """(BM, BN, warps, stages) with tokens held in shared memory between their two uses, and of
    those that read them again from the caches, for which wide tokens leave room.
    """
    again = [(16, 32, 8, 1)]
    if itemsize == 4:
        return [], [*again, (16, 16, 8, 1)] if dim <= 1024 else [(16, 16, 8, 1)]
    if itemsize == 1 and lanes == 1:
        # Codes that cannot be read as words: loaded a byte at a time, they fill the registers.
        return [], again
    if kernel == "forward":
        held = [(16, 32, 8, 2)] if dim <= 1024 or lanes == 1 else [(16, 16, 8, 2)]
        if dim <= 768:
            # Four warps first: 80 us of floats at 768 channels on an H200, against 152 us of eight.
            held = [(16, 32, 4, 2), *held, (16, 32, 8, 3), (16, 64, 8, 2)]
        # 32 rows of codes of few channels leave the statistics of LayerNorm no registers.
        held += [(32, 32, 8, 2)] if dim <= 768 and (lanes == 1 or dim > 384) else []
        held += [(32, 16, 8, 2)] if 768 < dim <= 1024 else []
        return held, again
    if lanes == 1:
        if dim > 1024:
            return [(16, 16, 8, 2)], [(16, 16, 8, 1)]
        held = [(16, 32, 8, 2)]
        # The second spills at 768 channels, and is the fastest there all the same: 113 us on an
        # H200, against 168 us of the third.
        held += [(16, 32, 4, 2), (16, 16, 4, 2), (32, 16, 8, 2)] if dim <= 768 else []
        return held, again
    if dim > 1024:
        return [], again
    held = [(16, 32, 8, 2)] if dim <= 768 else []
    held += [(16, 32, 4, 2)] if dim <= 384 else [(16, 16, 8, 2)]
    return held, again


def token_tiles(itemsize: int) -> list[Tile]:
    """Configurations of the kernel that writes the tokens' gradient, best guess first."""
    shapes = [(32, 64, 16, 4, 2), (64, 128, 16, 8, 2), (32, 128, 16, 4, 2), (64, 64, 32, 4, 2)]
    names = ("BN", "BD", "BK", "num_warps", "num_stages")
    return [
        dict(zip(names, shape, strict=True)) for shape in shapes if itemsize < 4 or shape[0] < 64
    ]


def shared_bytes(kernel: str, tile: Mapping[str, Any], lanes: int, itemsize: int) -> int:
    """About how many bytes of shared memory a configuration takes.

    One block of rows for each of the query and dy, one block of tokens for each stage but the one
    at work, and for codes in the backward pass their decoded block; with RELOAD two chunks of each.
    """
    operand = max(itemsize, 2)
    if tile["WHOLE"]:
        sides = tile["BM"] * (1 if kernel == "forward" else 2) * operand
        stages = tile["DC"] * (sides + tile["BN"] * itemsize) * tile["num_stages"]
        weights = tile["BM"] * tile["BN"] * operand
        return stages + weights + tile["BN"] * tile["DC"] * operand + 4096
    if tile["RELOAD"]:
        return 2 * (tile["BM"] + tile["BN"]) * tile["DC"] * lanes * operand + 4096
    dim = tile["DC"] * tile["NC"] * lanes
    rows = tile["BM"] * dim * operand * (1 if kernel == "forward" else 2)
    tokens = tile["BN"] * dim * itemsize * max(1, tile["num_stages"] - 1)
    decoded = tile["BN"] * dim * 2 if lanes == 4 and kernel == "backward" else 0
    return rows + tokens + decoded + 4096


def fitting(tiles: Sequence[Tile], needs: Callable[[Tile], int], limit: int) -> list[Tile]:
    """The configurations within the limit of shared memory; the most modest one if none is."""
    kept = [tile for tile in tiles if needs(tile) <= limit]
    return kept or [min(tiles, key=needs)]


@contextlib.contextmanager
def whole_samples() -> Iterator[None]:
    """Within this context a block of rows may hold all tokens of a sample (`triton_whole`).

    Not everywhere yet: these forms are checked in the interpreter and compiled, but no device has
    run them, while those that stream the tokens passed their tests on one.
    """
    _WHOLE.append(True)
    try:
        yield
    finally:
        _WHOLE.pop()


@contextlib.contextmanager
def only(position: int) -> Iterator[None]:
    """Within this context the configuration at ``position`` (modulo their number) is used."""
    _FORCED.append(position)
    try:
        yield
    finally:
        _FORCED.pop()


def frozen(tiles: Sequence[Tile]) -> FrozenTiles:
    """Configurations in a form that can be a key."""
    return tuple(tuple(tile.items()) for tile in tiles)


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]],
    tiles: FrozenTiles,
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    key: tuple[str, ...],
) -> None:
    """Run a kernel with the fastest of some configurations.

    Args:
        key: names of the kernel's arguments that decide which one is fastest. None of them may
            follow from the size of the batch, or every last batch of an epoch or of an evaluation
            would be timed anew.
    """
    fixed = bool(_FORCED) or INTERPRETED or len(tiles) == 1
    if not (fixed or torch.are_deterministic_algorithms_enabled()):
        tuner = _tuner(kernel, tiles, key, triton.runtime.driver.active.get_current_device())
        places = _places(kernel, key)
        case = (tuner, *(arguments[i] if i < len(arguments) else constants[n] for n, i in places))
        case += tuple(value.dtype for value in arguments if isinstance(value, Tensor))
        # What was chosen is launched past the autotuner, which takes as long as a small call.
        if (chosen := _TUNED.get(case)) is not None:
            kernel[grid(chosen)](*arguments, **constants, **chosen)
            return
        # A graph that is being captured has no place for measurements: one that was not warmed up
        # gets the first configuration.
        if not _capturing():
            tuner[grid](*arguments, **constants)
            _TUNED[case] = tuner.best_config.all_kwargs()
            return
    tile = dict(tiles[_FORCED[-1] % len(tiles) if _FORCED else 0])
    kernel[grid(tile)](*arguments, **constants, **tile)


@cache
def _places(kernel: Any, key: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """The names of a key, with their places among the kernel's arguments."""
    return tuple((name, kernel.arg_names.index(name)) for name in key)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@cache
def _tuner(kernel: Any, tiles: FrozenTiles, key: tuple[str, ...], device: int) -> Any:
    """An autotuner for each device by itself, since a machine may have different ones."""
    configs = []
    for items in tiles:
        meta = dict(items)
        warps, stages = meta.pop("num_warps"), meta.pop("num_stages")
        configs.append(triton.Config(meta, num_warps=warps, num_stages=stages))
    return triton.autotune(configs=configs, key=list(key), cache_results=True)(kernel)
