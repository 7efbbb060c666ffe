"""Optimizers of torch on offloaded state: the bits of the same class on fp32 masters in memory,
wherever the planes lie.
"""

import dataclasses
import functools
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from chaos import small_units
from parity import (
    Recipe,
    Record,
    Variant,
    assert_same,
    bits,
    make_policy,
    make_scheduler,
    param_groups,
    prepare,
    record_rest,
    record_state,
    run_plain,
    train,
    variant_policy,
    without_grads,
)
from steps import one_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import ZOO

import offload
from offload.errors import PolicyError, StateError
from offload.formats import Plane
from offload.plan import SCRATCH
from offload.space import TORCH_TEMPORARIES
from offload.torchstate import defaults_of, entries_of, freeze, make_part, optimizer_class

LLAMA = ZOO["llama"]
RECIPE = Recipe(steps=4)
STATE = "torch_state."
SLOW = pytest.mark.slow


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
SCALE = Case("SCALE", {"last": "lm_head.weight"})
CASES = [
    *(CENTERED, NADAM, ADAFACTOR, SCALE, Case("AdamW", {"amsgrad": True}), Case("Adamax")),
    *(Case("RMSprop"), Case("Adagrad", {"initial_accumulator_value": 0.1})),
    Case("SGD", {"momentum": 0.9, "dampening": 0.1}),
]
OTHERS = [Case(name) for name in ("ASGD", "Adadelta", "Adam", "RAdam", "Rprop", "SGD")]
IN_RAM = Variant("RAM", placement="ram")
MIXED = Variant("mixed", placement="mixed", num_paths=2)


class Plain:
    """The same class on fp32 masters in memory, in the place of parity.PlainAdamW."""

    def __init__(self, model: nn.Module, recipe: Recipe, format: str, *, case: Case) -> None:
        self.format, self.model = format, model
        self.masters = {n: p.detach().float().clone() for n, p in model.named_parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        groups = param_groups(model, recipe)
        for group in groups:
            group["params"] = [(names[id(p)], self.masters[names[id(p)]]) for p in group["params"]]
        options = {"foreach": False} if "foreach" in defaults_of(case.cls, {}) else {}
        self.optimizer = case.cls(groups, **case.options, **options)
        self.scheduler = make_scheduler(self.optimizer, recipe)
        self._show()

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
            halves = (flat,) if self.format == "fp32" else twins.split_fp32(flat)
            planes[name] = dict(zip(("weight", "residue"), halves, strict=False))
        return planes

    def step(self, grads: dict[str, Tensor | None], scale: float) -> None:
        for name, master in self.masters.items():
            grad = grads.get(name)
            master.grad = None if grad is None else grad.view(master.shape) * scale
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self._show()

    def kept(self, key: str, name: str) -> Tensor | None:
        """What the optimizer keeps under a key; None where it keeps nothing yet."""
        return self.optimizer.state.get(self.masters[name], {}).get(key)


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
    with small_units(variant.small_numel):
        with offload.offload(model, policy_of(case, format, variant, directory)) as engine:
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


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_training_has_torchs_bits_wherever_the_planes_lie(case: Case, nvme_dir: Path) -> None:
    check(case, "exact", nvme_dir, IN_RAM, MIXED, recipe=RECIPE)


def test_in_fp32_too(nvme_dir: Path) -> None:
    check(ADAFACTOR, "fp32", nvme_dir, recipe=RECIPE)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["exact", "fp32"])
@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_every_optimizer_every_way(case: Case, format: str, nvme_dir: Path) -> None:
    recipe = Recipe(steps=4, accumulation=2, clip=0.5, scheduler=True)
    chaos = Variant("oneslot", placement="oneslot", num_paths=2, chaos=True)
    threads = Variant("threads", io="threads", update="deferred")
    check(case, format, nvme_dir, IN_RAM, MIXED, chaos, threads, recipe=recipe)


