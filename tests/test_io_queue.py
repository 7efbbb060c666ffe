"""IoQueue: every byte lands, every transfer completes once, every error says where."""

import ctypes
import errno
import hashlib
import mmap
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload._native import OP_READ, OP_WRITE, IoQueue, uring_probe

PAGE = 4096
BLOCK = 1 << 16
DEPTH = 4
DEADLINE_S = 60.0

Completion = tuple[int, int, int, int, float]
MakeQueue = Callable[..., IoQueue]

pytestmark = pytest.mark.usefixtures("nothing_left")
needs_uring = pytest.mark.skipif(uring_probe() != 0, reason="io_uring is refused here")
BACKENDS = [pytest.param("uring", marks=needs_uring), "threads"]


class Buffer:
    """Page-aligned memory with an address."""

    def __init__(self, nbytes: int, seed: int | None = None) -> None:
        self.memory = mmap.mmap(-1, max(nbytes, PAGE))
        self.nbytes = nbytes
        if seed is not None:
            self.memory[:nbytes] = random.Random(seed).randbytes(nbytes)
        self._view = (ctypes.c_char * max(nbytes, PAGE)).from_buffer(self.memory)
        self.address = ctypes.addressof(self._view)

    def digest(self) -> str:
        return hashlib.sha256(self.memory[: self.nbytes]).hexdigest()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_queue(backend: str) -> Iterator[MakeQueue]:
    """Make queues of the backend under test; they are closed after the test."""
    queues: list[IoQueue] = []

    def make(depth: int = DEPTH, block_nbytes: int = BLOCK, num_threads: int = 2) -> IoQueue:
        queues.append(IoQueue(backend, depth, block_nbytes, num_threads))
        return queues[-1]

    yield make
    for queue in queues:
        queue.close()


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Open files for direct I/O by default; they are closed after the test."""
    fds: list[int] = []

    def open_one(name: str = "swap", flags: int = os.O_RDWR | os.O_CREAT | os.O_DIRECT) -> int:
        fds.append(os.open(tmp_path / name, flags, 0o600))
        return fds[-1]

    yield open_one
    for fd in fds:
        os.close(fd)


def drain(queue: IoQueue, num: int) -> list[Completion]:
    """Wait for exactly `num` completions and check that there is not one more."""
    found: list[Completion] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < num and time.monotonic() < deadline:
        found += queue.wait(1.0)
    found += queue.poll()
    assert len(found) == num
    assert queue.stats()["num_in_flight"] == 0
    return found


def run_one(queue: IoQueue, op: int, segments: list[tuple[int, int, int, int]]) -> Completion:
    queue.submit(op, 7, 0, segments)
    (completion,) = drain(queue, 1)
    assert completion[0] == 7
    assert completion[4] > 0
    return completion


@pytest.mark.parametrize(
    "nbytes",
    [PAGE, BLOCK - PAGE, BLOCK, BLOCK + PAGE, 3 * BLOCK, (4 * DEPTH + 1) * BLOCK - PAGE],
)
@pytest.mark.parametrize("offset", [0, 5 * PAGE])
def test_direct_round_trip(
    make_queue: MakeQueue, open_file: Callable[..., int], nbytes: int, offset: int
) -> None:
    queue, fd = make_queue(), open_file()
    source, target = Buffer(nbytes, seed=nbytes), Buffer(nbytes)
    for op, buffer in ((OP_WRITE, source), (OP_READ, target)):
        completion = run_one(queue, op, [(fd, offset, buffer.address, nbytes)])
        assert completion[1:4] == (nbytes, -1, 0)
    assert target.digest() == source.digest()
    stats = queue.stats()
    assert (stats["read_bytes"], stats["write_bytes"]) == (nbytes, nbytes)


def test_unaligned_buffered_round_trip(
    make_queue: MakeQueue, open_file: Callable[..., int]
) -> None:
    nbytes, offset = 5 * BLOCK + 77, 12_345
    queue, fd = make_queue(), open_file(flags=os.O_RDWR | os.O_CREAT)
    source, target = Buffer(nbytes, seed=1), Buffer(nbytes)
    assert run_one(queue, OP_WRITE, [(fd, offset, source.address, nbytes)])[1] == nbytes
    assert run_one(queue, OP_READ, [(fd, offset, target.address, nbytes)])[1] == nbytes
    assert target.digest() == source.digest()


def test_one_transfer_over_two_files(make_queue: MakeQueue, open_file: Callable[..., int]) -> None:
    queue, fds = make_queue(), (open_file("a"), open_file("b"))
    source, target = Buffer(6 * BLOCK, seed=2), Buffer(6 * BLOCK)
    parts = [(0, 0, 2 * BLOCK), (1, PAGE, BLOCK + PAGE), (0, 8 * BLOCK, 0), (0, 3 * BLOCK, BLOCK)]

    def segments(buffer: Buffer) -> list[tuple[int, int, int, int]]:
        address, rows = buffer.address, []
        for file, offset, nbytes in parts:
            rows.append((fds[file], offset, address, nbytes))
            address += nbytes
        return rows

    total = sum(nbytes for _, _, nbytes in parts)
    assert run_one(queue, OP_WRITE, segments(source))[1] == total
    assert run_one(queue, OP_READ, segments(target))[1] == total
    assert target.memory[:total] == source.memory[:total]
    assert os.pread(fds[1], 0, 0) == b"" and os.fstat(fds[1]).st_size == BLOCK + 2 * PAGE


@pytest.mark.parametrize("segments", [[], [(-1, 0, 0, 0)]])
def test_nothing_to_move_completes_with_zero(
    make_queue: MakeQueue, segments: list[tuple[int, int, int, int]]
) -> None:
    queue = make_queue()
    queue.submit(OP_WRITE, 2**64 - 1, 0, segments)
    (completion,) = drain(queue, 1)
    assert completion[:4] == (2**64 - 1, 0, -1, 0)


def test_500_small_transfers_complete_once(
    make_queue: MakeQueue, open_file: Callable[..., int]
) -> None:
    queue, fd, num = make_queue(depth=32), open_file(), 500
    source, target = Buffer(num * PAGE, seed=3), Buffer(num * PAGE)
    order = random.Random(4).sample(range(num), num)
    for op, buffer in ((OP_WRITE, source), (OP_READ, target)):
        for i in order:
            queue.submit(op, i, i % 3, [(fd, i * PAGE, buffer.address + i * PAGE, PAGE)])
        completions = drain(queue, num)
        assert sorted(tag for tag, *_ in completions) == list(range(num))
        assert {result for _, result, *_ in completions} == {PAGE}
    assert target.digest() == source.digest()


@pytest.mark.parametrize("file_nbytes", [3 * BLOCK, 3 * BLOCK + PAGE, 3 * BLOCK + PAGE + 100])
@pytest.mark.parametrize("direct", [os.O_DIRECT, 0])
def test_read_past_the_end_is_an_error(
    make_queue: MakeQueue,
    tmp_path: Path,
    open_file: Callable[..., int],
    file_nbytes: int,
    direct: int,
) -> None:
    (tmp_path / "swap").write_bytes(bytes(file_nbytes))
    queue, fd = make_queue(depth=1, num_threads=1), open_file(flags=os.O_RDONLY | direct)
    buffer = Buffer(8 * BLOCK)
    completion = run_one(queue, OP_READ, [(fd, 0, buffer.address, 8 * BLOCK)])
    assert completion[1:4] == (-errno.ENODATA, fd, file_nbytes)
    assert queue.stats()["read_bytes"] == file_nbytes
    completion = run_one(queue, OP_READ, [(fd, 1 << 40, buffer.address, PAGE)])
    assert completion[1:4] == (-errno.ENODATA, fd, 1 << 40)


@pytest.mark.parametrize("op", [OP_READ, OP_WRITE])
def test_bad_descriptor_names_itself(
    make_queue: MakeQueue, open_file: Callable[..., int], op: int
) -> None:
    queue, fd = make_queue(), open_file()
    os.ftruncate(fd, BLOCK)
    bad = os.dup(fd)
    os.close(bad)
    buffer = Buffer(2 * BLOCK)
    segments = [(fd, 0, buffer.address, BLOCK), (bad, 9 * PAGE, buffer.address + BLOCK, BLOCK)]
    assert run_one(queue, op, segments)[1:4] == (-errno.EBADF, bad, 9 * PAGE)


def test_write_to_a_read_only_descriptor(
    make_queue: MakeQueue, tmp_path: Path, open_file: Callable[..., int]
) -> None:
    (tmp_path / "swap").write_bytes(bytes(BLOCK))
    queue, fd = make_queue(), open_file(flags=os.O_RDONLY | os.O_DIRECT)
    source = Buffer(BLOCK, seed=5)
    assert run_one(queue, OP_WRITE, [(fd, 0, source.address, BLOCK)])[1:3] == (-errno.EBADF, fd)
    assert (tmp_path / "swap").read_bytes() == bytes(BLOCK)


def test_misaligned_direct_io_is_reported(
    make_queue: MakeQueue, tmp_path: Path, open_file: Callable[..., int]
) -> None:
    (tmp_path / "swap").write_bytes(random.Random(6).randbytes(2 * BLOCK))
    queue, fd = make_queue(), open_file()
    buffer = Buffer(BLOCK)
    completion = run_one(queue, OP_READ, [(fd, 33, buffer.address, PAGE)])
    assert completion[1:4] == (-errno.EINVAL, fd, 33)


def test_full_device(make_queue: MakeQueue, open_file: Callable[..., int]) -> None:
    fd = open_file("/dev/full", os.O_WRONLY)
    source = Buffer(64 * BLOCK, seed=7)
    queue = make_queue(depth=1, num_threads=1)
    completion = run_one(queue, OP_WRITE, [(fd, PAGE, source.address, 64 * BLOCK)])
    assert completion[1:4] == (-errno.ENOSPC, fd, PAGE)
    assert queue.stats()["write_bytes"] == 0


def test_short_write_continues_up_to_the_limit(
    make_queue: MakeQueue, open_file: Callable[..., int]
) -> None:
    limit = 2 * BLOCK + 1000
    queue, fd = make_queue(depth=1, num_threads=1), open_file(flags=os.O_RDWR | os.O_CREAT)
    source = Buffer(4 * BLOCK, seed=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        completion = run_one(queue, OP_WRITE, [(fd, 0, source.address, 4 * BLOCK)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert completion[1:4] == (-errno.EFBIG, fd, limit)
    assert queue.stats()["num_short"] == 1
    assert queue.stats()["write_bytes"] == limit
    assert os.pread(fd, 4 * BLOCK, 0) == source.memory[:limit]


def test_an_error_spares_the_other_transfers(
    make_queue: MakeQueue, open_file: Callable[..., int]
) -> None:
    queue, fd = make_queue(), open_file()
    source = Buffer(16 * BLOCK, seed=9)
    for tag in range(16):
        target = fd if tag % 2 == 0 else -1
        row = (target, tag * BLOCK, source.address + tag * BLOCK, BLOCK)
        queue.submit(OP_WRITE, tag, 0, [row, row])
    results = {tag: result for tag, result, *_ in drain(queue, 16)}
    assert results == {i: 2 * BLOCK if i % 2 == 0 else -errno.EBADF for i in range(16)}


def test_lower_priority_value_overtakes(
    make_queue: MakeQueue, open_file: Callable[..., int]
) -> None:
    queue, fd = make_queue(depth=1, block_nbytes=PAGE, num_threads=1), open_file()
    nbytes = 2000 * PAGE  # thousands of device round trips: far longer than four submits
    source = Buffer(nbytes, seed=10)
    queue.submit(OP_WRITE, 1, 5, [(fd, 0, source.address, nbytes)])
    queue.submit(OP_WRITE, 2, 5, [(fd, 0, source.address, PAGE)])
    queue.submit(OP_WRITE, 3, 5, [(fd, 0, source.address, PAGE)])
    queue.submit(OP_WRITE, 4, -1, [(fd, 0, source.address, PAGE)])
    queue.submit(OP_WRITE, 5, 0, [(fd, 0, source.address, PAGE)])
    assert [tag for tag, *_ in drain(queue, 5)] == [4, 5, 1, 2, 3]


def test_close_finishes_what_was_submitted(
    make_queue: MakeQueue, open_file: Callable[..., int]
) -> None:
    queue, fd = make_queue(), open_file()
    nbytes = 128 * BLOCK
    source = Buffer(nbytes, seed=11)
    for i in range(128):
        queue.submit(OP_WRITE, i, 0, [(fd, i * BLOCK, source.address + i * BLOCK, BLOCK)])
    queue.close()
    queue.close()
    assert (queue.poll(), queue.wait(10.0)) == ([], [])
    assert queue.stats()["num_in_flight"] == 0
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(OP_WRITE, 0, 0, [])
    target = Buffer(nbytes)
    assert os.preadv(fd, [target.memory], 0) == nbytes
    assert target.digest() == source.digest()


def test_dropping_the_queue_finishes_its_work(backend: str, open_file: Callable[..., int]) -> None:
    source, target = Buffer(64 * BLOCK, seed=12), Buffer(64 * BLOCK)
    fd = open_file()
    queue = IoQueue(backend, DEPTH, BLOCK, 2)
    queue.submit(OP_WRITE, 0, 0, [(fd, 0, source.address, 64 * BLOCK)])
    del queue
    assert os.preadv(fd, [target.memory], 0) == 64 * BLOCK
    assert target.digest() == source.digest()


def test_close_wakes_a_waiting_thread(make_queue: MakeQueue) -> None:
    queue = make_queue()
    found: list[list[Completion]] = []
    waiter = threading.Thread(target=lambda: found.append(queue.wait(DEADLINE_S)))
    waiter.start()
    time.sleep(0.05)
    queue.close()
    waiter.join(5.0)
    assert found == [[]]


def test_wait_lets_other_threads_run(make_queue: MakeQueue, open_file: Callable[..., int]) -> None:
    queue, fd = make_queue(), open_file()
    source = Buffer(PAGE, seed=13)

    def submit_later() -> None:
        time.sleep(0.05)
        queue.submit(OP_WRITE, 1, 0, [(fd, 0, source.address, PAGE)])

    other = threading.Thread(target=submit_later)
    begin = time.monotonic()
    other.start()
    completions = queue.wait(DEADLINE_S)
    other.join()
    assert [tag for tag, *_ in completions] == [1]
    assert time.monotonic() - begin < DEADLINE_S / 2


def test_many_threads_submit(make_queue: MakeQueue, open_file: Callable[..., int]) -> None:
    queue, fd = make_queue(depth=16), open_file()
    source = Buffer(PAGE, seed=14)

    def submit_some(first: int) -> None:
        for tag in range(first, first + 100):
            queue.submit(OP_WRITE, tag, tag % 2, [(fd, tag * PAGE, source.address, PAGE)])

    threads = [threading.Thread(target=submit_some, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    completions = drain(queue, 400)
    for thread in threads:
        thread.join()
    assert sorted(tag for tag, *_ in completions) == list(range(400))


def test_waiting_and_idling_cost_no_cpu(make_queue: MakeQueue) -> None:
    queue = make_queue(num_threads=4)
    begin_cpu, begin = time.process_time(), time.monotonic()
    assert queue.wait(0.5) == []
    assert time.monotonic() - begin >= 0.49
    assert time.process_time() - begin_cpu < 0.1
    assert queue.wait(0.0) == queue.wait(-1.0) == []


def test_signal_interrupts_wait(make_queue: MakeQueue) -> None:
    class Alarm(Exception):
        pass

    def ring(signum: int, frame: object) -> None:
        raise Alarm

    queue = make_queue()
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(Alarm):
            queue.wait(DEADLINE_S)
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("aio", 4, PAGE, 1), "'uring' or 'threads'"),
        (("threads", 0, PAGE, 1), "depth"),
        (("threads", 4097, PAGE, 1), "depth"),
        (("threads", 4, 0, 1), "block_nbytes"),
        (("threads", 4, PAGE + 512, 1), "multiple of 4096"),
        (("threads", 4, 2 << 30, 1), "block_nbytes"),
        (("threads", 4, PAGE, 0), "num_threads"),
    ],
)
def test_limits_are_checked(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IoQueue(*arguments)


@pytest.mark.parametrize(
    ("op", "tag", "segment", "error"),
    [
        (2, 0, (0, 0, 0, 0), ValueError),
        (OP_READ, -1, (0, 0, 0, 0), OverflowError),
        (OP_READ, 0, (0, 0, 0), ValueError),
        (OP_READ, 0, (0, -1, 0, 0), OverflowError),
        (OP_READ, 0, (0, 2**63 - 1, 0, 1), OverflowError),
        (OP_READ, 0, (2**31, 0, 0, 0), OverflowError),
        (OP_READ, 0, ("0", 0, 0, 0), TypeError),
        (OP_READ, 0, 5, TypeError),
    ],
)
def test_bad_arguments_queue_nothing(
    make_queue: MakeQueue, op: int, tag: int, segment: object, error: type[Exception]
) -> None:
    queue = make_queue()
    with pytest.raises(error):
        queue.submit(op, tag, 0, [segment])  # type: ignore[list-item]
    assert queue.stats()["num_in_flight"] == 0
    assert queue.poll() == []


def test_backend_names_itself(make_queue: MakeQueue, backend: str) -> None:
    assert make_queue().backend() == backend
