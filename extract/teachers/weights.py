"""Weights: from a local file without running code in it, from the hub, and their hash."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TeacherError

HUB_TIMEOUT = 5.0
"""Seconds until a model hub that does not answer counts as absent."""

_log = logging.getLogger(__name__)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a local checkpoint: ``.safetensors``, or a file of ``torch.save``.

    Code in a pickle is never run. A state dict wrapped under ``state_dict`` or ``model``, with or
    without the ``module.`` prefix of a parallel run, is unwrapped; averaged weights
    (``state_dict_ema``, ``model_ema``) go first.

    Raises:
        TeacherError: the file is missing, damaged, or holds something other than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise TeacherError(f"checkpoint {path} is no file")
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TeacherError(
            f"checkpoint {path} holds more than tensors ({first_line(error)}), and code in a "
            "checkpoint is never run; save its state_dict as .safetensors"
        ) from error
    except Exception as error:  # damaged files raise anything at all
        raise TeacherError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise TeacherError(f"checkpoint {path} holds no dictionary of tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def weights_sha256(network: nn.Module) -> str:
    """Hash over name, dtype, shape and bytes of every tensor of the state dict, in its order."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\0".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Asks the model hub once whether it is there; if not, only the local cache is tried.

    The hub's own client tries every file again for half a minute. Yields the words for a message:
    which hub, and whether it answered.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        yield "the local cache (HF_HUB_OFFLINE is set)"
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:
        _log.info("the hub %s does not answer: %s", constants.ENDPOINT, error)
    else:
        yield constants.ENDPOINT
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield f"{constants.ENDPOINT}, which does not answer, nor from the local cache"
    finally:
        constants.HF_HUB_OFFLINE = False


def first_line(error: BaseException) -> str:
    """The first sentence of an error, for a message."""
    text = str(error).strip()
    return text.splitlines()[0].split(". ")[0].rstrip(".")[:200] if text else type(error).__name__
