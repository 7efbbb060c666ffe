"""This project: a model on meta, its weights drawn straight to the tiers, updates eager."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from models import build_model

sys.path.append(str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed

import offload


class OffloadTrainer:
    """Trains with the native optimizer of the policy, or with the one of torch `name`."""

    def __init__(self, engine: Any, name: str | None = None) -> None:
        self._engine = engine
        params = list(engine.model.parameters())
        self.num_params = sum(param.numel() for param in params)
        hyper = {"lr": 1e-5, "weight_decay": 0.01}
        if name is not None:
            cls = getattr(torch.optim, name)
            self._optimizer: torch.optim.Optimizer = offload.Torch(cls, params, **hyper)
        else:
            kinds = {"adamw": offload.AdamW, "adafactor": offload.Adafactor, "scale": offload.SCALE}
            self._optimizer = kinds[engine.policy.optimizer.kind](params, **hyper)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self._engine.model(input_ids=tokens, labels=tokens).loss
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def finish(self) -> None:
        self._engine.flush()
        self._engine.run.settle()

    def state_nbytes(self) -> int:
        """Return the bytes that persist between steps."""
        return int(self._engine.plan.state_nbytes)

    def close(self) -> dict[str, str]:
        about = {
            "offload": offload.__version__,
            "plan": str(self._engine.plan),
            "memory": str(self._engine.memory()),
            "last step": str(self._engine.stats()),
        }
        self._engine.close()
        return about


def start(job: dict[str, Any]) -> OffloadTrainer:
    """Build the trainer; job["policy"] is a policy less its path, overrides change it."""
    with torch.device("meta"):
        model = build_model(job["model"])
    policy = job["policy"]
    policy["tiers"]["nvme"]["paths"] = [job["dir"]]
    settled = offload.load_policy(policy, job["overrides"])
    engine = offload.offload(model, settled, weights="init")
    return OffloadTrainer(engine, settled.optimizer.name)
