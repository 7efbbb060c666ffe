"""Turn the runs of train.py into Markdown: medians, paired ratios, and what they were taken on."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from models import MODELS

REPO = Path(__file__).resolve().parents[1]
GB = 1e9
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process of one engine: `outcome` is what worker.py wrote."""

    engine: str
    round: int
    outcome: dict[str, Any]

    def steps(self) -> list[dict[str, float]]:
        """Return the timed steps, without the first."""
        steps: list[dict[str, float]] = self.outcome["steps"][1:]
        return steps

    def mean(self, key: str) -> float:
        """Average over the timed steps; a median would not see what the last step waits for."""
        return statistics.fmean(step[key] for step in self.steps())

    def peak_rss(self) -> int:
        """Return the peak over the whole life of the process, in bytes."""
        return int(max(self.outcome["init_peak_rss"], self.outcome["train_peak_rss"]))


def one_line(run: Run) -> str:
    """Say what one run took, for the terminal while the bench goes on."""
    if run.engine == "disk":
        read, write = run.outcome["read_bytes_per_s"], run.outcome["write_bytes_per_s"]
        return f"disk reads {read / GB:.2f}, writes {write / GB:.2f} GB/s"
    seconds = " ".join(f"{step['total']:.2f}" for step in run.steps())
    return f"{run.engine}: {seconds} s/step, peak {run.peak_rss() / GIB:.2f} GiB"


