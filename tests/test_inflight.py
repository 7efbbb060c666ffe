"""What is in flight: each end is told to its owner once, in poll or block, and never lost."""

import signal
import threading
import time
from collections.abc import Callable

import pytest

from offload.errors import StateError, StorageError
from offload.extents import Extent
from offload.inflight import InFlight
from offload.io import READ, WRITE, IoCompletion
from offload.stats import UPDATE
from offload.tier import Link
from offload.timeline import Timeline
from offload.transfer import StandinEvent
from offload.update import UpdateCompletion

MAX_POLLS = 300


class Stuck(BaseException):
    """Raised by the fakes where somebody waits for what can never come; drain lets it pass."""


class FakeSource:
    """Completions that the test hands out; both the I/O queue and the update worker."""

    def __init__(self) -> None:
        self.submitted: list[int] = []
        self.ready: list = []
        self.timeouts: list[float] = []
        self.is_closed = False

    def poll(self) -> list:
        self.timeouts.append(0.0)
        if len(self.timeouts) > MAX_POLLS:
            raise Stuck
        done, self.ready = self.ready, []
        return done

    def wait(self, timeout_s: float) -> list:
        done = self.poll()
        self.timeouts[-1] = timeout_s
        return done

    def close(self) -> None:
        self.is_closed = True


class FakeQueue(FakeSource):
    def submit(self, op: int, tag: int, segments: list, priority: int) -> None:
        self.submitted.append(tag)

    def complete(self, tag: int, result: int = 8) -> None:
        self.ready.append(IoCompletion(tag, result, 3, 4096, 0.25))


class FakePipeline(FakeSource):
    def submit(
        self, tag: int, fmt_code: int, numel: int, planes: list, ops: bytes, *, write_all: bool
    ) -> None:
        self.submitted.append(tag)

    def complete(self, tag: int, result: int = 0) -> None:
        self.ready.append(UpdateCompletion(tag, result, 3, 4096, 100, 60, 0.5, 0.125, ((3, 60),)))


