#!/usr/bin/env python3
"""Move planes of one file on request: io_worker.py JOB_JSON, then a request a line on stdin.

One process stays for a whole bench, so that building its buffers is not timed and the contenders
can take turns every second. The job has `engine`, `path`, `plane_nbytes` and `num_buffers`; a
request has `test` (read, write or mix), `nbytes` and the settings of a mover. The answer is one
line of JSON: seconds, cpu_s of the whole process, nbytes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

MIB = 1 << 20
READ, WRITE = 0, 1
Move = tuple[int, int]  # direction, offset of one plane in the file


class Mover(Protocol):
    """What moves planes between the file and its own buffers."""

    def prepare(self, settings: dict[str, Any]) -> None:
        """Take the settings of the next run; not timed."""

    def run(self, moves: list[Move]) -> None:
        """Make all moves; returns when the last one is done."""


class OffloadMover:
    """This project's queue and slab. Planes follow each other as buffers become free."""

    def __init__(self, job: dict[str, Any]) -> None:
        sys.path.append(str(Path(__file__).resolve().parents[2]))  # a checkout, not installed
        from offload.slots import Slab

        self._plane_nbytes = job["plane_nbytes"]
        self._slab = Slab(job["num_buffers"] * self._plane_nbytes)
        self._slab.populate()
        self._slab.tensor.random_()
        self._buffers = [self._slab.address + i * self._plane_nbytes
                         for i in range(job["num_buffers"])]  # fmt: skip
        self._fd = os.open(job["path"], os.O_RDWR | os.O_DIRECT)
        self._queue: Any = None
        self._window_nbytes = 0

    def prepare(self, settings: dict[str, Any]) -> None:
        from offload.io import IoQueue, Limits

        if self._queue is not None:
            self._queue.close()
        limits = Limits(*settings["limits"]) if settings["limits"] else None
        self._queue = IoQueue(settings["backend"], limits)
        self._window_nbytes = settings["window_nbytes"]

    def _segments(self, offset: int, buffer: int) -> list[tuple[int, int, int, int]]:
        """A plane against its own buffer, or all planes against the same few MiB."""
        if not self._window_nbytes:
            return [(self._fd, offset, self._buffers[buffer], self._plane_nbytes)]
        return [
            (self._fd, offset + start, self._slab.address + start % self._window_nbytes, MIB)
            for start in range(0, self._plane_nbytes, MIB)
        ]

    def run(self, moves: list[Move]) -> None:
        left, free = list(reversed(moves)), list(range(len(self._buffers)))
        num_in_flight = 0
        while left or num_in_flight:
            while left and free:
                op, offset = left.pop()
                buffer = free.pop()
                self._queue.submit(op, buffer, self._segments(offset, buffer))
                num_in_flight += 1
            for done in self._queue.wait(10.0):
                if done.result != self._plane_nbytes:
                    raise OSError(-done.result, os.strerror(-done.result))
                free.append(done.tag)
                num_in_flight -= 1


class DeepNvmeMover:
    """DeepSpeed's aio_handle on page-locked tensors, one handle for each direction.

    A handle works on one tensor at a time, so reads and writes overlap only from two. All planes
    are handed over at once; its wait() returns after the last.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from deepspeed.ops.op_builder import AsyncIOBuilder

        self._make = AsyncIOBuilder().load(verbose=False).aio_handle
        self._path = job["path"]
        owner = self._make()
        example = torch.empty(0, dtype=torch.uint8)
        self._buffers = [owner.new_cpu_locked_tensor(job["plane_nbytes"], example)
                         for _ in range(job["num_buffers"])]  # fmt: skip
        for buffer in self._buffers:
            buffer.random_()
        self._owner = owner
        self._handles: list[Any] = []

    def prepare(self, settings: dict[str, Any]) -> None:
        self._handles = [self._make(*settings["handle"]) for _ in (READ, WRITE)]

    def run(self, moves: list[Move]) -> None:
        for index, (op, offset) in enumerate(moves):
            buffer = self._buffers[index % len(self._buffers)]
            handle = self._handles[op]
            start = handle.async_pread if op == READ else handle.async_pwrite
            if start(buffer, self._path, offset) != 0:
                raise OSError(f"aio_handle refused {'write' if op else 'read'} at {offset}")
        for op, handle in enumerate(self._handles):
            num_moves = sum(move[0] == op for move in moves)
            if num_moves and handle.wait() != num_moves:
                raise OSError("aio_handle lost an operation")


MOVERS = {"offload": OffloadMover, "deepspeed": DeepNvmeMover, "deepspeed-hugepages": DeepNvmeMover}


def moves_of(test: str, nbytes: int, plane_nbytes: int) -> list[Move]:
    """Return the moves of a test: planes in file order, reads and writes in turn for mix."""
    directions = {"read": (READ, READ), "write": (WRITE, WRITE), "mix": (READ, WRITE)}[test]
    return [(directions[i % 2], i * plane_nbytes) for i in range(nbytes // plane_nbytes)]


def main() -> None:
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")  # DeepSpeed prints to stdout
    os.dup2(2, 1)
    mover: Mover = MOVERS[job["engine"]](job)
    from fio import huge_page_nbytes

    ready = {"huge_nbytes": huge_page_nbytes(os.getpid())}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        mover.prepare(request)
        moves = moves_of(request["test"], request["nbytes"], job["plane_nbytes"])
        cpu_s, started = process_cpu_s(), time.perf_counter()
        mover.run(moves)
        answer = {"seconds": time.perf_counter() - started, "cpu_s": process_cpu_s() - cpu_s}
        answer["nbytes"] = len(moves) * job["plane_nbytes"]
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # DeepSpeed's threads can hang an ordinary exit


def process_cpu_s() -> float:
    """Return the core-seconds that this process has used, all threads and the kernel's share."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
