"""Vision tower and losses of stages of kind "tower": dense labels of what each patch shows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own usage)
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from eval.demo_model.views import IGNORE, TowerBatch
from eval.signs.scenes import COLOURS, SHAPES

_SIZES = (1, len(COLOURS), len(SHAPES), 11, 11, 11)


def to_pixels(views: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Scale uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1], as the image processor does."""
    return torch.from_numpy(views).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class TowerWithHeads(nn.Module):
    """CLIP vision tower with a linear read-out per patch, which only training uses."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)
        self.heads = nn.Linear(config.hidden_size, sum(_SIZES))

    def hidden(self) -> nn.Module:
        """The encoder, whose matrices Muon optimises."""
        return self.tower.get_submodule("encoder")

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Compute six score arrays (N, 64, classes) of pixels (N, 3, 112, 112)."""
        features = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
        scores: Tensor = self.heads(self.norm(features))
        return torch.split(scores.float(), list(_SIZES), dim=-1)


def whitening_filters(views: NDArray[np.uint8], side: int, count: int) -> Tensor:
    """First ``count`` whitened principal components of image patches, (count, 3, side, side).

    Patches are mostly smooth, so random filters respond to little but brightness; whitening gives
    every component the same variance from the first step.
    """
    pixels = to_pixels(views, torch.device("cpu"))
    patches = F.unfold(pixels, side, stride=side).permute(0, 2, 1).reshape(-1, 3 * side * side)
    centred = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    filters: Tensor = (vectors / (values + 1e-3).sqrt()).T
    return 0.5 * filters.reshape(count, 3, side, side)


def tower_loss(scores: tuple[Tensor, ...], batch: TowerBatch) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of the dense losses, and its parts with accuracies for the log."""
    device = scores[0].device

    def put(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device)

    sign, weight = put(batch.sign), torch.from_numpy(batch.weight).to(device)
    loss = F.binary_cross_entropy_with_logits(scores[0].squeeze(-1), sign.float())
    parts = {"sign": float(loss.detach())}
    targets = {
        "colour": (scores[1], put(batch.colour), 0.5),
        "shape": (scores[2], put(batch.shape), 0.5),
        "digit1": (scores[3], put(batch.digits[..., 0]), 1.0),
        "digit2": (scores[4], put(batch.digits[..., 1]), 1.0),
        "under": (scores[5], torch.where(sign > 0, put(batch.under), IGNORE), 1.0),
    }
    for name, (score, target, share) in targets.items():
        mask = (target != IGNORE).float() * weight
        losses = F.cross_entropy(
            score.transpose(1, 2), target, ignore_index=IGNORE, reduction="none"
        )
        total = mask.sum().clamp_min(1.0)
        part = (losses * mask).sum() / total
        right = ((score.argmax(-1) == target).float() * mask).sum() / total
        parts[name] = float(part.detach())
        parts[f"{name}_right"] = float(right.detach())
        loss = loss + share * part
    return loss, parts