class Log:
    """What finished, as (name, result, fd, offset)."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, int, int]] = []

    def finish(self, name: str) -> Callable[[int, int, int], None]:
        def finish(result: int, fd: int, offset: int) -> None:
            self.rows.append((name, result, fd, offset))
            if result < 0:
                raise StorageError(-result, "moving", path=name)

        return finish

    @property
    def names(self) -> list[str]:
        return [row[0] for row in self.rows]


class Bench:
    """InFlight with fakes around it."""

    def __init__(self) -> None:
        self.queue, self.pipeline, self.log = FakeQueue(), FakePipeline(), Log()
        self.timeline = Timeline(100)
        self.flight = InFlight(self.queue, self.pipeline, self.timeline)  # type: ignore[arg-type]

    def start_io(self, name: str, op: int = READ, nbytes: int = 8) -> int:
        link = Link.READ if op == READ else Link.WRITE
        segments = [(3, 0, 0, nbytes)]
        self.flight.start_io(op, link, name, segments, self.log.finish(name), 0)
        return self.queue.submitted[-1]

    def start_update(self, name: str) -> int:
        self.flight.start_update(name, 1, 4096, [], b"", self.log.finish(name), write_all=False)
        return self.pipeline.submitted[-1]

    def start_copy(self, name: str, keep: tuple[object, ...] = ()) -> StandinEvent:
        event = StandinEvent()
        self.flight.start_copy(Link.H2D, name, 16, event, self.log.finish(name), keep)
        return event


def test_each_end_is_told_once_and_only_in_poll() -> None:
    bench = Bench()
    read, write = bench.start_io("a"), bench.start_io("b", WRITE)
    update, event = bench.start_update("c"), bench.start_copy("d")
    assert len({read, write}) == 2 and bool(bench.flight)
    bench.flight.poll()
    assert bench.log.rows == []
    bench.queue.complete(write)
    bench.queue.complete(read)
    bench.pipeline.complete(update)
    event.set()
    assert bench.log.rows == []
    bench.flight.poll()
    bench.flight.poll()
    want = {("a", 8, 3, 4096), ("b", 8, 3, 4096), ("c", 0, 3, 4096), ("d", 0, -1, -1)}
    assert set(bench.log.rows) == want and len(bench.log.rows) == 4
    assert bench.log.names.index("b") < bench.log.names.index("a")
    assert not bench.flight


def test_bytes_and_seconds_are_booked_to_their_link() -> None:
    bench = Bench()
    for name, op, nbytes in (("a", READ, 10), ("b", READ, 20), ("c", WRITE, 5)):
        bench.queue.complete(bench.start_io(name, op, nbytes), nbytes)
    bench.pipeline.complete(bench.start_update("d"))
    bench.start_copy("e").set()
    bench.flight.poll()
    stats = bench.flight.stats.roll()
    assert stats.nbytes == {"nvme read": 130, "nvme write": 65, "h2d": 16, "d2h": 0}
    assert (stats.busy_s["nvme read"], stats.busy_s["nvme write"]) == (0.5, 0.25)
    assert (stats.num_updates, stats.update_kernel_s) == (1, 0.125)
    lanes = {(event.kind, event.name, event.nbytes) for event in bench.timeline.events()}
    assert lanes >= {("nvme read", "b", 20), (UPDATE, "d", 0), ("h2d", "e", 16)}


def test_what_a_copy_needs_lives_until_it_is_done() -> None:
    class Buffer:
        num_alive = 0

        def __init__(self) -> None:
            Buffer.num_alive += 1

        def __del__(self) -> None:
            Buffer.num_alive -= 1

    bench = Bench()
    event = bench.start_copy("a", keep=(Buffer(),))
    bench.flight.poll()
    assert Buffer.num_alive == 1
    event.set()
    bench.flight.poll()
    assert Buffer.num_alive == 0


def test_waiting_with_nothing_in_flight_is_refused() -> None:
    with pytest.raises(StateError, match="waiting for update with nothing in flight"):
        Bench().flight.block(UPDATE)


def test_without_a_drive_nothing_can_be_read() -> None:
    bench = Bench()
    with pytest.raises(StateError, match="chunk a: there is no NVMe tier"):
        bench.flight.move_extent(READ, Extent(((0, 0, 8),)), 0, "a")
    assert not bench.flight
    bench.flight.poll()
    bench.flight.close()
    assert bench.pipeline.is_closed


@pytest.mark.parametrize(
    ("started", "cause", "sleeper"),
    [
        ("io", Link.READ.value, "queue"),
        ("update", UPDATE, "pipeline"),
        ("io update", Link.READ.value, "queue"),
        ("io update", UPDATE, "pipeline"),
        ("update", Link.READ.value, "pipeline"),
        ("io", UPDATE, "queue"),
    ],
)
def test_a_blocked_wait_sleeps_where_the_end_will_come(
    started: str, cause: str, sleeper: str
) -> None:
    """On the source of the cause where that has work, else on the other: it never spins."""
    bench = Bench()
    if "io" in started:
        bench.start_io("a")
    if "update" in started:
        bench.start_update("b")
    bench.flight.block(cause)
    slept = {
        name
        for name, source in (("queue", bench.queue), ("pipeline", bench.pipeline))
        if any(source.timeouts)
    }
    assert slept == {sleeper}


def test_a_stall_is_counted_and_recorded() -> None:
    bench = Bench()
    bench.queue.complete(bench.start_io("a"))
    bench.flight.block(Link.READ.value)
    assert list(bench.flight.stats.roll().stall_s) == [Link.READ.value]
    assert [e.name for e in bench.timeline.events() if e.kind == "stall"] == [Link.READ.value]


def test_blocking_on_a_copy_waits_for_its_event() -> None:
    bench = Bench()
    event = bench.start_copy("a")
    setter = threading.Thread(target=lambda: (time.sleep(0.01), event.set()))
    setter.start()
    bench.flight.block(Link.H2D.value)
    assert bench.log.names == ["a"]
    setter.join()


# Failures


def test_an_error_is_raised_and_kept() -> None:
    bench = Bench()
    bench.queue.complete(bench.start_io("a"), -5)
    with pytest.raises(StorageError) as raised:
        bench.flight.poll()
    assert raised.value.errno == 5 and bench.flight.failure is raised.value
    assert not bench.flight


def test_the_first_of_two_errors_stays() -> None:
    bench = Bench()
    tags = [bench.start_io("a"), bench.start_io("b")]
    for tag in tags:
        bench.queue.complete(tag, -5)
        with pytest.raises(StorageError):
            bench.flight.poll()
    assert bench.log.names == ["a", "b"] and str(bench.flight.failure).startswith("moving a")


@pytest.mark.parametrize("source", ["io", "update", "copy"])
@pytest.mark.parametrize("ending", ["drain", "close"])
def test_an_error_does_not_lose_what_completed_with_it(source: str, ending: str) -> None:
    """Two completions in one batch, the first an error: the second must still be told, or the end
    waits for it for ever.
    """
    bench = Bench()
    if source == "io":
        for result, name in ((-5, "a"), (8, "b")):
            bench.queue.complete(bench.start_io(name), result)
    elif source == "update":
        for result, name in ((-5, "a"), (0, "b")):
            bench.pipeline.complete(bench.start_update(name), result)
    else:
        bench.queue.complete(bench.start_io("a"), -5)
        bench.start_copy("b").set()
    with pytest.raises(StorageError):
        bench.flight.poll()
    getattr(bench.flight, ending)()
    assert sorted(bench.log.names) == ["a", "b"] and not bench.flight


def test_drain_goes_on_after_errors() -> None:
    """Ends arrive one by one while it waits; errors among them stop nothing, the first is kept."""
    bench = Bench()
    tags = [bench.start_io(name) for name in "abc"]
    pending = list(zip(tags, (8, -5, -28), strict=True))
    wait = bench.queue.wait

    def one_more(timeout_s: float) -> list:
        if pending:
            bench.queue.complete(*pending.pop(0))
        return wait(timeout_s)

    bench.queue.wait = one_more  # type: ignore[method-assign]
    bench.flight.drain()
    assert bench.log.names == ["a", "b", "c"] and not bench.flight
    assert isinstance(bench.flight.failure, StorageError) and bench.flight.failure.errno == 5


def test_close_waits_and_stops_both_workers() -> None:
    bench = Bench()
    bench.queue.complete(bench.start_io("a"))
    bench.flight.close()
    bench.flight.close()
    assert bench.log.names == ["a"] and bench.queue.is_closed and bench.pipeline.is_closed


def test_ctrl_c_behind_a_completion_does_not_lose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes as completions are handed over is raised when all have been told."""
    bench = Bench()
    bench.queue.complete(bench.start_io("a"))
    bench.pipeline.complete(bench.start_update("b"))
    for source in (bench.queue, bench.pipeline):
        poll = source.poll

        def interrupted(poll: Callable[[], list] = poll) -> list:
            rows = poll()
            signal.raise_signal(signal.SIGINT)
            return rows

        monkeypatch.setattr(source, "poll", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        bench.flight.block(UPDATE)
    assert sorted(bench.log.names) == ["a", "b"] and not bench.flight
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("source", ["queue", "pipeline"])
def test_what_the_native_code_refuses_is_not_waited_for(source: str) -> None:
    bench = Bench()

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such op")

    setattr(getattr(bench, source), "submit", refuse)  # noqa: B010
    with pytest.raises(ValueError, match="no such op"):
        bench.start_io("a") if source == "queue" else bench.start_update("a")
    assert not bench.flight
    bench.flight.drain()
    assert bench.flight.failure is None
