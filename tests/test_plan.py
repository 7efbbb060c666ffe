"""The plan is arithmetic that the engine obeys to the byte; a refusal names what would work."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parity import make_policy
from rig import spec_of
from torch import nn
from zoo import ResidualMLP

import offload
from offload.chunk import ChunkSpec
from offload.errors import BudgetError
from offload.formats import FORMATS, Plane
from offload.plan import Plan, make_plan
from offload.policy import load_policy
from offload.slots import HUGE_PAGE_NBYTES, round_up
from offload.update import tile_buffer_nbytes

MIB = 1 << 20
TILES_NBYTES = tile_buffer_nbytes(65536)
ANYWHERE = Path("drive")  # planning touches no file


def plan_of(
    specs: Sequence[ChunkSpec],
    budget: int,
    *,
    format: str = "exact",
    host: bool = True,
    nvme: bool = True,
    **changes: Any,
) -> Plan:
    """A plan with everything on `auto` but what is given."""
    cpu = {"budget": budget, **changes}
    policy = make_policy(ANYWHERE, format=format, tiers__cpu=cpu, optimizer__tile_numel=65536)
    if not nvme:
        policy["tiers"]["nvme"] = None
    return make_plan(specs, FORMATS[format], load_policy(policy), host_compute=host)


def even_specs(num: int, numel: int = 1 << 18) -> list[ChunkSpec]:
    return [spec_of(index, numel) for index in range(num)]


Specs = st.lists(
    st.tuples(st.integers(1, 3_000_000), st.booleans()), min_size=1, max_size=6
).flatmap(
    lambda rows: st.booleans().map(
        lambda small: [
            spec_of(i, numel, trainable=trainable, is_small=small and i == len(rows) - 1)
            for i, (numel, trainable) in enumerate(rows)
        ]
    )
)
Setup = st.fixed_dictionaries(
    {"format": st.sampled_from(["exact", "fp32"]), "host": st.booleans(), "nvme": st.booleans()}
)


def fits(specs: Sequence[ChunkSpec], budget: int, setup: dict[str, Any]) -> bool:
    try:
        plan_of(specs, budget, **setup)
    except BudgetError:
        return False
    return True


# What every plan keeps


@settings(deadline=None)
@given(Specs, st.integers(MIB, 256 * MIB), Setup)
def test_every_plan_is_whole_and_under_the_budget(
    specs: list[ChunkSpec], budget: int, setup: dict[str, Any]
) -> None:
    try:
        plan = plan_of(specs, budget, **setup)
    except BudgetError:
        assume(False)
    fmt = plan.fmt
    assert round_up(plan.slab_nbytes, HUGE_PAGE_NBYTES) <= budget
    for spec in specs:
        pools = [pool for pool in plan.pools if spec.index in pool.members]
        assert [plan.pool_of(spec.index)] == pools
        assert spec.nbytes(Plane.WEIGHT, fmt) <= pools[0].slot_nbytes
        state = set(spec.state_planes(fmt))
        pinned = {plane for index, plane in plan.pinned if index == spec.index}
        on_nvme = set(plan.nvme_planes(spec))
        assert pinned | (on_nvme & state) == state and not pinned & on_nvme
        assert Plane.WEIGHT in pinned or pools[0].num_weight_slots > 0
        assert Plane.WEIGHT in pinned or not spec.is_small
        assert not spec.trainable or pools[0].num_grad_slots > 0
        assert bool(pools[0].num_gpu_slots) != setup["host"]
        can_spill = spec.trainable and not plan.grads_resident
        assert (Plane.GRAD in on_nvme) == can_spill
    if not plan.uses_nvme:
        assert plan.grads_resident and plan.nvme_nbytes == 0 and plan.traffic() == (0, 0)


@settings(deadline=None)
@given(Specs, st.integers(1, 256 * MIB), Setup)
def test_a_refusal_is_just_short_of_what_it_names(
    specs: list[ChunkSpec], budget: int, setup: dict[str, Any]
) -> None:
    """One byte less than the named budget is refused too, or is enough for all without a drive."""
    assume(not fits(specs, budget, setup))
    with pytest.raises(BudgetError) as refused:
        plan_of(specs, budget, **setup)
    named = named_budget(refused.value)
    assert named > budget
    if fits(specs, named - 1, setup):
        assert setup["nvme"] and not plan_of(specs, named - 1, **setup).uses_nvme


def named_budget(error: BudgetError) -> int:
    found = re.search(r"Set tiers\.cpu\.budget to at least (\d+)MiB", str(error))
    assert found, str(error)
    return int(found[1]) * MIB


@pytest.mark.parametrize("tile_numel", [65536, 100 * 4096, 1 << 20])
@pytest.mark.parametrize("nvme", [True, False])
def test_the_budget_that_a_refusal_names_works(nvme: bool, tile_numel: int) -> None:
    specs = even_specs(4, 10 << 20)
    policy = make_policy(ANYWHERE, tiers__cpu={"budget": MIB}, optimizer__tile_numel=tile_numel)
    if not nvme:
        policy["tiers"]["nvme"] = None
    for budget in range(MIB, 700 * MIB, 13 * MIB):
        policy["tiers"]["cpu"]["budget"] = budget
        try:
            make_plan(specs, FORMATS["exact"], load_policy(policy), host_compute=True)
        except BudgetError as error:
            policy["tiers"]["cpu"]["budget"] = named_budget(error)
            make_plan(specs, FORMATS["exact"], load_policy(policy), host_compute=True)


def test_a_refusal_itemises_what_is_needed() -> None:
    with pytest.raises(BudgetError) as refused:
        plan_of(even_specs(4), 2 * MIB)
    for words in ("update tiles", "weight slots 4x512KiB", "gradient slots 4x512KiB"):
        assert words in str(refused.value)
    with pytest.raises(BudgetError, match=r"or name a drive in tiers\.nvme\.paths"):
        plan_of(even_specs(4), 2 * MIB, nvme=False)


def test_unpinned_memory_does_not_need_a_drive() -> None:
    """tiers.cpu.pin is about page-locking; what fits the budget needs no drive either way."""
    assert not plan_of(even_specs(4), 4 << 30, nvme=False, pin=False).uses_nvme


# More budget is never worse


@settings(deadline=None, max_examples=40)
@given(Specs, Setup)
def test_more_budget_never_moves_more(specs: list[ChunkSpec], setup: dict[str, Any]) -> None:
    """With equal tiles: what fits keeps fitting, and with equal slots the traffic never grows. (A
    slot more is for overlap, and takes the room of pinned planes.) Where slots are fewer than
    chunks, which chunk stays in one at the turns depends on which others are pinned.
    """
    fits = False
    before: dict[tuple[tuple[int, int], ...], int] = {}
    for budget in range(4 * MIB, 128 * MIB, 6 * MIB):
        try:
            plan = plan_of(specs, budget, **setup)
        except BudgetError:
            assert not fits, f"fits below {budget}, not with it"
            continue
        fits = True
        slots = tuple((pool.num_weight_slots, pool.num_grad_slots) for pool in plan.pools)
        traffic = sum(plan.traffic())
        turns = sum(
            2 * pool.num_weight_slots * pool.slot_nbytes
            for pool in plan.pools
            if 0 < pool.num_weight_slots < len(pool.members)
        )
        assert traffic <= before.get(slots, traffic) + turns, budget
        before[slots] = traffic


def test_planes_are_pinned_weights_first() -> None:
    """For chunks of one size the pinned planes are a growing prefix: weights, then residues, ..."""
    specs = even_specs(4)
    order = [(spec.index, p) for p in FORMATS["exact"].state_planes for spec in specs]
    seen = set()
    for budget in range(2 * MIB, TILES_NBYTES + 24 * MIB, MIB // 4):
        if not fits(specs, budget, {}):
            continue
        plan = plan_of(specs, budget)
        num = len(plan.pinned)
        if plan.uses_nvme:
            assert plan.pinned == frozenset(order[:num])
            seen.add(num)
    assert 0 in seen and {4, 8} & seen and len(seen) > 5


def test_everything_in_ram_opens_no_file() -> None:
    plan = plan_of(even_specs(4), 64 * MIB)
    assert not plan.uses_nvme and len(plan.pinned) == 4 * 4
    assert "NVMe not used" in str(plan)


def test_slots_that_the_policy_fixes_are_kept() -> None:
    plan = plan_of(even_specs(6), 16 * MIB, weight_slots=4, grad_slots=1, pin=False)
    (pool,) = plan.pools
    assert pool.num_weight_slots == 4
    assert pool.num_grad_slots == 2  # one landing gradient can have two halves


@pytest.mark.parametrize("format", FORMATS)
def test_device_slots_fit_the_budget_of_the_device(format: str) -> None:
    """Three slots per class where they fit, else two, else one; else it says what would do."""
    specs = [spec_of(0, 700_000), *(spec_of(i, 1 << 18) for i in range(1, 6))]
    policy = make_policy(ANYWHERE, format=format, tiers__cpu={"budget": "64MiB"})

    def plan(budget: int) -> Plan:
        policy["tiers"]["gpu"]["budget"] = budget
        return make_plan(specs, FORMATS[format], load_policy(policy), host_compute=False)

    def device_nbytes(plan: Plan) -> int:
        return sum(pool.slot_nbytes * pool.num_gpu_slots for pool in plan.pools)

    with pytest.raises(BudgetError, match=r"tiers\.gpu\.budget of 1MiB is too small") as refused:
        plan(MIB)
    named = int(re.search(r"at least (\d+)MiB", str(refused.value))[1]) * MIB  # type: ignore[index]
    counts = set()
    for budget in range(named, 16 * MIB, MIB // 4):
        made = plan(budget)
        assert device_nbytes(made) <= budget
        counts.add(made.pool_of(3).num_gpu_slots)
        assert made.pool_of(0).num_gpu_slots == 1  # alone in its class
    assert counts == {1, 2, 3}
    with pytest.raises(BudgetError):
        plan(named - MIB)


# Size classes


def test_chunks_share_slots_with_their_like() -> None:
    sizes = [100_000, 1_000_000, 90_000, 700_000, 20_000, 650_000]
    plan = plan_of([spec_of(i, n) for i, n in enumerate(sizes)], 64 * MIB, pin=False)
    assert {pool.members for pool in plan.pools} == {(1, 3, 5), (0, 2), (4,)}
    assert plan.pool_of(3).slot_nbytes == round_up(1_000_000, 4096) * 2


def test_the_small_chunk_has_a_class_of_its_own() -> None:
    specs = [spec_of(0, 5000), spec_of(1, 5000), spec_of(2, 5000, is_small=True)]
    plan = plan_of(specs, 16 * MIB, pin=False)
    assert plan.pool_of(2).members == (2,) and plan.pool_of(2).num_weight_slots == 0
    assert (2, Plane.WEIGHT) in plan.pinned


# Traffic, by hand


def test_traffic_of_an_even_stack() -> None:
    """Exact format, nothing pinned: state once, and weights twice less what the slots keep."""
    num, slots, numel = 8, 2, 1 << 18
    plan = plan_of(even_specs(num, numel), 64 * MIB, weight_slots=slots, grad_slots=1, pin=False)
    loads = 2 * (num - slots)
    read = numel * (loads * 2 + num * 10 + num * 2)  # weights, residue and moments, gradient
    written = numel * (num * 12 + num * 2)
    assert plan.traffic() == (read, written)
    eager = replace(plan, eager=True)  # no gradient waits, so none is spilled
    assert eager.traffic() == (read - numel * num * 2, written - numel * num * 2)
    frozen = [spec_of(i, numel, trainable=False) for i in range(num)]
    plan = plan_of(frozen, 64 * MIB, weight_slots=slots, pin=False)
    assert plan.traffic() == (numel * loads * 2, 0)


# The engine carves exactly what the plan sums


class Net(nn.Module):
    """Chunks of three size classes: blocks, two larger linear layers, little tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(48, 2048)
        self.fold = nn.Linear(2048, 48)
        self.blocks = nn.ModuleList(ResidualMLP() for _ in range(5))


