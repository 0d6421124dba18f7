"""Pieces that the Triton kernels share: loading tokens and rows by chunks, rounding, storing.

A tile of tokens [BN, D] is a tuple of NC * LANES tiles [BN, DC], because Triton's tile sizes are
powers of two and D = 384, 768 or 1536 is not. Packed int8 codes are loaded as 32-bit words, four
channels each, since byte-wide loads are neither vectorised nor asynchronous; lane k of a word chunk
holds the channels 4 j + k, and rows are split and interleaved to match.

Where a tile does not fit beside its rows (float32 tokens, wide codes in the backward pass), RELOAD
reads tokens and rows again from the caches for each product instead of holding them.
"""

# Triton's language is a subset of Python: no unpacking into tuples, constants on the right.
# ruff: noqa: RUF005, SIM300
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_token_chunk(
    base, positions, valid, stride, width, chunk, DC: tl.constexpr,
    EVEN: tl.constexpr, LANES: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """LANES tiles [BN, DC] of dot operands; zeros outside.

    ``width`` and ``stride`` count elements of the pointer: channels, or words of four.
    """
    columns = chunk * DC + tl.arange(0, DC)
    places = base + positions[:, None] * stride + columns[None, :]
    inside = valid[:, None] if EVEN else valid[:, None] & (columns < width)[None, :]
    tiles = ()
    if LANES == 4:
        words = tl.load(places, mask=inside, other=0)
        for lane in tl.static_range(4):
            # The biased code u = code + 128 in the low mantissa bits of 1024.0 reads 1024 + u,
            # exactly; subtracting 1152 leaves the code, without an integer conversion.
            bits = (((words >> (8 * lane)) & 0xFF) ^ 0x80) | 0x6400
            tiles = tiles + ((bits.to(tl.int16).to(tl.float16, bitcast=True) - 1152.0),)
    else:
        tiles = (tl.load(places, mask=inside, other=0.0).to(OPERAND),)
    return tiles


@triton.jit
def load_tokens(
    base, positions, valid, stride, width, NC: tl.constexpr, DC: tl.constexpr,
    EVEN: tl.constexpr, LANES: tl.constexpr, OPERAND: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """All NC * LANES tiles of a block of tokens, or none where they are to be read again."""
    tiles = ()
    if not RELOAD:
        for chunk in tl.static_range(NC):
            tiles = tiles + load_token_chunk(
                base, positions, valid, stride, width, chunk, DC, EVEN, LANES, OPERAND
            )
    return tiles


@triton.jit
def merge_statistics(
    mean, squares, tiles, chunk, width, DC: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations [BN] with one more chunk of channels.

    Chunk by chunk, so that one chunk at a time is in registers, and exact about whatever mean the
    tokens have (Chan, Golub and LeVeque, 1983).
    """
    columns = chunk * DC + tl.arange(0, DC)
    size = DC * 1.0
    if not EVEN:
        size = tl.minimum(width - chunk * DC, DC).to(tl.float32)
    seen = chunk * (DC * LANES) * 1.0
    for lane in tl.static_range(LANES):
        tile = tiles[lane].to(tl.float32)
        part_mean = tl.sum(tile, axis=1) / size
        centred = tile - part_mean[:, None]
        if not EVEN:
            centred = tl.where((columns < width)[None, :], centred, 0.0)
        gap = part_mean - mean
        together = seen + size
        squares += tl.sum(centred * centred, axis=1) + gap * gap * (seen * size / together)
        mean += gap * (size / together)
        seen = together
    return mean, squares


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
def load_operand_chunk(
    base, rows, inside, stride, dim, factor, chunk, DC: tl.constexpr, EVEN: tl.constexpr,
    LANES: tl.constexpr, OPERAND: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    block = load_row_chunk(base, rows, inside, stride, dim, chunk, DC, EVEN, LANES)
    if OPERAND == tl.float16:
        # Divided, not multiplied by a reciprocal: 1 / factor overflows for subnormal rows.
        block = block / factor[:, None]
    return to_operand(block, OPERAND, EMULATE)


@triton.jit
def row_operands(
    base, rows, inside, stride, dim, NC: tl.constexpr, DC: tl.constexpr, EVEN: tl.constexpr,
    LANES: tl.constexpr, OPERAND: tl.constexpr, EMULATE: tl.constexpr, RELOAD: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
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
        operand = load_operand_chunk(
            base, rows, inside, stride, dim, factor, chunk, DC, EVEN, LANES, OPERAND, EMULATE
        )
        total += tl.sum(operand.to(tl.float32), axis=1)
        if not RELOAD:
            operands = operands + split_lanes(operand, DC, LANES)
    return operands, factor, total


@triton.jit
def products(
    operands, tiles, row_base, rows, inside, row_stride, dim, factor,
    token_base, positions, valid, token_stride, width,
    NC: tl.constexpr, DC: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, RELOAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32 inner products of rows and tokens."""
    total = tl.zeros((BM, BN), tl.float32)
    if RELOAD:
        # A loop at run time, or the compiler would merge these loads with later ones and hold all.
        for chunk in tl.range(0, NC, num_stages=2):
            operand = load_operand_chunk(
                row_base, rows, inside, row_stride, dim, factor, chunk,
                DC, EVEN, LANES, OPERAND, EMULATE,
            )  # fmt: skip
            ours = split_lanes(operand, DC, LANES)
            theirs = load_token_chunk(
                token_base, positions, valid, token_stride, width, chunk, DC, EVEN, LANES, OPERAND
            )
            for lane in tl.static_range(LANES):
                total = tl.dot(ours[lane], tl.trans(theirs[lane]), total, input_precision=PRECISION)
    else:
        for index in tl.static_range(NC * LANES):
            total = tl.dot(
                operands[index], tl.trans(tiles[index]), total, input_precision=PRECISION
            )
    return total


@triton.jit
def accumulate(
    accumulators, alpha, weights, tiles, token_base, positions, valid, token_stride, width,
    NC: tl.constexpr, DC: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    """alpha * accumulators + weights @ tokens, chunk by chunk."""
    updated = ()
    for chunk in tl.static_range(NC):
        if RELOAD:
            theirs = load_token_chunk(
                token_base, positions, valid, token_stride, width, chunk, DC, EVEN, LANES, OPERAND
            )
        for lane in tl.static_range(LANES):
            held = accumulators[chunk * LANES + lane]
            if RESCALE:
                held = held * alpha[:, None]
            x = theirs[lane] if RELOAD else tiles[chunk * LANES + lane]
            updated = updated + (tl.dot(weights, x, held, input_precision=PRECISION),)
    return updated


@triton.jit
def zeros(COUNT: tl.constexpr, BM: tl.constexpr, DC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BM, DC), tl.float32),)
    return tiles


@triton.jit
def keep_coefficients(
    key_weight, value_weight, t, u, q_true, dy_true,
    coefficient_key, coefficient_value, sum_kept, along_kept,
    sample, row, row_inside, row_place, row_block, position, valid, batch, rows, count,
    NORM: tl.constexpr, EMULATE: tl.constexpr, GRANULE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write what the tokens' gradient is made of: a ds and a p, and with LayerNorm their sums."""
    inside = row_inside[:, None] & valid[None, :]
    cells = (row_place + row)[:, None] * count + position[None, :]
    kept_type = coefficient_key.dtype.element_ty
    tl.store(
        coefficient_key + cells,
        to_operand(key_weight, kept_type, EMULATE).to(kept_type), mask=inside,
    )  # fmt: skip
    tl.store(
        coefficient_value + cells,
        to_operand(value_weight, kept_type, EMULATE).to(kept_type), mask=inside,
    )  # fmt: skip
    if NORM:
        sums = tl.sum(key_weight * q_true[:, None] + value_weight * dy_true[:, None], axis=0)
        alongs = tl.sum(key_weight * t + value_weight * u, axis=0)
        # One slot for every GRANULE rows: this block fills its first and clears the rest.
        for part in tl.static_range(BM // GRANULE):
            slot = row_block * (BM // GRANULE) + part
            target = (slot * batch + sample) * count + position
            used = valid & (slot * GRANULE < rows)
            tl.store(sum_kept + target, sums if part == 0 else sums * 0.0, mask=used)
            tl.store(along_kept + target, alongs if part == 0 else alongs * 0.0, mask=used)
