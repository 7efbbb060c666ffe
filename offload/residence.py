"""The slots that the plan asks for, made real: host slots carved from the slab, weight slots on the compute device."""

from __future__ import annotations

from collections.abc import Callable

from offload.chunk import GpuSlot
from offload.errors import StateError
from offload.plan import Plan, PoolSpec
from offload.slots import Slab, SlotPool
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
        self.slots = [GpuSlot(i, device.allocate(spec.slot_nbytes)) for i in range(spec.num_gpu_slots)]
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
