"""Exact softmax over several token sets from the attention over each one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_spaces(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of S token sets, from the attention over each set.

    With ``y_s`` the output over set s and ``lse_s`` the logarithm of its softmax denominator, the
    output over the concatenated tokens is ``sum_s softmax_s(lse_s) y_s`` and its denominator
    ``logsumexp_s(lse_s)``. Nothing is approximated, and gradients flow through both arguments.

    Args:
        outputs: S tensors of one shape [..., K], any float dtype.
        lses: S tensors of shape [...], float32 or float64; -inf where a set had nothing to attend.

    Returns:
        The merged output [..., K] and its logsumexp [...]; zero and -inf where every set was empty.

    Raises:
        ValueError: the two sequences are empty, differ in length, or their shapes do not match.

    Source: the split-KV merge of Dao et al., "Flash-Decoding for long-context inference" (2023).
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"merge_spaces needs one lse for each output and at least one of them, "
            f"got {len(outputs)} outputs and {len(lses)} lses"
        )
    shape = outputs[0].shape
    for position, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        if output.shape != shape or lse.shape != shape[:-1]:
            raise ValueError(
                f"merge_spaces: outputs[{position}] {tuple(output.shape)} and lses[{position}] "
                f"{tuple(lse.shape)} must have the shapes {tuple(shape)} and {tuple(shape[:-1])}"
            )
    stacked = torch.stack(list(lses), dim=0)
    # The maximum is only a shift, so it carries no gradient; -inf is replaced or inf - inf is NaN.
    top = stacked.detach().amax(dim=0)
    empty = top == -torch.inf
    shift = torch.where(empty, torch.zeros_like(top), top)
    shares = torch.exp(stacked - shift)
    total = shares.sum(dim=0)
    total_safe = torch.where(empty, torch.ones_like(total), total)
    merged = torch.zeros_like(outputs[0], dtype=torch.promote_types(outputs[0].dtype, total.dtype))
    for share, output in zip(shares.unbind(0), outputs, strict=True):
        merged = merged + (share / total_safe).unsqueeze(-1) * output
    lse_merged = torch.where(empty, top, shift + torch.log(total_safe))
    return merged.to(outputs[0].dtype), lse_merged
