"""Typed face of the native I/O queue, and the choice of its backend."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from offload import _native
from offload.errors import PolicyError

READ = _native.OP_READ
WRITE = _native.OP_WRITE
NUM_THREADS = 4
DEPTH_MIN = 4
# What compute waits for goes first; the update worker's own I/O is write-back.
DEMAND = _native.PRIORITY_DEMAND
PREFETCH = _native.PRIORITY_PREFETCH
WRITE_BACK = _native.PRIORITY_WRITE_BACK

logger = logging.getLogger("offload")
Native = TypeVar("Native")
# fd, offset, address, nbytes, and where checksums are kept, the address of its first block's.
# A run of floats (see Runs in store.py) has the size of its items behind that.
Segment = (
    tuple[int, int, int, int] | tuple[int, int, int, int, int] | tuple[int, int, int, int, int, int]
)
crc32c = _native.crc32c
crc32c_blocks = _native.crc32c_blocks
unpack_run = _native.unpack_run
PACK_ISA = _native.pack_isas()[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How a queue cuts transfers: blocks of at most `block_nbytes`, at most `depth` in flight.

    The thread backend has at most NUM_THREADS in flight, so its blocks are larger. Its threads run
    on `cpus` (None: anywhere); see offload/numa.py.
    """

    depth: int
    block_nbytes: int
    cpus: frozenset[int] | None = None


DEFAULT_LIMITS = {  # for a drive that was not measured, see offload/calibrate.py
    "uring": Limits(depth=64, block_nbytes=512 << 10),
    "threads": Limits(depth=NUM_THREADS, block_nbytes=4 << 20),
}


def with_room(limits: Limits, make: Callable[[int, int], Native]) -> Native:
    """make(depth, block_nbytes), with less depth where the kernel has no memory for that many: a
    user without privileges may lock little, and rings count. Raises OSError below DEPTH_MIN.
    """
    depth = limits.depth
    while True:
        try:
            with on_cpus(limits.cpus):
                return make(depth, limits.block_nbytes)
        except OSError as error:
            if error.errno != errno.ENOMEM or depth // 2 < DEPTH_MIN:
                raise
            depth //= 2


@contextlib.contextmanager
def on_cpus(cpus: frozenset[int] | None) -> Iterator[None]:
    """Have threads that are started meanwhile run there: they inherit where their maker may run."""
    before = os.sched_getaffinity(0)
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)
    except OSError as error:  # a cpuset has changed since: an advice, nothing is wrong without it
        logger.warning("threads are not kept to CPUs %s: %s", sorted(cpus or ()), error)
    try:
        yield
    finally:
        if cpus:
            os.sched_setaffinity(0, before)


def default_limits(backend: str) -> Limits:
    """For a drive that was not measured. Backends of tests are threads."""
    return DEFAULT_LIMITS.get(backend, DEFAULT_LIMITS["threads"])


@dataclasses.dataclass(frozen=True, slots=True)
class IoCompletion:
    """What became of one transfer: `result` is the bytes moved, or -errno with the fd and offset
    that failed.
    """

    tag: int
    result: int
    fd: int
    offset: int
    seconds: float


class IoQueue:
    """Submission and completion queue. `submit` never blocks; `wait` blocks without the GIL.

    Segments with checksums get one uint32 for every `checksum_nbytes` of their piece: stored before
    a write, compared after a read, which fails with EBADMSG and the block's offset. Segments that
    are runs have `item_nbytes` too; the length of each packed block is `pack_stride` entries behind
    its checksum. A read unpacks them, a write keeps them plain.
    """

    def __init__(
        self,
        backend: str,
        limits: Limits | None = None,
        *,
        checksum_nbytes: int = 0,
        pack_stride: int = 0,
    ) -> None:
        self.native = with_room(
            limits or default_limits(backend),
            lambda depth, block_nbytes: _native.IoQueue(
                backend, depth, block_nbytes, NUM_THREADS, checksum_nbytes, pack_stride
            ),
        )
        self.backend = backend
        self.cpus = limits.cpus if limits else None

    def submit(
        self, op: int, tag: int, segments: Sequence[Segment], priority: int = DEMAND
    ) -> None:
        """Start one transfer over all segments; it completes once. Buffers must outlive it."""
        self.native.submit(op, tag, priority, segments)

    def poll(self) -> list[IoCompletion]:
        """Take what has completed; never blocks."""
        return [IoCompletion(*row) for row in self.native.poll()]

    def wait(self, timeout_s: float) -> list[IoCompletion]:
        """Block until something completes or the time is up."""
        return [IoCompletion(*row) for row in self.native.wait(timeout_s)]

    def close(self) -> None:
        """Wait for what is in flight and stop the threads. Idempotent."""
        self.native.close()


_REFUSALS = (errno.EPERM, errno.ENOSYS, errno.ENOMEM, errno.EACCES, errno.EINVAL)


def choose_backend(requested: str) -> tuple[str, str]:
    """Return (backend, reason). `auto` takes io_uring where the kernel allows it, else threads.

    Raises PolicyError where `uring` is demanded and refused.
    """
    if requested == "threads":
        return "threads", "tiers.nvme.io is threads"
    code = -_native.uring_probe()
    if code == 0:
        return "uring", "the kernel allows io_uring"
    name = errno.errorcode.get(code, str(code))
    if requested == "uring":
        raise PolicyError(
            f"tiers.nvme.io is uring, but the kernel refuses io_uring ({name}); a container's "
            "seccomp "
            "profile or the sysctl kernel.io_uring_disabled forbids it. Set tiers.nvme.io to auto "
            "or threads."
        )
    if code not in _REFUSALS:
        logger.warning("io_uring failed in an unusual way (%s)", name)
    return "threads", f"the kernel refuses io_uring ({name}), so pread/pwrite threads do the I/O"
