"""Networks whose every weight matters, and inputs for them."""

from __future__ import annotations

import torch
from preceptor.extract.teachers import Teacher
from torch import nn


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights in which no norm, bias or statistic is at its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.abs() * 0.1 if "running_var" in name else noise * 0.05)
    return network.eval()


def images(teacher: Teacher, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *teacher.preprocessing.size, generator=generator)
