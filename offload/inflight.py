"""Everything in flight: who is told what when a move ends, and how the engine sleeps until one
does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from offload import forks, interrupts
from offload.errors import OffloadError, StateError
from offload.extents import Extent
from offload.io import DEMAND, READ, WRITE, IoQueue, Segment
from offload.stats import UPDATE, StatsCounter
from offload.store import ChunkStore
from offload.tier import DeviceEvent, Link
from offload.timeline import Timeline
from offload.transfer import Transfer
from offload.update import PlaneArgument, UpdatePipeline

Finish = Callable[[int, int, int], None]
_WAIT_S = 0.01  # a blocked wait looks at the other completion source this often


class InFlight:
    """The transfers under way on all links. Completions act only in `poll`, `block` and `drain`."""

    def __init__(
        self,
        queue: IoQueue,
        pipeline: UpdatePipeline,
        timeline: Timeline,
        store: ChunkStore | None = None,
    ) -> None:
        self.stats = StatsCounter(len(store.paths) if store is not None else 0)
        self.failure: BaseException | None = None
        self._store = store
        self._queue = queue
        self._pipeline = pipeline
        self._timeline = timeline
        self._tags = itertools.count(1)
        self._transfers: dict[int, Transfer] = {}
        self._num_moving = 0  # of them, in the I/O queue
        self._num_updating = 0  # of them, with the update worker
        forks.register(self)

    def __bool__(self) -> bool:
        return bool(self._transfers)

    # ---- starting ----

    def start_plane(
        self, op: int, extent: Extent, address: int, chunk: str, finish: Finish, priority: int,
        begin: int = 0, nbytes: int | None = None,
    ) -> None:  # fmt: skip
        """Start moving an extent, or a part of it, from or to memory at `address`, as start_io
        does.
        """
        if self._store is None:
            raise StateError(f"chunk {chunk}: there is no NVMe tier.")
        link = Link.READ if op == READ else Link.WRITE
        is_part = op == READ and nbytes is not None
        if is_part and not self._store.holds_whole_runs(extent, begin, nbytes or 0):
            raise StateError(f"chunk {chunk}: bytes from {begin} are no whole packed runs.")
        segments = self._store.io_segments(extent, address, begin, nbytes)
        self.start_io(op, link, chunk, segments, finish, priority)

    def move_extent(
        self, op: int, extent: Extent, address: int, chunk: str, begin: int = 0,
        nbytes: int | None = None,
    ) -> None:  # fmt: skip
        """The same, and wait for it. Raises StorageError."""
        done: list[int] = []
        cause, action = (Link.READ, "reading") if op == READ else (Link.WRITE, "writing")

        def finish(result: int, fd: int, offset: int) -> None:
            done.append(result)
            if result < 0:
                raise self.storage_error(result, action, fd, offset, chunk)

        self.start_plane(op, extent, address, chunk, finish, DEMAND, begin, nbytes)
        while not done:
            self.block(cause.value)

    def start_io(
        self,
        op: int,
        link: Link,
        chunk: str,
        segments: Sequence[Segment],
        finish: Finish,
        priority: int,
    ) -> None:
        """Start an NVMe transfer; `finish(result, fd, offset)` runs when its completion is
        collected.
        """
        nbytes = sum(segment[3] for segment in segments)
        written: tuple[int, ...] = ()
        if op == WRITE and self._store is not None:
            written = self._store.by_drive((segment[0], segment[3]) for segment in segments)
        tag = self._track(link, chunk, nbytes, finish, written=written)
        self._num_moving += 1
        try:
            self._queue.submit(op, tag, segments, priority)
        except Exception:
            self._num_moving -= 1
            del self._transfers[tag]  # what was not taken never ends
            raise

    def storage_error(
        self, result: int, action: str, fd: int, offset: int, chunk: str
    ) -> OffloadError:
        """The error for a completion with the negative `result`."""
        if self._store is None:
            return StateError(f"{action} chunk {chunk} failed without a store ({result}).")
        return self._store.error(-result, action, fd, offset, chunk)

    def start_update(
        self,
        chunk: str,
        fmt_code: int,
        numel: int,
        planes: Sequence[PlaneArgument | None],
        ops: bytes,
        finish: Finish,
        *,
        write_all: bool,
    ) -> None:
        """Hand a chunk to the update worker."""
        tag = self._track(Link.WRITE, chunk, 0, finish)
        self._num_updating += 1
        try:
            self._pipeline.submit(tag, fmt_code, numel, planes, ops, write_all=write_all)
        except Exception:
            self._num_updating -= 1
            del self._transfers[tag]
            raise

    def updated(self, chunk: str, start: float, end: float) -> None:
        """Book an update that ran on the calling thread, which is time that compute waited."""
        self.stats.updated(end - start)
        self.stats.stalled(UPDATE, end - start)
        self._timeline.record(UPDATE, chunk, UPDATE, start, end)

    def start_copy(
        self,
        link: Link,
        chunk: str,
        nbytes: int,
        event: DeviceEvent,
        finish: Finish,
        keep: tuple[object, ...],
    ) -> None:
        """Watch a device copy that has been enqueued; `keep` lives until it is done."""
        self._track(link, chunk, nbytes, finish, event, keep)

    def _track(
        self,
        link: Link,
        chunk: str,
        nbytes: int,
        finish: Finish,
        event: DeviceEvent | None = None,
        keep: tuple[object, ...] = (),
        written: tuple[int, ...] = (),
    ) -> int:
        tag = next(self._tags)
        self._transfers[tag] = Transfer(
            tag, link, chunk, nbytes, time.perf_counter(), finish, event, keep, written
        )
        return tag

    # ---- ending ----

    def poll(self) -> None:
        """Act on whatever has finished; never blocks."""
        if not self._transfers:
            return
        with interrupts.held():  # what has been taken from the native code must be acted on
            self._collect_copies(block=False)
            self._collect_updates(0.0)
            self._collect_io(0.0)

    def block(self, cause: str) -> None:
        """Sleep until something finishes, and act on it. The time counts as a stall on `cause`.

        Raises StateError where nothing is in flight: nobody would ever wake up.
        """
        if not self._transfers:
            raise StateError(f"waiting for {cause} with nothing in flight.")
        with interrupts.held():
            self._block(cause)

    def _block(self, cause: str) -> None:
        start = time.perf_counter()
        try:
            self._collect_copies(block=cause in (Link.H2D.value, Link.D2H.value))
            on_updates = self._num_updating > 0 and (cause == UPDATE or not self._num_moving)
            self._collect_updates(_WAIT_S if on_updates else 0.0)
            self._collect_io(_WAIT_S if not on_updates and self._num_moving else 0.0)
        finally:
            end = time.perf_counter()
            self.stats.stalled(cause, end - start)
            self._timeline.record("stall", cause, "stall", start, end)

    def drain(self) -> None:
        """Wait for everything, whatever becomes of it; the first error is kept as the failure."""
        while self._transfers:
            try:
                self.block(UPDATE)
            except Exception as error:
                self.failure = self.failure or error

    def close(self) -> None:
        """Drain, and stop the native threads. Idempotent."""
        try:
            self.drain()
        finally:  # an interrupted drain, too, ends with nothing in flight
            self._pipeline.close()
            self._queue.close()

    def let_go(self) -> None:
        """In a forked child: nothing moves here, and nothing will. See [Note: forks]."""
        self.failure = StateError(forks.REFUSAL)
        self._transfers.clear()
        self._num_moving = self._num_updating = 0

    def _collect_io(self, timeout_s: float) -> None:
        rows = self._queue.wait(timeout_s) if timeout_s else self._queue.poll()
        self._num_moving -= len(rows)
        self._finish_all([(d.tag, d.result, d.fd, d.offset, d.seconds, "") for d in rows])

    def _collect_updates(self, timeout_s: float) -> None:
        rows = self._pipeline.wait(timeout_s) if timeout_s else self._pipeline.poll()
        self._num_updating -= len(rows)
        for done in rows:
            self.stats.moved(Link.READ, done.read_nbytes, 0.0)
            self.stats.moved(Link.WRITE, done.write_nbytes, 0.0)
            self.stats.updated(done.kernel_seconds)
            if self._store is not None:
                self.stats.wrote(self._store.by_drive(done.written))
        self._finish_all([(d.tag, d.result, d.fd, d.offset, 0.0, UPDATE) for d in rows])

    def _finish_all(self, rows: Sequence[tuple[int, int, int, int, float, str]]) -> None:
        """Tell everybody, also behind one that fails; the first error is raised when all know."""
        errors: list[BaseException] = []
        for tag, result, fd, offset, seconds, lane in rows:
            try:
                self._finish(tag, result, fd, offset, seconds, lane=lane)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _collect_copies(self, *, block: bool) -> None:
        for transfer in [t for t in self._transfers.values() if t.event is not None]:
            event = transfer.event
            if event is not None and block:
                event.synchronize()
            if event is not None and event.query():
                seconds = time.perf_counter() - transfer.start
                self._finish(transfer.tag, 0, -1, -1, seconds)

    def _finish(
        self, tag: int, result: int, fd: int, offset: int, seconds: float, *, lane: str = ""
    ) -> None:
        transfer = self._transfers.pop(tag)
        is_io = transfer.link in (Link.READ, Link.WRITE) and lane != UPDATE
        nbytes = result if is_io and result >= 0 else transfer.nbytes  # less where it is packed
        lane = lane or transfer.link.value
        end = time.perf_counter()
        self._timeline.record(lane, transfer.chunk, lane, transfer.start, end, nbytes)
        self.stats.moved(transfer.link, nbytes, seconds)
        if result >= 0:
            self.stats.wrote(transfer.written)
        try:
            transfer.finish(result, fd, offset)
        except BaseException as error:
            self.failure = self.failure or error
            raise
