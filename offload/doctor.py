"""What this machine offers a run: cores, memory, devices, and drives measured as runs use them."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from offload import io, machine
from offload.errors import OffloadError
from offload.io import IoQueue
from offload.policy import short_nbytes
from offload.progress import Reporter
from offload.slots import Slab
from offload.store import ChunkStore
from offload.swapfile import SWAP_NAME

SPEED_NBYTES = 256 << 20
NUM_PASSES = 2  # the first touches fresh memory and unwritten blocks; the faster one is shown
_WAIT_S = 1.0


def examine(paths: Sequence[Path], reporter: Reporter) -> None:
    """Say what was found; raises nothing for a bad path, but says what is wrong with it."""
    reporter.say("python", f"{platform.python_version()}, torch {torch.__version__}")
    reporter.say("cores", f"{machine.usable_cpu_count()} usable")
    reporter.say("memory", _memory())
    reporter.say("device", _device())
    reporter.say("openmp", _openmp())
    backend, reason = io.choose_backend("auto")
    reporter.say("io", f"{backend}: {reason}")
    for path in paths:
        reporter.say("path", f"{path}\n" + "\n".join(_path_facts(path, backend)))


def _memory() -> str:
    limit, available = machine.memory_limit(), machine.memory_available()
    return (
        f"{short_nbytes(limit)} for this process (control groups counted), "
        f"{short_nbytes(available)} available"
    )


def _device() -> str:
    if not torch.cuda.is_available():
        return "no CUDA: compute runs on the CPU, and the GPU tier is empty"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "\n".join(f"{i}: {p.name}, {short_nbytes(p.total_memory)}" for i, p in enumerate(found))


def _openmp() -> str:
    if machine.openmp_may_spin():
        return (
            "idle OpenMP threads spin, which can slow a run down 4-6 times beside its I/O threads. "
            "The command offload sets OMP_WAIT_POLICY=passive for itself, and an open engine stops "
            "them; in other programs set it yourself."
        )
    return "idle OpenMP threads sleep, as they should"


def _path_facts(path: Path, backend: str) -> list[str]:
    if not path.is_dir():
        return ["is no folder; name an existing one"]
    facts = [f"{machine.file_system_type(path)}, {short_nbytes(machine.free_nbytes(path))} free"]
    if machine.is_tmpfs(path):
        facts.append("WARNING: files here live in memory, so swapping to them saves nothing")
    try:
        facts += _speed(path, backend)
    except (OffloadError, OSError) as error:
        facts.append(f"cannot be used: {error}")
    return facts


def _speed(path: Path, backend: str) -> list[str]:
    """Write and read a swap file of SPEED_NBYTES, with direct I/O where the file system has it."""
    store = ChunkStore([path])
    extent = store.allocate(SPEED_NBYTES)
    slab = Slab(SPEED_NBYTES)
    slab.tensor.random_()
    store.open(None)
    queue = IoQueue(backend)
    try:
        alignment = machine.dioalign(path / SWAP_NAME)
        segments = store.io_segments(extent, slab.address)
        rates = [
            f"{name} {max(_rate(queue, store, op, segments) for _ in range(NUM_PASSES)):.2f} GB/s"
            for name, op in (("write", io.WRITE), ("read", io.READ))
        ]
    finally:
        queue.close()
        store.close()
        slab.close()
    return [_direct_io(alignment), f"{', '.join(rates)} (one file of {short_nbytes(SPEED_NBYTES)})"]


def _rate(queue: IoQueue, store: ChunkStore, op: int, segments: Sequence[io.Segment]) -> float:
    """Move all segments once; returns 10^9 bytes per second. Raises StorageError."""
    start = time.perf_counter()
    queue.submit(op, 0, segments)
    while not (done := queue.wait(_WAIT_S)):
        pass
    if done[0].result < 0:
        action = "reading" if op == io.READ else "writing"
        raise store.error(-done[0].result, action, done[0].fd, done[0].offset, "")
    return SPEED_NBYTES / (time.perf_counter() - start) / 1e9


def _direct_io(alignment: tuple[int, int] | None) -> str:
    if alignment is None:
        return "direct I/O: the kernel does not say which alignment it needs; 4096 bytes are used"
    if alignment == (0, 0):
        return "direct I/O: refused; transfers go through the page cache, outside the budget"
    return f"direct I/O: memory at {alignment[0]}, offsets at {alignment[1]} bytes; 4096 are used"