@pytest.mark.parametrize("format", ["exact", "fp32"])
@pytest.mark.parametrize(
    ("device", "room", "nvme"),
    [
        ("cpu", 4, True),
        ("cpu", 6, True),
        ("standin", 6, True),
        ("cpu", 32, True),
        ("cpu", 32, False),
    ],
)
def test_the_engine_carves_the_terms_of_the_plan(
    device: str, room: int, nvme: bool, format: str, nvme_dir: Path
) -> None:
    budget = TILES_NBYTES + room * MIB
    policy = make_policy(
        nvme_dir,
        format=format,
        tiers__gpu__device=device,
        tiers__cpu={"budget": budget},
        optimizer__tile_numel=65536,
    )
    if not nvme:
        policy["tiers"]["nvme"] = None
    with offload.offload(Net(), policy) as engine:
        plan, memory = engine.plan, engine.memory()
        arenas = dict(memory.arenas)
        unused = arenas.pop("unused")
        terms = dict(plan.terms())
        assert len(terms) == len(plan.terms())
        assert {name: n for name, n in arenas.items() if n} == terms
        assert sum(terms.values()) == plan.slab_nbytes and unused < HUGE_PAGE_NBYTES
        assert memory.slab_nbytes <= budget
        assert memory.nvme_nbytes == plan.nvme_nbytes
        files = sum(path.stat().st_size for path in nvme_dir.glob("*.swap"))
        assert files == plan.nvme_nbytes
        gpu = sum(pool.slot_nbytes * pool.num_gpu_slots for pool in plan.pools)
        assert memory.gpu_nbytes == gpu
        assert all(name in str(plan) for name in terms)


def test_planning_takes_nothing(nvme_dir: Path) -> None:
    """A model on meta is planned without memory or files, and as the engine will plan it."""
    policy = make_policy(nvme_dir, tiers__cpu={"budget": "16MiB"}, optimizer__tile_numel=65536)
    with torch.device("meta"):
        planned = offload.plan_for(Net(), policy)
    assert list(nvme_dir.iterdir()) == []
    with offload.offload(Net(), policy) as engine:
        assert engine.plan == planned
