"""Keep OpenMP's threads from spinning beside the update worker.

[Note: spinning] libgomp's threads spin for milliseconds after each parallel region, waiting for the
next. With compute on all cores a worker thread of ours then finds no core, holds back the slowest
compute thread, and the run becomes several times slower. OMP_WAIT_POLICY=passive cures it, but
libgomp reads it when it is loaded, and a library is imported too late to set it. What libgomp does
look at in every wait is whether more of its threads exist than cores; then it spins for a hundred
rounds only. One parked thread that has run a parallel region of its own tips that balance: its team
stays, asleep, and everybody else stops spinning.
"""

from __future__ import annotations

import logging
import os
import threading

import torch

from offload import machine

logger = logging.getLogger("offload")
_REGION_NUMEL = 1 << 20  # large enough for torch to use all its threads


def num_threads_advice(num_threads: int, num_cpus: int) -> str:
    """What is wrong with computing in so many threads on so many CPUs; "" for nothing.

    OpenMP counts the CPUs that it may run on, and knows nothing of a control group's quota. Threads
    beyond it take turns, and every parallel region waits for the last of them.
    """
    if num_threads <= num_cpus:
        return ""
    return (
        f"torch computes with {num_threads} threads, and this process can keep {num_cpus} busy "
        f"(affinity and control groups counted). Set OMP_NUM_THREADS={num_cpus}, or call "
        f"torch.set_num_threads({num_cpus})."
    )


def limit_threads() -> None:
    """Have torch compute in no more threads than this process can keep busy, unless the user has
    said how many.
    """
    num_cpus = machine.usable_cpu_count()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > num_cpus:
        torch.set_num_threads(num_cpus)


class Calm:
    """While it lives, OpenMP threads do not spin. Does nothing where they would not anyway."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        advice = num_threads_advice(torch.get_num_threads(), machine.usable_cpu_count())
        if advice:
            logger.warning("%s", advice)
        if torch.get_num_threads() > 1 and machine.openmp_may_spin():
            self._thread = threading.Thread(target=self._park, name="offload-calm", daemon=True)
            self._thread.start()
            self._ready.wait()

    def _park(self) -> None:
        torch.ones(_REGION_NUMEL).add_(1.0)
        self._ready.set()
        self._done.wait()

    def close(self) -> None:
        """Let the parked thread end. Idempotent."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
