"""How a chunk's update runs: by the native worker in tiles, or here and now on whole planes."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch

from offload import io
from offload.chunk import Chunk, Ops, PlaneStep
from offload.errors import StateError
from offload.extents import Extent
from offload.factored import FactoredStep
from offload.formats import Plane
from offload.inflight import Finish, InFlight
from offload.interrupts import held
from offload.jobs import plane_arguments
from offload.plan import SCRATCH, Plan
from offload.slots import Region, Slab
from offload.stats import UPDATE
from offload.store import ChunkStore
from offload.torchstate import ITEM_DTYPE, plain_torch
from offload.update import apply_in_ram


def carve_scratch(plan: Plan, slab: Slab) -> Region | None:
    """The arena for steps on whole planes, where the plan has one."""
    return slab.carve(SCRATCH, plan.scratch_nbytes) if plan.scratch_nbytes else None


def _native(chunk: Chunk, step: FactoredStep) -> bytes:
    """The ops of a step whose factors depend on the gradient. See [Note: factors]."""
    if chunk.gradient is None:
        raise StateError(f"chunk {chunk.name} has no gradient.")
    region = chunk.pinned.get(Plane.FACTORS)  # of SCALE only where there are vectors
    plane = torch.empty(0, dtype=ITEM_DTYPE) if region is None else region.tensor.view(ITEM_DTYPE)
    return step.pack(plane, chunk.gradient.factor_sums)


@dataclasses.dataclass(frozen=True, slots=True)
class _Home:
    """Where a plane is during a step on whole planes, and the extents on both sides of it."""

    memory: torch.Tensor  # uint8, of the plane's size
    read: Extent | None = None
    write: Extent | None = None


class Updates:
    """Starts updates. Steps on whole planes use one scratch arena, so one chunk is updated at a
    time, and its update is over when start() returns. See [Note: torch step].
    """

    def __init__(
        self, flight: InFlight, plan: Plan, store: ChunkStore | None, scratch: Region | None
    ) -> None:
        self._flight, self._fmt, self._store = flight, plan.fmt, store
        self._scratch, self._work_nbytes = scratch, plan.work_nbytes

    def start(self, chunk: Chunk, ops: Ops, finish: Finish, *, fresh: bool) -> None:
        """Start the update of a chunk that is in UPDATING; `fresh` says that its weight slot is
        empty, and shall hold the new weights. A step on whole planes blocks until it is done.
        """
        with self._whole():
            if isinstance(ops, FactoredStep):
                ops = _native(chunk, ops)
            if not isinstance(ops, bytes):
                self._run(chunk, ops, finish, fresh=fresh)
                return
            self._flight.start_update(
                chunk.name,
                self._fmt.native_code,
                chunk.spec.numel,
                plane_arguments(chunk, self._fmt, self._store, fresh=fresh),
                ops,
                finish,
                write_all=chunk.has_versions,
            )

    def apply(self, chunk: Chunk, ops: Ops) -> None:
        """Run the update of a chunk here and now; all its planes lie in RAM."""
        with self._whole():
            if isinstance(ops, FactoredStep):
                ops = _native(chunk, ops)
            if not isinstance(ops, bytes):
                self._step(chunk, ops, self._homes(chunk, fresh=False))
                return
            arguments = plane_arguments(chunk, self._fmt, self._store, fresh=False)
            addresses = [0 if argument is None else argument.address for argument in arguments]
            apply_in_ram(self._fmt.native_code, chunk.spec.numel, addresses, ops)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Changes of state that cannot be taken back or begun again: Ctrl-C waits for their end,
        and behind an exception the engine stops. Views that are made in the inference mode of a
        forward could not be written.
        """
        with held(), plain_torch():
            try:
                yield
            except BaseException as error:
                self._flight.failure = self._flight.failure or error
                raise

    # ---- steps on whole planes ----

    def _run(self, chunk: Chunk, step: PlaneStep, finish: Finish, *, fresh: bool) -> None:
        homes = self._homes(chunk, fresh=fresh)
        reads = [(home.read, home.memory) for home in homes.values()]
        failed = self._move(io.READ, chunk, reads)
        if failed is None:
            self._step(chunk, step, homes)
            writes = [(home.write, home.memory) for home in homes.values()]
            failed = self._move(io.WRITE, chunk, writes)
        finish(*(failed or (0, -1, -1)))

    def _step(self, chunk: Chunk, step: PlaneStep, homes: dict[Plane, _Home]) -> None:
        start = time.perf_counter()
        planes = {plane: home.memory.view(self._fmt.dtypes[plane]) for plane, home in homes.items()}
        step.apply(planes, self._work())
        self._flight.updated(chunk.name, start, time.perf_counter())

    def _work(self) -> torch.Tensor:
        if self._scratch is None:
            return torch.empty(0, dtype=ITEM_DTYPE)
        return self._scratch.tensor[: self._work_nbytes].view(ITEM_DTYPE)

    def _homes(self, chunk: Chunk, *, fresh: bool) -> dict[Plane, _Home]:
        homes: dict[Plane, _Home] = {}
        used = self._work_nbytes

        def take(plane: Plane) -> torch.Tensor:
            nonlocal used
            nbytes = chunk.spec.nbytes(plane, self._fmt)
            if self._scratch is None or used + nbytes > self._scratch.nbytes:
                raise StateError(
                    f"no scratch for {plane.value} of {chunk.name}: the plan is wrong."
                )
            used += nbytes
            return self._scratch.tensor[used - nbytes : used]

        for plane in chunk.spec.state_planes(self._fmt):
            nbytes = chunk.spec.nbytes(plane, self._fmt)
            if plane in chunk.pinned:
                homes[plane] = _Home(chunk.pinned[plane].tensor[:nbytes])
                continue
            read, write = chunk.extents[plane].newest, chunk.extents[plane].target
            if plane is Plane.WEIGHT and chunk.slot is not None:
                memory = chunk.slot.region.tensor[:nbytes]
                homes[plane] = _Home(memory, read if fresh else None, write)
            else:
                homes[plane] = _Home(take(plane), read, write)
        gradient = chunk.gradient
        if gradient is None:
            raise StateError(f"chunk {chunk.name} has no gradient.")
        halves = [(Plane.GRAD, gradient.hi, True), (Plane.GRAD_LO, gradient.lo, gradient.has_lo)]
        for plane, slot, exists in halves:
            nbytes = chunk.spec.nbytes(plane, self._fmt) if exists else 0
            if exists and gradient.spilled:
                homes[plane] = _Home(take(plane), chunk.extents[plane].newest)
            elif exists and slot is not None:
                homes[plane] = _Home(slot.region.tensor[:nbytes])
        return homes

    def _move(
        self, op: int, chunk: Chunk, moves: Sequence[tuple[Extent | None, torch.Tensor]]
    ) -> tuple[int, int, int] | None:
        """Move planes, all at once, and wait. Returns the first completion that failed, or None."""
        left = sum(extent is not None for extent, _ in moves)
        failed: list[tuple[int, int, int]] = []

        def finish(result: int, fd: int, offset: int) -> None:
            nonlocal left
            left -= 1
            if result < 0:
                failed.append((result, fd, offset))

        for extent, memory in moves:
            if extent is not None:
                address = memory.data_ptr()
                self._flight.start_plane(op, extent, address, chunk.name, finish, io.DEMAND)
        while left:
            self._flight.block(UPDATE)
        return failed[0] if failed else None
