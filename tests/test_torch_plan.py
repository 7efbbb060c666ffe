"""What the plan and the policy say of torch optimizers, and what they refuse."""

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import bits, make_policy
from steps import one_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_rig import ADAFACTOR, CASES, CENTERED, LLAMA, NADAM, OTHERS, Case

import offload
from offload.errors import PolicyError, StateError
from offload.formats import Plane
from offload.plan import SCRATCH
from offload.space import TORCH_TEMPORARIES
from offload.torchstate import defaults_of, entries_of, freeze, make_part, optimizer_class

# What the plan says


@pytest.mark.parametrize(("format", "master_nbytes"), [("exact", 4), ("int8", 3)])
def test_the_plan_counts_the_plane_and_the_scratch(
    format: str, master_nbytes: int, nvme_dir: Path
) -> None:
    """A chunk's planes, and the master and gradient of its largest parameter in fp32."""
    layers = nn.ModuleList(nn.Linear(256, 128, bias=False) for _ in range(4))
    model, numel = nn.ModuleDict({"layers": layers}), 256 * 128
    plans = {}
    for case in (NADAM, ADAFACTOR, Case("SGD")):
        policy = case.policy(make_policy(nvme_dir, format=format))
        plan = plans[case.name] = offload.plan_for(model, policy)
        terms = dict(plan.terms())
        state = sum(spec.nbytes(Plane.TORCH_STATE, plan.fmt) for spec in plan.specs) // 4
        planes_nbytes = (master_nbytes + 4) * numel + state  # with both halves of the gradient
        assert terms[SCRATCH] == planes_nbytes + 8 * numel
        made = 4 * sum(entry.num_items for entry in plan.specs[0].params[0].state)
        assert plan.beside_nbytes == TORCH_TEMPORARIES * 4 * numel + made
        assert f"  {SCRATCH} " in str(plan) and "beside it" in str(plan)
        with offload.offload(model, policy) as engine:
            assert engine.memory().arenas[SCRATCH] == terms[SCRATCH]
    kept = {n: plan.state_nbytes / (4 * numel) - master_nbytes for n, plan in plans.items()}
    assert kept["SGD"] == 0 and f"({master_nbytes} B/param)" in str(plans["SGD"])
    assert 8 < kept["NAdam"] < 8.2
    assert 0 < kept["Adafactor"] < 0.2


def test_a_budget_without_room_for_torch_is_refused_with_one_that_has_it(nvme_dir: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1024, 1024) for _ in range(3))})
    policy = NADAM.policy(make_policy(nvme_dir, cpu_budget="16MiB"))
    with pytest.raises(offload.BudgetError, match="beside the slab 20 MiB") as refused:
        offload.plan_for(model, policy)
    named = re.search(r"at least (\d+MiB)", str(refused.value))
    policy["tiers"]["cpu"]["budget"] = named[1]
    plan = offload.plan_for(model, policy)
    assert plan.slab_nbytes + plan.beside_nbytes <= plan.cpu_budget_nbytes
    policy["tiers"]["cpu"]["budget"] = f"{int(named[1][:-3]) - 1}MiB"
    with pytest.raises(offload.BudgetError):
        offload.plan_for(model, policy)


