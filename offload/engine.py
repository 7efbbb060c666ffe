"""The one mutable coordinator: fetches what compute needs next, evicts what it needs last, keeps
every promise.

[Note: one thread] The engine's state changes only inside its methods, under one lock. Native
threads move bytes and post completions; a completion acts in `poll`, never in a callback. (Autograd
runs CUDA backward on its own thread while the caller's waits in `backward()`, hence the lock.)

[Note: updates] optimizer.step() leaves an Update on each chunk with a gradient; *an optimizer step
is a promise that fetch keeps*. `deferred`: the update runs when its chunk is fetched, or earlier
where a slot is free. `eager`: it runs as soon as the chunk's gradient is complete, beside the rest
of backward.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from offload import io
from offload.chunk import Chunk, Ops, Update
from offload.errors import StateError
from offload.extents import Extent, PlaneExtents
from offload.formats import Plane
from offload.homes import PlaneKey, allocate_extents, carve_pinned
from offload.inflight import Finish, InFlight
from offload.interrupts import held
from offload.io import IoQueue, Limits
from offload.plan import Plan
from offload.residence import Residence
from offload.schedule import Schedule, default_order
from offload.slots import Slab, Slot
from offload.stats import UPDATE, StatsCounter
from offload.store import ChunkStore
from offload.tier import DeviceEvent, Link, Residency
from offload.timeline import Timeline
from offload.transfer import Device
from offload.update import UpdatePipeline
from offload.updates import Updates, carve_scratch

PREFETCH_DISTINCT = 4  # how many chunks ahead of use the engine looks for something to start
_CAUSES = {
    Residency.READING: Link.READ.value,
    Residency.UPLOADING: Link.H2D.value,
    Residency.UPDATING: UPDATE,
}


def _nothing(*_: object) -> None:
    pass


class Engine:
    """Moves chunks between tiers. Knows tensors and bytes, but no modules and no optimizers."""

    def __init__(
        self,
        plan: Plan,
        chunks: Sequence[Chunk],
        *,
        slab: Slab,
        store: ChunkStore | None,
        nvme_budget: int | None = None,
        homes: Mapping[PlaneKey, PlaneExtents] | None = None,
        backend: str,
        limits: Limits | None = None,
        device: Device,
        timeline: Timeline,
        poison: bool = False,
    ) -> None:
        self.plan = plan
        self.chunks = list(chunks)
        self.device = device
        self.timeline = timeline
        self.schedule = Schedule(
            default_order([c.spec.index for c in self.chunks if not c.spec.is_small])
        )
        self.slab = slab
        self.store = store
        self.lock = threading.RLock()
        tiles = slab.carve("update tiles", plan.tile_nbytes)
        scratch = carve_scratch(plan, slab)
        self.residence = Residence(plan, self.chunks, slab, device, self.schedule, poison=poison)
        carve_pinned(plan, self.chunks, slab, device.torch_device)
        if store is not None:
            allocate_extents(plan, self.chunks, store, homes or {})
            store.open(nvme_budget)
        self.before_change: Callable[[], None] = _nothing  # a commit under way must end first
        self.after_poll: Callable[[], None] = _nothing  # and goes on when something has finished
        self.before_overwrite: Callable[[Extent], None] = _nothing  # a checkpoint may need it
        checksum_nbytes = store.checksum_nbytes if store else 0
        pack_stride = store.pack_stride if store else 0
        queue = IoQueue(backend, limits, checksum_nbytes=checksum_nbytes, pack_stride=pack_stride)
        try:
            pipeline = UpdatePipeline(
                queue, plan.tile_numel, tiles, checksum_nbytes=checksum_nbytes
            )
        except BaseException:
            queue.close()
            raise
        self._flight = InFlight(queue, pipeline, timeline, store)
        self._updates = Updates(self._flight, plan, store, scratch)

    # ---- use: the only place where training waits ----

    def enter(self, index: int, *, record: bool) -> None:
        """Have chunk `index` on the compute device and its parameters bound to it. Blocks until it
        is there.
        """
        with self.lock:
            self.check_alive()
            chunk = self.chunks[index]
            if not chunk.spec.is_small:  # that one is always there, whatever comes next
                self.schedule.use(index, record=record)
            if chunk.num_users == 0 and chunk.override is None:
                chunk.check_unbound()
                self._bring(chunk)
                chunk.bind(self.bound_weight(index))
            chunk.num_users += 1

    def _bring(self, chunk: Chunk) -> None:
        """Start this chunk, then what comes after it, and only then wait: the one line where
        training can stall.
        """
        chunk.wanted = True  # what is prefetched must not evict it before it is bound
        try:
            self.fetch(chunk, demand=True)
            if not chunk.spec.is_small:
                self.prefetch()
            self.wait(chunk)
        finally:
            chunk.wanted = False

    def leave(self, index: int) -> None:
        """The use is over: parameters become placeholders, the bytes stay until their slot is
        needed.
        """
        with self.lock:
            chunk = self.chunks[index]
            chunk.num_users -= 1
            if chunk.num_users or chunk.override is not None:
                return
            chunk.unbind()
            if chunk.gpu_slot is not None:
                chunk.gpu_slot.free_event = self.device.compute_event()
            self.poll()

    def bound_weight(self, index: int) -> torch.Tensor:
        """The flat weight plane (numel,) of a chunk in use, on the compute device."""
        chunk = self.chunks[index]
        dtype = self.plan.fmt.weight_dtype
        if self.device.is_host:
            region = chunk.host_weight()
            if region is None:
                raise StateError(f"chunk {chunk.name} is bound without a host copy.")
            return region.view(dtype, chunk.spec.numel)
        if chunk.gpu_slot is None:
            raise StateError(f"chunk {chunk.name} is bound without a GPU slot.")
        return chunk.gpu_slot.tensor[: chunk.spec.numel * dtype.itemsize].view(dtype)

    # ---- the way up ----

    def _ready(self, chunk: Chunk) -> bool:
        target = Residency.CPU if self.device.is_host else Residency.GPU
        return chunk.residency is target and chunk.update is None

    def fetch(self, chunk: Chunk, *, demand: bool) -> bool:
        """Start the next stage of the way up and return; False where no slot is to be had.

        With `demand` it waits for a slot, and raises StateError where none can ever come free.
        """
        if self._ready(chunk) or chunk.residency in _CAUSES:
            return True
        if chunk.update is not None:
            if not self._start_update(chunk, keep=True, demand=demand):
                return False
            return chunk.update is not None or self.fetch(chunk, demand=demand)
        if chunk.residency is Residency.NVME:
            return self._start_read(chunk, demand=demand)
        return self._start_upload(chunk, demand=demand)

    def prefetch(self) -> None:
        """Start what comes next, as far as slots are free or hold something needed later still."""
        for index in self.schedule.upcoming(PREFETCH_DISTINCT):
            self.fetch(self.chunks[index], demand=False)

    def wait(self, chunk: Chunk) -> None:
        """Block until the chunk is on the compute device, with no update pending."""
        while not self._ready(chunk):
            if not self.fetch(chunk, demand=True):
                raise StateError(f"chunk {chunk.name} cannot be fetched.")
            if chunk.residency is Residency.UPLOADING and chunk.upload is not None:
                start = time.perf_counter()
                self._adopt_upload(chunk, chunk.upload)
                self.stats.stalled(Link.H2D.value, time.perf_counter() - start)
            elif not self._ready(chunk):
                self.block(_CAUSES.get(chunk.residency, UPDATE))

    def _start_read(self, chunk: Chunk, *, demand: bool) -> bool:
        slot = self._weight_slot(chunk, demand=demand)
        if slot is None:
            return False
        chunk.slot = slot
        chunk.to(Residency.READING)
        priority = io.DEMAND if demand else io.PREFETCH

        def finish(result: int, fd: int, offset: int) -> None:
            if result < 0:
                chunk.to(Residency.NVME)
                self.residence.release_slot(chunk)
                raise self._flight.storage_error(result, "reading", fd, offset, chunk.name)
            chunk.to(Residency.CPU)
            if not self.device.is_host:
                self._start_upload(chunk, demand=False)

        extent = chunk.extents[Plane.WEIGHT].newest
        self.start_plane(io.READ, extent, slot.region.address, chunk, finish, priority)
        return True

    def _start_upload(self, chunk: Chunk, *, demand: bool) -> bool:
        while (slot := self.residence.gpu_slot(chunk, demand=demand)) is None:
            if not demand:
                return False
            self._block_or_refuse(f"GPU slot for {chunk.name}", Link.H2D.value)
        region = chunk.host_weight()
        if region is None:
            raise StateError(f"chunk {chunk.name} is uploaded without a host copy.")
        chunk.gpu_slot = slot
        chunk.to(Residency.UPLOADING)
        nbytes = chunk.spec.nbytes(Plane.WEIGHT, self.plan.fmt)
        event = self.device.h2d(slot.tensor[:nbytes], region.tensor[:nbytes], slot.free_event)
        chunk.upload = event

        def finish(result: int, fd: int, offset: int) -> None:
            if chunk.upload is event:
                chunk.upload = None
                self._adopt_upload(chunk, event)

        self._flight.start_copy(Link.H2D, chunk.name, nbytes, event, finish, ())
        return True

    def _release_device(self, chunk: Chunk) -> None:
        """Give up the device's copy, once its copy engine no longer reads the host's."""
        if chunk.upload is not None:
            chunk.upload.synchronize()
        self.residence.drop_gpu(chunk)

    def _adopt_upload(self, chunk: Chunk, event: DeviceEvent) -> None:
        """Let compute use the bytes as soon as the copy is done; the calling thread need not wait
        for it.
        """
        if chunk.residency is Residency.UPLOADING:
            self.device.compute_waits(event)
            chunk.to(Residency.GPU)

    def _weight_slot(self, chunk: Chunk, *, demand: bool) -> Slot | None:
        while (slot := self.residence.weight_slot(chunk, demand=demand)) is None and demand:
            self._block_or_refuse(f"host slot for {chunk.name}", UPDATE)
        return slot

    def acquire_grad_slot(self, chunk: Chunk, spill_other: Callable[[], bool]) -> Slot:
        """A gradient slot. Waits for what is in flight; if that is nothing, `spill_other` helps."""
        while (slot := self.residence.grad_slot(chunk)) is None:
            if self._flight:
                self.block(UPDATE)
            elif not spill_other():
                self._block_or_refuse(f"gradient slot for {chunk.name}", UPDATE)
        return slot

    # ---- updates ----

    def set_updates(self, updates: Mapping[int, Ops]) -> None:
        """Leave an Update on each chunk of `updates`, and start those that can start."""
        with self.lock:
            self.check_alive()
            self.before_change()
            for index, ops in updates.items():
                self.chunks[index].update = Update(ops)
            for index in self.schedule.upcoming(len(self.chunks)):
                if self.chunks[index].update is not None:
                    self.fetch(self.chunks[index], demand=False)

    def update_in_place(self, index: int, ops: Ops) -> None:
        """Update the small chunk here and now: it is little, it lies in RAM, and it stays bound."""
        self.before_change()
        chunk = self.chunks[index]
        on_device = not self.device.is_host
        if on_device:
            self.leave(index)
            self._release_device(chunk)
        with held():
            self._updates.apply(chunk, ops)
            self._changed(chunk)
            self.release_gradient(chunk)
        if on_device:
            self.enter(index, record=False)

    def update_now(self, index: int, ops: Ops) -> None:
        """Start the update of a chunk whose gradient is complete (eager)."""
        self.before_change()
        chunk = self.chunks[index]
        while chunk.residency in _CAUSES:
            self.block(_CAUSES.get(chunk.residency, UPDATE))
        chunk.update = Update(ops)
        self._start_update(chunk, keep=False, demand=True)

    def _start_update(self, chunk: Chunk, *, keep: bool, demand: bool) -> bool:
        """Hand a chunk to the update worker. With `keep` the new weights land in a slot, ready for
        use.
        """
        gradient, update = chunk.gradient, chunk.update
        if gradient is None or update is None or chunk.num_users:
            raise StateError(
                f"chunk {chunk.name} cannot be updated: it is in use or has no gradient."
            )
        while gradient.moving:
            if not demand:
                return True  # under way: the spill ends first
            self.block(Link.WRITE.value)
        self._release_device(chunk)
        fresh = keep and chunk.host_weight() is None
        if fresh:
            chunk.slot = self._weight_slot(chunk, demand=demand)
            if chunk.slot is None:
                return False
        for extents in chunk.extents.values():
            self.before_overwrite(extents.target)
        with held():  # a chunk in UPDATING that nobody updates would be waited for in vain
            update.started = True
            chunk.to(Residency.UPDATING)
            self._updates.start(chunk, update.ops, self._finish_update(chunk), fresh=fresh)
        return True

    def _finish_update(self, chunk: Chunk) -> Finish:
        def finish(result: int, fd: int, offset: int) -> None:
            chunk.to(Residency.CPU if chunk.host_weight() is not None else Residency.NVME)
            chunk.update = None
            self.release_gradient(chunk)
            if result < 0:
                raise self._flight.storage_error(result, "updating", fd, offset, chunk.name)
            self._changed(chunk)

        return finish

    def _changed(self, chunk: Chunk) -> None:
        for plane in chunk.spec.state_planes(self.plan.fmt):
            chunk.changed(plane)

    def release_gradient(self, chunk: Chunk) -> None:
        """Forget a chunk's gradient and give its slots back. Nothing of it may be in flight."""
        gradient, chunk.gradient = chunk.gradient, None
        if gradient is None:
            return
        for slot in (gradient.hi, gradient.lo):
            if slot is not None:
                slot.pool.release(slot)

    def flush(self) -> None:
        """Finish every pending update. Blocks until the state is whole."""
        with self.lock:
            self.check_alive()
            for chunk in self.chunks:
                self.finish_update(chunk, wait=False)
            for chunk in self.chunks:
                self.finish_update(chunk, wait=True)

    def finish_update(self, chunk: Chunk, *, wait: bool) -> None:
        """Start a chunk's pending update if it has not started; with `wait`, block until it is
        done.
        """
        while chunk.update is not None:
            if not chunk.update.started:
                while chunk.residency in _CAUSES:
                    self.block(_CAUSES.get(chunk.residency, UPDATE))
                self._start_update(chunk, keep=False, demand=True)
            elif wait:
                self.block(UPDATE)
            else:
                return

    def invalidate(self, chunk: Chunk) -> None:
        """Forget every copy of a chunk's weights but the one at rest, which will be written."""
        while chunk.residency in _CAUSES:
            self.block(_CAUSES.get(chunk.residency, UPDATE))
        self._release_device(chunk)
        if chunk.slot is not None:
            self.residence.drop_host(chunk)

    # ---- planes as tensors: start-up, export, inspection ----

    def move_plane(self, op: int, chunk: Chunk, plane: Plane, address: int) -> None:
        """Read the newest version of one whole plane to memory at `address`, or write a new one
        from there, and wait for it.
        """
        extents = chunk.extents[plane]
        if op == io.READ:
            self.read_part(chunk, plane, 0, address, extents.newest.nbytes)
        else:
            self.write_part(chunk, plane, 0, address, extents.newest.nbytes)
            extents.wrote()

    def read_part(self, chunk: Chunk, plane: Plane, begin: int, address: int, nbytes: int) -> None:
        """Read `nbytes` of a plane's newest version, from its byte `begin`, and wait for it."""
        newest = chunk.extents[plane].newest
        self._flight.move_extent(io.READ, newest, address, chunk.name, begin, nbytes)

    def write_part(self, chunk: Chunk, plane: Plane, begin: int, address: int, nbytes: int) -> None:
        """Write `nbytes` of a plane's next version, from its byte `begin`, and wait for it."""
        target = chunk.extents[plane].target_of(chunk.name)
        self.before_overwrite(target)
        self._flight.move_extent(io.WRITE, target, address, chunk.name, begin, nbytes)

    def start_plane(
        self, op: int, extent: Extent, address: int, chunk: Chunk, finish: Finish,
        priority: int = io.DEMAND,
    ) -> None:  # fmt: skip
        """Start moving one whole plane between its extent and memory at `address`; `finish` runs in
        poll.
        """
        if op == io.WRITE:
            self.before_overwrite(extent)
        self._flight.start_plane(op, extent, address, chunk.name, finish, priority)

    # ---- completions ----

    def start_d2h(
        self, chunk: Chunk, target: torch.Tensor, source: torch.Tensor, finish: Finish
    ) -> None:
        """Copy a device tensor to the slab behind the compute submitted so far; `finish` runs in
        poll.
        """
        event = self.device.d2h(target, source)
        self._flight.start_copy(Link.D2H, chunk.name, target.nbytes, event, finish, (source,))

    def poll(self) -> None:
        """Act on whatever has finished; never blocks."""
        with self.lock:
            self._flight.poll()
            self.after_poll()

    def block(self, cause: str) -> None:
        """Wait until something in flight ends, and act on it; a stall on `cause`."""
        self._flight.block(cause)

    def _block_or_refuse(self, what: str, cause: str) -> None:
        if not self._flight:
            raise StateError(
                f"no {what}: all are in use and nothing is in flight. More chunks are needed at "
                "the same time than there are slots; raise tiers.cpu.budget (or "
                "tiers.cpu.weight_slots, tiers.cpu.grad_slots)."
            )
        self.block(cause)

    def check_alive(self) -> None:
        """Raise StateError behind a failure, which it names."""
        failure = self._flight.failure
        if failure is not None:
            raise StateError(
                f"the engine stopped at an earlier error: {failure} Leave the context, run again."
            ) from failure

    @property
    def failed(self) -> bool:
        return self._flight.failure is not None

    @property
    def stats(self) -> StatsCounter:
        return self._flight.stats

    # ---- ends ----

    def end_step(self) -> None:
        """An optimizer step is over: the order of uses is known, the statistics roll."""
        with self.lock:
            self.schedule.end_step()
            self.timeline.instant("step", "end", "step")
            self.stats.roll()

    def drain(self) -> None:
        """Wait for everything in flight, whatever becomes of it."""
        with self.lock:
            self._flight.drain()

    def fail(self, error: BaseException) -> None:
        """Stop at this error: every later call names it."""
        self._flight.failure = self._flight.failure or error

    def close(self, *, keep: bool = False) -> None:
        """Drain, stop the native threads, remove the files or keep a committed run. Idempotent;
        raises for no transfer.
        """
        with self.lock, contextlib.ExitStack() as rest:  # a second Ctrl-C leaves nothing open
            rest.callback(self.slab.close)
            if self.store is not None:
                rest.callback(self.store.close, keep=keep)
            rest.callback(self.device.close)
            self._flight.close()
