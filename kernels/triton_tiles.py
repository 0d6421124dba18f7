"""Pieces that the Triton kernels share: loading tokens and rows by chunks, rounding, storing.

A tile of tokens [BN, D] is a tuple of NC * LANES tiles [BN, DC], because Triton's tile sizes are
powers of two and D = 384, 768 or 1536 is not. Packed int8 codes are loaded as 32-bit words, four
channels each, since byte-wide loads are neither vectorised nor asynchronous; lane k of a word chunk
holds the channels 4 j + k, and rows are split and interleaved to match.
"""

# Triton's language is a subset of Python: no unpacking into tuples, constants on the right.
# ruff: noqa: RUF005, SIM108, SIM300
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tokens(
    base,
    positions,
    valid,
    stride,
    width,
    NC: tl.constexpr,
    DC: tl.constexpr,
    EVEN: tl.constexpr,
    LANES: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """NC * LANES tiles [BN, DC] of dot operands; zeros outside.

    ``width`` and ``stride`` count elements of the pointer: channels, or words of four.
    """
    tiles = ()
    for chunk in tl.static_range(NC):
        columns = chunk * DC + tl.arange(0, DC)
        places = base + positions[:, None] * stride + columns[None, :]
        if EVEN:
            inside = valid[:, None]
        else:
            inside = valid[:, None] & (columns < width)[None, :]
        if LANES == 4:
            words = tl.load(places, mask=inside, other=0)
            for lane in tl.static_range(4):
                # The biased code u = code + 128 in the low mantissa bits of 1024.0 reads 1024 + u,
                # exactly; subtracting 1152 leaves the code, without an integer conversion.
                bits = (((words >> (8 * lane)) & 0xFF) ^ 0x80) | 0x6400
                tiles = tiles + ((bits.to(tl.int16).to(tl.float16, bitcast=True) - 1152.0),)
        else:
            tiles = tiles + (tl.load(places, mask=inside, other=0.0).to(OPERAND),)
    return tiles


@triton.jit
def load_row_chunk(
    base,
    rows,
    inside,
    stride,
    dim,
    chunk,
    DC: tl.constexpr,
    EVEN: tl.constexpr,
    LANES: tl.constexpr,
):
    """One chunk [BM, DC * LANES] of query-like rows as float32, channels in their own order."""
    columns = chunk * DC * LANES + tl.arange(0, DC * LANES)
    keep = inside[:, None] if EVEN else inside[:, None] & (columns < dim)[None, :]
    block = tl.load(base + rows[:, None] * stride + columns[None, :], mask=keep, other=0.0)
    return block.to(tl.float32)


@triton.jit
def split_lanes(block, DC: tl.constexpr, LANES: tl.constexpr):
    if LANES == 1:
        return (block,)
    else:
        even, odd = tl.split(tl.reshape(block, (block.shape[0], DC, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth)


@triton.jit
def join_lanes(tiles, chunk: tl.constexpr, LANES: tl.constexpr):
    """One chunk of accumulators [BM, DC * LANES] with its channels back in their own order."""
    if LANES == 1:
        return tiles[chunk]
    else:
        return tl.interleave(
            tl.interleave(tiles[chunk * 4], tiles[chunk * 4 + 2]),
            tl.interleave(tiles[chunk * 4 + 1], tiles[chunk * 4 + 3]),
        )


@triton.jit
def store_row_chunk(
    base,
    block,
    rows,
    inside,
    stride,
    dim,
    chunk,
    DC: tl.constexpr,
    EVEN: tl.constexpr,
    LANES: tl.constexpr,
    EMULATE: tl.constexpr,
):
    columns = chunk * DC * LANES + tl.arange(0, DC * LANES)
    keep = inside[:, None] if EVEN else inside[:, None] & (columns < dim)[None, :]
    if EMULATE:
        block = round_to_bfloat16(block)
    places = base + rows[:, None] * stride + columns[None, :]
    tl.store(places, block.to(base.dtype.element_ty), mask=keep)


@triton.jit
def round_to_bfloat16(x):
    """float32 rounded to the nearest bfloat16, ties to even, kept as float32.

    For the interpreter, whose bfloat16 truncates on conversion and is wrong in arithmetic.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def to_operand(x, OPERAND: tl.constexpr, EMULATE: tl.constexpr):
    if EMULATE:
        return round_to_bfloat16(x)
    else:
        return x.to(OPERAND)


@triton.jit
def row_operands(
    base,
    rows,
    inside,
    stride,
    dim,
    NC: tl.constexpr,
    DC: tl.constexpr,
    EVEN: tl.constexpr,
    LANES: tl.constexpr,
    OPERAND: tl.constexpr,
    EMULATE: tl.constexpr,
    BM: tl.constexpr,
):
    """Rows as NC * LANES dot operands, the factor [BM] divided out, and the operands' sums [BM].

    Each row is brought to a maximum of 1 before it is rounded to float16, whose range is narrow.
    """
    factor = tl.full((BM,), 1.0, tl.float32)
    if OPERAND == tl.float16:
        top = tl.zeros((BM,), tl.float32)
        for chunk in tl.static_range(NC):
            block = load_row_chunk(base, rows, inside, stride, dim, chunk, DC, EVEN, LANES)
            top = tl.maximum(top, tl.max(tl.abs(block), axis=1))
        factor = tl.where(top > 0.0, top, 1.0)
    operands = ()
    total = tl.zeros((BM,), tl.float32)
    for chunk in tl.static_range(NC):
        block = load_row_chunk(base, rows, inside, stride, dim, chunk, DC, EVEN, LANES)
        if OPERAND == tl.float16:
            # Divided, not multiplied by a reciprocal: 1 / factor overflows for subnormal rows.
            block = block / factor[:, None]
        operand = to_operand(block, OPERAND, EMULATE)
        total += tl.sum(operand.to(tl.float32), axis=1)
        operands = operands + split_lanes(operand, DC, LANES)
    return operands, factor, total


@triton.jit
def products(
    operands,
    tiles,
    COUNT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BM, BN] float32 inner products of rows and tokens."""
    total = tl.zeros((BM, BN), tl.float32)
    for index in tl.static_range(COUNT):
        total = tl.dot(operands[index], tl.trans(tiles[index]), total, input_precision=PRECISION)
    return total


@triton.jit
def accumulate(
    accumulators,
    alpha,
    weights,
    tiles,
    COUNT: tl.constexpr,
    RESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """alpha * accumulators + weights @ tokens, chunk by chunk."""
    updated = ()
    for index in tl.static_range(COUNT):
        held = accumulators[index]
        if RESCALE:
            held = held * alpha[:, None]
        updated = updated + (tl.dot(weights, tiles[index], held, input_precision=PRECISION),)
    return updated


@triton.jit
def zeros(COUNT: tl.constexpr, BM: tl.constexpr, DC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BM, DC), tl.float32),)
    return tiles
