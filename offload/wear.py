"""Wear: what writing costs a drive. Pure decisions: bytes and times in, days and seconds out.

[Note: daily limit] `tiers.nvme.max_writes_per_day` holds for any 24 hours, not for days of the
calendar and not on average: what a drive was written is remembered by the hour, and an hour counts
until all of it is a day old. Half of the limit may be spent at full speed, so that a short run is
not slowed down. From there on steps are spread: at the highest even pace that never has to stop for
what was written before to get old. (A token bucket as deep as a day's limit would let twice the
limit through on the first day; a shallow one would slow down every short run.)
Rates and ratings of drives are in decimal units, as their makers give them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from offload.errors import PolicyError

DAY_S = 86400
HOUR_S = 3600
FREE_SHARE = 0.5  # of the limit, before steps are spread
HOURS_KEPT = DAY_S // HOUR_S  # full ones, beside the one that has begun
WEAR_LIMIT = "wear limit"  # waiting until a drive may be written again
_YEAR_DAYS = 365
_DAYS_SHOWN_MAX = 100 * _YEAR_DAYS
_UNITS = ((15, "PB"), (12, "TB"), (9, "GB"), (6, "MB"), (3, "kB"))

Hours = tuple[tuple[int, tuple[int, ...]], ...]  # (hours since 1970, bytes by drive), oldest first


def add(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    """Sums by drive; an empty one is of no drive yet."""
    if not (left and right):
        return tuple(left or right)
    return tuple(a + b for a, b in zip(left, right, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Writes:
    """What a run has written by drive: in all, and in each hour of the last day."""

    total: tuple[int, ...] = ()
    hours: Hours = ()

    def plus(self, by_drive: Sequence[int], now_s: float) -> Writes:
        """The same with what was written until `now_s`, without what no longer counts.

        Where a clock was set back, what seems to come from the future is of this hour.
        """
        hour, oldest = int(now_s // HOUR_S), _oldest_hour(now_s)
        last: tuple[int, ...] = tuple(by_drive)
        kept = []
        for begun, nbytes in self.hours:
            if begun >= hour:
                last = add(last, nbytes)
            elif begun >= oldest:
                kept.append((begun, nbytes))
        return Writes(add(self.total, by_drive), (*kept, (hour, last)))

    def recent(self, drive: int, now_s: float) -> int:
        """Bytes that a drive was written in the last 24 hours, and in what counts with them."""
        oldest = _oldest_hour(now_s)
        return sum(nbytes[drive] for begun, nbytes in self.hours if begun >= oldest)

    def pause_s(
        self, step: Sequence[int], limit: int, *, last_begin_s: float, now_s: float
    ) -> float:
        """Seconds to wait before a step that writes `step` by drive, after one that began at
        `last_begin_s`. May have to be asked again then. See [Note: daily limit].
        """
        pauses = [0.0]
        for drive, nbytes in enumerate(step):
            left = limit - self.recent(drive, now_s)
            due = self._due(drive, now_s)
            if nbytes > left and due:
                pauses.append(due[0][0])
            elif limit - left + nbytes > limit * FREE_SHARE:
                begin_s = min(last_begin_s, now_s)  # a clock may be set back
                pauses.append(begin_s + nbytes / _even_pace(left, due) - now_s)
        return max(pauses)

    def _due(self, drive: int, now_s: float) -> list[tuple[float, int]]:
        """(seconds from now, bytes) of each hour that counts, when it will not any more."""
        oldest = _oldest_hour(now_s)
        return [
            ((begun + HOURS_KEPT + 1) * HOUR_S - now_s, nbytes[drive])
            for begun, nbytes in self.hours
            if begun >= oldest
        ]


def _oldest_hour(now_s: float) -> int:
    return int(now_s // HOUR_S) - HOURS_KEPT


def _even_pace(left: int, due: Sequence[tuple[float, int]]) -> float:
    """The most bytes a second that `left` can bear, if (seconds from now, bytes) are due to be
    added to it: spent at this pace it is never below 0.
    """
    pace, room = float("inf"), left
    for in_s, nbytes in due:
        pace = min(pace, room / in_s)
        room += nbytes
    return max(pace, 1e-9)


def check_daily_limit(step: Sequence[int], limit: int | None) -> None:
    """Raise PolicyError where one step alone writes more to a drive than it may get in a day."""
    most = max(step, default=0)
    if limit is not None and most > limit:
        raise PolicyError(
            f"tiers.nvme.max_writes_per_day of {limit} bytes is less than one step writes to a "
            f"drive: {most} bytes. Set it to at least {-(-most // 10**6)}MB, raise "
            "tiers.cpu.budget (what rests in RAM is not written), or name more drives in "
            "tiers.nvme.paths."
        )


def plan_lines(step: Sequence[int], rated: Sequence[int], limit: int | None) -> list[str]:
    """What a plan says about the drives, where there is anything to say."""
    if not any(step):
        return []
    shown = decimal_nbytes(max(step))
    lines = [f"to each of {len(step)} drives at most {shown} a step"] if len(step) > 1 else []
    if rated:
        num_steps, tbw = min((r // n, r) for r, n in zip(rated, step, strict=True) if n)
        lines.append(f"endurance: {decimal_nbytes(tbw)} last {num_steps:,} steps of {shown}")
    if limit is not None:
        per_day = limit // max(step)
        lines.append(f"at most {per_day:,} steps in 24 hours, by max_writes_per_day")
    return lines


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DriveWear:
    """One drive's wear. `rated_nbytes` is None where nobody states it; `used_nbytes` is what the
    drive has been written in all its life, as far as is known.
    """

    written_nbytes: int  # by this run
    step_nbytes: int
    nbytes_per_day: float
    used_nbytes: int
    rated_nbytes: int | None
    rated_by: str

    @property
    def days_left(self) -> float | None:
        """Days to what the drive is rated for, at this pace."""
        if self.rated_nbytes is None:
            return None
        left = max(self.rated_nbytes - self.used_nbytes, 0)
        return left / self.nbytes_per_day if self.nbytes_per_day else float("inf")


@dataclasses.dataclass(frozen=True, slots=True)
class WearReport:
    """Every drive's wear. `str(report)` is one sentence about the worst."""

    drives: tuple[DriveWear, ...]

    @property
    def worst(self) -> DriveWear | None:
        """The drive that lasts the shortest, or where that is unknown, is written the most."""
        return min(
            self.drives,
            key=lambda d: (d.days_left is None, d.days_left or 0.0, -d.nbytes_per_day),
            default=None,
        )

    def short(self) -> str:
        """A few words for a line that has many; nothing where nothing is written."""
        worst = self.worst
        if worst is None or not worst.nbytes_per_day:
            return ""
        days = worst.days_left
        if days is None:
            return f"drive {decimal_nbytes(worst.nbytes_per_day)}/day"
        return f"drive {_days(days)}"

    def __str__(self) -> str:
        worst = self.worst
        total = sum(drive.written_nbytes for drive in self.drives)
        if worst is None or not total:
            return "nothing was written"
        text = f"wrote {decimal_nbytes(total)}"
        if len(self.drives) > 1:
            text += f" to {len(self.drives)} drives; to the most worn"
        if not worst.nbytes_per_day:
            return text
        text += (
            f", {decimal_nbytes(worst.step_nbytes)} a step; at this pace "
            f"{decimal_nbytes(worst.nbytes_per_day)} a day"
        )
        if worst.rated_nbytes is None or worst.days_left is None:
            return text
        before = worst.used_nbytes - worst.written_nbytes
        used = f" (of which {decimal_nbytes(before)} were written before)" if before > 0 else ""
        rated = decimal_nbytes(worst.rated_nbytes)
        return f"{text}, {_days(worst.days_left)} of the {rated} that {worst.rated_by}{used}"


def _days(days: float) -> str:
    if days > _DAYS_SHOWN_MAX:
        return f"over {_DAYS_SHOWN_MAX // _YEAR_DAYS} years"
    return f"{days:,.0f} days" if days >= 10 else f"{days:.1f} days"


def decimal_nbytes(nbytes: float) -> str:
    """A size for reading, in the units of drive makers: two or three digits."""
    for power, unit in _UNITS:
        if nbytes >= 10**power:
            value = nbytes / 10**power
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{nbytes:.0f} B"
