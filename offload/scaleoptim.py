"""SCALE on state in the tiers: matrices in tiles, the last layer in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from offload.chunk import Chunk, Ops
from offload.errors import StateError
from offload.factored import FactoredStep, ScaleParam
from offload.formats import Plane
from offload.optim import TierOptimizer, matrix_in_plan
from offload.routing import Owner
from offload.scale import (
    EMBEDDING,
    LAST,
    MOMENTUM,
    NORM_MIN,
    PlainScale,
    check_scale,
    is_input_first,
)
from offload.torchstep import ParamStep, TorchStep
from offload.update import FactoredOp

_Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]]


class SCALE(TierOptimizer):
    """SCALE (arXiv 2506.16659): SGD on normalised columns, momentum in the layer `last` alone, Adam
    on vectors; needs `optimizer.kind: scale`, and where `last` is another name, `options: {last:}`.

    Parameters with `embedding` in their name are kept input first, but for `last`, also where that
    is a tied embedding. The chunk of `last` is updated on whole planes ([Note: torch step]),
    because a momentum has no norm before all of it is there; all others in tiles. Arguments that
    the policy's options have must be the same here. See [Note: SCALE].
    """

    kind = "scale"

    def __init__(
        self,
        params: _Params,
        lr: float = 1e-3,
        momentum: float = MOMENTUM,
        weight_decay: float = 0.0,
        last: str | None = LAST,
        embedding: str = EMBEDDING,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        rms: bool = False,
        maximize: bool = False,
    ) -> None:
        self._checked: set[tuple[Any, ...]] = set()
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "last": last,
            "embedding": embedding, "betas": betas, "eps": eps, "rms": rms, "maximize": maximize,
        }  # fmt: skip
        check_scale(defaults)
        super().__init__(params, defaults)

    def _find_owner(self) -> Owner:
        owner = super()._find_owner()
        policy = owner.policy.optimizer
        if policy.kind == self.kind:  # else attach() says what is wrong
            self._check_groups(owner)
            self._check_policy(policy.options)
        return owner

    def _check_policy(self, options: Mapping[str, Any]) -> None:
        """Raise StateError where a group has another argument than the policy says: only
        `offload finetune` would have taken it from there.
        """
        for group in self.param_groups:
            for name, value in options.items():
                in_use = name != "momentum" or group["last"] is not None
                if name != "last" and in_use and group[name] != value:
                    raise StateError(
                        f"optimizer.options in the policy has {name}: {value}, and offload.SCALE "
                        f"was given {name}={group[name]}. Give it the same, or take it out of the "
                        "policy."
                    )

    def _check_groups(self, owner: Owner) -> None:
        """Raise ValueError for a group's hyperparameter, StateError where a parameter would keep
        another state than the plan has room for.
        """
        for index, group in enumerate(self.param_groups):
            check_scale(group)
            key = (index, len(group["params"]), group["last"], bool(group["momentum"]))
            if key in self._checked:
                continue
            for param in group["params"]:
                spec = owner.spec_of(param)
                kept = any(entry.name == "momentum_buffer" for entry in spec.state)
                wanted = spec.name == group["last"] and bool(group["momentum"])
                if spec.trainable and kept != wanted:
                    raise _mismatch(spec.name, group, kept=kept)
            self._checked.add(key)

    def hyperparameters(self) -> list[tuple[Any, ...]]:
        self._check_groups(self._owner)
        return super().hyperparameters()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As TierOptimizer's; also raises ValueError or StateError, with nothing changed, for what
        a group has become since.
        """
        self._check_groups(self._owner)
        return super().step(closure)

    def update_of(
        self, chunk: Chunk, positions: Iterable[int], scales: dict[tuple[int, int], float]
    ) -> Ops | None:
        captured = list(self._capture(chunk, positions, scales))
        if not captured:
            return None
        if chunk.spec.state_plane is Plane.TORCH_STATE:
            steps = [_in_torch(*row) for row in captured]
            return TorchStep(cls=PlainScale, spec=chunk.spec, steps=steps)
        return FactoredStep(tuple(_in_tiles(chunk, *row) for row in captured))


def _mismatch(name: str, group: Mapping[str, Any], *, kept: bool) -> StateError:
    if kept:
        return StateError(
            f"offload.SCALE(last={group['last']!r}, momentum={group['momentum']}), and the plan "
            f"has a momentum for {name}. Set optimizer.options: {{last: null}} in the policy, or "
            "give SCALE, and the group that has it, this name and a momentum above 0."
        )
    return StateError(
        f"the plan has no momentum for {name}. Set optimizer.options: {{last: {name}}} in the "
        "policy, or give SCALE last=None."
    )


def _in_torch(position: int, group: dict[str, Any], common: dict[str, Any]) -> ParamStep:
    sign = -1.0 if common["maximize"] else 1.0
    options = {key: value for key, value in group.items() if key not in ("params", "maximize")}
    return ParamStep(
        position=position,
        options=options | {"lr": common["lr"], "weight_decay": common["weight_decay"]},
        is_first=common["step"] == 1,
        grad_scale=sign * common["grad_scale"],
    )


def _in_tiles(
    chunk: Chunk, position: int, group: dict[str, Any], common: dict[str, Any]
) -> ScaleParam:
    spec = chunk.spec.params[position]
    num_rows, num_cols = matrix_in_plan(spec)
    op = FactoredOp(beta1=None, eps=NORM_MIN, num_rows=num_rows, num_cols=num_cols, **common)
    beta1, beta2 = map(float, group["betas"])
    return ScaleParam(
        position=position, op=op, state=spec.state, rms=bool(group["rms"]), betas=(beta1, beta2),
        vector_eps=float(group["eps"]),
        by_cols=is_input_first(
            spec.name, len(spec.shape), embedding=group["embedding"], last=group["last"]
        ),
    )  # fmt: skip
