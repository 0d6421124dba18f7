"""Buffers, splits and launches of the Triton kernels of the attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune
from .autotune import blocks
from .availability import MAX_REACH
from .triton_backward import GRANULE, attend_backward_query, attend_backward_tokens
from .triton_forward import attend_forward, merge_parts

# Parts of a sample's tokens are multiples of this many, which every BN divides.
_SPLIT_UNIT = 64
_MOST_SPLITS = 16


@dataclass(frozen=True)
class Layout:
    """How the kernels read one tokens tensor."""

    tokens: Tensor
    lanes: int
    width: int
    operand: Any
    emulate: bool
    precision: str

    @classmethod
    def of(cls, tokens: Tensor) -> Layout:
        tokens = _addressable(tokens)
        emulate = tokens.dtype == torch.bfloat16 and autotune.INTERPRETED
        if tokens.dtype == torch.int8:
            packed = (
                tokens.shape[2] % 4 == 0
                and tokens.stride(0) % 4 == 0
                and tokens.stride(1) % 4 == 0
                # Of a storage that itself starts anywhere, as one that borrows a buffer does.
                and tokens.storage_offset() % 4 == 0
                and tokens.data_ptr() % 4 == 0
            )
            words = tokens.view(torch.int32) if packed else tokens
            return cls(words, 4 if packed else 1, words.shape[2], tl.float16, emulate, "ieee")
        operand = {
            torch.float16: tl.float16,
            torch.bfloat16: tl.float32 if emulate else tl.bfloat16,
            torch.float32: tl.float32,
        }[tokens.dtype]
        return cls(tokens, 1, tokens.shape[2], operand, emulate, float32_precision())


def float32_precision() -> str:
    """How float32 products use the tensor cores, after torch's own setting.

    `torch.get_float32_matmul_precision` raises where the setting was made on this attribute, which
    follows `torch.set_float32_matmul_precision`.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@lru_cache(maxsize=1024)
