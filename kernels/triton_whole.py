"""The attention kernels where one block holds all of a sample's tokens: two products, no loop.

Scores [BM, BN] of all tokens fit the registers where the tokens themselves do not, so the products
run over chunks of channels as a matrix product does, whatever the width: the first pass takes the
tokens from memory, the second finds them in the L2 cache. All rows of a sample (up to 64) share
one reading, which a kernel with accumulators [BM, D] has no registers for. Codes are read as bytes,
sixteen at once, since nothing is held as it was read.
"""

# Triton's language is a subset of Python: no unpacking into tuples, constants on the right.
# ruff: noqa: SIM300
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LN2,
    LOG2E,
    keep_coefficients,
    load_operand_chunk,
    load_row_chunk,
    load_token_chunk,
    merge_statistics,
    store_row_chunk,
    to_operand,
)


@triton.jit
def row_factors(
    base, row, row_inside, row_stride, dim, NC: tl.constexpr, DC: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The largest magnitude [BM] of each row, 1 where the operands have float32's range."""
    factor = tl.full((BM,), 1.0, tl.float32)
    if OPERAND == tl.float16:
        top = tl.zeros((BM,), tl.float32)
        for chunk in tl.range(0, NC):
            block = load_row_chunk(base, row, row_inside, row_stride, dim, chunk, DC, EVEN, 1)
            top = tl.maximum(top, tl.max(tl.abs(block), axis=1))
        factor = tl.where(top > 0.0, top, 1.0)
    return factor


@triton.jit
def forward_whole(
    query, tokens, weight, output, lse, gain_kept, mean_kept,
    sample, row, row_inside, row_place, first, count, dim,
    query_row_stride, token_stride, norm_eps,
    HAS_WEIGHT: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, TINY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DC: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    """y [BM, D] and its logsumexp of one block of rows of one sample over all its tokens."""
    position = tl.arange(0, BN)
    valid = position < count
    factor = row_factors(query, row, row_inside, query_row_stride, dim, NC, DC, EVEN, OPERAND, BM)
    t = tl.zeros((BM, BN), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    mean = tl.zeros((BN,), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    for chunk in tl.range(0, NC):
        rows = load_operand_chunk(
            query, row, row_inside, query_row_stride, dim, factor, chunk,
            DC, EVEN, 1, OPERAND, EMULATE,
        )  # fmt: skip
        x = load_token_chunk(
            tokens, position, valid, token_stride, dim, chunk, DC, EVEN, 1, OPERAND
        )[0]
        if NORM:
            row_sum += tl.sum(rows.to(tl.float32), axis=1)
            mean, squares = merge_statistics(mean, squares, (x,), chunk, dim, DC, EVEN, 1)
        t = tl.dot(rows, tl.trans(x), t, input_precision=PRECISION)

    attended = valid
    gain = tl.full((BN,), 1.0, tl.float32)
    place = sample * count + position
    if HAS_WEIGHT:
        gain = tl.load(weight + place, mask=valid, other=-1.0)
        # A weight that is NaN must show: only a negative one hides its token.
        attended = (gain >= 0.0) | (gain != gain)
    if NORM:
        deviation = squares / dim
        if HAS_WEIGHT:
            gain = tl.where(attended, gain, 0.0)
            gain = gain * tl.rsqrt(gain * gain * deviation + norm_eps)
        else:
            gain = tl.rsqrt(deviation + norm_eps)
        tl.store(gain_kept + place, tl.where(attended, gain, -1.0), mask=valid & first)
        tl.store(mean_kept + place, mean, mask=valid & first)
        t -= row_sum[:, None] * mean[None, :]
    s = t * (factor * LOG2E)[:, None]
    if HAS_WEIGHT or NORM:
        gain_safe = tl.maximum(gain, TINY)
        s = s * gain[None, :] + tl.log2(gain_safe)[None, :]
    s = tl.where(attended[None, :], s, float("-inf"))
    # Over log2(p a), so that the weights p a, rounded to 16 bits, stay at most 1.
    top = tl.max(s, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    value_weight = tl.exp2(s - shift[:, None])
    if HAS_WEIGHT or NORM:
        denominator = tl.sum(value_weight / gain_safe[None, :], axis=1)
    else:
        denominator = tl.sum(value_weight, axis=1)
    rounded = to_operand(value_weight, OPERAND, EMULATE)
    centre = tl.zeros((BM,), tl.float32)
    if NORM:
        centre = tl.sum(rounded.to(tl.float32) * mean[None, :], axis=1)
    # Not "> 0": a row that is NaN must not look like one that attends nothing.
    some = denominator != 0.0
    safe = tl.where(some, denominator, 1.0)
    reciprocal = tl.where(some, 1.0 / safe, 0.0)
    tl.store(
        lse + row_place + row,
        tl.where(some, (shift + tl.log2(safe)) * LN2, float("-inf")), mask=row_inside,
    )  # fmt: skip
    for chunk in tl.range(0, NC):
        x = load_token_chunk(
            tokens, position, valid, token_stride, dim, chunk, DC, EVEN, 1, OPERAND
        )[0]
        summed = tl.dot(rounded, x, input_precision=PRECISION)
        y = (summed - centre[:, None]) * reciprocal[:, None]
        store_row_chunk(
            output + row_place * dim, y, row, row_inside, dim, dim, chunk, DC, EVEN, 1, EMULATE
        )


@triton.jit
def backward_whole(
    query, tokens, gain, mean_kept, lse, grad_output, grad_lse,
    grad_query, residual_kept, coefficient_key, coefficient_value, sum_kept, along_kept,
    sample, row, row_inside, row_place, row_block, batch, rows, count, dim,
    query_row_stride, token_stride,
    HAS_GAIN: tl.constexpr, NORM: tl.constexpr, EMIT: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    GRANULE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DC: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    """The query's gradient of one block of rows of one sample, and the coefficients for dx.

    With all tokens at hand ``dy . y`` is ``sum_n p a u``, so that ``ds`` sums to zero by itself:
    the output is not read, and no residual is left.
    """
    position = tl.arange(0, BN)
    valid = position < count
    place = sample * count + position
    q_factor = row_factors(query, row, row_inside, query_row_stride, dim, NC, DC, EVEN, OPERAND, BM)
    dy_factor = row_factors(grad_output, row, row_inside, dim, dim, NC, DC, EVEN, OPERAND, BM)
    t = tl.zeros((BM, BN), tl.float32)
    u = tl.zeros((BM, BN), tl.float32)
    q_sum = tl.zeros((BM,), tl.float32)
    dy_sum = tl.zeros((BM,), tl.float32)
    for chunk in tl.range(0, NC):
        x = load_token_chunk(
            tokens, position, valid, token_stride, dim, chunk, DC, EVEN, 1, OPERAND
        )[0]
        q = load_operand_chunk(
            query, row, row_inside, query_row_stride, dim, q_factor, chunk,
            DC, EVEN, 1, OPERAND, EMULATE,
        )  # fmt: skip
        dy = load_operand_chunk(
            grad_output, row, row_inside, dim, dim, dy_factor, chunk,
            DC, EVEN, 1, OPERAND, EMULATE,
        )  # fmt: skip
        if NORM:
            q_sum += tl.sum(q.to(tl.float32), axis=1)
            dy_sum += tl.sum(dy.to(tl.float32), axis=1)
        seen = tl.trans(x)
        t = tl.dot(q, seen, t, input_precision=PRECISION)
        u = tl.dot(dy, seen, u, input_precision=PRECISION)

    row_lse = tl.load(lse + row_place + row, mask=row_inside, other=float("-inf"))
    attends = row_lse > float("-inf")
    shift = tl.where(attends, row_lse, 0.0) * LOG2E
    dlse = tl.load(grad_lse + row_place + row, mask=row_inside & attends, other=0.0)
    attended = valid
    a = tl.full((BN,), 1.0, tl.float32)
    if HAS_GAIN:
        a = tl.load(gain + place, mask=valid, other=-1.0)
        attended = a >= 0.0
        a = tl.maximum(a, 0.0)
    mean = tl.zeros((BN,), tl.float32)
    if NORM:
        mean = tl.load(mean_kept + place, mask=valid, other=0.0)
        t -= q_sum[:, None] * mean[None, :]
        u -= dy_sum[:, None] * mean[None, :]
    t = t * q_factor[:, None]
    u = u * dy_factor[:, None]
    live = attended[None, :] & (row_inside & attends)[:, None]
    p = tl.where(live, tl.exp2(t * (a * LOG2E)[None, :] - shift[:, None]), 0.0)
    value_weight = p * a[None, :]
    delta = tl.sum(value_weight * u, axis=1)
    key_weight = (p * (u * a[None, :] - delta[:, None]) + p * dlse[:, None]) * a[None, :]
    if EMIT:
        keep_coefficients(
            key_weight, value_weight, t, u, q_sum * q_factor, dy_sum * dy_factor,
            coefficient_key, coefficient_value, sum_kept, along_kept,
            sample, row, row_inside, row_place, row_block, position, valid, batch, rows, count,
            NORM, EMULATE, GRANULE, BM,
        )  # fmt: skip
        tl.store(residual_kept + row_place + row, tl.zeros((BM,), tl.float32), mask=row_inside)
    unit = tl.full((BM,), 1.0, tl.float32)
    if OPERAND == tl.float16:
        # A gradient may lie anywhere between 1e-10 and 1e5: each row is brought to 1.
        largest = tl.max(tl.abs(key_weight), axis=1)
        unit = tl.where(largest > 0.0, largest, 1.0)
        key_weight = key_weight / unit[:, None]
    rounded = to_operand(key_weight, OPERAND, EMULATE)
    centre = tl.zeros((BM,), tl.float32)
    if NORM:
        centre = tl.sum(rounded.to(tl.float32) * mean[None, :], axis=1)
    for chunk in tl.range(0, NC):
        x = load_token_chunk(
            tokens, position, valid, token_stride, dim, chunk, DC, EVEN, 1, OPERAND
        )[0]
        summed = tl.dot(rounded, x, input_precision=PRECISION)
        dq = (summed - centre[:, None]) * unit[:, None]
        store_row_chunk(
            grad_query + row_place * dim, dq, row, row_inside, dim, dim, chunk,
            DC, EVEN, 1, EMULATE,
        )  # fmt: skip
