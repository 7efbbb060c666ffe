"""fio as the yardstick of a drive: direct I/O through io_uring, buffers on huge pages.

Two traps make fio's figures mean something else than they seem to. With buffers on 4 KiB pages
every request is split at each of them, and fio shows less than half of what some drives can do.
And a fresh fio touches its buffers for the first time while it is timed, which in a large read
costs more than the read. So the buffers are a piece of memory of ours on huge pages, touched once,
which every fio maps. Huge pages are reserved for the time of a run where that is allowed; else fio
gets ordinary memory under transparent huge pages. What it really had is read from the kernel.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE_PAGE_NBYTES = 2 << 20
RESERVED = Path("/proc/sys/vm/nr_hugepages")
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
DIRECTIONS = {"read": ["--rw=read"], "write": ["--rw=write"], "mix": ["--rw=rw", "--rwmixread=50"]}
NUM_SPARE_PAGES = 2  # fio maps a little more than its blocks
_LOOK_EVERY_S = 0.02


@dataclass(frozen=True, kw_only=True)
class FioPoint:
    """One setting of fio. `fixed` registers the buffers and the file with the ring."""

    block_nbytes: int
    depth: int
    fixed: bool = False

    def __str__(self) -> str:
        fixed = ", registered" if self.fixed else ""
        return f"{self.block_nbytes >> 10} KiB x {self.depth}{fixed}"


@contextlib.contextmanager
def huge_pages(nbytes: int) -> Iterator[str]:
    """Make huge pages for fio's buffers of `nbytes` to be had; yields fio's name for the memory.

    What is changed in the system is put back at the end. Yields `malloc` where nothing may be
    changed, and then fio's figures are those of 4 KiB pages.
    """
    with contextlib.ExitStack() as stack:
        try:
            num_pages = -(-nbytes // HUGE_PAGE_NBYTES) + NUM_SPARE_PAGES
            number = int(RESERVED.read_text()) + num_pages
            stack.enter_context(_switched(RESERVED, str(number)))
            memory = f"mmaphuge:{stack.enter_context(_touched_memory(num_pages))}"
        except OSError:
            stack.close()
            memory = _transparent(stack)
        yield memory


def _transparent(stack: contextlib.ExitStack) -> str:
    try:
        stack.enter_context(_switched(TRANSPARENT, "always"))
    except OSError:
        return "malloc"
    return "mmap"


@contextlib.contextmanager
def _switched(switch: Path, value: str) -> Iterator[None]:
    text = switch.read_text()
    before = text.partition("[")[2].partition("]")[0] or text.strip()  # [chosen] among others
    switch.write_text(value)
    try:
        yield
    finally:
        switch.write_text(before)


@contextlib.contextmanager
def _touched_memory(num_pages: int) -> Iterator[Path]:
    """Hold reserved huge pages that another process can map by the path; OSError for too few."""
    fd = os.memfd_create("fio", os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, num_pages * HUGE_PAGE_NBYTES)
        with mmap.mmap(fd, num_pages * HUGE_PAGE_NBYTES) as view:
            view[:] = os.urandom(HUGE_PAGE_NBYTES) * num_pages
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)


def run_fio(
    path: Path, test: str, nbytes: int, point: FioPoint, memory: str
) -> dict[str, float | str]:
    """Move `nbytes` of the existing file `path`; `test` is read, write or mix.

    Returns seconds, cpu_s (fio's own count), nbytes and huge_nbytes, its memory on huge pages.
    Raises RuntimeError with fio's message where it fails.
    """
    command = [
        "fio", "--name=bench", f"--filename={path}", f"--size={nbytes}", *DIRECTIONS[test],
        f"--bs={point.block_nbytes}", f"--iodepth={point.depth}", "--ioengine=io_uring",
        "--direct=1", f"--iomem={memory}", "--thread", "--allow_file_create=0", "--invalidate=0",
        "--scramble_buffers=0", "--output-format=json",
    ]  # fmt: skip
    if point.fixed:
        command += ["--fixedbufs", "--registerfiles"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        huge_nbytes = 0
        while process.poll() is None and huge_nbytes == 0:  # once it has them, it is left alone
            time.sleep(_LOOK_EVERY_S)
            huge_nbytes = huge_page_nbytes(process.pid)
        output, errors = process.communicate()
    if process.returncode != 0 or "{" not in output:
        raise RuntimeError(f"fio: {(errors or output).strip()[:300]}")
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
    seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return {"seconds": seconds, "cpu_s": cpu_s, "nbytes": moved, "huge_nbytes": huge_nbytes}


def fio_version() -> str:
    """Return fio's version; raises OSError where it is not installed."""
    done = subprocess.run(["fio", "--version"], capture_output=True, text=True)
    return done.stdout.strip()


def huge_page_nbytes(pid: int) -> int:
    """Return the memory of a process on huge pages, reserved or transparent; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    fields = ("AnonHugePages:", "Private_Hugetlb:", "Shared_Hugetlb:")
    return sum(int(line.split()[1]) for line in lines if line.startswith(fields)) * 1024
