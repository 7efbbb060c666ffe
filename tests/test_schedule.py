"""The order of uses: every answer equals that of a model which looks ahead one use at a time."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import schedule
from offload.schedule import NEVER, Schedule, count_loads, default_order

INDICES = range(5)


class SlowSchedule:
    """What Schedule promises, by looking ahead from the cursor step by step."""

    def __init__(self, guess: list[int]) -> None:
        self.order, self.cursor, self.recorded = guess, 0, []

    def ahead(self) -> list[int]:
        return self.order[self.cursor :] + self.order[: self.cursor]

    def distance(self, index: int) -> int:
        return self.ahead().index(index) if index in self.order else NEVER

    def use(self, index: int, record: bool) -> None:
        if record:
            self.recorded.append(index)
        while index in self.order:
            at, self.cursor = self.cursor, (self.cursor + 1) % len(self.order)
            if self.order[at] == index:
                return

    def end_step(self) -> None:
        self.order, self.cursor, self.recorded = self.recorded or self.order, 0, []

    def upcoming(self, num_distinct: int) -> list[int]:
        return list(dict.fromkeys(self.ahead()))[:num_distinct]


Events = st.lists(
    st.one_of(st.just("end"), st.tuples(st.sampled_from(INDICES), st.booleans())), max_size=40
)


@given(st.lists(st.sampled_from(INDICES), max_size=8), Events)
def test_schedule_equals_the_slow_one(guess: list[int], events: list) -> None:
    fast, slow = Schedule(guess), SlowSchedule(list(guess))
    for event in events:
        if event == "end":
            fast.end_step()
            slow.end_step()
        else:
            fast.use(event[0], record=event[1])
            slow.use(*event)
        assert fast.order == tuple(slow.order)
        assert [fast.distance(i) for i in INDICES] == [slow.distance(i) for i in INDICES]
        for num in (0, 1, 3, 9):
            assert list(fast.upcoming(num)) == slow.upcoming(num)


def test_a_followed_order_keeps_the_cursor_in_step() -> None:
    """The same uses every step: the next use is always at distance 0."""
    order = default_order(INDICES)
    known = Schedule(order)
    for _ in range(3):
        for index in order:
            assert known.distance(index) == 0 and next(known.upcoming(1)) == index
            known.use(index, record=True)
        known.end_step()
        assert known.order == tuple(order)


def test_a_detour_is_not_recorded() -> None:
    """An evaluation between steps moves the cursor, and leaves the learned order alone."""
    known = Schedule(default_order(INDICES))
    for index in (3, 1, 4):
        known.use(index, record=False)
    known.end_step()
    assert known.order == tuple(default_order(INDICES))


def test_a_long_record_keeps_its_first_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_MAX_RECORD", 3)
    known = Schedule([])
    for index in (4, 3, 2, 1):
        known.use(index, record=True)
    known.end_step()
    assert known.order == (4, 3, 2) and known.distance(1) == NEVER


def test_default_order_goes_there_and_back() -> None:
    assert default_order([2, 5, 7]) == [2, 5, 7, 7, 5, 2]
    assert default_order([]) == []


def fewest_loads(order: tuple[int, ...], num_slots: int, num_cycles: int) -> int:
    """The fewest reads that any choice of victims needs, by trying all, slots empty at first."""
    uses = order * num_cycles

    @functools.cache
    def from_here(at: int, resident: frozenset[int]) -> int:
        if at == len(uses):
            return 0
        if uses[at] in resident:
            return from_here(at + 1, resident)
        if len(resident) < num_slots:
            return 1 + from_here(at + 1, resident | {uses[at]})
        return 1 + min(from_here(at + 1, resident - {v} | {uses[at]}) for v in resident)

    return from_here(0, frozenset())


Orders = st.lists(st.sampled_from(INDICES), min_size=1, max_size=8).map(tuple)


@settings(deadline=None)
@given(Orders, st.integers(1, 4))
def test_count_loads_is_the_least_possible(order: tuple[int, ...], num_slots: int) -> None:
    """It counts the second cycle of an optimal run, so two cycles less the first."""
    want = fewest_loads(order, num_slots, 2) - fewest_loads(order, num_slots, 1)
    loads = count_loads(order, num_slots)
    assert sum(loads.values()) == want
    assert set(loads) == set(order)
    assert all(0 <= loads[index] <= order.count(index) for index in loads)


@pytest.mark.parametrize("num_chunks", [1, 2, 5, 9])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 9])
def test_there_and_back_repeats_every_cycle(num_chunks: int, num_slots: int) -> None:
    """The turning points cost nothing, and each slot saves one read on either way."""
    order = default_order(range(num_chunks))
    loads = sum(count_loads(order, num_slots).values())
    assert loads == max(0, 2 * (num_chunks - num_slots))
