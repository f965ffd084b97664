"""Optimisers and learning-rate schedule of both kinds of stage."""

from __future__ import annotations

import torch
from torch import nn


def make_optimisers(
    modules: list[nn.Module], hidden: list[nn.Module], learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside ``hidden`` modules, AdamW on everything else in ``modules``."""
    matrices = [p for m in hidden for p in m.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for m in modules for p in m.parameters() if id(p) not in taken and p.requires_grad]
    muon = torch.optim.Muon(
        matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    return [muon, adamw]


def rate_at(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Learning rate: a short warm-up, constant until half, then linear to nearly zero."""
    rise = min((step + 1) / warmup, 1.0)
    fall = min(2.0 * (1.0 - step / steps), 1.0)
    return peak * min(rise, max(fall, 0.01))


def set_rate(optimisers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of every group."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
