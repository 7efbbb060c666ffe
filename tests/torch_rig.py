"""Torch optimizers for tests: the cases, the same class in memory, and a run through the tiers."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import twins
from chaos import small_units
from parity import (
    Recipe,
    Record,
    Variant,
    assert_same,
    bits,
    make_scheduler,
    param_groups,
    prepare,
    run_plain,
    train,
    variant_policy,
    without_grads,
)
from torch import Tensor, nn
from zoo import ZOO

import offload
from offload.torchstate import defaults_of, optimizer_class

LLAMA = ZOO["llama"]
STATE = "torch_state."
RECIPE = Recipe(steps=4)


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer and the arguments that the policy and the loop both give it."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cls(self) -> type[torch.optim.Optimizer]:
        return optimizer_class(self.name)

    @property
    def make(self) -> Callable[..., offload.Torch]:
        return functools.partial(offload.Torch, self.cls, **self.options)

    def policy(self, policy: dict[str, Any]) -> dict[str, Any]:
        policy["optimizer"] |= {"kind": "torch", "name": self.name, "options": self.options}
        return policy

    def __str__(self) -> str:
        return "-".join([self.name, *self.options])


CENTERED = Case("RMSprop", {"momentum": 0.9, "centered": True})
NADAM = Case("NAdam")
ADAFACTOR = Case("Adafactor")
CASES = [
    *(CENTERED, NADAM, ADAFACTOR, Case("AdamW", {"amsgrad": True}), Case("Adamax")),
    *(Case("RMSprop"), Case("Adagrad", {"initial_accumulator_value": 0.1})),
    Case("SGD", {"momentum": 0.9, "dampening": 0.1}),
]
OTHERS = [Case(name) for name in ("ASGD", "Adadelta", "Adam", "RAdam", "Rprop", "SGD")]
IN_RAM = Variant("RAM", placement="ram")
MIXED = Variant("mixed", placement="mixed", num_paths=2)
FORMATS = ("exact", "fp32", "int8")


class Plain:
    """The same class on fp32 masters in memory, in the place of parity.PlainAdamW. In format int8
    the masters are rounded to 24 bits before the first step and after every one; a block of which
    nothing is trained has no residue, and is rounded once, to bf16.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, format: str, *, case: Case) -> None:
        self.format, self.model = format, model
        self.masters = {n: p.detach().float().clone() for n, p in model.named_parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        trained = {_block(name) for name, p in model.named_parameters() if p.requires_grad}
        self.rounded = {n for n in self.masters if format == "int8" and _block(n) in trained}
        groups = param_groups(model, recipe)
        for group in groups:
            group["params"] = [(names[id(p)], self.masters[names[id(p)]]) for p in group["params"]]
        options = {"foreach": False} if "foreach" in defaults_of(case.cls, {}) else {}
        self.optimizer = case.cls(groups, **case.options, **options)
        self.scheduler = make_scheduler(self.optimizer, recipe)
        self._round()
        self._show()

    def _round(self) -> None:
        for name in self.rounded:
            flat = self.masters[name].numpy().reshape(-1)
            flat[:] = twins.join_fp24(*twins.split_fp24(flat))

    def _show(self) -> None:
        for name, p in self.model.named_parameters():
            weight = torch.from_numpy(self.state[name]["weight"].copy())
            p.data = (weight if self.format == "fp32" else weight.view(torch.bfloat16)).view(
                p.shape
            )

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        planes = {}
        for name, master in self.masters.items():
            flat = master.numpy().reshape(-1)
            if self.format == "fp32":
                parts: tuple[Any, ...] = (flat,)
            else:
                parts = (twins.split_fp24 if name in self.rounded else twins.split_fp32)(flat)
            planes[name] = dict(zip(("weight", "residue"), parts, strict=False))
        return planes

    def step(self, grads: dict[str, Tensor | None], scale: float) -> None:
        for name, master in self.masters.items():
            grad = grads.get(name)
            master.grad = None if grad is None else grad.view(master.shape) * scale
        self.optimizer.step()
        self._round()
        if self.scheduler is not None:
            self.scheduler.step()
        self._show()

    def kept(self, key: str, name: str) -> Tensor | None:
        """What the optimizer keeps under a key; None where it keeps nothing yet."""
        return self.optimizer.state.get(self.masters[name], {}).get(key)


def _block(name: str) -> str:
    return ".".join(name.split(".")[:3])  # model.layers.0, or a parameter outside of them


def policy_of(case: Case, format: str, variant: Variant, directory: Path) -> dict[str, Any]:
    """The policy of a variant; `mixed` pins about half of what this optimizer's state takes."""
    policy = case.policy(variant_policy(variant, format, directory, LLAMA))
    if variant.placement == "mixed":
        policy["tiers"]["cpu"] |= {"pin": False, "budget": "64MiB"}
        plan = offload.plan_for(LLAMA.make_model(), policy)
        nbytes = plan.slab_nbytes + plan.beside_nbytes + plan.state_nbytes // 2
        policy["tiers"]["cpu"] |= {"pin": "auto", "budget": nbytes}
    return policy


def run_tiers(
    case: Case, format: str, variant: Variant, directory: Path, recipe: Recipe = RECIPE
) -> tuple[Record, dict[str, tuple[int, ...]], list[float]]:
    """Train through the tiers; also the shapes of all that the optimizer keeps, and the norms."""
    model = prepare(LLAMA.make_model(), recipe, format)
    with (
        small_units(variant.small_numel),
        offload.offload(model, policy_of(case, format, variant, directory)) as engine,
    ):
        assert bool(engine.plan.pinned) or variant.placement not in ("ram", "mixed")
        assert engine.plan.uses_nvme or variant.placement == "ram"
        eager = variant.update == "eager"
        result = train(engine, LLAMA, recipe, format, grads=not eager, make=case.make)
        shapes = {
            f"{STATE}{entry.name}[{param.name}]": entry.shape
            for spec in engine.plan.specs
            for param in spec.params
            for entry in param.state
            if param.trainable
        }
    return result.record, shapes, result.norms


def run_in_memory(
    case: Case, format: str, shapes: dict[str, tuple[int, ...]], recipe: Recipe, norms: list[float]
) -> Record:
    """The same run in plain torch; what never had a gradient keeps zeros in the tiers."""
    made: list[Plain] = []

    def make(model: nn.Module, recipe: Recipe, format: str) -> Any:
        made.append(Plain(model, recipe, format, case=case))
        return made[0]

    record = run_plain(LLAMA, recipe, format, make=make, norms=norms).record
    for key, shape in shapes.items():
        plane, name = key.removesuffix("]").split("[")
        kept = made[0].kept(plane.removeprefix(STATE), name)
        assert kept is None or tuple(kept.shape) == shape
        record[key] = bits(torch.zeros(shape) if kept is None else kept)
    return record


def check(case: Case, format: str, directory: Path, *variants: Variant, recipe: Recipe) -> None:
    base, shapes, norms = run_tiers(case, format, Variant("NVMe"), directory / "base", recipe)
    memory = run_in_memory(case, format, shapes, recipe, norms)
    assert_same(base, memory, only=lambda key: not key.startswith("norm"))
    for variant in variants:
        got, _, _ = run_tiers(case, format, variant, directory / variant.name, recipe)
        assert_same(got, base, only=without_grads)