def splits_of(batch: int, rows: int, count: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts a sample's tokens are split, and the length of each.

    Enough to fill the device twice. It follows from the shapes and the device alone, so that sums
    are taken in the same order on every run.
    """
    processors = 8
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = batch * blocks(rows, 16)
    # Rounded down: parts cost memory, and two programs a processor are only a wish.
    wanted = 2 * processors // max(programs, 1)
    splits = max(1, min(wanted, blocks(count, _SPLIT_UNIT), _MOST_SPLITS))
    length = blocks(blocks(count, splits), _SPLIT_UNIT) * _SPLIT_UNIT
    return max(1, blocks(count, max(length, 1))), max(length, 1)


def forward(
    query: Tensor, tokens: Tensor, weight: Tensor | None, norm_eps: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, R, D], logsumexp [B, R], and with LayerNorm the gain and token mean [B, N]."""
    batch, rows, dim = query.shape
    count = tokens.shape[1]
    query = _addressable(query)
    layout = Layout.of(tokens)
    weight = None if weight is None else weight.contiguous()
    kept = (batch, count) if norm_eps is not None else (0,)
    options: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    gain, mean = torch.empty(kept, **options), torch.empty(kept, **options)
    output = torch.empty((batch, rows, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, rows), **options)
    if batch == 0:
        return output, lse, gain, mean
    splits, length = splits_of(batch, rows, count, query.device)
    parts = (output, lse)
    if splits > 1:
        parts = (
            torch.empty((splits, batch, rows, dim), **options),
            torch.empty((splits, batch, rows), **options),
        )
    autotune.launch(
        attend_forward,
        lambda tile: (blocks(rows, tile["BM"]) * splits * batch,),
        _row_tiles("forward", layout, rows, count if splits == 1 else None, most=64),
        (
            query, layout.tokens, weight, *parts, gain, mean,
            batch, rows, count, length, dim, layout.width,
            query.stride(0), query.stride(1), layout.tokens.stride(0), layout.tokens.stride(1),
            norm_eps or 0.0,
        ),
        {
            "HAS_WEIGHT": weight is not None, "NORM": norm_eps is not None, "LANES": layout.lanes,
            "OPERAND": layout.operand, "PRECISION": layout.precision, "EMULATE": layout.emulate,
            "SPLITS": splits,
        },
        key=("rows", "dim", "HAS_WEIGHT", "NORM"),
    )  # fmt: skip
    if splits > 1:
        merge_parts[(batch * rows,)](
            *parts, output, lse, batch * rows, dim,
            SPLITS=splits, BD=triton.next_power_of_2(dim),
            EMULATE=autotune.INTERPRETED and output.dtype == torch.bfloat16,
        )  # fmt: skip
    return output, lse, gain, mean


def backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    tokens: Tensor,
    gain: Tensor | None,
    mean: Tensor | None,
    output: Tensor,
    lse: Tensor,
    tokens_need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the query [B, R, D] and, where asked for, of the tokens [B, N, D]."""
    batch, rows, dim = query.shape
    count = tokens.shape[1]
    query = _addressable(query)
    layout = Layout.of(tokens)
    # Autograd hands over whatever strides it has; what the forward pass kept is contiguous already
    # unless something between the passes (a saved-tensor hook, a compiler) laid it out anew.
    grad_output, grad_lse = grad_output.contiguous(), grad_lse.contiguous()
    output, lse = output.contiguous(), lse.contiguous()
    gain = None if gain is None else gain.contiguous()
    mean = None if mean is None else mean.contiguous()
    device = query.device
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    splits, length = splits_of(batch, rows, count, device)
    grad_query = torch.empty((batch, rows, dim), dtype=query.dtype, device=device)
    if batch == 0:
        return grad_query, query.new_empty(
            tokens.shape if tokens_need_grad else (0,),
            dtype=tokens.dtype if tokens_need_grad else query.dtype,
        )
    parts = torch.empty((splits, batch, rows, dim), **options) if splits > 1 else grad_query
    normalised = mean is not None
    residual = torch.empty((splits, batch, rows) if tokens_need_grad else (0,), **options)
    # bfloat16 has float32's range, float16 does not: its coefficients could vanish.
    kept_type = torch.bfloat16 if tokens.dtype == torch.bfloat16 else torch.float32
    cells = (batch, rows, count) if tokens_need_grad else (0,)
    key = torch.empty(cells, dtype=kept_type, device=device)
    value = torch.empty(cells, dtype=kept_type, device=device)
    slots = blocks(rows, GRANULE.value)
    # What is written beside the query's gradient leaves registers for fewer rows.
    most = 64 if not tokens_need_grad else 16 if normalised else 32
    sums = torch.empty(
        (slots, batch, count) if tokens_need_grad and normalised else (0,), **options
    )
    along = torch.empty_like(sums)
    autotune.launch(
        attend_backward_query,
        lambda tile: (blocks(rows, tile["BM"]) * splits * batch,),
        _row_tiles("backward", layout, rows, count if splits == 1 else None, most),
        (
            query, layout.tokens, gain, mean, output, lse, grad_output, grad_lse,
            parts, residual, key, value, sums, along,
            batch, rows, count, length, dim, layout.width,
            query.stride(0), query.stride(1), layout.tokens.stride(0), layout.tokens.stride(1),
        ),
        {
            "HAS_GAIN": gain is not None, "NORM": normalised, "EMIT": tokens_need_grad,
            "LANES": layout.lanes, "OPERAND": layout.operand, "PRECISION": layout.precision,
            "EMULATE": layout.emulate, "SPLITS": splits,
        },
        key=("rows", "dim", "HAS_GAIN", "NORM", "EMIT"),
    )  # fmt: skip
    if splits > 1:
        grad_query.copy_(parts.sum(0))
    if not tokens_need_grad:
        return grad_query, torch.empty(0, dtype=query.dtype, device=device)
    grad_tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=device)
    if count == 0:
        return grad_query, grad_tokens
    half = tokens.dtype == torch.float16
    autotune.launch(
        attend_backward_tokens,
        lambda tile: (blocks(count, tile["BN"]) * blocks(dim, tile["BD"]) * batch,),
        _token_tiles(tokens.element_size()),
        (
            query, layout.tokens, gain, mean, grad_output, residual.sum(0),
            key, value, sums, along, grad_tokens,
            batch, rows, count, dim,
            query.stride(0), query.stride(1), layout.tokens.stride(0), layout.tokens.stride(1),
        ),
        {
            "NORM": normalised, "SLOTS": slots,
            "OPERAND": tl.float32 if half else layout.operand,
            # float16 tokens: float32 operands cut to tf32, float16's mantissa in a wide range.
            "PRECISION": "tf32" if half else layout.precision, "EMULATE": layout.emulate,
        },
        key=("rows", "dim", "NORM"),
    )  # fmt: skip
    return grad_query, grad_tokens


def _row_tiles(
    kernel: str, layout: Layout, rows: int, count: int | None, most: int
) -> autotune.FrozenTiles:
    """Configurations for a call; with the count of tokens also those that hold all of them.

    Args:
        most: rows of a block that holds all tokens.
    """
    limit = shared_limit(layout.tokens.device)
    itemsize = layout.tokens.element_size() // layout.lanes
    block = autotune.block_of(count)
    most = max(16, min(most, triton.next_power_of_2(rows))) if block else 0
    return fitting_tiles(kernel, layout.width, layout.lanes, itemsize, limit, block, most)


@cache
def _token_tiles(itemsize: int) -> autotune.FrozenTiles:
    return autotune.frozen(autotune.token_tiles(itemsize))


@cache
def shared_limit(device: torch.device) -> int | None:
    """Bytes of shared memory that a block may have; None where there is no such limit."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def fitting_tiles(
    kernel: str, width: int, lanes: int, itemsize: int, limit: int | None,
    block: int = 0, most: int = 0,
) -> autotune.FrozenTiles:  # fmt: skip
    tiles = autotune.row_tiles(kernel, width, lanes, itemsize, block, most)
    if limit is not None:
        tiles = autotune.fitting(
            tiles, lambda tile: autotune.shared_bytes(kernel, tile, lanes, itemsize), limit
        )
    return autotune.frozen(tiles)


def _addressable(tensor: Tensor) -> Tensor:
    """The tensor itself where the kernels can read it as it lies, a contiguous copy elsewhere.

    They step by 1 through the channels, and within a sample by 32-bit offsets.
    """
    reach = (tensor.shape[1] - 1) * tensor.stride(1) + tensor.shape[2]
    return tensor if tensor.stride(2) == 1 and reach <= MAX_REACH else tensor.contiguous()
