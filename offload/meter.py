"""The wear of a run's drives: measured step by step, and kept under the daily limit by waiting."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from offload.engine import Engine
from offload.smart import read_smart
from offload.wear import DAY_S, WEAR_LIMIT, DriveWear, WearReport, Writes, decimal_nbytes

logger = logging.getLogger("offload")
BY_POLICY = "tiers.nvme.endurance states"
BY_SMART = "its SMART log implies"
SLICE_S = 0.2  # of a pause: hurry() is looked at in between


class WearMeter:
    """Adds up what each step writes, and waits."""

    def __init__(self, engine: Engine, writes: Writes) -> None:
        self.writes = writes  # of this run, in earlier processes too
        self._engine = engine
        self._plan = engine.plan
        paths = engine.store.paths if engine.store is not None else ()
        self._smart = [read_smart(path).log for path in paths]
        self._step = self._plan.written_by_drive()  # what the next one is expected to write
        self._own = Writes()  # of this process, to set against what SMART said at its start
        self._noted = engine.stats.written_by_drive  # of the step under way; nothing yet
        self._num_steps = 0
        self._begin: Writes = self._own  # at the end of the first step: it moved the model in
        self._begin_s = self._last_end_s = 0.0
        self._last_begin_s = 0.0
        self._waits = True
        self._has_said = False

    def end_step(self) -> None:
        """A step is over, and its statistics have rolled."""
        written, now_s = self._engine.stats.last.written_by_drive, time.time()
        if not written:
            return
        self._note(written)
        self._noted = (0,) * len(written)
        self._num_steps += 1
        self._last_end_s = now_s
        if self._num_steps == 1:
            self._begin, self._begin_s = self._own, now_s
        else:
            self._step = written

    def _note(self, written: Sequence[int]) -> None:
        """Book what the step under way has written by now, in so far as it is not booked yet."""
        now_s = time.time()
        new = [a - b for a, b in zip(written, self._noted, strict=True)]
        self.writes, self._own = self.writes.plus(new, now_s), self._own.plus(new, now_s)
        self._noted = tuple(written)

    def expected(self) -> Writes:
        """The writes so far, and what pending updates and a commit are still to write: whoever goes
        on from here must not forget them. Without the commit's own few files.
        """
        totals = [0] * len(self._noted)
        for chunk in self._engine.chunks:
            changes = chunk.spec.state_planes(self._plan.fmt) if chunk.update else chunk.unsaved
            for plane in changes:
                extents = chunk.extents.get(plane)
                for index, _, nbytes in extents.target.pieces if extents is not None else ():
                    totals[index] += nbytes
        return self.writes.plus(totals, time.time()) if totals else self.writes

    def hurry(self) -> None:
        """End the pause under way, and wait no more: the run is about to end."""
        self._waits = False

    def pause(self, finish: Callable[[], None]) -> None:
        """Wait until the next step may be written; call `finish` first, so that what is pending
        does not wait, too. See [Note: daily limit] in wear.py.
        """
        limit = self._plan.max_writes_per_day
        if limit is not None and self._left_s(limit) > 0:
            finish()
            while self._waits and (left_s := self._left_s(limit)) > 0:
                self._say(limit)
                start_s = time.time()
                time.sleep(min(left_s, SLICE_S))
                self._engine.stats.stalled(WEAR_LIMIT, time.time() - start_s)
        self._last_begin_s = time.time()

    def _left_s(self, limit: int) -> float:
        if not self._noted:
            return 0.0
        self._note(self._engine.stats.written_by_drive)
        return self.expected().pause_s(
            self._step, limit, last_begin_s=self._last_begin_s, now_s=time.time()
        )

    def _say(self, limit: int) -> None:
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "steps wait from now on, because tiers.nvme.max_writes_per_day allows a drive %s "
                "in 24 hours and a step writes %s",
                decimal_nbytes(limit), decimal_nbytes(max(self._step)),
            )  # fmt: skip

    def report(self) -> WearReport:
        """What has been written, and how long the drives last at this pace."""
        return WearReport(tuple(self._drive(i) for i in range(len(self.writes.total))))

    def _drive(self, index: int) -> DriveWear:
        smart = self._smart[index]
        own, written = self._own.total, self.writes.total[index]
        since = own[index] - self._begin.total[index] if own else 0
        elapsed_s = self._last_end_s - self._begin_s
        rated, rated_by = None, ""
        if self._plan.rated_nbytes:
            rated, rated_by = self._plan.rated_nbytes[index], BY_POLICY
        elif smart is not None:
            rated, rated_by = smart.rated_nbytes, BY_SMART
        return DriveWear(
            written_nbytes=written,
            step_nbytes=since // max(self._num_steps - 1, 1),
            nbytes_per_day=since * DAY_S / elapsed_s if elapsed_s > 0 else 0.0,
            used_nbytes=smart.written_nbytes + own[index] if smart and own else written,
            rated_nbytes=rated,
            rated_by=rated_by,
        )