class Peak(TorchDispatchMode):
    """The most bytes that live at a time of what torch allocates inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)
        }
        for tensor in filter(is_tensor, tree_leaves(result)):
            address = tensor.untyped_storage().data_ptr()
            if address not in known:
                self.alive[address] = (weakref.ref(tensor), tensor.untyped_storage().nbytes())
        now = sum(nbytes for ref, nbytes in self.alive.values() if ref() is not None)
        self.nbytes = max(self.nbytes, now)
        return result


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_a_step_allocates_no_more_than_the_plan_allows(case: Case) -> None:
    """That is some temporaries, and the state that a first step makes."""
    options = {**defaults_of(case.cls, case.options), "weight_decay": 0.1, "maximize": True}
    leaf = torch.ones(64, 256)
    leaf.grad = torch.ones(64, 256)
    with Peak() as peak:
        part = make_part(case.cls, leaf, "lm_head.weight", options)
        part.step()
        part.step()
    state = sum(tensor.nbytes for tensor in part.state[leaf].values())
    assert 0 < peak.nbytes <= TORCH_TEMPORARIES * leaf.nbytes + state + 4096


def test_shapes_of_the_state_follow_the_parameters() -> None:
    def shapes(name: str, shape: tuple[int, ...], **options: Any) -> dict[str, tuple[int, ...]]:
        cls = optimizer_class(name)
        entries = entries_of(cls, freeze(defaults_of(cls, options)), "p", shape, 0)
        ends = [entry.offset + entry.num_items for entry in entries]
        assert all(a <= b.offset for a, b in zip(ends, entries[1:], strict=False))
        return {entry.name: entry.shape for entry in entries}

    assert shapes("Adafactor", (64, 64)) == {"step": (), "row_var": (64, 1), "col_var": (1, 64)}
    assert shapes("Adafactor", (64, 1)) == {"step": (), "row_var": (64, 1), "col_var": (1, 1)}
    assert shapes("Adafactor", (9,)) == {"step": (), "variance": (9,)}
    assert shapes("Adafactor", ()) == {"step": (), "variance": ()}
    assert shapes("NAdam", (2, 3, 4, 5))["mu_product"] == ()
    assert shapes("NAdam", (2, 3, 4, 5))["exp_avg"] == (2, 3, 4, 5)
    assert shapes("SGD", (3,)) == {}
    assert shapes("SGD", (3,), momentum=0.5) == {"momentum_buffer": (3,)}


# Refusals


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"kind": "torch"}, "None is no optimizer that runs here"),
        ({"kind": "torch", "name": "os.system"}, "'os.system' is no optimizer that runs here"),
        ({"kind": "torch", "name": "LBFGS"}, "LBFGS cannot run here: it calls the loss several"),
        ({"kind": "torch", "name": "SparseAdam"}, "sparse gradients"),
        ({"kind": "torch", "name": "Muon"}, "takes matrices only"),
        ({"kind": "adamw", "name": "RMSprop"}, "'RMSprop' needs optimizer.kind: torch"),
        ({"options": {"momentum": 0.9}}, "needs optimizer.kind: torch"),
    ],
)
def test_the_policy_refuses(optimizer: dict[str, Any], message: str, nvme_dir: Path) -> None:
    policy = make_policy(nvme_dir)
    policy["optimizer"] |= optimizer
    with pytest.raises(PolicyError, match=message):
        offload.load_policy(policy)


def test_bf16_would_be_exact(nvme_dir: Path) -> None:
    with pytest.raises(PolicyError, match=r"optimizer: .*bf16 would be exact.*set it to exact"):
        offload.load_policy(NADAM.policy(make_policy(nvme_dir, format="bf16")))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("RMSprop", {"momentun": 0.9}), "RMSprop has no momentun"),
        (Case("RMSprop", {"momentum": -1.0}), "RMSprop refuses .*Invalid momentum"),
        (Case("AdamW", {"fused": True}), "fused has no place here"),
    ],
)
def test_options_that_cannot_be_are_refused(case: Case, message: str, nvme_dir: Path) -> None:
    with pytest.raises(PolicyError, match=message):
        offload.offload(LLAMA.make_model(), case.policy(make_policy(nvme_dir)))


def test_another_layout_than_the_planned_is_refused(nvme_dir: Path) -> None:
    policy = Case("RMSprop").policy(make_policy(nvme_dir))
    with offload.offload(LLAMA.make_model(), policy) as engine:
        params = list(engine.model.parameters())
        for refused, message in (
            (CENTERED, r"name: RMSprop, options: \{momentum: 0.9, centered: true\}"),
            (Case("Adagrad"), "set in the policy: optimizer: {kind: torch, name: Adagrad"),
        ):
            with pytest.raises(StateError, match=message):
                refused.make(params)
        with pytest.raises(StateError, match=r"offload\.AdamW was created for a model"):
            offload.AdamW(params)
        groups = [{"params": params[:3]}, {"params": params[3:], "momentum": 0.9}]
        with pytest.raises(StateError, match="All param groups must keep the same"):
            Case("RMSprop").make(groups)
        for cls, message in ((torch.optim.LBFGS, "LBFGS cannot run here"), (Fake, "none of them")):
            with pytest.raises(StateError, match=message):
                offload.Torch(cls, params)
        with pytest.raises(ValueError, match="Invalid learning rate"):
            Case("RMSprop").make(params, lr=-1.0)
        optimizer = Case("RMSprop").make(params)
        one_step(engine, optimizer, LLAMA, 0)
        before = {name: bits(t) for name, t in engine.state("lm_head.weight").items()}
        optimizer.param_groups[0]["momentum"] = 0.9
        with pytest.raises(StateError, match="keeps"):
            one_step(engine, optimizer, LLAMA, 1)
        assert before == {name: bits(t) for name, t in engine.state("lm_head.weight").items()}


class Fake(torch.optim.SGD):
    """Not one of torch.optim, whatever it is called."""


Fake.__name__ = "RMSprop"


def test_a_nan_gradient_stops_the_step_before_it_begins(nvme_dir: Path) -> None:
    policy = NADAM.policy(make_policy(nvme_dir, optimizer__update="deferred"))
    with offload.offload(LLAMA.make_model(), policy) as engine:
        optimizer = NADAM.make(engine.model.parameters())
        one_step(engine, optimizer, LLAMA, 0)
        before = {name: bits(t) for name, t in engine.state("lm_head.weight").items()}
        loss = LLAMA.loss(engine.model, LLAMA.make_batch(1, torch.bfloat16))
        (loss * float("nan")).backward()
        with pytest.raises(offload.NumericsError):
            optimizer.step()
        optimizer.zero_grad()
        assert before == {name: bits(t) for name, t in engine.state("lm_head.weight").items()}
