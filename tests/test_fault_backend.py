"""The backend "faults" does to files what its plan says, counts it, and disturbs nothing else."""

import ctypes
import errno
import mmap
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_plans import DELAYS, ERRORS, KINDS, LIES, TRANSIENT, at, faults, num_injected, rate

import offload
from offload import _native
from offload._native import OP_READ, OP_WRITE, IoQueue
from offload.io import choose_backend

pytestmark = pytest.mark.usefixtures("nothing_left")
PAGE = 4096
BLOCK = 4 * PAGE
NUM_BLOCKS = 8
NBYTES = NUM_BLOCKS * BLOCK
DEADLINE_S = 60.0


class File:
    """A file of random bytes opened for direct I/O, beside page-aligned memory of its size."""

    def __init__(self, path: Path) -> None:
        self.before = random.Random(1).randbytes(NBYTES)
        path.write_bytes(self.before)
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.memory = mmap.mmap(-1, NBYTES)
        self.address = ctypes.addressof((ctypes.c_char * NBYTES).from_buffer(self.memory))

    def move(self, op: int, *, backend: str = "faults", num_threads: int = 2) -> int:
        """Move all of it in one transfer, and return the result."""
        queue = IoQueue(backend, NUM_BLOCKS, BLOCK, num_threads)
        queue.submit(op, 7, 0, [(self.fd, 0, self.address, NBYTES)])
        rows = queue.wait(DEADLINE_S)
        queue.close()
        assert len(rows) == 1 and rows[0][0] == 7
        return rows[0][1]

    def read(self) -> bytes:
        assert self.move(OP_READ) == NBYTES
        return self.memory[:]

    def write(self) -> bytes:
        """Write other bytes over all of it; return them."""
        data = random.Random(2).randbytes(NBYTES)
        self.memory[:] = data
        assert self.move(OP_WRITE) == NBYTES
        assert self.memory[:] == data  # whatever goes wrong, the caller's bytes stay as they are
        return data

    def content(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "swap")
    yield file
    _native.clear_fault_plan()
    os.close(file.fd)


def flipped_bits(a: bytes, b: bytes) -> int:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_count()


def differing_blocks(a: bytes, b: bytes) -> list[int]:
    return [i for i in range(0, NBYTES, BLOCK) if a[i : i + BLOCK] != b[i : i + BLOCK]]


def test_without_a_plan_it_is_the_thread_backend(file: File) -> None:
    queue = IoQueue("faults", 1, PAGE, 1)
    assert queue.backend() == "faults"
    queue.close()
    assert file.read() == file.before
    assert file.write() == file.content()


def test_an_empty_plan_counts(file: File) -> None:
    with faults([]):
        assert file.read() == file.before
        file.write()
    counts = _native.fault_counts()
    assert (counts["reads"], counts["writes"]) == (NUM_BLOCKS, NUM_BLOCKS)
    assert set(counts) == {"reads", "writes", *KINDS} and num_injected() == 0
    file.read()  # after the plan
    assert _native.fault_counts() == counts


@pytest.mark.parametrize("kind", TRANSIENT + DELAYS)
@pytest.mark.parametrize("number", [1, 5])
def test_what_passes_leaves_no_trace(file: File, kind: str, number: int) -> None:
    with faults(at(kind, number)):
        assert file.read() == file.before
    assert num_injected() == _native.fault_counts()[kind] == 1
    with faults(rate(0.4, kind), seed=number):
        assert file.write() == file.content()
    assert num_injected() == _native.fault_counts()[kind] > 1


def test_a_short_transfer_goes_on_where_it_stopped(file: File) -> None:
    with faults(at("short", 3)):
        file.read()
    assert _native.fault_counts()["reads"] == NUM_BLOCKS + 1


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_reach_the_caller(file: File, kind: str) -> None:
    code = getattr(errno, kind.upper())
    with faults(at(kind, 2)):
        assert file.move(OP_WRITE) == -code
    assert num_injected() == 1
    with faults(rate(1.0, "enospc")):
        assert file.read() is not None  # a read needs no space
    assert num_injected() == 0


def test_endless_interruptions_end(file: File) -> None:
    with faults(rate(1.0, "eintr")):
        assert file.move(OP_READ) == -errno.EINTR


def test_flip_read(file: File) -> None:
    with faults(at("flip_read", 2)):
        data = file.read()
    assert flipped_bits(data, file.before) == 1
    assert file.content() == file.before


