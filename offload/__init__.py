"""offload: fine-tune models larger than the GPU, and larger than RAM, in a plain PyTorch loop.

with offload.offload(model, "tiers.yaml") as engine:
    optimizer = offload.AdamW(model.parameters(), lr=2e-5)
    ...
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from offload.errors import (
    BudgetError,
    NumericsError,
    OffloadError,
    PolicyError,
    StateError,
    StorageError,
)
from offload.optim import AdamW
from offload.plan import Plan
from offload.policy import OffloadPolicy, load_policy
from offload.pretrained import meta_model
from offload.session import Session
from offload.session import plan_for as _plan_for

__version__ = "0.1.0"
PolicySource = str | Path | Mapping[str, object] | OffloadPolicy


def offload(
    model: nn.Module, policy: PolicySource, *, weights: str | Path | None = None
) -> Session:
    """Move a model's parameters into the tiers that `policy` describes; use the result as a context
    manager.

    `weights` says where a model on meta gets its weights: "init" runs its modules' own initialisers
    chunk by chunk, a folder is read as Hugging Face safetensors. Parameter objects stay the same.

    Raises PolicyError (a key), BudgetError (does not fit), StorageError (a path), StateError (the
    model).
    """
    return Session(model, load_policy(policy), weights)


def load_pretrained(path: str | Path, policy: PolicySource) -> Session:
    """Build the model of a Hugging Face folder on meta and read its weights straight into the
    tiers.

    The model is `.model` of the result. Needs transformers. RAM use is that of the tiers, never of
    the model.
    """
    return Session(meta_model(Path(path)), load_policy(policy), path)


def plan_for(model: nn.Module, policy: PolicySource) -> Plan:
    """What offload() would do with this model (it may be on meta); takes no memory and no files."""
    return _plan_for(model, load_policy(policy))


__all__ = [
    "AdamW",
    "BudgetError",
    "NumericsError",
    "OffloadError",
    "OffloadPolicy",
    "Plan",
    "PolicyError",
    "Session",
    "StateError",
    "StorageError",
    "load_policy",
    "load_pretrained",
    "offload",
    "plan_for",
]