@pytest.mark.parametrize(
    ("update", "device"),
    [("eager", "standin")]
    + [pytest.param(*row, marks=SLOW) for row in (("deferred", "standin"), ("eager", "cpu"))],
)
def test_eager_deferred_and_a_device_change_nothing(
    update: str, device: str, nvme_dir: Path
) -> None:
    base, _, _ = run_tiers(NADAM, "exact", Variant("NVMe"), nvme_dir / "base")
    variant = Variant("other", update=update, device=device, chaos=True)
    got, _, _ = run_tiers(NADAM, "exact", variant, nvme_dir / "other")
    assert_same(got, base, only=without_grads)


@pytest.mark.parametrize("case", [CENTERED, pytest.param(SCALE, marks=SLOW)], ids=str)
def test_clipping_accumulation_groups_and_what_is_frozen(case: Case, nvme_dir: Path) -> None:
    """Rates that change, two groups with their own, a frozen block, micro-batches added in fp32."""
    recipe = Recipe(
        steps=4, accumulation=2, clip=0.5, groups=case is CENTERED, scheduler=True,
        freeze=("model.layers.1", "model.layers.2.self_attn"),
    )  # fmt: skip
    check(case, "exact", nvme_dir, MIXED, recipe=recipe)


def test_a_parameter_without_a_gradient_is_left_alone(nvme_dir: Path) -> None:
    """Every other step uses one of two layers of a block; state begins when a gradient does."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a if x.shape[0] == 2 else self.b)(x).tanh()

    torch.manual_seed(0)
    plain = nn.Sequential(*(Block() for _ in range(3)))
    tiered = nn.Sequential(*(Block() for _ in range(3)))
    tiered.load_state_dict(plain.state_dict())
    batches = [torch.randn(2 if step in (1, 3) else 3, 64) for step in range(4)]
    case = Case("NAdam", {"decoupled_weight_decay": True})
    theirs = torch.optim.NAdam(plain.parameters(), foreach=False, weight_decay=0.1, **case.options)
    policy = case.policy(make_policy(nvme_dir, format="fp32"))
    with small_units(1024), offload.offload(tiered, policy) as engine:
        ours = case.make(tiered.parameters(), weight_decay=0.1)
        for batch in batches:
            for model, optimizer in ((plain, theirs), (tiered, ours)):
                optimizer.zero_grad()
                model(batch).square().sum().backward()
                optimizer.step()
        for name, p in plain.named_parameters():
            state = engine.state(name)
            assert torch.equal(state["weight"], p), name
            for key, value in theirs.state[p].items():
                assert torch.equal(state[STATE + key], value), (name, key)


@pytest.mark.parametrize(
    ("case", "placement"),
    [(NADAM, "mixed")]
    + [
        pytest.param(*row, marks=SLOW)
        for row in ((NADAM, "nvme"), (NADAM, "ram"), (ADAFACTOR, "nvme"), (SCALE, "mixed"))
    ],
)
def test_a_run_in_pieces_is_the_run(case: Case, placement: str, nvme_dir: Path) -> None:
    """State and its scalars are committed with the weights, and come back with them."""
    variant = Variant("run", placement=placement)

    def run(folder: Path, until: int, weights: str | None, durability: str) -> Record:
        policy = policy_of(case, "exact", variant, folder)
        policy["tiers"]["nvme"] = policy["tiers"]["nvme"] or {"paths": [str(folder / "drive")]}
        policy["durability"] = durability
        record: Record = {}
        with offload.offload(LLAMA.make_model(), policy, weights=weights) as engine:
            optimizer = case.make(engine.model.parameters(), lr=1e-2)
            for step in range(engine.run.num_steps, until):
                one_step(engine, optimizer, LLAMA, step)
            engine.flush()
            record_state(record, engine)
            record_rest(record, engine.model)
        return record

    with small_units(1024):
        want = run(nvme_dir / "plain", 5, None, "off")
        run(nvme_dir / "run", 2, None, "step")
        run(nvme_dir / "run", 3, "resume", "step")
        assert_same(run(nvme_dir / "run", 5, "resume", "step"), want)


def test_a_checkpoint_restores_the_state(nvme_dir: Path, tmp_path: Path) -> None:
    case, records = CENTERED, []
    policy = case.policy(make_policy(nvme_dir / "a", durability="step"))
    other = case.policy(make_policy(nvme_dir / "b"))
    other["tiers"]["cpu"] = {"budget": "256MiB"}
    with small_units(1024):
        with offload.offload(LLAMA.make_model(), policy) as engine:
            optimizer = case.make(engine.model.parameters(), lr=1e-2)
            one_step(engine, optimizer, LLAMA, 0)
            engine.checkpoint(tmp_path / "checkpoint").wait()
            one_step(engine, optimizer, LLAMA, 1)
            engine.flush()
            records.append({})
            record_state(records[-1], engine)
        with offload.offload(LLAMA.make_model(), other, weights=tmp_path / "checkpoint") as engine:
            one_step(engine, case.make(engine.model.parameters(), lr=1e-2), LLAMA, 1)
            engine.flush()
            records.append({})
            record_state(records[-1], engine)
    assert_same(records[1], records[0])


def test_another_optimizers_state_is_not_taken_for_this_ones(nvme_dir: Path) -> None:
    """RMSprop and Adagrad keep as much, under other names."""
    with small_units(1024):
        policy = Case("RMSprop").policy(make_policy(nvme_dir, durability="step"))
        with offload.offload(LLAMA.make_model(), policy) as engine:
            one_step(engine, Case("RMSprop").make(engine.model.parameters()), LLAMA, 0)
        for other, message in (
            (Case("Adagrad"), r"the optimizer keeps \[.*square_avg.*would keep \[.*sum"),
            (CENTERED, "the optimizer keeps"),
            (Case("SGD"), "see optimizer.kind"),
        ):
            with pytest.raises(StateError, match=message):
                policy = other.policy(make_policy(nvme_dir, durability="step"))
                offload.offload(LLAMA.make_model(), policy, weights="resume")


@pytest.mark.parametrize(
    ("case", "format", "update"),
    [
        (NADAM, "exact", "eager"),
        (NADAM, "exact", "deferred"),
        (ADAFACTOR, "exact", "eager"),
        (NADAM, "fp32", "eager"),
    ],
)
def test_a_step_moves_what_the_plan_says(
    case: Case, format: str, update: str, nvme_dir: Path
) -> None:
    layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(24))
    policy = case.policy(make_policy(nvme_dir, format=format, optimizer__update=update))
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    moved = []
    with offload.offload(nn.ModuleDict({"layers": layers}), policy) as engine:
        optimizer = case.make(layers.parameters(), lr=1e-3)
        for _ in range(8):
            x = torch.ones(1, 64, dtype=dtype)
            for layer in layers:
                x = torch.tanh(layer(x))
            x.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            moved.append(engine.stats().nbytes)
        read, written = engine.plan.traffic()
    for link, nbytes in (("nvme read", read), ("nvme write", written)):
        mean = sum(step[link] for step in moved[4:]) / 4
        assert mean == pytest.approx(nbytes, rel=0.01), link
    assert engine.stats().num_updates == len(layers)


# What the plan says


def test_the_plan_counts_the_plane_and_the_scratch(nvme_dir: Path) -> None:
    """In `exact` a chunk's planes, and the master and gradient of its largest parameter in fp32."""
    layers = nn.ModuleList(nn.Linear(256, 128, bias=False) for _ in range(4))
    model, numel = nn.ModuleDict({"layers": layers}), 256 * 128
    plans = {}
    for case in (NADAM, ADAFACTOR, Case("SGD")):
        policy = case.policy(make_policy(nvme_dir))
        plan = plans[case.name] = offload.plan_for(model, policy)
        terms = dict(plan.terms())
        state = sum(spec.nbytes(Plane.TORCH_STATE, plan.fmt) for spec in plan.specs) // 4
        assert terms[SCRATCH] == 4 * 2 * numel + state + 8 * numel
        made = 4 * sum(entry.num_items for entry in plan.specs[0].params[0].state)
        assert plan.beside_nbytes == TORCH_TEMPORARIES * 4 * numel + made
        assert f"  {SCRATCH} " in str(plan) and "beside it" in str(plan)
        with offload.offload(model, policy) as engine:
            assert engine.memory().arenas[SCRATCH] == terms[SCRATCH]
    kept = {name: plan.state_nbytes / (4 * numel) - 4 for name, plan in plans.items()}
    assert kept["SGD"] == 0 and "(4 B/param)" in str(plans["SGD"])
    assert 8 < kept["NAdam"] < 8.1
    assert 0 < kept["Adafactor"] < 0.2


