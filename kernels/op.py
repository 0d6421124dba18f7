"""`cross_attention`: what may be asked of it, and the custom op behind it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd, register_fake, register_vmap

from . import absorbed
from .availability import FLOATS, refuse_forward_mode, why_not_triton
from .materialised import attend as attend_materialised

Implementation = Literal["auto", "triton", "absorbed", "standard"]

_IMPLEMENTATIONS = ("auto", "triton", "absorbed", "standard")


def cross_attention(
    query: Tensor,
    tokens: Tensor,
    scale: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    norm_eps: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of R query rows over N tokens that serve as keys and as values.

    With ``x_n`` the decoded token (``scale_n * tokens_n`` for codes; times ``std`` plus ``mean``
    where given; its LayerNorm without affine where ``norm_eps`` is given)::

        y_r = sum_n softmax_n(q_r . x_n) x_n        lse_r = log sum_n exp(q_r . x_n)

    Key and value projections are absorbed: fold ``Wk`` and the 1/sqrt(d) of the softmax into the
    query and apply ``Wv`` to the result, as `preceptor.train.attention.CrossAttention` does. Each
    token is then read once, at the width it is stored in, and K and V never exist.

    Args:
        query: [R, D], shared by all samples, or [B, R, D]; float16, bfloat16, float32 or float64.
            R = M * H rows for M model tokens of H heads.
        tokens: [B, N, D]; a float dtype (with gradients), or int8 codes. Float tokens set the
            precision of the products: a query of another dtype is rounded to theirs.
        scale: [B, N] float, one non-negative factor a token; needed with int8 codes and only there.
            A constant: it gets no gradient.
        mean, std: [D] float, statistics that undo a standardisation per dimension, as a store keeps
            them. They carry no gradient and exclude ``norm_eps``.
        mask: [B, N] bool, True where a token may be attended. What the others hold must be finite,
            as with `scaled_dot_product_attention`; their scales need not be.
        lengths: [B] integer, tokens from this position on are not attended.
        norm_eps: epsilon of a LayerNorm over each token, None for none.
        return_lse: also return ``lse``, with which `merge_spaces` joins several token sets exactly.
        implementation: "absorbed" is the PyTorch form; "triton" the fused CUDA kernels (NVIDIA's
            GPUs of compute capability 8.0, D up to 2048, R up to 128, no float64); "standard"
            decodes the tokens, materialises them and calls
            `torch.nn.functional.scaled_dot_product_attention`; "auto" takes "triton" on CUDA where
            it can and "absorbed" elsewhere. (With the projections in the picture there is one more
            choice, which `CrossAttention` makes.)
        validate: check that the scales of attended tokens are finite and not negative, which on
            CUDA waits for the device, and which `torch.vmap` over scales does not allow. It is
            never checked while compiling or capturing a graph.

    Returns:
        y [B, R, D] in the query's dtype and, if asked for, lse [B, R] in float32 (float64 for
        float64 inputs). Rows that may attend nothing get y = 0 and lse = -inf. Under autocast float
        tokens and the query are cast first. Sums are accumulated in float32 at least, in a fixed
        order: results repeat bit for bit, and on CUDA in another process too where torch is to use
        deterministic algorithms, which leaves Triton's autotuner no choice.
        Gradients are of first order and of reverse mode: a second backward pass is refused, and so
        is forward mode.

    Raises:
        TypeError: an argument has a dtype that is not listed above.
        ValueError: shapes or devices do not match, a scale is not finite, arguments exclude each
            other, "triton" was asked for what it cannot do, or a derivative in forward mode.
    """
    _check(query, tokens, scale, mean, std, mask, lengths, norm_eps, implementation)
    mean, std = (None if value is None else value.detach() for value in (mean, std))
    if validate and scale is not None:
        _check_scale(scale, mask, lengths)
    device_type = tokens.device.type
    if torch.is_autocast_enabled(device_type):
        autocast_dtype = torch.get_autocast_dtype(device_type)
        if query.dtype != torch.float64:
            query = query.to(autocast_dtype)
        if tokens.is_floating_point() and tokens.dtype != torch.float64:
            tokens = tokens.to(autocast_dtype)
    batch, count, _ = tokens.shape
    rows = query if query.dim() == 3 else query.expand(batch, -1, -1)
    # Constant over the tokens, q . mean shifts the logsumexp and cancels in the softmax.
    folded = rows if std is None else (rows * std.to(rows)).to(rows.dtype)
    weight = token_weight(scale, mask, lengths, batch, count, tokens)
    if implementation == "standard":
        with torch.autocast(device_type, enabled=False):
            y, lse = attend_materialised(
                folded, tokens, weight, norm_eps, need_lse=return_lse or mean is not None
            )
    else:
        refuse_forward_mode(folded, tokens)
        use_triton = _use_triton(folded, tokens, implementation)
        y, lse, *_ = torch.ops.preceptor.cross_attention(
            folded, tokens, weight, norm_eps, use_triton
        )
    if std is not None:
        y = y * std.to(y)
    if mean is not None:
        attended = (lse > -torch.inf).unsqueeze(-1)
        y = torch.where(attended, y + mean.to(y), y)
        # As precise as the scores that lse is of, whatever the rows are.
        shift = (rows.to(lse) * mean.to(lse)).sum(-1)
        lse = torch.where(attended.squeeze(-1), lse + shift, lse)
    return (y, lse) if return_lse else y


