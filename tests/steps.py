"""What tests of the user's loop share: one training step, and a plain model to compare with."""

from typing import Any

import torch
from parity import COMPUTE_DTYPE, PlainAdamW, Recipe
from torch import Tensor, nn
from zoo import ZooModel


def rounded(model: nn.Module, format: str = "exact") -> nn.Module:
    """Give a plain model the compute weights of a format."""
    PlainAdamW(model, Recipe(), format)
    return model


def one_step(
    engine: Any, optimizer: Any, entry: ZooModel, seed: int, format: str = "exact"
) -> Tensor:
    torch.manual_seed(seed)
    loss = entry.loss(engine.model, entry.make_batch(seed, COMPUTE_DTYPE[format]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
