"""What the engine's memory is used for, to the byte."""

from __future__ import annotations

import dataclasses

from offload import machine
from offload.engine import Engine
from offload.plan import Plan
from offload.policy import short_nbytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """`arenas` sum to `slab_nbytes`, which is at most `budget_nbytes`; RSS is that of the whole
    process.
    """

    arenas: dict[str, int]
    slab_nbytes: int
    budget_nbytes: int
    nvme_nbytes: int
    gpu_nbytes: int
    rss_nbytes: int
    peak_rss_nbytes: int

    def __str__(self) -> str:
        rows = [f"  {name:<28} {short_nbytes(n):>12}" for name, n in self.arenas.items()]
        slab, budget = short_nbytes(self.slab_nbytes), short_nbytes(self.budget_nbytes)
        head = f"CPU slab {slab} of {budget} promised:"
        tail = [
            f"NVMe files {short_nbytes(self.nvme_nbytes)}, GPU slots "
            f"{short_nbytes(self.gpu_nbytes)}",
            f"process: {short_nbytes(self.rss_nbytes)} resident, "
            f"{short_nbytes(self.peak_rss_nbytes)} at most",
        ]
        return "\n".join([head, *rows, *tail])


def memory_report(plan: Plan, engine: Engine) -> MemoryReport:
    """Account for everything that the engine holds."""
    return MemoryReport(
        arenas=engine.slab.memory(),
        slab_nbytes=engine.slab.nbytes,
        budget_nbytes=plan.cpu_budget_nbytes,
        nvme_nbytes=engine.store.nbytes if engine.store is not None else 0,
        gpu_nbytes=engine.residence.gpu_nbytes,
        rss_nbytes=machine.rss(),
        peak_rss_nbytes=machine.peak_rss(),
    )
