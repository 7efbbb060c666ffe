"""Turn the samples of io.py into Markdown: speeds, ratios within a round, core-seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from _train_report import GB, spread, table

TESTS = ("read", "write", "mix")
ORDER = (
    "fio",
    "offload",
    "offload-threads",
    "deepspeed",
    "deepspeed-hugepages",
    "fio-hot",
    "offload-hot",
)
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One test by one contender in one round; `cpu_s` are core-seconds."""

    engine: str
    test: str
    round: int
    seconds: float
    cpu_s: float
    nbytes: int

    @classmethod
    def of(cls, engine: str, test: str, index: int, row: Mapping[str, Any]) -> Sample:
        """Build one from what a contender answered."""
        return cls(
            engine=engine,
            test=test,
            round=index,
            seconds=float(row["seconds"]),
            cpu_s=float(row["cpu_s"]),
            nbytes=int(row["nbytes"]),
        )

    @property
    def speed(self) -> float:
        """Return GB/s."""
        return self.nbytes / self.seconds / GB

    @property
    def cost(self) -> float:
        """Return core-seconds per GB."""
        return self.cpu_s / (self.nbytes / GB)

    @property
    def busy(self) -> float:
        """Return the cores in use, on average."""
        return self.cpu_s / self.seconds

    def __str__(self) -> str:
        return f"{self.test} {self.engine}: {self.speed:.2f} GB/s, {self.cost:.3f} core-s/GB"


@dataclass(kw_only=True)
class Bench:
    """All that was measured in one run."""

    num_rounds: int
    file_nbytes: int
    plane_nbytes: int
    fio: str
    fio_memory: str = ""
    samples: list[Sample] = field(default_factory=list)
    searched: list[tuple[str, str, str, float, float]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    huge_nbytes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def note_search(self, engine: str, test: str, point: str, row: Mapping[str, Any]) -> float:
        """Keep one point of a search; returns its GB/s."""
        sample = Sample.of(engine, test, -1, row)
        self.searched.append((engine, test, point, sample.speed, sample.cost))
        return sample.speed

    def engines(self) -> list[str]:
        return sorted({sample.engine for sample in self.samples}, key=_place)

    def values(self, engine: str, test: str, value: Callable[[Sample], float]) -> list[float]:
        """Return value(sample) of every round, in order."""
        rows = [s for s in self.samples if (s.engine, s.test) == (engine, test)]
        return [value(sample) for sample in sorted(rows, key=lambda sample: sample.round)]

    def ratios(self, engine: str, reference: str, test: str) -> list[float]:
        """Return the ratios of speed within each round."""
        pair = (self.values(name, test, lambda s: s.speed) for name in (engine, reference))
        return [left / right for left, right in zip(*pair, strict=True)]


def _place(engine: str) -> int:
    return ORDER.index(engine)


def reference_of(engine: str) -> str:
    """Return the fio that uses its memory as `engine` does."""
    return "fio-hot" if engine.endswith("-hot") else "fio"


def render(bench: Bench, facts: Mapping[str, str]) -> str:
    """Return the whole result file."""
    facts = {**facts, "fio": f"{bench.fio}, buffers by `iomem={bench.fio_memory}`"}
    facts["memory on huge pages"] = ", ".join(
        f"`{name}` {nbytes / MIB:.0f} MiB" for name, nbytes in bench.huge_nbytes.items()
    )
    skipped = "\n".join(f"- `{engine}`: {why}" for engine, why in bench.skipped.items())
    sections = [
        title(bench),
        table(("fact", "value"), facts.items()),
        "## Skipped\n" + skipped if skipped else "",
        verdict(bench),
        speed_section(bench),
        cost_section(bench),
        rounds_section(bench),
        search_section(bench),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def title(bench: Bench) -> str:
    settings = "\n".join(f"- `{name}`: {bench.settings[name]}" for name in bench.engines())
    return f"""# How near is the I/O queue to the drive?

A file of {bench.file_nbytes / MIB:.0f} MiB, written before, is read, overwritten, and half read
and half overwritten (`mix`), with direct I/O. `offload` and `deepspeed` move planes of
{bench.plane_nbytes / MIB:.0f} MiB; in `mix` they read one and write the next, and fio chooses
block by block. All contenders of a test ran one after the other in each of {bench.num_rounds}
rounds, each time another one first.

- `fio`: io_uring, 128 MiB of buffers on huge pages, the best of a small search for each test.
- `fio-hot`: the same with 4 to 16 MiB of buffers. Where some cache lies between drive and memory,
  as in a virtual machine, data then never reaches memory, which training's data must.
- `offload`: this project's queue and slab. `offload-hot`: all planes through the same 8 MiB of it,
  beside `fio-hot`.
- `deepspeed`: DeepNVMe's aio_handle with the defaults of its configuration, page-locked tensors.
- `deepspeed-hugepages`: the same on huge pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`), the best
  handle of a small search for each test.

Settings:

{settings}"""


def verdict(bench: Bench) -> str:
    """The lines that the bench is for."""
    lines = []
    for engine in ("offload", "offload-hot"):
        reference = reference_of(engine)
        if engine in bench.engines():
            medians = ", ".join(
                f"{test} {statistics.median(bench.ratios(engine, reference, test)):.2f}"
                for test in TESTS
            )
            lines.append(f"- `{engine}` / best `{reference}`: {medians}")
    return "## Answer, median of the rounds\n" + "\n".join(lines)


def speed_section(bench: Bench) -> str:
    rows = []
    for test in TESTS:
        for engine in bench.engines():
            speeds = bench.values(engine, test, lambda s: s.speed)
            reference = reference_of(engine)
            ratios = bench.ratios(engine, reference, test)
            rows.append((test, engine, spread(speeds), spread(ratios), reference))
    header = ("test", "contender", "GB/s: median (min-max)", "ratio within a round", "to")
    return "## Speed\n" + table(header, rows)


def cost_section(bench: Bench) -> str:
    rows = []
    for test in TESTS:
        for engine in bench.engines():
            costs = [f"{c:.3f}" for c in _three(bench.values(engine, test, lambda s: s.cost))]
            busy = statistics.median(bench.values(engine, test, lambda s: s.busy))
            rows.append((test, engine, f"{costs[0]} ({costs[1]}-{costs[2]})", f"{busy:.1%}"))
    header = ("test", "contender", "core-seconds per GB: median (min-max)", "of one core")
    return f"""## Processor time
User and system time of the process, all its threads. Whoever polled would keep a core at 100 %.

{table(header, rows)}"""


def rounds_section(bench: Bench) -> str:
    rows = [
        (test, engine, *(f"{v:.2f}" for v in bench.values(engine, test, lambda s: s.speed)))
        for test in TESTS
        for engine in bench.engines()
    ]
    rounds = (f"round {index + 1}" for index in range(bench.num_rounds))
    return "## Every round, GB/s\n" + table(("test", "contender", *rounds), rows)


def search_section(bench: Bench) -> str:
    """What the search saw, one short run a point."""
    rows = [
        (test, engine, point, f"{speed:.2f}", f"{cost:.3f}")
        for engine, test, point, speed, cost in bench.searched
    ]
    header = ("test", "contender", "blocks x depth", "GB/s", "core-s/GB")
    return "## Search, before the rounds\n" + table(header, rows)


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    found = list(values)
    return statistics.median(found), min(found), max(found)
