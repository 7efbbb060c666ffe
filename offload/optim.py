"""Optimizers whose state lives in the tiers. They are torch.optim.Optimizers: param groups and
schedulers work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from offload.chunk import Chunk, Ops
from offload.errors import StateError
from offload.factored import AdafactorParam, FactoredStep
from offload.formats import Plane
from offload.optimstate import TorchState
from offload.routing import Owner, owner_of
from offload.spec import ParamSpec
from offload.stats import StepResult
from offload.update import AdamWOp, FactoredOp, LionOp, Op, SGDOp, pack_ops

_Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]]


class TierOptimizer(torch.optim.Optimizer):
    """What the optimizers here share. `kind` is the word of the policy; `_op` the step of a group.

    Create one inside the context: every parameter must belong to one offloaded model, whose
    optimizer.kind is this one. Hyperparameters are captured at step().
    """

    kind: str
    # torch's words for what is kept of a parameter; None: it cannot leave the tiers.
    moments: ClassVar[Mapping[str, Plane] | None] = None
    torch_group: ClassVar[dict[str, Any]] = {}  # what groups of torch's optimizer have beside ours

    def __init__(self, params: _Params, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.last_step: StepResult | None = None
        self._owner = self._find_owner()
        self._group_of = self._index_groups()
        self._owner.attach(self)

    def _op(self, group: dict[str, Any], common: dict[str, Any]) -> Op:
        """The step of a group's parameter; `common` has the fields of Op."""
        raise NotImplementedError

    def _find_owner(self) -> Owner:
        owners = {id(owner): owner for owner in map(owner_of, self._all_params())}
        if len(owners) != 1 or None in owners.values():
            raise StateError(
                f"offload.{type(self).__name__} takes the parameters of one offloaded model: "
                "create it inside `with offload.offload(model, ...)`, from model.parameters()."
            )
        owner = next(iter(owners.values()))
        if owner is None:
            raise StateError(f"offload.{type(self).__name__} was given no parameters.")
        return owner

    def _all_params(self) -> list[torch.Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _index_groups(self) -> dict[int, int]:
        return {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "_group_of"):
            self._group_of = self._index_groups()

    def ops_for(
        self, chunk: Chunk, positions: Iterable[int], scales: dict[tuple[int, int], float]
    ) -> list[Op]:
        """The update of the given parameters of a chunk, with the present hyperparameters; counts
        their steps.
        """
        captured = self._capture(chunk, positions, scales)
        return [self._op(group, common) for _, group, common in captured]

    def _capture(
        self, chunk: Chunk, positions: Iterable[int], scales: dict[tuple[int, int], float]
    ) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
        """Yield (position, group, fields of Op) of every parameter that is this optimizer's, and
        count its step.
        """
        for position in sorted(positions):
            spec, group_index = (
                chunk.spec.params[position],
                self._group_of.get(id(chunk.params[position])),
            )
            if group_index is None:
                continue
            group = self.param_groups[group_index]
            chunk.num_steps[position] += 1
            common = {
                "begin": spec.offset,
                "end": spec.offset + spec.numel,
                "step": chunk.num_steps[position],
                "lr": float(group["lr"]),
                "weight_decay": float(group["weight_decay"]),
                "maximize": bool(group["maximize"]),
                "grad_scale": scales.get((chunk.spec.index, position), 1.0),
                "seed": chunk.spec.index,  # so that no two chunks round by the same bits
            }
            yield position, group, common

    def update_of(
        self, chunk: Chunk, positions: Iterable[int], scales: dict[tuple[int, int], float]
    ) -> Ops | None:
        """The update of a chunk as the engine takes it; None where none of it is this optimizer's.
        Counts steps as ops_for does.
        """
        return pack_ops(self.ops_for(chunk, positions, scales)) or None

    def hyperparameters(self) -> list[tuple[Any, ...]]:
        """What eager updates captured during backward must still be true at step()."""
        return [tuple(_plain(group[key]) for key in self.defaults) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Give every gradient that has landed to its update. Returns a StepResult, which last_step
        keeps; with a closure its loss, as torch does.

        Where a gradient is not finite, nothing is changed: raises NumericsError, or with
        `optimizer.nonfinite: skip` says so in the result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last_step = self._owner.optimizer_step(self)
        return self.last_step if closure is None else loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what has landed. Gradients never stay on parameters, so there is nothing to set to
        zero.
        """
        self._owner.zero_grad()

    # ---- state: what is small, and what is not ----

    def state_dict(self) -> dict[str, Any]:
        """Param groups and step counts; the moments stay in the tiers."""
        state: dict[str, Any] = super().state_dict()
        state["num_steps"] = self._owner.step_counts(self._all_params())
        return state

    def stream_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield (name, state) of every parameter that has taken a step, in the order of the groups:
        what torch's optimizer keeps of it, in fp32 on the CPU.

        Memory: the state of one parameter. Finishes pending updates.
        """
        return ((name, state) for _, name, state in self._leaving_state().stream())

    def full_state_dict(self) -> dict[str, Any]:
        """What load_state_dict of the torch optimizer of this name takes, and of this one. Memory:
        the moments in fp32; raises StateError where tiers.cpu.budget does not leave room.
        """
        full = self.state_dict()
        full["state"] = self._leaving_state().full()
        for group in full["param_groups"]:
            group.update(self.torch_group)
        return full

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state_dict of this optimizer, of which the moments are in the tiers already, or a
        full one, of this optimizer or of torch's, whose moments are written to the tiers.

        `bf16` and `int8` round them. Raises StateError, with nothing changed, for what the tiers
        cannot keep. Memory: some MiB.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        tiers, saved = self._torch_state(), state_dict["param_groups"]
        groups = tiers.check_groups(saved, self.param_groups, self.defaults)
        ids = [number for group in saved for number in group["params"]]
        entries = tiers.check(ids, state_dict["state"], state_dict.get("num_steps"))
        if entries is not None:
            with self._owner.changing_state("load_state_dict()"):
                tiers.write(entries)
        for group, taken in zip(self.param_groups, groups, strict=True):
            group.update(copy.deepcopy(taken))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _torch_state(self) -> TorchState:
        state: TorchState = self._owner.torch_state(self._all_params(), self.moments or {})
        return state

    def _leaving_state(self) -> TorchState:
        if self.moments is None:
            raise StateError(
                f"the state of offload.{type(self).__name__} stays in the tiers: engine.state(name)"
                " shows it by parameter, and checkpoints and durability keep it."
            )
        return self._torch_state()


class AdamW(TierOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with moments in the tiers.

    Arithmetic is that of torch.optim.AdamW(fused=True) on the fp32 master.
    """

    kind = "adamw"
    moments = {"exp_avg": Plane.EXP_AVG, "exp_avg_sq": Plane.EXP_AVG_SQ}
    torch_group = {  # fused: the arithmetic that it had
        **{"amsgrad": False, "foreach": None, "capturable": False, "differentiable": False},
        **{"fused": True, "decoupled_weight_decay": True},
    }

    def __init__(
        self,
        params: _Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        _check_not_negative(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        _check_betas(type(self).__name__, betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _op(self, group: dict[str, Any], common: dict[str, Any]) -> Op:
        beta1, beta2 = map(float, group["betas"])
        return AdamWOp(beta1=beta1, beta2=beta2, eps=float(group["eps"]), **common)


class Adafactor(TierOptimizer):
    """Adam with Adafactor's factored second moment (arXiv 1804.04235): for a matrix two vectors
    instead of a moment; needs `optimizer.kind: adafactor`.

    w = (1 - lr weight_decay) w - lr m, where m is the mean (beta1) of g / max(sqrt(v), eps), and v
    moves by step**beta2_decay. The learning rate is AdamW's: steps are neither relative to the
    weights nor cut by their size (the paper's sections 6 and 8), so clip the gradient's norm, and
    warm up. `offload.Torch` runs torch's Adafactor, which has both and no momentum.
    """

    kind = "adafactor"

    def __init__(
        self,
        params: _Params,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2_decay: float = -0.8,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        _check_not_negative(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        if not 0 <= beta1 < 1:
            raise ValueError(f"Adafactor: beta1 is {beta1}; it must be in [0, 1).")
        if not beta2_decay <= 0:
            raise ValueError(f"Adafactor: beta2_decay is {beta2_decay}; it must be 0 or less.")
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def update_of(
        self, chunk: Chunk, positions: Iterable[int], scales: dict[tuple[int, int], float]
    ) -> Ops | None:
        params = []
        for position, group, common in self._capture(chunk, positions, scales):
            spec = chunk.spec.params[position]
            num_rows, num_cols = matrix_in_plan(spec)
            op = FactoredOp(
                beta1=float(group["beta1"]), eps=float(group["eps"]),
                num_rows=num_rows, num_cols=num_cols, **common,
            )  # fmt: skip
            weight = op.step ** float(group["beta2_decay"])
            params.append(AdafactorParam(position=position, op=op, state=spec.state, weight=weight))
        return FactoredStep(tuple(params)) if params else None


class SGD(TierOptimizer):
    """SGD with momentum in the tiers; needs `optimizer.kind: sgd`.

    Arithmetic is that of torch.optim.SGD on the fp32 master; fused, foreach and plain agree there.
    """

    kind = "sgd"
    moments = {"momentum_buffer": Plane.EXP_AVG}
    torch_group = {"foreach": None, "differentiable": False, "fused": None}

    def __init__(
        self,
        params: _Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        _check_not_negative(
            type(self).__name__, lr=lr, momentum=momentum, weight_decay=weight_decay
        )
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("SGD: nesterov needs a momentum above 0 and a dampening of 0.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _op(self, group: dict[str, Any], common: dict[str, Any]) -> Op:
        return SGDOp(
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            **common,
        )


class Lion(TierOptimizer):
    """Lion (arXiv 2302.06675): one moment, and steps of equal size; needs `optimizer.kind: lion`.

    Its learning rate is 3 to 10 times smaller than AdamW's, and its weight decay as much larger.
    """

    kind = "lion"
    moments = {"exp_avg": Plane.EXP_AVG}

    def __init__(
        self,
        params: _Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        _check_not_negative(type(self).__name__, lr=lr, weight_decay=weight_decay)
        _check_betas(type(self).__name__, betas)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _op(self, group: dict[str, Any], common: dict[str, Any]) -> Op:
        beta1, beta2 = map(float, group["betas"])
        return LionOp(beta1=beta1, beta2=beta2, **common)


def matrix_in_plan(spec: ParamSpec) -> tuple[int, int]:
    """Rows and columns of a parameter's matrices, as its sums have been taken."""
    if spec.matrix is None:
        raise StateError(f"the plan has no sums for {spec.name}: it is of another optimizer.kind.")
    return spec.matrix


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _check_not_negative(who: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{who}: {name} is {value}; it must be 0 or more.")


def _check_betas(who: str, betas: tuple[float, float]) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{who}: betas are {betas}; both must be in [0, 1).")
