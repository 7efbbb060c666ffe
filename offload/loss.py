"""Next-token loss that never holds the logits in fp32.

Where the vocabulary is large the logits are the largest activation of a small model, and the usual
loss keeps several copies of them in fp32. Here loss and gradient are computed in fp32 for a few
rows at a time, and the gradient is kept in the logits' own dtype.
"""

from __future__ import annotations

from typing import Any

import torch

ROWS_AT_ONCE = 64
IGNORED = -100


class _CrossEntropy(torch.autograd.Function):
    """Mean cross entropy of logits [rows, vocabulary] against int64 targets [rows]."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        num_targets = int((targets != IGNORED).sum())
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_p = torch.log_softmax(logits[rows].float(), dim=-1)
            is_target = (targets[rows] != IGNORED).unsqueeze(1)
            columns = targets[rows].clamp(min=0).unsqueeze(1)
            total -= (log_p.gather(1, columns) * is_target).sum(dtype=torch.float64)
            if grad is not None:
                share = is_target / num_targets
                slope = log_p.exp_().mul_(share).scatter_add_(1, columns, -share)
                grad[rows] = slope
        ctx.grad = grad
        return (total / num_targets).float()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(outer[0].to(grad.dtype)) if outer[0] != 1.0 else grad, None


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss of predicting tokens[:, 1:] from logits[:, :-1], as an fp32 scalar.

    logits [batch, length, vocabulary] in any float dtype, tokens int64 [batch, length]. Memory: one
    more tensor of the logits' size and dtype while gradients are wanted. Backward once only.
    """
    targets = torch.full_like(tokens, IGNORED)
    targets[:, :-1] = tokens[:, 1:]
    apply: Any = _CrossEntropy.apply
    loss: torch.Tensor = apply(logits.flatten(0, 1), targets.flatten())
    return loss
