"""What a long job says: facts, a bar on a terminal, plain lines elsewhere, and a JSONL log."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

NUM_PLAIN_LINES = 20  # at most, of a bar that is not on a terminal
PLAIN_LINE_S = 5.0  # and not more often than this
LABEL_WIDTH = 12


class Reporter:
    """Says what happens, on standard output. Holds no state but the console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def say(self, label: str, text: str) -> None:
        """Print one fact; further lines of `text` are indented below the first."""
        indented = escape(text).replace("\n", "\n" + " " * (LABEL_WIDTH + 1))
        self.console.print(f"[bold]{escape(label):<{LABEL_WIDTH}}[/bold] {indented}")

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """Show how far a job of `total` units is, until the block ends."""
        if not self.console.is_terminal:
            yield PlainBar(self, label, total)
            return
        columns = (
            TextColumn("[bold]{task.description}[/bold]"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            yield RichBar(progress, label, total)


class Bar:
    """How far a job is. `update` may be called as often as one likes."""

    def update(self, done: int, note: str = "") -> None:
        raise NotImplementedError


class RichBar(Bar):
    """A bar that redraws itself on a terminal."""

    def __init__(self, progress: Progress, label: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(f"{label:<{LABEL_WIDTH}}", total=total, note="")

    def update(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=escape(note))


class PlainBar(Bar):
    """Lines for a log file: few, whatever the job; the last one always if it has a note."""

    def __init__(self, reporter: Reporter, label: str, total: int) -> None:
        self._reporter, self._label, self._total = reporter, label, total
        self._due_done, self._due_time = 0.0, time.monotonic() + PLAIN_LINE_S

    def update(self, done: int, note: str = "") -> None:
        is_due = done >= self._due_done and time.monotonic() >= self._due_time
        if is_due or (note and done == self._total):
            self._due_done = done + self._total / NUM_PLAIN_LINES
            self._due_time = time.monotonic() + PLAIN_LINE_S
            self._reporter.say(self._label, f"{done}/{self._total}  {note}".rstrip())


class JsonlLog:
    """One JSON object a line, flushed at once: what was written survives a crash of the job."""

    def __init__(self, path: Path, *, appends: bool = False) -> None:
        self._file = path.open("a" if appends else "w", encoding="utf-8")
        self._start = time.perf_counter()

    def write(self, event: str, **facts: object) -> None:
        row = {"event": event, "seconds": round(time.perf_counter() - self._start, 3), **facts}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
