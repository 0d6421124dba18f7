"""The fused backward in Triton: the query's gradient in one pass, the tokens' from what it leaves.

`attend_backward_query` recomputes p and ds tile by tile. Where the tokens need a gradient it also
writes the coefficients a ds and a p, [B, R, N], from which `attend_backward_tokens` forms
``dx = (a ds)^T q + (a p)^T dy`` as one product over 2 R terms with the LayerNorm's terms in its
epilogue. R can then be anything without an accumulator [BN, D] in registers, for the price of
2 R / D of the tokens' memory.
"""

# Triton's language is a subset of Python: no unpacking into tuples, constants on the right.
# ruff: noqa: SIM300
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LOG2E,
    accumulate,
    join_lanes,
    keep_coefficients,
    load_row_chunk,
    load_tokens,
    products,
    row_operands,
    store_row_chunk,
    to_operand,
    zeros,
)
from .triton_whole import backward_whole

# Rows that share one partial sum over the rows, whatever the block of rows.
GRANULE = tl.constexpr(16)


@triton.jit
def attend_backward_query(
    query, tokens, gain, mean_kept, output, lse, grad_output, grad_lse,
    grad_query, residual_kept, coefficient_key, coefficient_value, sum_kept, along_kept,
    batch, rows, count, split_length, dim, width,
    query_batch_stride, query_row_stride, token_batch_stride, token_stride,
    HAS_GAIN: tl.constexpr, NORM: tl.constexpr, EMIT: tl.constexpr, LANES: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    SPLITS: tl.constexpr, RELOAD: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DC: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    """One block of rows of one sample over one part of its tokens, or with WHOLE over all."""
    row_blocks = tl.cdiv(rows, BM)
    program = tl.program_id(0)
    row_block = program % row_blocks
    split = (program // row_blocks) % SPLITS
    sample = (program // (row_blocks * SPLITS)).to(tl.int64)
    row = row_block * BM + tl.arange(0, BM)
    row_inside = row < rows
    row_place = sample * rows
    query += sample * query_batch_stride
    tokens += sample * token_batch_stride
    grad_output += row_place * dim
    if WHOLE:
        if LANES == 4:
            tokens = tokens.to(tl.pointer_type(tl.int8), bitcast=True)
        backward_whole(
            query, tokens, gain, mean_kept, lse, grad_output, grad_lse,
            grad_query, residual_kept, coefficient_key, coefficient_value, sum_kept, along_kept,
            sample, row, row_inside, row_place, row_block, batch, rows, count, dim,
            query_row_stride, token_stride * LANES,
            HAS_GAIN, NORM, EMIT, EVEN, OPERAND, PRECISION, EMULATE, GRANULE,
            BM, BN, DC, NC,
        )  # fmt: skip
    else:
        backward_streamed(
            query, tokens, gain, mean_kept, output + row_place * dim, lse, grad_output, grad_lse,
            grad_query, residual_kept, coefficient_key, coefficient_value, sum_kept, along_kept,
            sample, row, row_inside, row_place, row_block, split * batch * rows + row_place,
            batch, rows, count, split * split_length,
            tl.minimum((split + 1) * split_length, count), dim, width,
            query_row_stride, token_stride,
            HAS_GAIN, NORM, EMIT, LANES, EVEN, OPERAND, PRECISION, EMULATE, RELOAD,
            BM, BN, DC, NC,
        )  # fmt: skip


@triton.jit
def backward_streamed(
    query, tokens, gain, mean_kept, output, lse, grad_output, grad_lse,
    grad_query, residual_kept, coefficient_key, coefficient_value, sum_kept, along_kept,
    sample, row, row_inside, row_place, row_block, part_place, batch, rows, count, begin, end,
    dim, width, query_row_stride, token_stride,
    HAS_GAIN: tl.constexpr, NORM: tl.constexpr, EMIT: tl.constexpr, LANES: tl.constexpr,
    EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    RELOAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DC: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of rows over the tokens from ``begin`` to ``end``, BN at a time.

    The stored y is rounded, so ``ds = p (a u - dy . y)`` does not sum to zero over the tokens as it
    must. What is left over, the residual of each row, is summed and taken out again: from dq here
    and, with EMIT, from dx in the other kernel.
    """

    q, q_factor, q_sum = row_operands(
        query, row, row_inside, query_row_stride, dim,
        NC, DC, EVEN, LANES, OPERAND, EMULATE, RELOAD, BM,
    )  # fmt: skip
    dy, dy_factor, dy_sum = row_operands(
        grad_output, row, row_inside, dim, dim,
        NC, DC, EVEN, LANES, OPERAND, EMULATE, RELOAD, BM,
    )  # fmt: skip
    delta = tl.zeros((BM,), tl.float32)
    for chunk in tl.static_range(NC):
        grad = load_row_chunk(grad_output, row, row_inside, dim, dim, chunk, DC, EVEN, LANES)
        y = load_row_chunk(output, row, row_inside, dim, dim, chunk, DC, EVEN, LANES)
        delta += tl.sum(grad * y, axis=1)
    row_lse = tl.load(lse + row_place + row, mask=row_inside, other=float("-inf"))
    attends = row_lse > float("-inf")
    shift = tl.where(attends, row_lse, 0.0) * LOG2E
    dlse = tl.load(grad_lse + row_place + row, mask=row_inside & attends, other=0.0)

    accumulators = zeros(NC * LANES, BM, DC)
    centre = tl.zeros((BM,), tl.float32)
    residual = tl.zeros((BM,), tl.float32)
    # float16 operands: the largest |a ds| of a row so far is divided out, since a gradient may lie
    # anywhere between 1e-10 and 1e5.
    unit = tl.zeros((BM,), tl.float32)

    for start in tl.range(begin, end, BN):
        position = start + tl.arange(0, BN)
        valid = position < end
        place = sample * count + position
        x = load_tokens(
            tokens, position, valid, token_stride, width, NC, DC, EVEN, LANES, OPERAND, RELOAD
        )
        t = products(
            q, x, query, row, row_inside, query_row_stride, dim, q_factor,
            tokens, position, valid, token_stride, width,
            NC, DC, EVEN, LANES, OPERAND, PRECISION, EMULATE, RELOAD, BM, BN,
        )  # fmt: skip
        u = products(
            dy, x, grad_output, row, row_inside, dim, dim, dy_factor,
            tokens, position, valid, token_stride, width,
            NC, DC, EVEN, LANES, OPERAND, PRECISION, EMULATE, RELOAD, BM, BN,
        )  # fmt: skip
        attended = valid
        a = tl.full((BN,), 1.0, tl.float32)
        if HAS_GAIN:
            a = tl.load(gain + place, mask=valid, other=-1.0)
            attended = a >= 0.0
            a = tl.maximum(a, 0.0)
        if NORM:
            mean = tl.load(mean_kept + place, mask=valid, other=0.0)
            t -= q_sum[:, None] * mean[None, :]
            u -= dy_sum[:, None] * mean[None, :]
        t = t * q_factor[:, None]
        u = u * dy_factor[:, None]
        s = t * (a * LOG2E)[None, :] - shift[:, None]
        live = attended[None, :] & (row_inside & attends)[:, None]
        p = tl.where(live, tl.exp2(s), 0.0)
        ds = p * (u * a[None, :] - delta[:, None])
        residual += tl.sum(ds, axis=1)
        key_weight = (ds + p * dlse[:, None]) * a[None, :]
        if EMIT:
            value_weight = p * a[None, :]
            keep_coefficients(
                key_weight, value_weight, t, u, q_sum * q_factor, dy_sum * dy_factor,
                coefficient_key, coefficient_value, sum_kept, along_kept,
                sample, row, row_inside, row_place, row_block, position, valid, batch, rows, count,
                NORM, EMULATE, GRANULE, BM,
            )  # fmt: skip
        alpha = unit
        if OPERAND == tl.float16:
            new_unit = tl.maximum(unit, tl.max(tl.abs(key_weight), axis=1))
            safe = tl.where(new_unit > 0.0, new_unit, 1.0)
            alpha = unit / safe
            key_weight = key_weight / safe[:, None]
            unit = new_unit
        rounded = to_operand(key_weight, OPERAND, EMULATE)
        if NORM:
            part_centre = tl.sum(rounded.to(tl.float32) * mean[None, :], axis=1)
            if OPERAND == tl.float16:
                centre = centre * alpha
            centre += part_centre
        accumulators = accumulate(
            accumulators, alpha, rounded, x, tokens, position, valid, token_stride, width,
            NC, DC, EVEN, LANES, OPERAND, PRECISION, RELOAD, OPERAND == tl.float16,
        )  # fmt: skip

    if OPERAND != tl.float16:
        unit = tl.full((BM,), 1.0, tl.float32)
    for chunk in tl.static_range(NC):
        summed = (join_lanes(accumulators, chunk, LANES) - centre[:, None]) * unit[:, None]
        y = load_row_chunk(output, row, row_inside, dim, dim, chunk, DC, EVEN, LANES)
        dq = summed - residual[:, None] * y
        store_row_chunk(
            grad_query + part_place * dim, dq, row, row_inside, dim, dim, chunk,
            DC, EVEN, LANES, EMULATE,
        )  # fmt: skip
    if EMIT:
        tl.store(residual_kept + part_place + row, residual, mask=row_inside)


@triton.jit
def attend_backward_tokens(
    query, tokens, gain, mean_kept, grad_output, residual,
    coefficient_key, coefficient_value, sum_kept, along_kept, grad_tokens,
    batch, rows, count, dim,
    query_batch_stride, query_row_stride, token_batch_stride, token_stride,
    NORM: tl.constexpr, SLOTS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BN, BD] of dx of one sample, over all rows."""
    token_blocks = tl.cdiv(count, BN)
    column_blocks = tl.cdiv(dim, BD)
    program = tl.program_id(0)
    column_block = program % column_blocks
    token_block = (program // column_blocks) % token_blocks
    sample = (program // (column_blocks * token_blocks)).to(tl.int64)
    position = token_block * BN + tl.arange(0, BN)
    column = column_block * BD + tl.arange(0, BD)
    valid = position < count
    column_inside = column < dim

    dx = tl.zeros((BN, BD), tl.float32)
    for start in tl.range(0, rows, BK):
        row = start + tl.arange(0, BK)
        row_inside = row < rows
        block_inside = row_inside[:, None] & column_inside[None, :]
        row_place = sample * rows + row
        q = tl.load(
            query + sample * query_batch_stride + row[:, None] * query_row_stride
            + column[None, :],
            mask=block_inside, other=0.0,
        ).to(tl.float32)  # fmt: skip
        dy = tl.load(
            grad_output + row_place[:, None] * dim + column[None, :], mask=block_inside, other=0.0
        ).to(tl.float32)
        dy -= tl.load(residual + row_place, mask=row_inside, other=0.0)[:, None] * q
        cells = row_place[:, None] * count + position[None, :]
        inside = row_inside[:, None] & valid[None, :]
        key = tl.load(coefficient_key + cells, mask=inside, other=0.0).to(OPERAND)
        value = tl.load(coefficient_value + cells, mask=inside, other=0.0).to(OPERAND)
        q = to_operand(q, OPERAND, EMULATE)
        dy = to_operand(dy, OPERAND, EMULATE)
        dx = tl.dot(tl.trans(key), q, dx, input_precision=PRECISION)
        dx = tl.dot(tl.trans(value), dy, dx, input_precision=PRECISION)

    place = sample * count + position
    if NORM:
        total = tl.zeros((BN,), tl.float32)
        along = tl.zeros((BN,), tl.float32)
        for slot in tl.static_range(SLOTS):
            target = (slot * batch + sample) * count + position
            total += tl.load(sum_kept + target, mask=valid, other=0.0)
            along += tl.load(along_kept + target, mask=valid, other=0.0)
        a = tl.maximum(tl.load(gain + place, mask=valid, other=0.0), 0.0)
        mean = tl.load(mean_kept + place, mask=valid, other=0.0)
        x = tl.load(
            tokens + sample * token_batch_stride + position[:, None] * token_stride
            + column[None, :],
            mask=valid[:, None] & column_inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        dx -= (total / dim)[:, None]
        dx -= (along * a * a / dim)[:, None] * (x - mean[:, None])
    if EMULATE:
        dx = to_operand(dx, OPERAND, EMULATE)
    tl.store(
        grad_tokens + place[:, None] * dim + column[None, :],
        dx.to(grad_tokens.dtype.element_ty),
        mask=valid[:, None] & column_inside[None, :],
    )
