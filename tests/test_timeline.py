"""Timeline: bounded, complete where it says so, and written as a trace that viewers can draw."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from offload.timeline import Event, Timeline, Total


def filled(*spans: tuple[float, float], lane: str = "nvme read") -> Timeline:
    timeline = Timeline(capacity=100)
    for index, (start, end) in enumerate(spans):
        timeline.record("read", f"c{index}", lane, start, end, 4096)
    return timeline


def trace(timeline: Timeline, folder: Path) -> dict[str, Any]:
    path = folder / "step.json"
    timeline.write_trace(path)
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


def drawn_rows(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Events of a trace by the name of the thread that shows them."""
    events = content["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] in "Xi":
            rows[names[event["tid"]]].append(event)
    return rows


def test_events_come_back_in_the_order_of_recording() -> None:
    timeline = Timeline(capacity=4)
    timeline.record("read", "block 1", "nvme", 2.0, 3.0, nbytes=7)
    timeline.record("compute", "block 0", "gpu", 1.0, 1.5)
    assert timeline.events() == [
        Event("read", "block 1", "nvme", 2.0, 3.0, 7),
        Event("compute", "block 0", "gpu", 1.0, 1.5, 0),
    ]
    assert timeline.num_dropped == 0


def test_events_are_frozen() -> None:
    event = filled((0, 1)).events()[0]
    with pytest.raises(AttributeError):
        event.end = 5.0  # type: ignore[misc]


def test_a_full_timeline_keeps_the_newest_and_counts_the_rest() -> None:
    timeline = Timeline(capacity=3)
    for index in range(10):
        timeline.record("read", str(index), "nvme", index, index + 1)
    assert [event.name for event in timeline.events()] == ["7", "8", "9"]
    assert timeline.num_dropped == 7
    assert timeline.capacity == 3


def test_totals_sum_by_kind_since_a_time() -> None:
    timeline = Timeline(capacity=10)
    timeline.record("read", "a", "nvme", 0.0, 1.0, 10)
    timeline.record("read", "b", "nvme", 0.5, 3.0, 20)
    timeline.record("write", "a", "nvme", 3.0, 3.5, 40)
    assert timeline.totals() == {"read": Total(2, 3.5, 30), "write": Total(1, 0.5, 40)}
    assert timeline.totals(since=3.0) == {"read": Total(1, 2.5, 20), "write": Total(1, 0.5, 40)}
    assert timeline.totals(since=4.0) == {}


def test_covers_tells_whether_totals_are_complete() -> None:
    timeline = Timeline(capacity=2)
    timeline.record("read", "late end", "nvme", 0.0, 9.0)
    timeline.record("read", "a", "nvme", 1.0, 2.0)
    assert timeline.covers(-math.inf)
    timeline.record("read", "b", "nvme", 2.0, 3.0)  # drops "late end"
    assert not timeline.covers(-math.inf)
    assert not timeline.covers(9.0)
    assert timeline.covers(9.1)
    timeline.record("read", "c", "nvme", 3.0, 4.0)  # drops "a", which ended before "late end"
    assert not timeline.covers(9.0)


def test_instant_happens_now() -> None:
    timeline = Timeline(capacity=1)
    before = time.perf_counter()
    timeline.instant("evict", "block 3", "engine", nbytes=5)
    event = timeline.events()[0]
    assert before <= event.start == event.end <= time.perf_counter()
    assert event[:3] == ("evict", "block 3", "engine") and event.nbytes == 5


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (math.nan, 1.0), (1.0, math.nan)])
def test_impossible_times_are_refused(start: float, end: float) -> None:
    timeline = Timeline(capacity=1)
    with pytest.raises(ValueError, match="read block 3"):
        timeline.record("read", "block 3", "nvme", start, end)
    assert timeline.events() == []


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_must_be_positive(capacity: int) -> None:
    with pytest.raises(ValueError, match=str(capacity)):
        Timeline(capacity)


