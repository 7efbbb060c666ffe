"""The order in which chunks are used, learned from the first step and followed after. Pure
decisions, no effects.

Static knowledge of the whole loop makes Belady's rule possible: evict the chunk whose next use is
furthest away.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

NEVER = 1 << 60
_MAX_RECORD = 1 << 20  # uses per step; a longer step keeps its first part


class Schedule:
    """A cyclic order of uses with a cursor. Any other order is followed by demand and recorded
    anew.

    `guess` is the order before anything was recorded.
    """

    def __init__(self, guess: Iterable[int]) -> None:
        self._current: list[int] = []
        self._follow(list(guess))

    def _follow(self, order: list[int]) -> None:
        self._order = order
        self._cursor = 0
        self._positions: dict[int, list[int]] = {}
        for position, index in enumerate(order):
            self._positions.setdefault(index, []).append(position)

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(self._order)

    def use(self, index: int, *, record: bool) -> None:
        """Note that chunk `index` is used now, and put the cursor behind that use."""
        if record and len(self._current) < _MAX_RECORD:
            self._current.append(index)
        distance = self.distance(index)
        if distance != NEVER:
            self._cursor = (self._cursor + distance + 1) % len(self._order)

    def end_step(self) -> None:
        """A step is over: what was recorded is what the next one is expected to do."""
        if self._current and self._current != self._order:
            self._follow(self._current)
        self._cursor = 0
        self._current = []

    def distance(self, index: int) -> int:
        """Uses until chunk `index` is used next; 0 means it is the very next one."""
        positions = self._positions.get(index)
        if not positions:
            return NEVER
        at = bisect.bisect_left(positions, self._cursor)
        if at < len(positions):
            return positions[at] - self._cursor
        return positions[0] + len(self._order) - self._cursor

    def upcoming(self, num_distinct: int) -> Iterator[int]:
        """The next different chunks in the order of their use, at most num_distinct."""
        seen: set[int] = set()
        for step in range(len(self._order)):
            if len(seen) >= num_distinct:
                return
            index = self._order[(self._cursor + step) % len(self._order)]
            if index not in seen:
                seen.add(index)
                yield index


def default_order(indices: Sequence[int]) -> list[int]:
    """Forward through all chunks and back: the guess for the very first step."""
    return [*indices, *reversed(indices)]


def count_loads(order: Iterable[int], num_slots: int) -> dict[int, int]:
    """How often each chunk must be read in one cycle of `order` with `num_slots` slots under
    Belady's rule.

    The steady state: the slots start as the previous cycle left them.
    """
    order = list(order)
    resident: list[int] = []
    loads: dict[int, int] = {}
    for _ in range(2):
        loads = dict.fromkeys(order, 0)
        for position, index in enumerate(order):
            if index in resident:
                continue
            loads[index] += 1
            if len(resident) >= num_slots:
                resident.remove(max(resident, key=lambda other: _next_use(order, position, other)))
            resident.append(index)
    return loads


def _next_use(order: list[int], position: int, index: int) -> int:
    for step in range(1, len(order) + 1):
        if order[(position + step) % len(order)] == index:
            return step
    return NEVER