def token_weight(
    scale: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    batch: int,
    count: int,
    tokens: Tensor,
) -> Tensor | None:
    """One number a token [B, N]: its scale (1 for float tokens), or -1 where it is not attended.

    None where every token has the weight 1.
    """
    if scale is None and mask is None and lengths is None:
        return None
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    if scale is None:
        weight = torch.ones((batch, count), dtype=dtype, device=tokens.device)
    else:
        weight = scale.detach().to(dtype)
    if mask is not None:
        weight = torch.where(mask, weight, -1.0)
    if lengths is not None:
        positions = torch.arange(count, device=tokens.device)
        weight = torch.where(positions < lengths.unsqueeze(1), weight, -1.0)
    return weight.contiguous()


def _check(
    query: Tensor,
    tokens: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    norm_eps: float | None,
    implementation: str,
) -> None:
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(_IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if tokens.dim() != 3:
        raise ValueError(f"tokens must have the shape [B, N, D], got {tuple(tokens.shape)}")
    if query.dim() not in (2, 3):
        raise ValueError(f"query must have the shape [R, D] or [B, R, D], got {tuple(query.shape)}")
    batch, count, dim = tokens.shape
    if query.shape[-1] != dim or (query.dim() == 3 and query.shape[0] != batch):
        raise ValueError(
            f"query must have the shape [R, {dim}] or [{batch}, R, {dim}] to match tokens "
            f"{tuple(tokens.shape)}, got {tuple(query.shape)}"
        )
    if dim == 0 or query.shape[-2] == 0:
        raise ValueError(
            f"query must have at least one row and one channel, got {tuple(query.shape)}"
        )
    if query.dtype not in FLOATS:
        raise TypeError(f"query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    if tokens.dtype not in (*FLOATS, torch.int8):
        raise TypeError(
            f"tokens must be int8 codes, float16, bfloat16, float32 or float64, got {tokens.dtype}"
        )
    if (tokens.dtype == torch.int8) != (scale is not None):
        raise ValueError(
            "scale [B, N] must be given with int8 tokens"
            if scale is None
            else f"scale is for int8 tokens, but tokens are {tokens.dtype}"
        )
    for name, value, shape, kind in (
        ("scale", scale, (batch, count), "float"),
        ("mean", mean, (dim,), "float"),
        ("std", std, (dim,), "float"),
        ("mask", mask, (batch, count), "bool"),
        ("lengths", lengths, (batch,), "integer"),
    ):
        if value is None:
            continue
        if value.shape != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {tuple(value.shape)}")
        if value.device != tokens.device:
            raise ValueError(
                f"{name} must be on the device of tokens, {tokens.device}, got {value.device}"
            )
        if kind != _kind(value.dtype):
            raise TypeError(f"{name} must have {_KINDS[kind]} dtype, got {value.dtype}")
    if query.device != tokens.device:
        raise ValueError(
            f"query must be on the device of tokens, {tokens.device}, got {query.device}"
        )
    if norm_eps is not None:
        if not 0 < norm_eps < math.inf:
            raise ValueError(f"norm_eps must be positive and finite, got {norm_eps}")
        if mean is not None or std is not None:
            raise ValueError(
                "norm_eps normalises the tokens as stored and cannot be combined with mean or std"
            )


_KINDS = {"float": "a float", "bool": "the bool", "integer": "an integer"}


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "integer"


def _check_scale(scale: Tensor, mask: Tensor | None, lengths: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        return
    if scale.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bad = ~(torch.isfinite(scale) & (scale >= 0))
    if mask is not None:
        bad &= mask
    if lengths is not None:
        bad &= torch.arange(scale.shape[1], device=scale.device) < lengths.unsqueeze(1)
    if bool(bad.any()):
        index = tuple(int(i) for i in torch.nonzero(bad)[0])
        raise ValueError(
            f"scale must be finite and not negative where tokens are attended, "
            f"got {float(scale[index])} at {index}"
        )


def _use_triton(query: Tensor, tokens: Tensor, implementation: str) -> bool:
    if implementation == "absorbed" or (implementation == "auto" and not tokens.is_cuda):
        return False
    reason = why_not_triton(query, tokens)
    if reason and implementation == "triton":
        raise ValueError(f'implementation="triton" {reason}')
    return reason is None


@custom_op("preceptor::cross_attention", mutates_args=())
def _forward(
    query: Tensor, tokens: Tensor, weight: Tensor | None, norm_eps: float | None, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, lse, gain, mean, p: the last three for the backward pass, empty where it has no use."""
    if triton:
        from . import triton_launch

        with torch.cuda.device_of(tokens):
            results = triton_launch.forward(query, tokens, weight, norm_eps)
            return (*results, results[1].new_empty(0))
    with torch.autocast(query.device.type, enabled=False):
        return absorbed.forward(query, tokens, weight, norm_eps)


@register_fake("preceptor::cross_attention")
def _forward_fake(
    query: Tensor, tokens: Tensor, weight: Tensor | None, norm_eps: float | None, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, rows, _ = query.shape
    dtype = absorbed.compute_dtype(query, tokens)
    kept = (batch, tokens.shape[1]) if norm_eps is not None else (0,)
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        query.new_empty((batch, rows), dtype=dtype),
        query.new_empty(kept, dtype=dtype),
        query.new_empty(kept, dtype=dtype),
        query.new_empty((0,) if triton else (batch, rows, tokens.shape[1]), dtype=dtype),
    )


@custom_op("preceptor::cross_attention_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    tokens: Tensor,
    gain: Tensor | None,
    mean: Tensor | None,
    output: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    tokens_need_grad: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    if triton:
        from . import triton_launch

        with torch.cuda.device_of(tokens):
            return triton_launch.backward(
                grad_output, grad_lse, query, tokens, gain, mean, output, lse, tokens_need_grad
            )
    # A constant where nothing is attended: NaN, as of a logsumexp over nothing, ends there.
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0.0)
    # A backward pass may run inside the caller's autocast.
    with torch.autocast(query.device.type, enabled=False):
        return absorbed.backward(
            grad_output, grad_lse, query, tokens, gain, mean, probabilities, tokens_need_grad
        )


@register_fake("preceptor::cross_attention_backward")
def _backward_fake(
    grad_output: Tensor, grad_lse: Tensor, query: Tensor, tokens: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    tokens_need_grad = rest[-2]
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(tokens.shape, dtype=tokens.dtype, device=query.device)
        if tokens_need_grad
        else query.new_empty((0,)),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, tokens, weight, norm_eps, triton = inputs
    y, lse, gain, mean, probabilities = output
    ctx.triton = triton
    ctx.normalised = norm_eps is not None
    ctx.mark_non_differentiable(gain, mean, probabilities)
    ctx.set_materialize_grads(False)  # zeros for what is kept would be made in every step
    gain = gain if ctx.normalised else weight
    ctx.save_for_backward(query, tokens, gain, mean, y, lse, probabilities)


def _differentiate(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, tokens, gain, mean, output, lse, probabilities = ctx.saved_tensors
    if grad_output is None and grad_lse is None:
        return (None,) * 5
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grad_query, grad_tokens = torch.ops.preceptor.cross_attention_backward(
        grad_output,
        grad_lse,
        query,
        tokens,
        gain,
        mean if ctx.normalised else None,
        output,
        lse,
        probabilities,
        ctx.needs_input_grad[1],
        ctx.triton,
    )
    return grad_query, grad_tokens if ctx.needs_input_grad[1] else None, None, None, None


register_autograd("preceptor::cross_attention", _differentiate, setup_context=_save_for_backward)


@register_vmap("preceptor::cross_attention")
def _forward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    query: Tensor,
    tokens: Tensor,
    weight: Tensor | None,
    norm_eps: float | None,
    triton: bool,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size = info.batch_size
    flat = [
        None if value is None else _fold_batch(value, dim, size)
        for value, dim in zip((query, tokens, weight), in_dims[:3], strict=True)
    ]
    results = torch.ops.preceptor.cross_attention(*flat, norm_eps, triton)
    unfolded = tuple(
        r.unflatten(0, (size, -1)) if r.dim() > 1 else r.expand(size, 0) for r in results
    )
    return unfolded, (0,) * len(unfolded)


def _fold_batch(value: Tensor, dim: int | None, size: int) -> Tensor:
    """The vmapped dimension joined with the batch dimension."""
    stacked = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return stacked.flatten(0, 1)