def render(
    options: argparse.Namespace,
    facts: Mapping[str, str],
    runs: Sequence[Run],
    skipped: Mapping[str, str],
) -> str:
    """Return the whole result file."""
    by_engine = {
        engine: [run for run in runs if run.engine == engine]
        for engine in options.engines
        if any(run.engine == engine for run in runs)
    }
    num_params = MODELS[options.model].num_params()
    sections = [
        title(options, num_params),
        table(("fact", "value"), facts.items()),
        skipped_section(skipped),
        "## Seconds and memory\n" + engine_table(by_engine, options, num_params),
        ratio_section(by_engine, options.rounds),
        limit_section(by_engine, [run for run in runs if run.engine == "disk"]),
        steps_section(by_engine),
        about_section(by_engine),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def title(options: argparse.Namespace, num_params: int) -> str:
    changes = f". Both changed by {', '.join(options.set)}" if options.set else ""
    return f"""# Training step of a {num_params / 1e6:.0f} M parameter Llama: seconds and memory

Batch {options.batch}, sequence {options.seq}, bf16 compute, AdamW on an fp32 master, random weights
and tokens, on the CPU. Rounds: {options.rounds}; in each, every engine ran once in a process of its
own: one step dropped, {options.steps} timed.
`OMP_WAIT_POLICY={options.wait_policy}` and {options.threads} threads for all.

- `torch`: everything in memory (bf16 weights and gradients, fp32 master and moments, fused AdamW
  parameter by parameter), blocks recomputed in backward; `torch-keep`: nothing recomputed.
- `offload`: this project, format `exact`, update `eager`, RAM budget {options.cpu_budget},
  `pin: {options.pin}`; `offload-plain`: the same without packing; `offload-pinned`: budget
  {options.pinned_budget}, what fits stays in RAM{changes}.
- `deepspeed`: ZeRO-3, parameters and optimizer on NVMe, blocks recomputed, in the leanest
  configuration found that works (bench/_peers/engine_deepspeed.py); `deepspeed-hugepages`: the same
  with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, which puts its I/O buffers on huge pages."""


def engine_table(
    by_engine: Mapping[str, Sequence[Run]], options: argparse.Namespace, num_params: int
) -> str:
    """One row an engine; seconds and bytes are the mean step of a round, over the rounds."""
    header = ("engine", "s/step", "forward", "backward", "update", "tokens/s", "GB read",
              "GB written", "B/param read", "B/param written", "peak RSS GiB",
              "of it building", "building s")  # fmt: skip
    rows = []
    for engine, runs in by_engine.items():
        read = statistics.fmean(run.mean("read") for run in runs)
        write = statistics.fmean(run.mean("write") for run in runs)
        seconds = means(runs, "total")
        rows.append(
            (
                engine,
                spread(seconds),
                *(f"{statistics.median(means(runs, k)):.2f}"
                  for k in ("forward", "backward", "update")),
                f"{options.seq * options.batch / statistics.median(seconds):.1f}",
                f"{read / GB:.2f}",
                f"{write / GB:.2f}",
                f"{read / num_params:.2f}",
                f"{write / num_params:.2f}",
                f"{max(run.peak_rss() for run in runs) / GIB:.2f}",
                f"{max(run.outcome['init_peak_rss'] for run in runs) / GIB:.2f}",
                f"{statistics.median(run.outcome['init_s'] for run in runs):.1f}",
            )
        )  # fmt: skip
    note = """

Seconds are the mean step of a round: median (minimum-maximum) over the rounds. Bytes are what
/proc/self/io counts for the process. Peak RSS is VmHWM over its whole life. Work pending after
the last step is waited for inside it."""
    return table(header, rows) + note


def ratio_section(by_engine: Mapping[str, Sequence[Run]], num_rounds: int) -> str:
    """Ratios of seconds and of memory to plain torch and to DeepSpeed, paired by round."""
    rows = []
    for reference in ("torch", "deepspeed"):
        for engine in by_engine:
            if reference in by_engine and engine != reference:
                pair = by_engine[engine], by_engine[reference]
                time = paired(*pair, num_rounds, lambda run: run.mean("total"))
                memory = paired(*pair, num_rounds, lambda run: run.peak_rss())
                if time:
                    rows.append((f"{engine} / {reference}", *three(time), *three(memory)))
    if not rows:
        return ""
    header = ("", "time: median", "min", "max", "peak RSS: median", "min", "max")
    return "## Ratios, paired by round\n" + table(header, rows)


def limit_section(by_engine: Mapping[str, Sequence[Run]], disk: Sequence[Run]) -> str:
    """What the disk alone would take for each engine's bytes, one direction after the other."""
    if not disk:
        return ""
    read = statistics.median(run.outcome["read_bytes_per_s"] for run in disk)
    write = statistics.median(run.outcome["write_bytes_per_s"] for run in disk)
    compute = (
        [statistics.median(means(by_engine["torch"], "total"))] if "torch" in by_engine else []
    )
    rows = []
    for engine, runs in by_engine.items():
        disk_s = statistics.fmean(r.mean("read") / read + r.mean("write") / write for r in runs)
        limit = max([disk_s, *compute])
        measured = statistics.median(means(runs, "total"))
        if disk_s > 0.001:
            rows.append((engine, f"{disk_s:.2f}", f"{limit:.2f}", f"{measured / limit:.2f}"))
    if not rows:
        return ""
    header = ("engine", "disk alone s", "limit s", "measured / limit")
    return f"""## Limit
The disk read {read / GB:.2f} and wrote {write / GB:.2f} GB/s (medians of a probe in every round:
O_DIRECT, huge pages, 8 blocks of 8 MiB in flight). Limit: the larger of the disk's time for the
engine's bytes, one direction after the other, and plain torch's step.
{table(header, rows)}"""


def steps_section(by_engine: Mapping[str, Sequence[Run]]) -> str:
    """All timed steps and losses; the tiers must not show in the losses."""
    rows = []
    for engine, runs in by_engine.items():
        rounds = "; ".join(" ".join(f"{s['total']:.2f}" for s in run.steps()) for run in runs)
        losses = {tuple(step["loss"] for step in run.outcome["steps"]) for run in runs}
        shown = " ".join(f"{loss:.6f}" for loss in sorted(losses)[0])
        same = "" if len(losses) == 1 else f" ({len(losses)} different series)"
        rows.append((engine, rounds, shown + same))
    text = "## Every step\n" + table(("engine", "s/step, rounds parted by ;", "losses"), rows)
    for left, right in (("torch", "torch-keep"), ("offload", "offload-pinned")):
        if left in by_engine and right in by_engine:
            equal = losses_of(by_engine[left]) == losses_of(by_engine[right])
            verdict = "bit-identical" if equal else "DIFFERENT"
            text += f"\n\nLosses of `{left}` and `{right}`: {verdict}."
    return text


def about_section(by_engine: Mapping[str, Sequence[Run]]) -> str:
    """Versions and remarks that the engines gave of themselves, from their last run."""
    lines = ["## What the engines say"]
    for engine, runs in by_engine.items():
        about = dict(runs[-1].outcome["about"])
        long = {key: about.pop(key) for key in list(about) if len(about[key]) > 40}
        lines.append(f"- `{engine}`: " + ", ".join(f"{k} {v}" for k, v in about.items()))
        lines += [f"\n  {key}:\n```\n{text}\n```" for key, text in long.items()]
    return "\n".join(lines)


def skipped_section(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return ""
    return "## Skipped\n" + "\n".join(f"- `{engine}`: {why}" for engine, why in skipped.items())


def collect_facts(folder: Path, arguments: str, script: str = "train.py") -> dict[str, str]:
    """Describe machine, file system and source; `folder` is where the swap files lie."""
    memory = psutil.virtual_memory().total
    return {
        "month": datetime.date.today().strftime("%Y-%m"),
        "command": f"`python bench/{script} {arguments}`",
        "source": source_revision(),
        "processor": f"{processor_name()}, {psutil.cpu_count()} logical cores",
        "memory": f"{memory / GIB:.1f} GiB",
        "disk": file_system(folder),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def hide_paths(text: str, options: argparse.Namespace) -> str:
    """Replace what is only true of this machine, so that the result can be shown. `options` has
    `dir` and `out`; what else names a path is replaced where a script has it.
    """
    names = {
        str(options.dir): "DIR",
        str(options.out or ""): "RESULT",
        str(getattr(options, "deepspeed_python", "") or ""): "PYTHON",
        str(getattr(options, "deepspeed_extensions", "") or ""): "EXTENSIONS",
        str(REPO): ".",
        str(Path.home()): "~",
        f"/proc/{os.getpid()}/": "/proc/PID/",
    }
    for path in sorted(filter(None, names), key=len, reverse=True):  # a path before its parents
        text = text.replace(path, names[path])
    return text


def source_revision() -> str:
    """Return the commit of this checkout, marked when files differ from it."""
    try:
        command = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "no commit yet"


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def file_system(folder: Path) -> str:
    """Name the file system type and the device that hold `folder`."""
    parts = [p for p in psutil.disk_partitions(all=True) if folder.is_relative_to(p.mountpoint)]
    if not parts:
        return "unknown"
    part = max(parts, key=lambda p: len(p.mountpoint))
    return f"{part.fstype} on {part.device}"


def means(runs: Iterable[Run], key: str) -> list[float]:
    return [run.mean(key) for run in runs]


def losses_of(runs: Sequence[Run]) -> list[float]:
    return [step["loss"] for step in runs[0].outcome["steps"]]


def paired(
    runs: Sequence[Run],
    references: Sequence[Run],
    num_rounds: int,
    value: Callable[[Run], float],
) -> list[float]:
    """Return value(run) / value(reference) for every round that has both."""
    of_run = {run.round: value(run) for run in runs}
    of_reference = {run.round: value(run) for run in references}
    both = [index for index in range(num_rounds) if index in of_run and index in of_reference]
    return [of_run[index] / of_reference[index] for index in both]


def three(values: Sequence[float]) -> tuple[str, str, str]:
    """Format median, minimum and maximum."""
    chosen = statistics.median(values), min(values), max(values)
    median, low, high = (f"{value:.2f}" for value in chosen)
    return median, low, high


def spread(values: Sequence[float]) -> str:
    median, low, high = three(values)
    return f"{median} ({low}-{high})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
