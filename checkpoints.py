"""Weights from a local file, without running code that it may hold, and the hash of a network's."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import PreceptorError, first_line


def read_checkpoint(path: str | Path, refused: type[PreceptorError]) -> dict[str, Tensor]:
    """The tensors of a local checkpoint: ``.safetensors``, or a file of ``torch.save``.

    Code in a pickle is never run. A state dict wrapped under ``state_dict`` or ``model``, with or
    without the ``module.`` prefix of a parallel run, is unwrapped; averaged weights
    (``state_dict_ema``, ``model_ema``) go first.

    Args:
        refused: the error to raise.

    Raises:
        PreceptorError: of that kind: the file is missing, damaged, or holds something other than
            named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise refused(f"checkpoint {path} is no file")
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (other := _other_kind(path)) is not None:
            raise refused(f"checkpoint {path} is {other}, no file of weights") from error
        raise refused(
            f"checkpoint {path} holds more than tensors ({_reason(error)}), and code in a "
            "checkpoint is never run; save its state_dict as .safetensors"
        ) from error
    except Exception as error:  # damaged files raise anything at all
        raise refused(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise refused(f"checkpoint {path} holds no dictionary of tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _other_kind(path: Path) -> str | None:
    """What a file is that torch takes for a pickle and that is none; None where it is one."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS (git lfs pull fetches what it stands for)"
    if start[8:9] == b"{":
        return "of safetensors under another name (its name must end with .safetensors)"
    if start.lstrip().startswith((b"<", b"{")):
        return "a page or a text"
    return None if start.startswith((b"\x80", b"PK")) else "of another kind"


def _reason(error: BaseException) -> str:
    """Why torch refuses a pickle, without its advice to load it all the same."""
    found = re.search(r"WeightsUnpickler error: (.*)", str(error))
    return found[1] if found else first_line(error)


def misfit(error: BaseException) -> str:
    """What does not fit, from torch's error of loading a state dict: counts and the first names.

    Another error's first line.
    """
    text, parts = str(error), []
    for kind, words in (("Missing", "lacks"), ("Unexpected", "has, and the network not,")):
        if found := re.search(rf"{kind} key\(s\) in state_dict: (.*)", text):
            names = re.findall('"([^"]+)"', found[1])
            parts.append(f"it {words} {_counted(names)}")
    if sizes := re.findall(
        r"size mismatch for (\S+): copying a param with shape (?:torch\.Size\()?(\[[^\]]*\]).*?"
        r"the shape in current model is (?:torch\.Size\()?(\[[^\]]*\])",
        text,
    ):
        told = [f"{name} ({theirs} there, {ours} here)" for name, theirs, ours in sizes]
        parts.append(f"sizes differ of {_counted(told)}")
    return "; ".join(parts) or first_line(error)


def _counted(names: list[str]) -> str:
    return f"{len(names)} tensor(s) ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def weights_sha256(network: nn.Module) -> str:
    """Hash over name, dtype, shape and bytes of every tensor of the state dict, in its order."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\0".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
