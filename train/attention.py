"""Multi-head cross-attention of model tokens over the visual tokens of one space or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import cross_attention, merge_spaces
from ..kernels.absorbed import compute_dtype
from ..kernels.materialised import masked_logsumexp
from ..kernels.op import Implementation
from .groups import GroupLinear


class ProjectedTokens(NamedTuple):
    """Tokens that stand for ``weight @ x + bias``, which is never computed.

    Attributes:
        tokens: x, [B, N, D] float or int8 codes.
        scale: [B, N], with codes.
        weight: [token_dim, D].
        bias: [token_dim].
    """

    tokens: Tensor
    scale: Tensor | None
    weight: Tensor
    bias: Tensor


class CrossAttention(nn.Module):
    """Cross-attention of M model tokens over N visual tokens, with absorbed projections.

    It computes what `torch.nn.MultiheadAttention` does with ``kdim = vdim = token_dim``, with a
    LayerNorm before keys and values if ``norm`` is set, and without a key bias (which cancels in
    the softmax). The projections of keys and values are applied to the few query rows instead of
    the many tokens, so that the tokens are read once and may stay int8 codes.

    With ``groups`` it is that many attentions at once, each with its own weights, model tokens and
    visual tokens: one call of the kernel for all of them.

    Args:
        dim: width of the model tokens; a multiple of ``heads``.
        token_dim: width D of the visual tokens.
        heads: number H of heads.
        norm: LayerNorm over each visual token.
        groups: G; None for one attention, whose tensors have no group dimension.
        implementation: as in `cross_attention`, except that "standard" projects keys and values and
            calls `scaled_dot_product_attention`, and that "auto" does so where M * H > 0.6 D: on a
            CPU both take the same time at 0.60 to 0.68 (benchmarks/attention_crossover.py).

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``.
    """

    def __init__(
        self,
        dim: int,
        token_dim: int,
        heads: int,
        *,
        norm: bool = False,
        groups: int | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim {dim} and heads {heads}")
        self.heads, self.groups = heads, groups
        self.implementation: Implementation = implementation
        self.norm = nn.LayerNorm(token_dim) if norm else None
        self.q_proj = self._linear(dim, dim)
        self.k_proj = self._linear(token_dim, dim, bias=False)
        self.v_proj = self._linear(token_dim, dim)
        self.out_proj = self._linear(dim, dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            for weight in (projection.weight,) if groups is None else projection.weight:
                nn.init.xavier_uniform_(weight)
        for projection in (self.q_proj, self.v_proj, self.out_proj):
            assert projection.bias is not None
            nn.init.zeros_(projection.bias)

    def _linear(self, source: int, target: int, bias: bool = True) -> nn.Linear | GroupLinear:
        if self.groups is None:
            return nn.Linear(source, target, bias)
        return GroupLinear(self.groups, source, target, bias)

    def forward(
        self,
        model_tokens: Tensor,
        tokens: Tensor | Sequence[ProjectedTokens],
        scale: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The update of the model tokens, [B, M, dim] ([B, G, M, dim] for groups).

        Args:
            model_tokens: [B, M, dim] float ([B, G, M, dim] for groups).
            tokens: [B, N, token_dim] float, or int8 codes with ``scale`` [B, N]; for groups
                [B, G, N, token_dim] float, or G `ProjectedTokens`.
            mask: [B, N] bool, True where a token may be attended. A sample that may attend nothing
                gets the bias of the output projection. Not for groups.
        """
        values, _ = self._attend(model_tokens, tokens, scale, mask, need_lse=False)
        return self.out_proj(values.flatten(-2))

    def attend(
        self,
        model_tokens: Tensor,
        tokens: Tensor,
        scale: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Values [B, M, H, dim / H] of the heads and their logsumexp [B, M, H].

        `preceptor.kernels.merge_spaces` joins them over several spaces into one softmax.
        """
        values, lse = self._attend(model_tokens, tokens, scale, mask, need_lse=True)
        assert lse is not None
        return values, lse

    def over_spaces(
        self, model_tokens: Tensor, spaces: Tensor | Sequence[ProjectedTokens]
    ) -> Tensor:
        """The update where all model tokens attend to the tokens of all spaces under one softmax.

        Attention over each space, merged by the logsumexp: exactly the attention over the
        concatenated tokens, which need not have one shape and are never put together.

        Args:
            model_tokens: [B, M, dim] float.
            spaces: [B, S, N, token_dim] float, or S `ProjectedTokens`.

        Returns:
            [B, M, dim] float.
        """
        query = self._absorbed_query(self._query(model_tokens).unsqueeze(1))  # [B, 1, M, H, D]
        if self.norm is not None:
            query = query * self.norm.weight  # its bias adds the same to all scores of a query
        count = spaces.shape[1] if isinstance(spaces, Tensor) else len(spaces)
        y, lse = self._core(query.expand(-1, count, -1, -1, -1), spaces)
        merged, _ = merge_spaces(list(y.unbind(1)), list(lse.unbind(1)))
        if self.norm is not None:
            merged = merged * self.norm.weight + self.norm.bias
        values = self._values(merged.unsqueeze(1)).squeeze(1)
        return self.out_proj(values.flatten(-2))

    def _query(self, model_tokens: Tensor) -> Tensor:
        """[..., M, H, d] with the softmax's 1 / sqrt(d)."""
        q = self.q_proj(model_tokens).unflatten(-1, (self.heads, -1))
        return q * q.shape[-1] ** -0.5

    def _attend(
        self,
        model_tokens: Tensor,
        tokens: Tensor | Sequence[ProjectedTokens],
        scale: Tensor | None,
        mask: Tensor | None,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q = self._query(model_tokens)
        if isinstance(tokens, Tensor) and self._materialises(q.shape[-3], tokens):
            return self._attend_standard(q, tokens, scale, mask, need_lse)
        if self.groups is not None:
            return self._attend_absorbed(q, tokens, scale, mask)
        assert isinstance(tokens, Tensor)
        values, lse = self._attend_absorbed(q.unsqueeze(1), tokens.unsqueeze(1), scale, mask)
        return values.squeeze(1), lse.squeeze(1)

    def _materialises(self, count: int, tokens: Tensor) -> bool:
        if self.implementation == "auto":
            return 5 * count * self.heads > 3 * tokens.shape[-1]
        return self.implementation == "standard"

    def _by_head(self, projection: nn.Linear | GroupLinear) -> Tensor:
        """A projection's weight or bias as [G, H, d, ...]."""
        weight = projection.weight if self.groups is not None else projection.weight.unsqueeze(0)
        return weight.unflatten(1, (self.heads, -1))

    def _attend_absorbed(
        self,
        q: Tensor,
        tokens: Tensor | Sequence[ProjectedTokens],
        scale: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Values [B, G, M, H, d] and logsumexp [B, G, M, H] of q [B, G, M, H, d]."""
        query, offset = self._absorbed_query(q), None
        if self.norm is not None:
            offset = query @ self.norm.bias.to(query.dtype)
            query = query * self.norm.weight
        y, lse = self._core(query, tokens, scale, mask)
        if self.norm is not None:
            y = y * self.norm.weight + self.norm.bias
        values = self._values(y)
        if mask is not None:
            # What the biases add must not reach a sample that attends nothing; NaN must stay.
            values = torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, values)
        return values, lse if offset is None else lse + offset

    def _absorbed_query(self, q: Tensor) -> Tensor:
        """[B, G, M, H, D] from [B, G, M, H, d]: k_proj applied to the query."""
        return _by_group_and_head(q, self._by_head(self.k_proj))

    def _values(self, y: Tensor) -> Tensor:
        """[B, G, M, H, d] from [B, G, M, H, D]: v_proj applied to the attended mean."""
        weight = self._by_head(self.v_proj).transpose(2, 3)
        values = _by_group_and_head(y, weight)
        assert self.v_proj.bias is not None
        return values + self.v_proj.bias.view(len(weight), 1, self.heads, -1).to(values.dtype)

    def _core(
        self,
        query: Tensor,
        tokens: Tensor | Sequence[ProjectedTokens],
        scale: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean tokens [B, G, M, H, D] under each query row [B, G, M, H, D], logsumexp [B, G, M, H].

        Args:
            tokens: [B, G, N, D], or G `ProjectedTokens`.
        """
        batch, groups, count, heads, _ = query.shape
        rows = query.flatten(2, 3)
        if isinstance(tokens, Tensor):
            y, lse = self._kernel(rows.flatten(0, 1), tokens.flatten(0, 1), scale, mask)
            y, lse = y.unflatten(0, (batch, groups)), lse.unflatten(0, (batch, groups))
        else:
            parts = []
            for group, seen in enumerate(tokens):
                row = rows[:, group]
                # W x + b under the query q: the scores q W x + q b, the mean W mean(x) + b.
                mean, part = self._kernel(row @ seen.weight, seen.tokens, seen.scale, None)
                part = part + (row @ seen.bias).to(part.dtype)
                parts.append((functional.linear(mean, seen.weight, seen.bias), part))
            y, lse = (torch.stack(list(each), 1) for each in zip(*parts, strict=True))
        return y.unflatten(2, (count, heads)), lse.unflatten(2, (count, heads))

    def _kernel(
        self, rows: Tensor, tokens: Tensor, scale: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, lse = cross_attention(
            rows,
            tokens,
            scale,
            mask=mask,
            norm_eps=None if self.norm is None else self.norm.eps,
            return_lse=True,
            implementation=self.implementation,
            # Codes come from a checked store; on CUDA looking again would stall every step.
            validate=not tokens.is_cuda,
        )
        return y, lse

    def _attend_standard(
        self,
        q: Tensor,
        tokens: Tensor,
        scale: Tensor | None,
        mask: Tensor | None,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x = tokens if scale is None else tokens.to(q.dtype) * scale.unsqueeze(-1).to(q.dtype)
        x = x.to(self.k_proj.weight.dtype)
        if self.norm is not None:
            x = self.norm(x)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))
        batch = q.shape[:-3]
        if self.groups is not None:  # exporters know the attention of four dimensions
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        allowed = None if mask is None else mask[:, None, None, :]
        values = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=1.0)
        if allowed is not None:
            values = torch.where(allowed.any(-1, keepdim=True), values, 0.0)
        values, lse = values.transpose(1, 2), None
        if need_lse:
            scores = (q @ k.transpose(-1, -2)).to(compute_dtype(q, k))
            lse = masked_logsumexp(scores, allowed).transpose(1, 2)
        if self.groups is None:
            return values, lse
        return values.unflatten(0, batch), None if lse is None else lse.unflatten(0, batch)


def _by_group_and_head(x: Tensor, weight: Tensor) -> Tensor:
    """[B, G, M, H, i] @ [G, H, i, o] -> [B, G, M, H, o], one product for all groups and heads."""
    batch, groups, count, heads, _ = x.shape
    rows = x.permute(1, 3, 0, 2, 4).reshape(groups * heads, batch * count, -1)
    y = torch.bmm(rows, weight.flatten(0, 1))
    return y.view(groups, heads, batch, count, -1).permute(2, 0, 3, 1, 4)
