"""Fault plans for the backend "faults" (see _native.pyi), and engines that use it."""

from collections.abc import Iterator
from contextlib import contextmanager

from chaos import patched

from offload import _native, opening

DELAYS = ("latency", "reorder")
TRANSIENT = ("short", "eintr", "eagain")
ERRORS = ("eio", "enospc")
LIES = ("flip_read", "flip_write", "misplace", "drop")
KINDS = (*DELAYS, *TRANSIENT, *ERRORS, *LIES)
DELAY_S = 2e-3

Rule = tuple[str, int, float]  # kind, number of the operation or 0, rate


def at(kind: str, number: int) -> list[Rule]:
    """Strike one operation."""
    return [(kind, number, 0.0)]


def rate(probability: float, *kinds: str) -> list[Rule]:
    """Strike any operation with this probability, of each kind."""
    return [(kind, 0, probability) for kind in kinds]


@contextmanager
def faults(rules: list[Rule], *, seed: int = 0, delay_s: float = DELAY_S) -> Iterator[None]:
    """Have the plan in force for a while; its counts can be read until the next one."""
    _native.set_fault_plan(rules, seed, delay_s)
    try:
        yield
    finally:
        _native.clear_fault_plan()


def num_injected() -> int:
    """Faults of every kind since the last plan was set."""
    counts = _native.fault_counts()
    return sum(counts[kind] for kind in KINDS)


@contextmanager
def fault_backend() -> Iterator[None]:
    """Let sessions made inside use the backend "faults", which no policy can ask for."""

    def choose(requested: str) -> tuple[str, str]:
        return "faults", "the test wants it"

    with patched(opening, choose_backend=choose):
        yield
