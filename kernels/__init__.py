"""Fused cross-attention of a few query rows over many visual tokens, and losses over int8 tokens.

Needs torch alone; Triton, where it is installed, adds the CUDA bodies.
"""

from __future__ import annotations

from .loss import AlignmentLoss, alignment_loss
from .merge import merge_spaces
from .op import cross_attention

__all__ = ["AlignmentLoss", "alignment_loss", "cross_attention", "merge_spaces"]
