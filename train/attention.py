"""Multi-head cross-attention of model tokens over the tokens of one space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import cross_attention
from ..kernels.materialised import masked_logsumexp
from ..kernels.op import Implementation


class CrossAttention(nn.Module):
    """Cross-attention of M model tokens over N visual tokens, with absorbed projections.

    It computes what `torch.nn.MultiheadAttention` does with ``kdim = vdim = token_dim``, with a
    LayerNorm before keys and values if ``norm`` is set, and without a key bias (which cancels in
    the softmax). The projections of keys and values are applied to the few query rows instead of
    the many tokens, so that the tokens are read once and may stay int8 codes.

    Args:
        dim: width of the model tokens; a multiple of ``heads``.
        token_dim: width D of the visual tokens.
        heads: number H of heads.
        norm: LayerNorm over each visual token.
        implementation: as in `cross_attention`, except that "standard" projects keys and values and
            calls `scaled_dot_product_attention`, and that "auto" does so where M * H comes near D.

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
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim {dim} and heads {heads}")
        self.heads = heads
        self.implementation: Implementation = implementation
        self.norm = nn.LayerNorm(token_dim) if norm else None
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(token_dim, dim, bias=False)
        self.v_proj = nn.Linear(token_dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        for bias in (self.q_proj.bias, self.v_proj.bias, self.out_proj.bias):
            nn.init.zeros_(bias)

    def forward(
        self,
        model_tokens: Tensor,
        tokens: Tensor,
        scale: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The update of the model tokens, [B, M, dim].

        Args:
            model_tokens: [B, M, dim] float.
            tokens: [B, N, token_dim] float, or int8 codes with ``scale`` [B, N].
            mask: [B, N] bool, True where a token may be attended. A sample that may attend nothing
                gets the bias of the output projection.
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

    def _attend(
        self,
        model_tokens: Tensor,
        tokens: Tensor,
        scale: Tensor | None,
        mask: Tensor | None,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        count, dim = model_tokens.shape[-2:]
        q = self.q_proj(model_tokens).unflatten(-1, (self.heads, dim // self.heads))
        q = q * (dim // self.heads) ** -0.5
        if self._materialises(count, tokens):
            return self._attend_standard(q, tokens, scale, mask, need_lse)
        return self._attend_absorbed(q, tokens, scale, mask)

    def _materialises(self, count: int, tokens: Tensor) -> bool:
        if self.implementation == "auto":
            return 2 * count * self.heads > tokens.shape[-1]
        return self.implementation == "standard"

    def _attend_absorbed(
        self, q: Tensor, tokens: Tensor, scale: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        _, count, heads, head_dim = q.shape
        key_weight = self.k_proj.weight.unflatten(0, (heads, head_dim))
        value_weight = self.v_proj.weight.unflatten(0, (heads, head_dim))
        # Head by head without a copy of the query, as rows m * H + h: [H, B M, d] @ [H, d, D].
        query = torch.bmm(q.flatten(0, 1).transpose(0, 1), key_weight).transpose(0, 1)
        query = query.unflatten(0, (-1, count))
        offset = None
        if self.norm is not None:
            offset = query @ self.norm.bias.to(query.dtype)
            query = query * self.norm.weight
        y, lse = cross_attention(
            query.flatten(1, 2),
            tokens,
            scale,
            mask=mask,
            norm_eps=None if self.norm is None else self.norm.eps,
            return_lse=True,
            implementation=self.implementation,
            # Codes come from a checked store; on CUDA looking again would stall every step.
            validate=not tokens.is_cuda,
        )
        y = y.unflatten(1, (count, heads))
        lse = lse.unflatten(1, (count, heads))
        if self.norm is not None:
            y = y * self.norm.weight + self.norm.bias
        values = torch.bmm(y.flatten(0, 1).transpose(0, 1), value_weight.transpose(1, 2))
        values = values.transpose(0, 1).unflatten(0, (-1, count))
        values = values + self.v_proj.bias.unflatten(0, (heads, head_dim)).to(values.dtype)
        if mask is not None:
            # What the biases add must not reach a sample that attends nothing.
            values = torch.where((lse > -torch.inf).unsqueeze(-1), values, 0.0)
        return values, lse if offset is None else lse + offset

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
        heads = self.heads
        q = q.transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        allowed = None if mask is None else mask[:, None, None, :]
        values = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=1.0)
        if allowed is not None:
            values = torch.where(allowed.any(-1, keepdim=True), values, 0.0)
        lse = masked_logsumexp(q @ k.transpose(-1, -2), allowed) if need_lse else None
        return values.transpose(1, 2), None if lse is None else lse.transpose(1, 2)
