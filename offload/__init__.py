"""offload: fine-tune models larger than the GPU, and larger than RAM, in a plain PyTorch loop.

with offload.offload(model, "tiers.yaml") as engine:
    optimizer = offload.AdamW(model.parameters(), lr=2e-5)
    ...

torch is imported at first use, not here: the command line's --help is then instant, and can still
say how OpenMP's threads shall wait.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import (
    BudgetError,
    NumericsError,
    OffloadError,
    PolicyError,
    StateError,
    StorageError,
)
from offload.policy import OffloadPolicy, load_policy

if TYPE_CHECKING:
    from torch import nn

    from offload.optim import SGD, Adafactor, AdamW, Lion
    from offload.plan import Plan
    from offload.scaleoptim import SCALE
    from offload.session import Session
    from offload.stats import StepResult
    from offload.torchoptim import Torch

__version__ = "0.1.0"
PolicySource = str | Path | Mapping[str, object] | OffloadPolicy
_AT_FIRST_USE = {
    "AdamW": "offload.optim",
    "SCALE": "offload.scaleoptim",
    "Torch": "offload.torchoptim",
    "Adafactor": "offload.optim",
    "Lion": "offload.optim",
    "Plan": "offload.plan",
    "SGD": "offload.optim",
    "Session": "offload.session",
    "StepResult": "offload.stats",
}


def __getattr__(name: str) -> object:
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_AT_FIRST_USE[name]), name)


def offload(
    model: nn.Module, policy: PolicySource, *, weights: str | Path | None = None
) -> Session:
    """Move a model's parameters into the tiers that `policy` describes; a context manager.

    `weights` says where a model on meta gets its weights: "init" runs its modules' own initialisers
    chunk by chunk, a folder is read as Hugging Face safetensors. Parameter objects stay the same.

    Raises PolicyError (a key), BudgetError (does not fit), StorageError (a path), StateError (the
    model).
    """
    from offload.session import Session

    return Session(model, load_policy(policy), weights)


def load_pretrained(path: str | Path, policy: PolicySource) -> Session:
    """Build the model of a Hugging Face folder on meta; its weights go straight to the tiers.

    The model is `.model` of the result. Needs transformers. RAM use is that of the tiers, never of
    the model.
    """
    from offload.pretrained import meta_model
    from offload.session import Session

    return Session(meta_model(Path(path)), load_policy(policy), path)


def plan_for(model: nn.Module, policy: PolicySource) -> Plan:
    """What offload() would do with this model (it may be on meta); takes no memory, no files."""
    from offload.partition import plan_for

    return plan_for(model, load_policy(policy))


__all__ = [
    "AdamW",
    "BudgetError",
    "Adafactor",
    "Lion",
    "NumericsError",
    "OffloadError",
    "OffloadPolicy",
    "Plan",
    "PolicyError",
    "SCALE",
    "SGD",
    "Session",
    "StateError",
    "StepResult",
    "StorageError",
    "Torch",
    "load_policy",
    "load_pretrained",
    "offload",
    "plan_for",
]
