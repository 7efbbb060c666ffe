"""What one optimizer step cost: bytes and seconds per link, and where compute had to wait."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from offload.tier import Link

UPDATE = "update"  # waiting for the update worker
COMPUTE = "compute"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """The last finished step. `nbytes` and `busy_s` by link name; `stall_s` by what was waited for;
    `written_by_drive` in the order of tiers.nvme.paths.

    Transfers overlap, so busy seconds of a link can exceed the wall time.
    """

    wall_s: float
    nbytes: dict[str, int]
    busy_s: dict[str, float]
    stall_s: dict[str, float]
    num_updates: int
    update_kernel_s: float
    written_by_drive: tuple[int, ...] = ()

    def shares(self) -> dict[str, float]:
        """Fractions of the wall time: each stall, and `compute` for the rest; they sum to 1."""
        wall = max(self.wall_s, 1e-9)
        stalls = {name: seconds / wall for name, seconds in self.stall_s.items() if seconds > 0}
        return {COMPUTE: max(0.0, 1.0 - sum(stalls.values())), **stalls}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What optimizer.step() has done.

    `norm` is the 2-norm of all gradients of the step, before clipping and as clip_grad_norm_ would
    return it; None where there were none, and then nothing was done. `skipped` says that a gradient
    was not finite and nothing was changed, `reason` why.
    """

    norm: float | None
    skipped: bool = False
    reason: str = ""


class StatsCounter:
    """Counts during a step; `roll` gives the finished step and starts the next."""

    def __init__(self, num_drives: int = 0) -> None:
        self._num_drives = num_drives
        self.last = self._reset()

    def _reset(self) -> StepStats:
        self._start = time.perf_counter()
        self._nbytes = {link.value: 0 for link in Link}
        self._busy_s = {link.value: 0.0 for link in Link}
        self._stall_s: dict[str, float] = {}
        self._written = [0] * self._num_drives
        self._num_updates = 0
        self._kernel_s = 0.0
        return StepStats(
            wall_s=0.0, nbytes={}, busy_s={}, stall_s={}, num_updates=0, update_kernel_s=0.0
        )

    def moved(self, link: Link, nbytes: int, seconds: float) -> None:
        self._nbytes[link.value] += nbytes
        self._busy_s[link.value] += seconds

    def wrote(self, by_drive: Sequence[int]) -> None:
        """Bytes that reached the first drives; `moved` has them, too."""
        for drive, nbytes in enumerate(by_drive):
            self._written[drive] += nbytes

    @property
    def written_by_drive(self) -> tuple[int, ...]:
        """Of the step under way, so far."""
        return tuple(self._written)

    def stalled(self, cause: str, seconds: float) -> None:
        self._stall_s[cause] = self._stall_s.get(cause, 0.0) + seconds

    def updated(self, kernel_seconds: float) -> None:
        self._num_updates += 1
        self._kernel_s += kernel_seconds

    def roll(self) -> StepStats:
        self.last = StepStats(
            wall_s=time.perf_counter() - self._start,
            nbytes=self._nbytes,
            busy_s=self._busy_s,
            stall_s=self._stall_s,
            num_updates=self._num_updates,
            update_kernel_s=self._kernel_s,
            written_by_drive=tuple(self._written),
        )
        self._reset()
        return self.last
