"""Encoded tokens in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .encodings import encoding
from .encodings.prediction import Prediction


@dataclass(frozen=True)
class Tokens:
    """Encoded tokens of b rows of a space, still undecoded.

    Attributes:
        codes: what the encoding stores: int8 ``[b, N, D]`` for ``int8``, float16 for ``fp16``.
        scales: float16 ``[b, N]`` (a further axis of groups for ``int4``); None for ``fp16``.
        encoding: its name.
        dim: D.
        prediction: where the codes are what a prediction leaves; None: they are codes.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    encoding: str
    dim: int
    prediction: Prediction | None = None

    @classmethod
    def from_parts(
        cls,
        parts: Mapping[str, torch.Tensor],
        name: str,
        dim: int,
        prediction: Prediction | None = None,
    ) -> Tokens:
        """Tokens of stored arrays.

        Args:
            parts: ``codes`` and, where the encoding has them, ``scales``, shaped as above.
            name: of the encoding.
            dim: D.
            prediction: see above.
        """
        return cls(parts["codes"], parts.get("scales"), name, dim, prediction)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The stored arrays by component name."""
        return {"codes": self.codes} | ({} if self.scales is None else {"scales": self.scales})

    def standardised(self) -> torch.Tensor:
        """z = (x - mean) / std of the calibration, float32 ``[b, N, D]``."""
        values: torch.Tensor = encoding(self.encoding).decode(self.restored().parts, self.dim)
        return values

    def restored(self) -> Tokens:
        """The same tokens, with codes where the store has what a prediction left of them."""
        if self.prediction is None:
            return self
        return replace(self, codes=self.prediction.restored(self.codes), prediction=None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tokens:
        """The same codes on another device."""
        moved = {
            name: part.to(device, non_blocking=non_blocking) for name, part in self.parts.items()
        }
        prediction = None if self.prediction is None else self.prediction.on(device)
        return Tokens.from_parts(moved, self.encoding, self.dim, prediction)

    def __getitem__(self, rows: slice | torch.Tensor) -> Tokens:
        """Some of the rows."""
        taken = {name: part[rows] for name, part in self.parts.items()}
        return Tokens.from_parts(taken, self.encoding, self.dim, self.prediction)

    def __len__(self) -> int:
        return len(self.codes)
