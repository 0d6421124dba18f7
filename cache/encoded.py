"""Encoded tokens on their way from the device that made them to the host's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from ..errors import DataError
from .encodings import holding
from .encodings.base import to_numpy
from .plan import SpaceSpec


class Encoded:
    """Encoded tokens of v rows of a space; in the host's memory at the latest after :meth:`wait`.

    Args:
        at: int64 ``[v]``: places of the rows in their shard.
        keys: of the rows.
        peaks: float32 ``[v, N]``: largest magnitude of each standardised token.
        parts: by component name, ``[v, ...]``, on the same device.

    Attributes:
        under_way: whether a device may still be copying them.
    """

    def __init__(
        self,
        space: SpaceSpec,
        at: np.ndarray,
        keys: list[str],
        peaks: torch.Tensor,
        parts: Mapping[str, torch.Tensor],
    ) -> None:
        self.space, self.at = space, at
        self._keys = keys
        (self._peaks, *copies), self._await = to_host([peaks, *parts.values()])
        self._parts = dict(zip(parts, copies, strict=True))
        self.under_way = self._await is not None

    def wait(self) -> dict[str, np.ndarray]:
        """The arrays by component name, ``[v, ...]``, once they have arrived.

        Raises:
            DataError: tokens that are not finite, or beyond what the encoding can hold.
        """
        if self._await is not None:
            self._await()
        how = self.space.how
        if bad := how.beyond(self._peaks):
            row, token = bad
            where = f"token {token} of {self.space.id}"
            key = f"row key {self._keys[row]!r}"
            if not bool(torch.isfinite(self._peaks[row, token])):
                raise DataError(
                    f"{where} is not finite once standardised for {key}: check the image and the "
                    "teacher's precision"
                )
            wider = holding(float(self._peaks[row, token]))
            raise DataError(
                f"{where} is too far from the calibrated mean for the encoding {how.name}, which "
                f"holds {how.limit:,.0f} deviations, for {key}: check the image; if it is sound, "
                "make the store anew with a calibration of more images, or of such images"
                + (
                    f", or with encoding: {' or '.join(wider)}, which would hold it"
                    if wider
                    else ""
                )
            )
        return {name: to_numpy(part) for name, part in self._parts.items()}


def to_host(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], object] | None]:
    """Tensors of one device in the host's memory, and what waits, on any thread, until they have
    arrived; None: they have.

    From a CUDA device torch copies them into page-locked memory, and neither it nor the caller
    waits. Those of other devices are there on return.
    """
    device = tensors[0].device
    later = device.type == "cuda"
    copies = [x.to("cpu", non_blocking=later) for x in tensors]
    if not later:
        return copies, None
    copied = torch.cuda.Event(blocking=True)  # a spinning wait would cost the decoders a core
    copied.record(torch.cuda.current_stream(device))

    def wait() -> None:
        with torch.cuda.device(device):  # a new thread is at the first, and would take memory there
            copied.synchronize()

    return copies, wait
