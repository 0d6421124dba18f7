"""Launch configurations: a small committed set, pruned by an estimate of resources, then timed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One launch configuration: block sizes BM and BN, warps and pipeline stages."""

    rows: int
    tokens: int
    warps: int
    stages: int


def chunk_of(width: int, lanes: int, itemsize: int) -> int:
    """The chunk DC in which a token's ``width`` elements are read: a power of two.

    The largest one that divides the width, unless that makes too many chunks (each is an unrolled
    product); then one that leaves little of its last chunk unused.
    """
    floor = 16
    ceiling = 64 if lanes == 4 else 512 // itemsize
    most = 4 if lanes == 4 else 8
    exact = ceiling
    while exact > floor and width % exact:
        exact //= 2
    if width % exact == 0 and width // exact <= most:
        return exact
    chunk = floor
    while chunk * most < width:
        chunk *= 2
    return chunk


def default_tile(kernel: str, dim: int, itemsize: int) -> Tile:
    return Tile(16, 32 if dim * itemsize <= 1536 else 16, 4, 2)


import triton
INTERPRETED = triton.knobs.runtime.interpret

def row_tiles(kernel, width, lanes, itemsize):
    dc = chunk_of(width, lanes, itemsize)
    return [dict(BM=16, BN=16, DC=dc, NC=triton.cdiv(width, dc), EVEN=width % dc == 0, num_warps=4, num_stages=2)]

def token_tiles(itemsize):
    return [dict(BN=32, BD=64, BK=16, num_warps=4, num_stages=2)]

def launch(kernel, grid, tiles, arguments, constants, key):
    tile = tiles[0]
    kernel[grid(tile)](*arguments, **constants, **tile)
