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
    try:
        is_file = path.is_file()
    except OSError as error:  # a folder that may not be looked into, a name that cannot be
        raise refused(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if not is_file:
        raise refused(f"checkpoint {path} is no file")
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise anything at all
        raise refused(f"checkpoint {path} {_complaint(path, error)}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise refused(f"checkpoint {path} holds no dictionary of tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _complaint(path: Path, error: Exception) -> str:
    """What is wrong with a file that could not be loaded; without torch's advice to run its code.

    Loaders take whatever they are given for their own kind, so its first bytes are looked at.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as unread:
        return f"cannot be read: {unread.strerror}"
    named_safe = path.suffix == ".safetensors"
    is_safe, is_torch = start[8:9] == b"{", start.startswith((b"\x80", b"PK"))
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return (
            "is a pointer of Git LFS, no file of weights: git lfs pull fetches what it stands for"
        )
    if is_safe and not named_safe:
        return "is of safetensors under another name: let it end with .safetensors"
    if is_torch and named_safe:
        return "is of torch.save under another name: let it end with .pth"
    if is_torch and (isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error)):
        return (
            f"holds more than tensors ({_reason(error)}), and code in a checkpoint is never run; "
            "save its state_dict as .safetensors"
        )
    if is_safe or is_torch:
        return f"cannot be read: {first_line(error)}"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"<", b"{")):
        return "is a page or a text, no file of weights"
    return "is of another kind, no file of weights"


def _reason(error: Exception) -> str:
    """Why torch refuses a file, in its own words."""
    said = re.search(
        r"WeightsUnpickler error:\s*(.+?)( was not an allowed|\. |$)", str(error), re.M
    )
    if said is not None:
        return said[1]
    return "TorchScript" if "TorchScript" in str(error) else type(error).__name__


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