def test_a_budget_without_room_for_torch_is_refused_with_one_that_has_it(nvme_dir: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1024, 1024) for _ in range(3))})
    policy = NADAM.policy(make_policy(nvme_dir, cpu_budget="16MiB"))
    with pytest.raises(offload.BudgetError, match="allocated by torch 20 MiB") as refused:
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


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_lossy_formats_are_refused(format: str, nvme_dir: Path) -> None:
    with pytest.raises(PolicyError, match=f"runs on fp32 state, and state.format is {format}"):
        offload.load_policy(NADAM.policy(make_policy(nvme_dir, format=format)))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("RMSprop", {"momentun": 0.9}), "RMSprop has no momentun"),
        (Case("RMSprop", {"momentum": -1.0}), "RMSprop refuses .*Invalid momentum"),
        (Case("AdamW", {"fused": True}), "fused has no place here"),
        (Case("SCALE", {"last": "head"}), "no parameter of that name. Set last"),
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


# SCALE


def test_scale_follows_the_paper() -> None:
    """Every output's weights get a step of norm lr; of an embedding every feature; the last layer's
    direction is an average of gradients.
    """
    model = LLAMA.make_model()
    optimizer = offload.SCALE(model.named_parameters(), lr=0.5, momentum=0.75)
    mean = torch.zeros_like(model.lm_head.weight)
    for step in range(3):
        optimizer.zero_grad()
        LLAMA.loss(model, LLAMA.make_batch(step, torch.float32)).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        mean = 0.75 * mean + 0.25 * model.lm_head.weight.grad
        want = -0.5 * mean / mean.norm(dim=1, keepdim=True)
        torch.testing.assert_close(moved["lm_head.weight"], want, atol=1e-6, rtol=1e-4)
        matrix = "model.layers.0.mlp.up_proj.weight"
        grad = model.get_parameter(matrix).grad
        want = -0.5 * grad / grad.norm(dim=1, keepdim=True)
        torch.testing.assert_close(moved[matrix], want, atol=1e-6, rtol=1e-4)
        norms = moved["model.embed_tokens.weight"].norm(dim=0)
        torch.testing.assert_close(norms, torch.full_like(norms, 0.5))
    assert len(optimizer.state[model.get_parameter(matrix)]) == 0


