"""The fused forward in Triton: one pass over the tokens, softmax kept online."""

# Triton's language is a subset of Python: no unpacking into tuples, constants on the right.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LN2,
    LOG2E,
    accumulate,
    join_lanes,
    load_token_chunk,
    load_tokens,
    merge_statistics,
    products,
    round_to_bfloat16,
    row_operands,
    store_row_chunk,
    to_operand,
    zeros,
)
from .triton_whole import forward_whole

# Gains below this are taken for it where their logarithm or reciprocal is needed.
TINY = tl.constexpr(1e-20)


@triton.jit
def attend_forward(
    query, tokens, weight, output, lse, gain_kept, mean_kept,
    batch, rows, count, split_length, dim, width,
    query_batch_stride, query_row_stride, token_batch_stride, token_stride, norm_eps,
    HAS_WEIGHT: tl.constexpr, NORM: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, SPLITS: tl.constexpr,
    RELOAD: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DC: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    """One block of rows of one sample over one part of its tokens, or with WHOLE over all.

    Writes y and its logsumexp: to [B, R, D] if SPLITS is 1, else its part to [SPLITS, B, R, D].
    With NORM the first row block also keeps the gain and the mean of each token.
    """
    row_blocks = tl.cdiv(rows, BM)
    program = tl.program_id(0)
    # Row blocks of one part run side by side, so that they share the tokens through the cache.
    row_block = program % row_blocks
    split = (program // row_blocks) % SPLITS
    sample = (program // (row_blocks * SPLITS)).to(tl.int64)
    row = row_block * BM + tl.arange(0, BM)
    row_inside = row < rows

    query += sample * query_batch_stride
    tokens += sample * token_batch_stride
    if WHOLE:
        if LANES == 4:
            tokens = tokens.to(tl.pointer_type(tl.int8), bitcast=True)
        forward_whole(
            query, tokens, weight, output, lse, gain_kept, mean_kept,
            sample, row, row_inside, sample * rows, row_block == 0, count, dim,
            query_row_stride, token_stride * LANES, norm_eps,
            HAS_WEIGHT, NORM, EVEN, OPERAND, PRECISION, EMULATE, TINY, BM, BN, DC, NC,
        )  # fmt: skip
    else:
        forward_streamed(
            query, tokens, weight, output, lse, gain_kept, mean_kept,
            sample, row, row_inside, split * batch * rows + sample * rows, row_block == 0,
            count, split * split_length, tl.minimum((split + 1) * split_length, count), dim, width,
            query_row_stride, token_stride, norm_eps,
            HAS_WEIGHT, NORM, LANES, EVEN, OPERAND, PRECISION, EMULATE, RELOAD, BM, BN, DC, NC,
        )  # fmt: skip


@triton.jit
def forward_streamed(
    query, tokens, weight, output, lse, gain_kept, mean_kept,
    sample, row, row_inside, row_place, first, count, begin, end, dim, width,
    query_row_stride, token_stride, norm_eps,
    HAS_WEIGHT: tl.constexpr, NORM: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, RELOAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DC: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    """y [BM, D] and its logsumexp over the tokens from ``begin`` to ``end``, BN at a time."""
    operands, factor, row_sum = row_operands(
        query, row, row_inside, query_row_stride, dim,
        NC, DC, EVEN, LANES, OPERAND, EMULATE, RELOAD, BM,
    )  # fmt: skip
    accumulators = zeros(NC * LANES, BM, DC)
    # The running maximum is over log2(p a), so that the weights p a of the sum stay at most 1
    # whatever the tokens' scale: they are rounded to 16 bits.
    top = tl.full((BM,), float("-inf"), tl.float32)
    denominator = tl.zeros((BM,), tl.float32)
    centre = tl.zeros((BM,), tl.float32)

    for start in tl.range(begin, end, BN):
        position = start + tl.arange(0, BN)
        valid = position < end
        x = load_tokens(
            tokens, position, valid, token_stride, width, NC, DC, EVEN, LANES, OPERAND, RELOAD
        )
        t = products(
            operands, x, query, row, row_inside, query_row_stride, dim, factor,
            tokens, position, valid, token_stride, width,
            NC, DC, EVEN, LANES, OPERAND, PRECISION, EMULATE, RELOAD, BM, BN,
        )  # fmt: skip
        attended = valid
        gain = tl.full((BN,), 1.0, tl.float32)
        if HAS_WEIGHT:
            gain = tl.load(weight + sample * count + position, mask=valid, other=-1.0)
            # A weight that is NaN must show: only a negative one hides its token.
            attended = (gain >= 0.0) | (gain != gain)
        if NORM:
            mean, deviation = token_statistics(
                x, tokens, position, valid, token_stride, width, dim,
                NC, DC, EVEN, LANES, OPERAND, RELOAD, BN,
            )  # fmt: skip
            if HAS_WEIGHT:
                gain = tl.where(attended, gain, 0.0)
                gain = gain * tl.rsqrt(gain * gain * deviation + norm_eps)
            else:
                gain = tl.rsqrt(deviation + norm_eps)
            kept = tl.where(attended, gain, -1.0)
            place = sample * count + position
            tl.store(gain_kept + place, kept, mask=valid & first)
            tl.store(mean_kept + place, mean, mask=valid & first)
            t -= row_sum[:, None] * mean[None, :]
        s = t * (factor * LOG2E)[:, None]
        if HAS_WEIGHT or NORM:
            gain_safe = tl.maximum(gain, TINY)
            s = s * gain[None, :] + tl.log2(gain_safe)[None, :]
        s = tl.where(attended[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        alpha = tl.exp2(top - shift)
        value_weight = tl.exp2(s - shift[:, None])
        if HAS_WEIGHT or NORM:
            mass = tl.sum(value_weight / gain_safe[None, :], axis=1)
        else:
            mass = tl.sum(value_weight, axis=1)
        denominator = denominator * alpha + mass
        rounded = to_operand(value_weight, OPERAND, EMULATE)
        if NORM:
            part = tl.sum(rounded.to(tl.float32) * mean[None, :], axis=1)
            centre = centre * alpha + part
        accumulators = accumulate(
            accumulators, alpha, rounded, x, tokens, position, valid, token_stride, width,
            NC, DC, EVEN, LANES, OPERAND, PRECISION, RELOAD, True,
        )  # fmt: skip
        top = new_top

    # Not "> 0": a row that is NaN must not look like one that attends nothing.
    some = denominator != 0.0
    reciprocal = tl.where(some, 1.0 / tl.where(some, denominator, 1.0), 0.0)
    for chunk in tl.static_range(NC):
        y = (join_lanes(accumulators, chunk, LANES) - centre[:, None]) * reciprocal[:, None]
        store_row_chunk(
            output + row_place * dim, y, row, row_inside, dim, dim, chunk, DC, EVEN, LANES, EMULATE
        )
    safe = tl.where(some, denominator, 1.0)
    value = tl.where(some, (top + tl.log2(safe)) * LN2, float("-inf"))
    tl.store(lse + row_place + row, value, mask=row_inside)


@triton.jit
def token_statistics(
    x, tokens, position, valid, token_stride, width, dim,
    NC: tl.constexpr, DC: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
    OPERAND: tl.constexpr, RELOAD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Mean and variance [BN] of each token over its channels, the variance about the mean."""
    mean = tl.zeros((BN,), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    if RELOAD:
        for chunk in tl.range(0, NC, num_stages=2):
            tiles = load_token_chunk(
                tokens, position, valid, token_stride, width, chunk, DC, EVEN, LANES, OPERAND
            )
            mean, squares = merge_statistics(mean, squares, tiles, chunk, width, DC, EVEN, LANES)
    else:
        for chunk in tl.static_range(NC):
            tiles = x[chunk * LANES : (chunk + 1) * LANES]
            mean, squares = merge_statistics(mean, squares, tiles, chunk, width, DC, EVEN, LANES)
    return mean, squares / dim


@triton.jit
def merge_parts(
    parts, part_lse, output, lse, rows_total, dim,
    SPLITS: tl.constexpr, BD: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One row of the output from its SPLITS parts, merged by their logsumexp in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BD)
    top = tl.load(part_lse + row)
    for split in tl.static_range(1, SPLITS):
        top = tl.maximum(top, tl.load(part_lse + split * rows_total + row))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    merged = tl.zeros((BD,), tl.float32)
    for split in tl.static_range(SPLITS):
        place = split * rows_total + row
        share = tl.exp(tl.load(part_lse + place) - shift)
        part = tl.load(parts + place * dim + column, mask=column < dim, other=0.0)
        total += share
        merged += share * part
    some = total != 0.0
    safe = tl.where(some, total, 1.0)
    merged = merged / safe
    if EMULATE:
        merged = round_to_bfloat16(merged)
    tl.store(output + row * dim + column, merged.to(output.dtype.element_ty), mask=column < dim)
    tl.store(lse + row, tl.where(some, shift + tl.log(safe), float("-inf")))
