"""Slots go to chunks by one rule: whoever is needed last gives up, and nothing in use is taken."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rig import Rig, make_rig, spec_of

from offload.chunk import Chunk
from offload.errors import StateError
from offload.formats import FORMATS, Plane
from offload.plan import PoolSpec
from offload.residence import GpuPool, carve_pools
from offload.slots import Slab
from offload.tier import Link, Residency
from offload.transfer import HostDevice, StandinDevice, StandinEvent

NUM_CHUNKS = 5


@pytest.fixture
def rig(nvme_dir: Path) -> Iterator[Rig]:
    """Five chunks and three host slots; compute on the CPU."""
    changes = {"tiers__cpu__weight_slots": 3}
    with make_rig(nvme_dir, num_chunks=NUM_CHUNKS, **changes) as rig:
        yield rig


@pytest.fixture
def gpu_rig(nvme_dir: Path) -> Iterator[Rig]:
    """Five chunks, three host slots, two slots on a stand-in device."""
    changes = {"tiers__cpu__weight_slots": 3, "num_gpu_slots": 2}
    with make_rig(nvme_dir, num_chunks=NUM_CHUNKS, device=StandinDevice(), **changes) as rig:
        yield rig


def follow(rig: Rig, order: list[int]) -> None:
    """Make the engine expect this order of uses, from its beginning."""
    for index in order:
        rig.engine.schedule.use(index, record=True)
    rig.engine.schedule.end_step()


def give_slot(rig: Rig, index: int, residency: Residency = Residency.CPU) -> Chunk:
    chunk = rig.chunks[index]
    chunk.slot = rig.engine.residence.weight_slot(chunk, demand=True)
    assert chunk.slot is not None
    chunk.residency = residency
    return chunk


def ask(rig: Rig, index: int, *, demand: bool) -> set[int]:
    """Ask for a host slot for a chunk; return which chunks gave theirs up."""
    before = {c.spec.index for c in rig.chunks if c.slot is not None}
    slot = rig.engine.residence.weight_slot(rig.chunks[index], demand=demand)
    left = {c.spec.index for c in rig.chunks if c.slot is not None}
    assert (slot is not None) == (before != left)
    return before - left


# Host slots


def test_the_chunk_that_is_needed_last_gives_up(rig: Rig) -> None:
    follow(rig, [3, 1, 4, 0, 2])
    for index in (0, 1, 4):
        give_slot(rig, index)
    assert ask(rig, 3, demand=False) == {0}
    assert rig.chunks[0].residency is Residency.NVME and rig.chunks[0].slot is None


def test_without_demand_nothing_sooner_is_taken(rig: Rig) -> None:
    follow(rig, [0, 1, 2, 3, 4])
    for index in (0, 1, 2):
        give_slot(rig, index)
    assert ask(rig, 3, demand=False) == set()
    assert ask(rig, 3, demand=True) == {2}


def test_what_is_never_used_goes_first(rig: Rig) -> None:
    follow(rig, [0, 1, 3])
    for index in (1, 2, 0):
        give_slot(rig, index)
    assert ask(rig, 3, demand=False) == {2}


@pytest.mark.parametrize("how", ["used", "wanted", "uploading", "reading", "updating"])
def test_what_is_needed_now_keeps_its_slot(how: str, rig: Rig) -> None:
    follow(rig, [3, 0, 1, 2, 4])
    for index in (0, 1, 2):
        give_slot(rig, index)
    last = rig.chunks[2]
    if how == "used":
        last.num_users = 1
    elif how == "wanted":
        last.wanted = True
    elif how == "uploading":
        last.upload = StandinEvent()
    else:
        last.residency = Residency(how)
    assert ask(rig, 3, demand=True) == {1}
    if last.upload is not None:
        last.upload.set()
        give_slot(rig, 4)
        assert last.slot is None


def test_victims_equal_a_search_by_hand(rig: Rig) -> None:
    dice = random.Random(9)
    for _ in range(60):
        order = [dice.randrange(NUM_CHUNKS) for _ in range(dice.randint(1, 8))]
        follow(rig, order)
        rig.engine.schedule.use(dice.choice(order), record=False)
        owners = dice.sample(range(NUM_CHUNKS), 3)
        for index in owners:
            give_slot(rig, index)
            rig.chunks[index].wanted = dice.random() < 0.3
        asking = dice.choice([i for i in range(NUM_CHUNKS) if i not in owners])
        demand = dice.random() < 0.5
        away = {i: rig.engine.schedule.distance(i) for i in range(NUM_CHUNKS)}
        willing = [i for i in owners if not rig.chunks[i].wanted]
        willing = [i for i in willing if demand or away[i] > away[asking]]
        farthest = max((away[i] for i in willing), default=None)
        given = ask(rig, asking, demand=demand)
        assert len(given) == bool(willing) and {away[i] for i in given} <= {farthest}
        for chunk in rig.chunks:
            chunk.wanted = False
            if chunk.slot is not None:
                rig.engine.residence.drop_host(chunk)
        for slot in rig.engine.residence._weight_pools[0].slots:
            if slot.owner:
                slot.pool.release(slot)


def test_dropping_the_host_copy_keeps_the_one_on_the_device(gpu_rig: Rig) -> None:
    chunk = give_slot(gpu_rig, 0, Residency.GPU)
    gpu_rig.engine.residence.drop_host(chunk)
    assert chunk.residency is Residency.GPU and chunk.slot is None


# Slots on the device


def on_device(rig: Rig, index: int, *, host_copy: bool) -> Chunk:
    chunk = give_slot(rig, index) if host_copy else rig.chunks[index]
    chunk.gpu_slot = rig.engine.residence.gpu_slot(chunk, demand=True)
    assert chunk.gpu_slot is not None
    chunk.residency = Residency.GPU
    return chunk


def test_device_slots_follow_the_same_rule(gpu_rig: Rig) -> None:
    follow(gpu_rig, [2, 1, 0, 3, 4])
    kept, given = on_device(gpu_rig, 1, host_copy=True), on_device(gpu_rig, 0, host_copy=True)
    residence = gpu_rig.engine.residence
    assert residence.gpu_slot(gpu_rig.chunks[3], demand=False) is None
    slot = given.gpu_slot
    assert residence.gpu_slot(gpu_rig.chunks[2], demand=False) is slot
    assert given.gpu_slot is None and given.residency is Residency.CPU
    assert kept.residency is Residency.GPU
    kept.num_users = 1
    assert residence.gpu_slot(gpu_rig.chunks[3], demand=True) is None


@pytest.mark.parametrize("host_copy", [False, True])
def test_leaving_the_device_falls_back_to_what_is_left(host_copy: bool, gpu_rig: Rig) -> None:
    chunk = on_device(gpu_rig, 0, host_copy=host_copy)
    gpu_rig.engine.residence.drop_gpu(chunk)
    assert chunk.residency is (Residency.CPU if host_copy else Residency.NVME)
    gpu_rig.engine.residence.drop_gpu(chunk)  # nothing there: no move
    assert chunk.gpu_slot is None


def pool_spec(**changes: int) -> PoolSpec:
    spec = PoolSpec(
        name="pool", slot_nbytes=4096, members=(0, 1), num_weight_slots=2, num_grad_slots=3
    )
    return replace(spec, **changes)


def test_a_device_slot_is_released_once() -> None:
    device = StandinDevice()
    pool = GpuPool(pool_spec(num_gpu_slots=2), device)
    slots = [pool.acquire(lambda: False) for _ in range(2)]
    assert None not in slots and pool.acquire(lambda: False) is None
    asked: list[int] = []

    def give_up() -> bool:
        asked.append(1)
        pool.release(slots[1])
        return True

    assert pool.acquire(give_up) is slots[1] and asked == [1]
    pool.release(slots[0])
    with pytest.raises(StateError, match="GPU slot 0 of pool was released twice"):
        pool.release(slots[0])
    device.close()


def test_bytes_on_the_device(gpu_rig: Rig) -> None:
    nbytes = gpu_rig.chunks[0].spec.nbytes(Plane.WEIGHT, FORMATS["exact"])
    assert gpu_rig.engine.residence.gpu_nbytes == 2 * nbytes


def test_compute_on_the_host_takes_no_device_memory(rig: Rig) -> None:
    assert rig.engine.residence.gpu_nbytes == 0


# Carving and staging


def test_pools_are_carved_as_planned(rig: Rig) -> None:
    other = pool_spec(name="other", slot_nbytes=8192, members=(2,), num_weight_slots=0)
    specs = tuple(spec_of(i, 1000) for i in range(3))
    plan = replace(rig.engine.plan, specs=specs, pools=(pool_spec(), other))
    slab = Slab(1 << 20)
    weights, grads = carve_pools(plan, slab, poison=False)
    assert [weights[i].num_free for i in range(3)] == [2, 2, 0]
    assert [grads[i].num_free for i in range(3)] == [3, 3, 3]
    assert weights[0] is weights[1] and grads[0] is not grads[2]
    arenas = {name: nbytes for name, nbytes in slab.memory().items() if nbytes and name != "unused"}
    assert arenas == {
        "weight slots pool": 2 * 4096,
        "gradient slots pool": 3 * 4096,
        "gradient slots other": 3 * 8192,
    }
    slab.close()


def test_staging_borrows_any_slot_and_says_when_there_is_none(rig: Rig) -> None:
    residence, chunk = rig.engine.residence, rig.chunks[0]
    free = sum(rig.num_free())
    slots = [residence.borrow(chunk) for _ in range(free)]
    assert len({slot.region.address for slot in slots}) == free
    with pytest.raises(StateError, match="no slot to stage chunk c0"):
        residence.borrow(chunk)
    for slot in slots:
        slot.pool.release(slot)
    assert sum(rig.num_free()) == free


# The engine, through these slots


@pytest.mark.parametrize("where", ["cpu", "standin"])
@pytest.mark.parametrize("weight_slots", [1, 2, 3])
def test_random_uses_see_their_own_weights(where: str, weight_slots: int, nvme_dir: Path) -> None:
    """Nested and repeated uses in any order; afterwards every slot can be had again."""
    dice = random.Random(weight_slots)
    device = HostDevice() if where == "cpu" else StandinDevice()
    changes = {"tiers__cpu__weight_slots": weight_slots, "num_gpu_slots": weight_slots}
    with make_rig(nvme_dir, num_chunks=NUM_CHUNKS, device=device, **changes) as rig:
        held: list[int] = []
        for _ in range(60):
            if held and (len(held) == weight_slots or dice.random() < 0.4):
                rig.engine.leave(held.pop(dice.randrange(len(held))))
                continue
            index = dice.randrange(NUM_CHUNKS)
            rig.engine.enter(index, record=True)
            held.append(index)
            for param, master in zip(rig.chunks[index].params, rig.masters[index], strict=True):
                torch.testing.assert_close(param.float(), master, rtol=2**-8, atol=0)
        users = [held.count(index) for index in range(NUM_CHUNKS)]
        assert [chunk.num_users for chunk in rig.chunks] == users
        for index in held:
            rig.engine.leave(index)
        rig.engine.drain()
        holders = [chunk for chunk in rig.chunks if chunk.slot is not None]
        assert len(holders) + rig.num_free()[0] == weight_slots
        assert all(bool(p.isnan().all()) for chunk in rig.chunks for p in chunk.params)


def test_prefetch_leaves_what_is_about_to_be_used(nvme_dir: Path) -> None:
    """One slot and the present chunk in it: what comes next must not take it before it is bound."""
    with make_rig(nvme_dir, tiers__cpu__weight_slots=1) as rig:
        for _ in range(3):
            rig.engine.enter(0, record=True)
            rig.engine.leave(0)
        events = rig.engine.timeline.events()
        reads = [event.name for event in events if event.kind == Link.READ.value]
        assert reads == ["c0"]


def test_more_chunks_at_once_than_slots_is_refused(rig: Rig) -> None:
    for index in range(3):
        rig.engine.enter(index, record=True)
    with pytest.raises(StateError, match=r"host slot for c3: .*tiers\.cpu\.weight_slots"):
        rig.engine.enter(3, record=True)
    for index in range(3):
        rig.engine.leave(index)
    rig.engine.enter(3, record=True)
    rig.engine.leave(3)