def test_scale_steps_vectors_as_adamw_does() -> None:
    hyper = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    vectors = [torch.linspace(-1, 1, 50).requires_grad_() for _ in range(2)]
    ours = offload.SCALE([vectors[0]], last=None, **hyper)
    theirs = torch.optim.AdamW([vectors[1]], **hyper)
    for step in range(4):
        for vector, optimizer in zip(vectors, (ours, theirs), strict=True):
            vector.grad = torch.sin(torch.arange(50.0) * (step + 1))
            optimizer.step()
    torch.testing.assert_close(vectors[0], vectors[1])


def test_scale_says_what_it_needs() -> None:
    params = list(LLAMA.make_model().named_parameters())
    with pytest.raises(ValueError, match=r"no parameter is named 'lm_head.weight'"):
        offload.SCALE([p for _, p in params])
    with pytest.raises(ValueError, match="no parameter is named 'other'"):
        offload.SCALE(params, last="other")
    with pytest.raises(ValueError, match="SCALE: momentum is 1"):
        offload.SCALE(params, momentum=1.0)
    rms, norm = (offload.SCALE([torch.ones(4, 9)], lr=0.5, last=None, rms=x) for x in (True, False))
    for optimizer, step in ((rms, 0.5), (norm, 0.5 / 3)):
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.full((4, 9), 7.0)
        optimizer.step()
        torch.testing.assert_close(p, torch.full((4, 9), 1 - step))
