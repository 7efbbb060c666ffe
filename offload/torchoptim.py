"""Any optimizer of torch on state in the tiers: slower than the native ones, and as exact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from offload.chunk import Chunk, Ops
from offload.errors import PolicyError, StateError
from offload.optim import TierOptimizer
from offload.routing import Owner
from offload.sizes import TORCH_NAMES, TORCH_REFUSED
from offload.spec import ParamSpec
from offload.torchstate import (
    StateEntry,
    defaults_of,
    entries_of,
    freeze,
    optimizer_class,
)
from offload.torchstep import ParamStep, TorchStep

_NO_STATE = ("lr", "weight_decay", "maximize")  # of no optimizer do they decide what it keeps
_Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]]


class Torch(TierOptimizer):
    """An optimizer of torch.optim with its state in the tiers; needs
    `optimizer: {kind: torch, name: ...}` in the policy.

    Takes the class, the parameters and the class's own arguments. Its step() runs chunk by chunk on
    fp32 masters and fp32 gradients, with foreach and fused off; format int8 rounds the masters to
    24 bits after each step, and nothing else. See [Note: torch step].
    """

    kind = "torch"

    def __init__(self, cls: type[torch.optim.Optimizer], params: _Params, **options: Any) -> None:
        self.cls = cls
        self._checked: set[tuple[int, ...]] = set()
        _check_class(cls)
        try:
            defaults = defaults_of(cls, options, f"offload.Torch({cls.__name__})")
        except PolicyError as error:
            raise ValueError(str(error)) from error
        super().__init__(params, defaults)

    def _find_owner(self) -> Owner:
        owner = super()._find_owner()
        self._check_layout(owner)
        return owner

    def _check_layout(self, owner: Owner) -> None:
        """Raise StateError where a parameter would keep another state than the plan has room for.

        Which state an option brings depends on whether it is set, so a group is looked at again
        only when that has changed.
        """
        for index, group in enumerate(self.param_groups):
            options = self._options(index)
            key = (index, len(group["params"]), *(bool(value) for value in options.values()))
            if key in self._checked:
                continue
            for param in group["params"]:
                spec = owner.spec_of(param)
                kept = entries_of(self.cls, freeze(options), spec.name, spec.shape, 0)
                if spec.trainable and _facts(kept) != _facts(spec.state):
                    raise self._mismatch(spec, kept)
            self._checked.add(key)

    def _mismatch(self, spec: ParamSpec, kept: Sequence[StateEntry]) -> StateError:
        usual = defaults_of(self.cls, {})
        options = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in self.defaults.items()
            if key not in _NO_STATE and value != usual.get(key)
        }
        written = json.dumps(options).replace('"', "")
        return StateError(
            f"offload.Torch({self.cls.__name__}) keeps [{', '.join(e.name for e in kept)}] for "
            f"{spec.name}, and the plan has room for [{', '.join(e.name for e in spec.state)}]. "
            "All param groups must keep the same; set in the policy: optimizer: "
            f"{{kind: torch, name: {self.cls.__name__}, options: {written}}}"
        )

    def hyperparameters(self) -> list[tuple[Any, ...]]:
        self._check_layout(self._owner)
        return super().hyperparameters()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self._check_layout(self._owner)
        return super().step(closure)

    def update_of(
        self, chunk: Chunk, positions: Iterable[int], scales: dict[tuple[int, int], float]
    ) -> Ops | None:
        steps = []
        for position in sorted(positions):
            index = self._group_of.get(id(chunk.params[position]))
            if index is None:
                continue
            steps.append(
                ParamStep(
                    position=position,
                    options=self._options(index),
                    is_first=chunk.num_steps[position] == 0,
                    grad_scale=scales.get((chunk.spec.index, position), 1.0),
                )
            )
            chunk.num_steps[position] += 1
        return TorchStep(cls=self.cls, spec=chunk.spec, steps=tuple(steps)) if steps else None

    def _options(self, index: int) -> dict[str, Any]:
        group = self.param_groups[index]
        return {
            key: value.item() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key in self.defaults
        }


def _facts(entries: Sequence[StateEntry]) -> list[tuple[Any, ...]]:
    return [(entry.name, entry.shape, entry.dtype) for entry in entries]


def _check_class(cls: type[torch.optim.Optimizer]) -> None:
    name = getattr(cls, "__name__", str(cls))
    if name in TORCH_REFUSED:
        raise StateError(f"offload.Torch: {name} cannot run here: {TORCH_REFUSED[name]}.")
    if name not in TORCH_NAMES or cls is not optimizer_class(name):
        raise StateError(
            f"offload.Torch runs these classes of torch.optim: {', '.join(TORCH_NAMES)}. "
            f"{name} is none of them."
        )
