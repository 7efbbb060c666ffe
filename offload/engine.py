"""The one mutable coordinator: fetches what compute needs next, evicts what it needs last, keeps every promise.

[Note: one thread] The engine's state changes only inside its methods, under one lock. Native threads move bytes
and post completions; a completion acts in `poll`, never in a callback. (Autograd runs CUDA backward on its own
thread while the caller's waits in `backward()`, hence the lock.)

[Note: updates] optimizer.step() leaves an Update on each chunk with a gradient; *an optimizer step is a promise
that fetch keeps*. `deferred`: the update runs when its chunk is fetched, or earlier where a slot is free. `eager`:
it runs as soon as the chunk's gradient is complete, beside the rest of backward.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from offload import io
from offload.chunk import Chunk, Update
from offload.errors import StateError
from offload.formats import Plane
from offload.io import IoQueue
from offload.plan import Plan
from offload.residence import GpuPool, carve_pools, gpu_pools
from offload.schedule import Schedule, default_order
from offload.slots import Slab, Slot, SlotPool
from offload.stats import UPDATE, StatsCounter
from offload.store import ChunkStore, Extent
from offload.tier import DeviceEvent, Link, Residency
from offload.timeline import Timeline
from offload.transfer import Device, Transfer
from offload.update import PlaneArgument, UpdatePipeline

PREFETCH_DISTINCT = 4  # how many chunks ahead of use the engine looks for something to start
_WAIT_S = 0.01  # a blocked wait looks at the other completion source this often
_BUSY = (Residency.READING, Residency.UPLOADING, Residency.UPDATING)


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
        backend: str,
        device: Device,
        timeline: Timeline,
        poison: bool = False,
    ) -> None:
        self.plan = plan
        self.chunks = list(chunks)
        self.device = device
        self.timeline = timeline
        self.stats = StatsCounter()
        self.schedule = Schedule(default_order([c.spec.index for c in self.chunks if not c.spec.is_small]))
        self.slab = slab
        self.store = store
        self.lock = threading.RLock()
        self._tags = itertools.count(1)
        self._in_flight: dict[int, Transfer] = {}
        self._num_moving = 0  # of them, in the I/O queue
        self._num_updating = 0  # of them, with the update worker
        self._failure: BaseException | None = None
        tiles = slab.carve("update tiles", plan.tile_nbytes)
        self._weight_pools, self._grad_pools = carve_pools(plan, slab, poison=poison)
        self._gpu_pools: dict[int, GpuPool] = gpu_pools(plan, device)
        for chunk in self.chunks:
            self._place(chunk)
        if store is not None:
            store.open(nvme_budget)
        try:
            self._queue = IoQueue(backend) if store is not None else None
            self._pipeline = UpdatePipeline(backend, plan.tile_numel, tiles)
        except BaseException:
            if store is not None:
                store.close()
            raise

    def _place(self, chunk: Chunk) -> None:
        """Give a chunk its pinned regions and extents, as planned."""
        for plane in chunk.spec.state_planes(self.plan.fmt):
            if (chunk.spec.index, plane) in self.plan.pinned:
                nbytes = chunk.spec.nbytes(plane, self.plan.fmt)
                chunk.pinned[plane] = self.slab.carve(f"pinned {plane.value}", nbytes)
        if self.store is not None:
            for plane in self.plan.nvme_planes(chunk.spec):
                chunk.extents[plane] = self.store.allocate(chunk.spec.nbytes(plane, self.plan.fmt))
        chunk.residency = chunk.resting
        chunk.make_placeholders(self.plan.fmt.weight_dtype, self.device.torch_device)

    # ---- use: the only place where training waits -------------------------------------------------

    def enter(self, index: int, *, record: bool) -> None:
        """Have chunk `index` on the compute device and its parameters bound to it. Blocks until it is there."""
        with self.lock:
            self._check_alive()
            chunk = self.chunks[index]
            self.schedule.use(index, record=record)
            if chunk.num_users == 0 and chunk.override is None:
                chunk.check_unbound()
                self.fetch(chunk, demand=True)
                self.prefetch()
                self.wait(chunk)
                chunk.bind(self._device_weight(chunk))
            chunk.num_users += 1

    def leave(self, index: int) -> None:
        """The use is over: parameters become placeholders, the bytes stay until their slot is needed."""
        with self.lock:
            chunk = self.chunks[index]
            chunk.num_users -= 1
            if chunk.num_users or chunk.override is not None:
                return
            chunk.unbind()
            if chunk.gpu_slot is not None:
                chunk.gpu_slot.free_event = self.device.compute_event()
            self.poll()

    def _device_weight(self, chunk: Chunk) -> torch.Tensor:
        dtype = self.plan.fmt.weight_dtype
        if self.device.is_host:
            region = chunk.host_weight()
            if region is None:
                raise StateError(f"chunk {chunk.name} is bound without a host copy.")
            return region.view(dtype, chunk.spec.numel)
        if chunk.gpu_slot is None:
            raise StateError(f"chunk {chunk.name} is bound without a GPU slot.")
        return chunk.gpu_slot.tensor[: chunk.spec.numel * dtype.itemsize].view(dtype)

    def bound_weight(self, index: int) -> torch.Tensor:
        """The flat weight plane (numel,) of a chunk in use, on the compute device."""
        return self._device_weight(self.chunks[index])

    def locate(self, address: int) -> tuple[int, int] | None:
        """Which chunk in use has `address` in its weights: (chunk index, byte offset), or None."""
        for chunk in self.chunks:
            if chunk.num_users and chunk.override is None:
                start = self._device_weight(chunk).data_ptr()
                if start <= address < start + chunk.spec.nbytes(Plane.WEIGHT, self.plan.fmt):
                    return chunk.spec.index, address - start
        return None

    # ---- the way up --------------------------------------------------------------------------------

    @property
    def _target(self) -> Residency:
        return Residency.CPU if self.device.is_host else Residency.GPU

    def _ready(self, chunk: Chunk) -> bool:
        return chunk.residency is self._target and chunk.update is None

    def fetch(self, chunk: Chunk, *, demand: bool) -> bool:
        """Start the next stage of the way up and return; False where no slot is to be had.

        With `demand` it waits for a slot, and raises StateError where none can ever come free.
        """
        if self._ready(chunk) or chunk.residency in _BUSY:
            return True
        if chunk.update is not None:
            return self._start_update(chunk, keep=True, demand=demand)
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
                self._block(self._cause(chunk))

    def _cause(self, chunk: Chunk) -> str:
        causes = {
            Residency.READING: Link.READ.value,
            Residency.UPLOADING: Link.H2D.value,
            Residency.UPDATING: UPDATE,
        }
        return causes.get(chunk.residency, UPDATE)

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
                self._release_slot(chunk)
                raise self._storage_error(result, "reading", fd, offset, chunk)
            chunk.to(Residency.CPU)
            if not self.device.is_host:
                self._start_upload(chunk, demand=False)

        self._start_io(io.READ, chunk, chunk.extents[Plane.WEIGHT], slot, finish, priority)
        return True

    def _start_upload(self, chunk: Chunk, *, demand: bool) -> bool:
        pool = self._gpu_pools[chunk.spec.index]
        while (slot := pool.acquire(self._gpu_victim(pool, chunk, demand=demand))) is None:
            if not demand:
                return False
            self._block_or_refuse(f"a GPU slot for {chunk.name}", Link.H2D.value)
        region = chunk.host_weight()
        if region is None:
            raise StateError(f"chunk {chunk.name} is uploaded without a host copy.")
        chunk.gpu_slot = slot
        chunk.to(Residency.UPLOADING)
        nbytes = chunk.spec.nbytes(Plane.WEIGHT, self.plan.fmt)
        event = self.device.h2d(
            slot.tensor[:nbytes], region.tensor[:nbytes], slot.free_event
        )
        chunk.upload = event

        def finish(result: int, fd: int, offset: int) -> None:
            if chunk.upload is event:
                chunk.upload = None
                self._adopt_upload(chunk, event)

        self._track(Link.H2D, chunk, nbytes, finish, event=event)
        return True

    def _adopt_upload(self, chunk: Chunk, event: DeviceEvent) -> None:
        """Let compute use the bytes as soon as the copy is done; the calling thread need not wait for it."""
        if chunk.residency is Residency.UPLOADING:
            self.device.compute_waits(event)
            chunk.to(Residency.GPU)

    # ---- slots, and who gives one up ---------------------------------------------------------------

    def _weight_slot(self, chunk: Chunk, *, demand: bool) -> Slot | None:
        pool = self._weight_pools[chunk.spec.index]
        while True:
            slot = pool.acquire(chunk.name)
            if slot is not None:
                return slot
            victim = self._host_victim(pool, chunk, demand=demand)
            if victim is not None:
                self._drop_host(victim)
            elif not demand:
                return None
            else:
                self._block_or_refuse(f"a host slot for {chunk.name}", UPDATE)

    def _host_victim(self, pool: SlotPool, chunk: Chunk, *, demand: bool) -> Chunk | None:
        """The chunk whose host copy is needed last; None where nobody's is needed later than `chunk`'s."""
        candidates = [
            other
            for other in self.chunks
            if other.slot is not None
            and other.slot.pool is pool
            and other.residency in (Residency.CPU, Residency.GPU)
            and not (self.device.is_host and other.num_users)
            and (other.upload is None or other.upload.query())
        ]
        return self._latest(candidates, chunk, demand=demand)

    def _gpu_victim(self, pool: GpuPool, chunk: Chunk, *, demand: bool) -> Callable[[], bool]:
        def give_up() -> bool:
            candidates = [
                other
                for other in self.chunks
                if other.gpu_slot in pool.slots
                and other.residency is Residency.GPU
                and not other.num_users
            ]
            victim = self._latest(candidates, chunk, demand=demand)
            if victim is not None:
                self._drop_gpu(victim)
            return victim is not None

        return give_up

    def _latest(self, candidates: list[Chunk], chunk: Chunk, *, demand: bool) -> Chunk | None:
        if not candidates:
            return None
        distance = self.schedule.distance
        victim = max(candidates, key=lambda other: (distance(other.spec.index), other.spec.index))
        if demand or distance(victim.spec.index) > distance(chunk.spec.index):
            return victim
        return None

    def _drop_host(self, chunk: Chunk) -> None:
        """Give up a host slot. Its bytes are clean: only updates change weights, and they write what they change."""
        if chunk.residency is Residency.CPU:
            chunk.to(Residency.NVME)
        self._release_slot(chunk)

    def _drop_gpu(self, chunk: Chunk) -> None:
        slot = chunk.gpu_slot
        if slot is None:
            return
        chunk.to(Residency.CPU if chunk.host_weight() is not None else Residency.NVME)
        chunk.gpu_slot = None
        self._gpu_pools[chunk.spec.index].release(slot)

    def _release_slot(self, chunk: Chunk) -> None:
        if chunk.slot is not None:
            chunk.slot.pool.release(chunk.slot)
            chunk.slot = None

    def borrow_slot(self, chunk: Chunk) -> Slot:
        """Any slot of the chunk's class for staging, outside of training."""
        for pools in (self._weight_pools, self._grad_pools):
            slot = pools[chunk.spec.index].acquire(chunk.name)
            if slot is not None:
                return slot
        raise StateError(f"no slot to stage chunk {chunk.name} in.")

    def acquire_grad_slot(self, chunk: Chunk, spill_other: Callable[[], bool]) -> Slot:
        """A gradient slot; waits for updates and spills in flight, then asks `spill_other` to make room."""
        pool = self._grad_pools[chunk.spec.index]
        while True:
            slot = pool.acquire(chunk.name)
            if slot is not None:
                return slot
            if self._in_flight:
                self._block(UPDATE)
            elif not spill_other():
                self._block_or_refuse(f"a gradient slot for {chunk.name}", UPDATE)

    # ---- updates -----------------------------------------------------------------------------------

    def set_updates(self, updates: Mapping[int, bytes]) -> None:
        """Leave an Update on each chunk of `updates` (native op records), and start those that can start."""
        with self.lock:
            self._check_alive()
            for index, ops in updates.items():
                self.chunks[index].update = Update(ops)
            for index in self.schedule.upcoming(len(self.chunks)):
                if self.chunks[index].update is not None:
                    self.fetch(self.chunks[index], demand=False)

    def update_now(self, index: int, ops: bytes) -> None:
        """Start the update of a chunk whose gradient is complete (eager)."""
        chunk = self.chunks[index]
        while chunk.residency in _BUSY:
            self._block(self._cause(chunk))
        chunk.update = Update(ops)
        self._start_update(chunk, keep=False, demand=True)

    def _start_update(self, chunk: Chunk, *, keep: bool, demand: bool) -> bool:
        """Hand a chunk to the update worker. With `keep` the new weights land in a slot, ready for use."""
        gradient, update = chunk.gradient, chunk.update
        if gradient is None or update is None or chunk.num_users:
            raise StateError(f"chunk {chunk.name} cannot be updated: it is in use or has no gradient.")
        while gradient.moving:
            if not demand:
                return True  # under way: the spill ends first
            self._block(Link.WRITE.value)
        self._drop_gpu(chunk)
        fresh = keep and chunk.host_weight() is None
        if fresh:
            chunk.slot = self._weight_slot(chunk, demand=demand)
            if chunk.slot is None:
                return False
        planes = [self._argument(chunk, plane, fresh=fresh) for plane in Plane]
        update.started = True
        chunk.to(Residency.UPDATING)
        tag = self._track(Link.WRITE, chunk, 0, self._finish_update(chunk))
        self._num_updating += 1
        self._pipeline.submit(tag, self.plan.fmt.native_code, chunk.spec.numel, planes, update.ops)
        return True

    def _argument(self, chunk: Chunk, plane: Plane, *, fresh: bool) -> PlaneArgument | None:
        if plane in (Plane.GRAD, Plane.GRAD_LO):
            return self._grad_argument(chunk, plane)
        if plane not in self.plan.fmt.state_planes:
            return None
        if plane in chunk.pinned:
            return PlaneArgument(chunk.pinned[plane].address)
        if self.store is None:
            raise StateError(f"chunk {chunk.name}: plane {plane.value} has no home.")
        segments = self.store.segments(chunk.extents[plane])
        if plane is Plane.WEIGHT and chunk.slot is not None:
            return PlaneArgument(chunk.slot.region.address, segments if fresh else None, segments)
        return PlaneArgument(0, segments, segments)

    def _grad_argument(self, chunk: Chunk, plane: Plane) -> PlaneArgument | None:
        gradient = chunk.gradient
        if gradient is None or (plane is Plane.GRAD_LO and not gradient.has_lo):
            return None
        if gradient.spilled and self.store is not None:
            return PlaneArgument(0, self.store.segments(chunk.extents[plane]))
        slot = gradient.hi if plane is Plane.GRAD else gradient.lo
        return None if slot is None else PlaneArgument(slot.region.address)

    def _finish_update(self, chunk: Chunk) -> Callable[[int, int, int], None]:
        def finish(result: int, fd: int, offset: int) -> None:
            chunk.to(Residency.CPU if chunk.host_weight() is not None else Residency.NVME)
            chunk.update = None
            self.release_gradient(chunk)
            if result < 0:
                raise self._storage_error(result, "updating", fd, offset, chunk)

        return finish

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
            self._check_alive()
            for chunk in self.chunks:
                self.finish_update(chunk, wait=False)
            for chunk in self.chunks:
                self.finish_update(chunk, wait=True)

    def finish_update(self, chunk: Chunk, *, wait: bool) -> None:
        """Start a chunk's pending update if it has not started; with `wait`, block until it is done."""
        while chunk.update is not None:
            if not chunk.update.started:
                while chunk.residency in _BUSY:
                    self._block(self._cause(chunk))
                self._start_update(chunk, keep=False, demand=True)
            if not wait:
                return
            self._block(UPDATE)

    def invalidate(self, chunk: Chunk) -> None:
        """Forget every copy of a chunk's weights but the one at rest, which is about to be written."""
        while chunk.residency in _BUSY:
            self._block(self._cause(chunk))
        self._drop_gpu(chunk)
        if chunk.slot is not None:
            self._drop_host(chunk)

    @property
    def gpu_nbytes(self) -> int:
        """Bytes of weight slots on the compute device."""
        return sum(slot.tensor.nbytes for pool in set(self._gpu_pools.values()) for slot in pool.slots)

    # ---- planes as tensors: start-up, export, inspection -------------------------------------------

    def move_plane(self, op: int, extent: Extent, address: int, chunk: Chunk, *, cause: str) -> None:
        """Read or write one whole plane against memory at `address`, and wait for it."""
        done: list[int] = []

        def finish(result: int, fd: int, offset: int) -> None:
            done.append(result)
            if result < 0:
                action = "reading" if op == io.READ else "writing"
                raise self._storage_error(result, action, fd, offset, chunk)

        self.start_plane(op, extent, address, chunk, finish)
        while not done:
            self._block(cause)

    def start_plane(
        self,
        op: int,
        extent: Extent,
        address: int,
        chunk: Chunk,
        finish: Callable[[int, int, int], None],
        priority: int = io.DEMAND,
    ) -> None:
        """Start moving one whole plane between its extent and memory at `address`; `finish` runs in poll."""
        if self.store is None or self._queue is None:
            raise StateError(f"chunk {chunk.name}: there is no NVMe tier.")
        link = Link.READ if op == io.READ else Link.WRITE
        tag = self._track(link, chunk, extent.nbytes, finish)
        self._num_moving += 1
        self._queue.submit(op, tag, self.store.io_segments(extent, address), priority)

    def _start_io(
        self,
        op: int,
        chunk: Chunk,
        extent: Extent,
        slot: Slot,
        finish: Callable[[int, int, int], None],
        priority: int,
    ) -> None:
        self.start_plane(op, extent, slot.region.address, chunk, finish, priority)

    # ---- completions -------------------------------------------------------------------------------

    def _track(
        self,
        link: Link,
        chunk: Chunk,
        nbytes: int,
        finish: Callable[[int, int, int], None],
        *,
        event: DeviceEvent | None = None,
        keep: tuple[object, ...] = (),
    ) -> int:
        tag = next(self._tags)
        self._in_flight[tag] = Transfer(
            tag, link, chunk.name, nbytes, time.perf_counter(), finish, event, keep
        )
        return tag

    def start_d2h(
        self,
        chunk: Chunk,
        target: torch.Tensor,
        source: torch.Tensor,
        finish: Callable[[int, int, int], None],
    ) -> None:
        """Copy a device tensor to the slab behind the compute submitted so far; `finish` runs in poll."""
        event = self.device.d2h(target, source)
        self._track(Link.D2H, chunk, target.nbytes, finish, event=event, keep=(source,))

    def poll(self) -> None:
        """Act on whatever has finished; never blocks."""
        with self.lock:
            self._drain(None)

    def block(self, cause: str) -> None:
        """Wait until something in flight finishes, and act on it; the time counts as a stall on `cause`."""
        self._block(cause)

    def _block(self, cause: str) -> None:
        start = time.perf_counter()
        try:
            self._drain(cause)
        finally:
            end = time.perf_counter()
            self.stats.stalled(cause, end - start)
            self.timeline.record("stall", cause, "stall", start, end)

    def _block_or_refuse(self, what: str, cause: str) -> None:
        if not self._in_flight:
            raise StateError(
                f"no {what}: all are in use and nothing is in flight. More chunks are needed at the same time "
                "than there are slots; raise tiers.cpu.budget (or tiers.cpu.weight_slots / grad_slots)."
            )
        self._block(cause)

    def _drain(self, cause: str | None) -> None:
        """Collect completions from all sources. With a cause, first sleep until one of them has something."""
        if cause is not None and not self._in_flight:
            raise StateError(f"waiting for {cause} with nothing in flight.")
        self._drain_events(block=cause in (Link.H2D.value, Link.D2H.value))
        on_updates = self._num_updating > 0 and (cause == UPDATE or not self._num_moving)
        self._drain_updates(_WAIT_S if cause is not None and on_updates else 0.0)
        on_queue = cause is not None and not on_updates and self._num_moving > 0
        self._drain_queue(_WAIT_S if on_queue else 0.0)

    def _drain_queue(self, timeout_s: float) -> None:
        if self._queue is None:
            return
        for done in self._queue.wait(timeout_s) if timeout_s else self._queue.poll():
            self._num_moving -= 1
            self._finish(done.tag, done.result, done.fd, done.offset, done.seconds)

    def _drain_updates(self, timeout_s: float) -> None:
        for done in self._pipeline.wait(timeout_s) if timeout_s else self._pipeline.poll():
            self._num_updating -= 1
            self.stats.moved(Link.READ, done.read_nbytes, 0.0)
            self.stats.moved(Link.WRITE, done.write_nbytes, 0.0)
            self.stats.updated(done.kernel_seconds)
            self._finish(done.tag, done.result, done.fd, done.offset, done.seconds, kind=UPDATE)

    def _drain_events(self, *, block: bool) -> None:
        for transfer in [t for t in self._in_flight.values() if t.event is not None]:
            event = transfer.event
            if event is not None and block:
                event.synchronize()
            if event is not None and event.query():
                self._finish(transfer.tag, 0, -1, -1, time.perf_counter() - transfer.start)

    def _finish(
        self, tag: int, result: int, fd: int, offset: int, seconds: float, *, kind: str = ""
    ) -> None:
        transfer = self._in_flight.pop(tag)
        end = time.perf_counter()
        lane = kind or transfer.link.value
        self.timeline.record(lane, transfer.chunk, lane, transfer.start, end, transfer.nbytes)
        self.stats.moved(transfer.link, transfer.nbytes, seconds)
        try:
            transfer.finish(result, fd, offset)
        except BaseException as error:
            self._failure = error
            raise

    def _storage_error(self, result: int, action: str, fd: int, offset: int, chunk: Chunk) -> Exception:
        if self.store is None:
            return StateError(f"{action} chunk {chunk.name} failed without a store ({result}).")
        return self.store.error(-result, action, fd, offset, chunk.name)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise StateError(
                f"the engine stopped at an earlier error: {self._failure} Leave the context and start again."
            ) from self._failure

    @property
    def failed(self) -> bool:
        return self._failure is not None

    # ---- ends --------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """An optimizer step is over: the order of uses is known, the statistics roll."""
        with self.lock:
            self.schedule.end_step()
            self.stats.roll()

    def drain(self) -> None:
        """Wait for everything in flight, whatever becomes of it. The first error is kept as the failure."""
        with self.lock:
            while self._in_flight:
                try:
                    self._drain(UPDATE)
                except Exception as error:
                    self._failure = self._failure or error

    def close(self) -> None:
        """Drain, stop the native threads, remove the files. Idempotent; never raises for lost transfers."""
        with self.lock:
            self.drain()
            self._pipeline.close()
            if self._queue is not None:
                self._queue.close()
            self.device.close()
            if self.store is not None:
                self.store.close()
            self.slab.close()


