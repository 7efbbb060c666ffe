"""Timeline: a bounded, append-only log of what happened when. Tests compare it, Perfetto shows it.

Times are time.perf_counter() seconds. One thread records; any thread may read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One thing that happened. An instant has start == end."""

    kind: str  # what was done: read, write, h2d, d2h, compute, stall, update
    name: str  # to what, normally a chunk
    lane: str  # the row in the trace: a link or a worker
    start: float  # perf_counter seconds
    end: float  # perf_counter seconds
    nbytes: int  # moved, 0 where nothing moves


@dataclass(frozen=True, slots=True)
class Total:
    """The sum over events of one kind. Seconds count overlapping events once each."""

    num_events: int
    seconds: float
    nbytes: int


class Timeline:
    """The last `capacity` events, about 200 bytes each; older ones are dropped and counted."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a timeline holds at least one event")
        self._capacity = capacity
        self._events: deque[tuple[str, str, str, float, float, int]] = deque()
        self._num_dropped = 0
        self._dropped_end = -math.inf  # the latest end of a dropped event

    def record(
        self, kind: str, name: str, lane: str, start: float, end: float, nbytes: int = 0
    ) -> None:
        """Append one event; raise ValueError where it ends before it starts, or a time is NaN."""
        if not start <= end:
            raise ValueError(f"event {kind} {name} ends at {end}, before its start at {start}")
        if len(self._events) == self._capacity:
            self._dropped_end = max(self._dropped_end, self._events.popleft()[4])
            self._num_dropped += 1
        self._events.append((kind, name, lane, start, end, nbytes))

    def instant(self, kind: str, name: str, lane: str, nbytes: int = 0) -> None:
        """Append an event that happens now and takes no time."""
        now = time.perf_counter()
        self.record(kind, name, lane, now, now, nbytes)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def num_dropped(self) -> int:
        return self._num_dropped

    def events(self) -> list[Event]:
        """Return the events that are still held, in the order in which they were recorded."""
        return [Event._make(event) for event in tuple(self._events)]

    def covers(self, since: float) -> bool:
        """Return whether every event that ended at or after `since` is still held."""
        return self._num_dropped == 0 or self._dropped_end < since

    def totals(self, since: float = -math.inf) -> dict[str, Total]:
        """Return the sums by kind over the held events that ended at or after `since`.

        They are complete only where covers(since).
        """
        sums: dict[str, tuple[int, float, int]] = {}
        for event in self.events():
            if event.end >= since:
                num, seconds, nbytes = sums.get(event.kind, (0, 0.0, 0))
                sums[event.kind] = (
                    num + 1,
                    seconds + event.end - event.start,
                    nbytes + event.nbytes,
                )
        return {kind: Total(*values) for kind, values in sums.items()}

    def write_trace(self, path: str | Path) -> None:
        """Write a Chrome trace (JSON) that Perfetto opens; `path` appears whole or not at all.

        `baseTimeNanoseconds` is what torch.profiler writes: added to ts it gives Unix time, so that
        the two traces can be laid over each other.
        """
        path = Path(path)
        header = {
            "displayTimeUnit": "ms",
            "baseTimeNanoseconds": time.time_ns() - time.perf_counter_ns(),
            "otherData": {"num_dropped": self._num_dropped},
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps(header)[:-1] + ', "traceEvents": [')
                for index, row in enumerate(_trace_rows(self.events())):
                    file.write((",\n" if index else "\n") + json.dumps(row, allow_nan=False))
                file.write("\n]}\n")
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _trace_rows(events: list[Event]) -> Iterator[dict[str, Any]]:
    """Yield Chrome trace events; times become microseconds."""
    process = os.getpid()
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": "offload"}}
    lanes: dict[str, list[Event]] = {}
    for event in events:
        lanes.setdefault(event.lane, []).append(event)
    thread = 0
    for lane, members in sorted(lanes.items()):
        for index, row in enumerate(_nested_rows(members)):
            thread += 1
            title = lane if index == 0 else f"{lane} {index + 1}"
            yield _metadata("thread_name", process, thread, name=title)
            yield _metadata("thread_sort_index", process, thread, sort_index=thread)
            for event in row:
                yield _trace_event(event, process, thread)


def _metadata(key: str, process: int, thread: int, **args: object) -> dict[str, Any]:
    return {"ph": "M", "name": key, "pid": process, "tid": thread, "args": args}


def _trace_event(event: Event, process: int, thread: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": f"{event.kind} {event.name}",
        "cat": event.kind,
        "pid": process,
        "tid": thread,
        "ts": event.start * 1e6,
        "args": {"nbytes": event.nbytes},
    }
    if event.start == event.end:
        return row | {"ph": "i", "s": "t"}
    return row | {"ph": "X", "dur": (event.end - event.start) * 1e6}


def _nested_rows(events: list[Event]) -> list[list[Event]]:
    """Spread one lane over rows in which events nest or follow each other, never overlap.

    Transfers in flight together overlap, and a trace viewer draws overlapping events of one thread
    wrongly or not at all.
    """
    rows: list[list[Event]] = []
    open_ends: list[list[float]] = []  # per row, the ends of the events around the present time
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        for ends in open_ends:
            while ends and ends[-1] <= event.start:
                ends.pop()
        free = (i for i, ends in enumerate(open_ends) if not ends or event.end <= ends[-1])
        index = next(free, len(rows))
        if index == len(rows):
            rows.append([])
            open_ends.append([])
        rows[index].append(event)
        open_ends[index].append(event.end)
    return rows
