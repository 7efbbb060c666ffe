"""What the disk under a folder can do: sequential O_DIRECT from huge pages, many blocks in flight.

Huge pages matter: a buffer of scattered 4 KiB pages splits each request, which halves the speed of
some disks. Pure Python on purpose, so that the ceiling does not come from the code under test.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK_NBYTES = 8 << 20
NUM_THREADS = 8
HUGE_PAGE_NBYTES = 2 << 20


def probe_disk(folder: Path, num_bytes: int) -> dict[str, float]:
    """Write and read a file of `num_bytes` in `folder`; returns bytes per second of each."""
    path = folder / "probe.bin"
    num_blocks = max(NUM_THREADS, num_bytes // BLOCK_NBYTES)
    blocks = huge_page_blocks(NUM_THREADS)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(fd, 0, num_blocks * BLOCK_NBYTES)
        run_blocks(os.pwritev, fd, blocks, num_blocks)  # unwritten extents cost more: not counted
        write = run_blocks(os.pwritev, fd, blocks, num_blocks)
        read = run_blocks(os.preadv, fd, blocks, num_blocks)
    finally:
        os.close(fd)
        path.unlink()
    return {"read_bytes_per_s": read, "write_bytes_per_s": write}


def huge_page_blocks(count: int) -> list[memoryview]:
    """Return `count` blocks that begin on huge page boundaries, all touched."""
    region = mmap.mmap(-1, count * BLOCK_NBYTES + HUGE_PAGE_NBYTES)
    region.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    start = -address % HUGE_PAGE_NBYTES
    view = memoryview(region)[start : start + count * BLOCK_NBYTES]
    view[:] = os.urandom(1 << 20) * (len(view) >> 20)
    return [view[i * BLOCK_NBYTES : (i + 1) * BLOCK_NBYTES] for i in range(count)]


def run_blocks(
    transfer: Callable[..., int], fd: int, blocks: list[memoryview], num_blocks: int
) -> float:
    """Move `num_blocks` blocks with one thread per buffer; returns bytes per second."""

    def lane(first: int) -> None:
        for index in range(first, num_blocks, NUM_THREADS):
            done = transfer(fd, [blocks[first]], index * BLOCK_NBYTES)
            if done != BLOCK_NBYTES:
                raise OSError(f"short transfer of {done} bytes at {index * BLOCK_NBYTES}")

    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(lane, range(NUM_THREADS)))
    return num_blocks * BLOCK_NBYTES / (time.perf_counter() - started)