def test_memory_stays_bounded() -> None:
    timeline = Timeline(capacity=1000)
    for index in range(5000):
        timeline.record("read", "block", "nvme", index * 0.5, index * 0.5 + 0.1, 2**33)
    event = timeline.events()[-1]
    parts = sum(map(sys.getsizeof, (event.start, event.end, event.nbytes)))
    assert sys.getsizeof(tuple(event)) + parts <= 256
    assert len(timeline.events()) == 1000


def test_trace_has_times_in_microseconds_and_lanes_as_named_threads(tmp_path: Path) -> None:
    timeline = Timeline(capacity=10)
    timeline.record("read", "block 1", "nvme read", 1.0, 1.25, 4096)
    timeline.record("compute", "block 0", "gpu", 1.0, 2.0)
    rows = drawn_rows(trace(timeline, tmp_path))
    assert sorted(rows) == ["gpu", "nvme read"]
    (read,) = rows["nvme read"]
    assert (read["ph"], read["name"], read["cat"]) == ("X", "read block 1", "read")
    assert (read["ts"], read["dur"]) == (pytest.approx(1e6), pytest.approx(0.25e6))
    assert read["args"] == {"nbytes": 4096}


def test_trace_draws_instants_as_marks(tmp_path: Path) -> None:
    timeline = Timeline(capacity=10)
    timeline.instant("evict", "block 1", "engine")
    (mark,) = drawn_rows(trace(timeline, tmp_path))["engine"]
    assert mark["ph"] == "i" and mark["s"] == "t" and "dur" not in mark


@pytest.mark.parametrize(
    ("spans", "num_rows"),
    [
        ([(0, 1), (1, 2), (2, 3)], 1),  # one after the other
        ([(0, 9), (1, 4), (2, 3), (5, 6)], 1),  # nested
        ([(0, 2), (1, 3)], 2),  # overlapping
        ([(0, 4), (1, 5), (2, 6), (4, 8)], 3),  # the fourth follows the first
        ([(0, 1), (0, 2)], 1),  # nested from the start
        ([(0, 10), (20, 30), (5, 25)], 2),  # recorded out of order
    ],
)
def test_trace_spreads_overlaps_over_rows(
    spans: list[tuple[float, float]], num_rows: int, tmp_path: Path
) -> None:
    rows = drawn_rows(trace(filled(*spans), tmp_path))
    names = ["nvme read", *(f"nvme read {index}" for index in range(2, num_rows + 1))]
    assert sorted(rows) == names
    assert sum(map(len, rows.values())) == len(spans)
    for row in rows.values():
        drawn = [(event["ts"], event["ts"] + event["dur"]) for event in row]
        crossings = [(a, b) for a in drawn for b in drawn if a[0] < b[0] < a[1] < b[1]]
        assert not crossings


def test_trace_says_what_it_lost_and_when_it_was(tmp_path: Path) -> None:
    timeline = Timeline(capacity=1)
    for _ in range(3):
        timeline.instant("evict", "block", "engine")
    content = trace(timeline, tmp_path)
    assert content["otherData"] == {"num_dropped": 2}
    (mark,) = drawn_rows(content)["engine"]
    unix_ns = content["baseTimeNanoseconds"] + mark["ts"] * 1000
    assert abs(unix_ns - time.time_ns()) < 60e9


def test_an_empty_timeline_is_a_valid_trace(tmp_path: Path) -> None:
    assert drawn_rows(trace(Timeline(capacity=1), tmp_path)) == {}


def test_trace_replaces_the_old_file_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    path.write_text("old")
    timeline = filled((0.0, math.inf))  # JSON has no word for infinity, so this write fails
    with pytest.raises(ValueError):
        timeline.write_trace(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["step.json"]
    filled((0.0, 1.0)).write_trace(path)
    assert json.loads(path.read_text())["traceEvents"]
    assert [file.name for file in tmp_path.iterdir()] == ["step.json"]


def test_trace_to_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        filled((0, 1)).write_trace(tmp_path / "none" / "step.json")
