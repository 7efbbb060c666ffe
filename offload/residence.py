"""The slots that the plan asks for, made real, and the rule of who gives one up.

Host slots are carved from the slab, weight slots on the compute device are allocated there, all at
start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload.chunk import Chunk, GpuSlot
from offload.errors import StateError
from offload.plan import Plan, PoolSpec
from offload.schedule import Schedule
from offload.slots import Slab, Slot, SlotPool
from offload.tier import Residency
from offload.transfer import Device

PoolsByChunk = dict[int, SlotPool]


def carve_pools(plan: Plan, slab: Slab, *, poison: bool) -> tuple[PoolsByChunk, PoolsByChunk]:
    """Carve the host slots; return (weight pools, gradient pools) by chunk index."""
    weights: PoolsByChunk = {}
    grads: PoolsByChunk = {}
    for spec in plan.pools:
        for kind, count, by_chunk in (
            ("weight", spec.num_weight_slots, weights),
            ("gradient", spec.num_grad_slots, grads),
        ):
            name = f"{kind} slots {spec.name}"
            regions = [slab.carve(name, spec.slot_nbytes) for _ in range(count)]
            pool = SlotPool(name, regions, poison=poison)
            by_chunk.update(dict.fromkeys(spec.members, pool))
    return weights, grads


class GpuPool:
    """A fixed number of equal weight buffers on the compute device."""

    def __init__(self, spec: PoolSpec, device: Device) -> None:
        self.name = spec.name
        self.slots = [
            GpuSlot(i, device.allocate(spec.slot_nbytes)) for i in range(spec.num_gpu_slots)
        ]
        self._free = list(reversed(self.slots))

    def acquire(self, give_up: Callable[[], bool]) -> GpuSlot | None:
        """Take a free slot; where there is none, ask `give_up` to drop one first."""
        if not self._free and not give_up():
            return None
        return self._free.pop()

    def release(self, slot: GpuSlot) -> None:
        if slot in self._free:
            raise StateError(f"GPU slot {slot.index} of {self.name} was released twice.")
        self._free.append(slot)


def gpu_pools(plan: Plan, device: Device) -> dict[int, GpuPool]:
    """The device's weight slots by chunk index; empty where compute runs on the CPU."""
    if device.is_host:
        return {}
    pools: dict[int, GpuPool] = {}
    for spec in plan.pools:
        pools.update(dict.fromkeys(spec.members, GpuPool(spec, device)))
    return pools


class Residence:
    """Gives slots to chunks. Where none is free, the chunk that is needed last gives up its own."""

    def __init__(
        self,
        plan: Plan,
        chunks: Sequence[Chunk],
        slab: Slab,
        device: Device,
        schedule: Schedule,
        *,
        poison: bool,
    ) -> None:
        self._chunks = chunks
        self._device = device
        self._schedule = schedule
        self._weight_pools, self._grad_pools = carve_pools(plan, slab, poison=poison)
        self._gpu_pools = gpu_pools(plan, device)

    @property
    def gpu_nbytes(self) -> int:
        """Bytes of weight slots on the compute device."""
        pools = set(self._gpu_pools.values())
        return sum(slot.tensor.nbytes for pool in pools for slot in pool.slots)

    def weight_slot(self, chunk: Chunk, *, demand: bool) -> Slot | None:
        """A host slot for a chunk's weights, or None. Without `demand` only from a later-needed
        chunk.
        """
        pool = self._weight_pools[chunk.spec.index]
        slot = pool.acquire(chunk.name)
        if slot is not None:
            return slot
        victim = self._latest(self._host_candidates(pool), chunk, demand=demand)
        if victim is None:
            return None
        self.drop_host(victim)
        return pool.acquire(chunk.name)

    def _host_candidates(self, pool: SlotPool) -> list[Chunk]:
        return [
            other
            for other in self._chunks
            if other.slot is not None
            and other.slot.pool is pool
            and other.residency in (Residency.CPU, Residency.GPU)
            and not other.wanted
            and not (self._device.is_host and other.num_users)
            and (other.upload is None or other.upload.query())
        ]

    def gpu_slot(self, chunk: Chunk, *, demand: bool) -> GpuSlot | None:
        """A slot on the compute device, or None, by the same rule."""
        pool = self._gpu_pools[chunk.spec.index]

        def give_up() -> bool:
            candidates = [
                other
                for other in self._chunks
                if other.gpu_slot in pool.slots
                and other.residency is Residency.GPU
                and not (other.num_users or other.wanted)
            ]
            victim = self._latest(candidates, chunk, demand=demand)
            if victim is not None:
                self.drop_gpu(victim)
            return victim is not None

        return pool.acquire(give_up)

    def _latest(self, candidates: list[Chunk], chunk: Chunk, *, demand: bool) -> Chunk | None:
        if not candidates:
            return None
        distance = self._schedule.distance
        victim = max(candidates, key=lambda other: (distance(other.spec.index), other.spec.index))
        if demand or distance(victim.spec.index) > distance(chunk.spec.index):
            return victim
        return None

    def drop_host(self, chunk: Chunk) -> None:
        """Give up a host slot. Its bytes are clean: an update writes what it changes."""
        if chunk.residency is Residency.CPU:
            chunk.to(Residency.NVME)
        self.release_slot(chunk)

    def drop_gpu(self, chunk: Chunk) -> None:
        """Give up a slot on the compute device; nothing where there is none."""
        slot = chunk.gpu_slot
        if slot is None:
            return
        chunk.to(Residency.CPU if chunk.host_weight() is not None else Residency.NVME)
        chunk.gpu_slot = None
        self._gpu_pools[chunk.spec.index].release(slot)

    def release_slot(self, chunk: Chunk) -> None:
        """Give back a chunk's host slot, whatever its state."""
        if chunk.slot is not None:
            chunk.slot.pool.release(chunk.slot)
            chunk.slot = None

    def grad_slot(self, chunk: Chunk) -> Slot | None:
        """A slot for one half of a chunk's gradient, or None."""
        return self._grad_pools[chunk.spec.index].acquire(chunk.name)

    def borrow(self, chunk: Chunk) -> Slot:
        """Any slot of the chunk's class for staging, outside of training."""
        for pools in (self._weight_pools, self._grad_pools):
            slot = pools[chunk.spec.index].acquire(chunk.name)
            if slot is not None:
                return slot
        raise StateError(f"no slot to stage chunk {chunk.name} in.")