def test_flip_write(file: File) -> None:
    with faults(at("flip_write", 2)):
        data = file.write()
    assert flipped_bits(data, file.content()) == 1


def test_drop(file: File) -> None:
    with faults(at("drop", NUM_BLOCKS)):
        data = file.write()
    [stale] = differing_blocks(data, file.content())
    assert file.content()[stale : stale + BLOCK] == file.before[stale : stale + BLOCK]


@pytest.mark.parametrize("number", range(1, NUM_BLOCKS + 1))
def test_misplace(file: File, number: int) -> None:
    """One thread, so the blocks are written in order and the last one is the only one missing."""
    data = random.Random(2).randbytes(NBYTES)
    file.memory[:] = data
    with faults(at("misplace", number)):
        assert file.move(OP_WRITE, num_threads=1) == NBYTES
    assert num_injected() == 1
    assert len(file.content()) == NBYTES
    begin = (number - 1) * BLOCK
    lost, found = data[begin : begin + BLOCK], file.content()
    assert found[begin : begin + BLOCK] != lost
    if number == NUM_BLOCKS:
        assert found.count(lost) == 1 and found.find(lost) % PAGE == 0


def test_held_operations_let_others_pass(file: File) -> None:
    """The first of four transfers is held: it does not end first. It does when nobody follows."""
    queue = IoQueue("faults", NUM_BLOCKS, BLOCK, 2)
    order: list[int] = []
    deadline = time.monotonic() + DEADLINE_S
    with faults(at("reorder", 1), delay_s=1.0):
        for tag in range(4):
            segment = (file.fd, tag * BLOCK, file.address + tag * BLOCK, BLOCK)
            queue.submit(OP_READ, tag, 0, [segment])
            while _native.fault_counts()["reads"] == 0 and time.monotonic() < deadline:
                pass  # the first is under way before another can overtake it
        while len(order) < 4 and time.monotonic() < deadline:
            order += [row[0] for row in queue.wait(1.0)]
    queue.close()
    assert sorted(order) == [0, 1, 2, 3] and order[0] != 0
    with faults(at("reorder", 1), delay_s=0.01):
        assert file.move(OP_READ, num_threads=1) == NBYTES


@pytest.mark.parametrize("kind", LIES + TRANSIENT)
def test_the_seed_decides(file: File, kind: str) -> None:
    """With one thread the operations are the same, so the faults are; another seed has others."""

    def struck(seed: int) -> tuple[int, bytes, bytes]:
        file.path.write_bytes(file.before)
        with faults(rate(0.3, kind), seed=seed):
            file.move(OP_READ, num_threads=1)
            read = file.memory[:]
            file.memory[:] = file.before[::-1]
            file.move(OP_WRITE, num_threads=1)
        return num_injected(), read, file.content()

    assert struck(1) == struck(1)
    assert len({struck(seed) for seed in range(8)}) > 1


def test_rates_are_kept(file: File) -> None:
    with faults(rate(0.25, "eintr"), seed=3):
        for _ in range(100):
            file.read()
    seen = _native.fault_counts()
    assert 0.2 < seen["eintr"] / seen["reads"] < 0.3


def test_other_backends_do_not_look(file: File) -> None:
    backends = ["threads"] + ["uring"] * (_native.uring_probe() == 0)
    with faults(rate(1.0, "eio")):
        assert all(file.move(OP_READ, backend=backend) == NBYTES for backend in backends)
    assert _native.fault_counts()["reads"] == 0


@pytest.mark.parametrize(
    ("rules", "seed", "delay_s"),
    [
        ([("fire", 1, 0.0)], 0, 0.0),
        ([("eio", 0, 1.5)], 0, 0.0),
        ([("eio", 0, float("nan"))], 0, 0.0),
        ([], 0, -1.0),
        ([], 0, 1e9),
    ],
)
def test_impossible_plans(rules: list[tuple[str, int, float]], seed: int, delay_s: float) -> None:
    with pytest.raises(ValueError):
        _native.set_fault_plan(rules, seed, delay_s)


def test_users_are_not_offered_it(nvme_dir: Path) -> None:
    assert {choose_backend(name)[0] for name in ("auto", "threads")} <= {"uring", "threads"}
    policy = {"tiers": {"cpu": {"budget": "1GiB"}, "nvme": {"paths": [str(nvme_dir)]}}}
    with pytest.raises(offload.PolicyError, match="tiers.nvme.io"):
        offload.load_policy(policy, ["tiers.nvme.io=faults"])
