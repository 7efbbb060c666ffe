"""Plain PyTorch, everything in memory: bf16 weights and gradients, fp32 master and moments.

16 bytes per parameter. Parameters are updated one by one, so that no fp32 gradient of the whole
model ever exists: the leanest form of the recipe that stays in stock PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from models import build_model


class TorchTrainer:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._params = list(model.parameters())
        self.num_params = sum(param.numel() for param in self._params)
        self._masters = [torch.nn.Parameter(param.detach().float()) for param in self._params]
        self._optimizers = [
            torch.optim.AdamW([master], lr=1e-5, weight_decay=0.01, fused=True)
            for master in self._masters
        ]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self._model(input_ids=tokens, labels=tokens).loss
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def update(self) -> None:
        for param, master, optimizer in zip(
            self._params, self._masters, self._optimizers, strict=True
        ):
            master.grad = param.grad.float()
            param.grad = None
            optimizer.step()
            master.grad = None
            param.copy_(master)

    def finish(self) -> None:
        """Nothing is ever pending."""

    def close(self) -> dict[str, str]:
        return {}


def start(job: dict[str, Any]) -> TorchTrainer:
    """Build the trainer; "torch" recomputes each block in backward, "torch-keep" does not."""
    model = build_model(job["model"])
    if job["engine"] == "torch":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return TorchTrainer(model)
