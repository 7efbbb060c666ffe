#!/usr/bin/env python3
"""What checksums and commits cost: seconds and bytes written per step, beside the run without.

    python bench/durability.py --model 350m --dir /mnt/nvme/bench

Each round trains the same model once with every setting, in a process of its own; ratios are taken
within a round. `nvme` keeps every plane on the drive, where a commit has nothing to write but the
manifest; `pinned` lets planes rest in RAM, which a commit then has to write.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).with_name("_peers")))

import _train_report
from launch import run_worker
from models import MODELS
from train import hide_paths, make_policy

SETTINGS: dict[str, list[str]] = {
    "plain": ["tiers.nvme.checksum=false", "durability=off"],
    "checksum": ["tiers.nvme.checksum=true", "durability=off"],
    "step": ["tiers.nvme.checksum=true", "durability=step"],
    "every 4 steps": ["tiers.nvme.checksum=true", "durability=every 4 steps"],
}
BUDGETS = {"tiny": ("128MiB", "256MiB"), "350m": ("640MiB", "3GiB"), "1b": ("2GiB", "7GiB")}
Rows = dict[
    tuple[str, str], list[tuple[float, float]]
]  # (placement, setting) -> (s, bytes written)


def main() -> int:
    options = parse_options()
    options.dir.mkdir(parents=True, exist_ok=True)
    rows: Rows = {}
    for index in range(options.rounds):
        for placement in options.placements:
            names = list(SETTINGS)
            for name in names[index % len(names) :] + names[: index % len(names)]:
                rows.setdefault((placement, name), []).append(run_once(placement, name, options))
    command = f"`python bench/durability.py {shlex.join(sys.argv[1:])}`"
    facts = _train_report.collect_facts(options.dir, "") | {"command": command}
    text = hide_paths(render(rows, facts, options), options)
    print("\n" + text)
    if options.out:
        options.out.write_text(text)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", choices=MODELS, default="tiny")
    add("--seq", type=int, default=256)
    add("--batch", type=int, default=1)
    add("--steps", type=int, default=8, help="timed steps of a run, after one that is dropped")
    add("--rounds", type=int, default=3)
    add("--placements", default="nvme,pinned")
    add("--dir", type=Path, default=Path("build/bench"))
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--out", type=Path)
    options = parser.parse_args()
    options.dir = options.dir.expanduser().absolute()
    options.placements = options.placements.split(",")
    options.deepspeed_python = options.deepspeed_extensions = ""
    return options


def run_once(placement: str, setting: str, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds and bytes written per step of one run, the commit of the last step included."""
    scratch = Path(tempfile.mkdtemp(dir=options.dir))
    pins = placement == "pinned"
    job: dict[str, Any] = {"engine": "offload", "dir": str(scratch), "threads": options.threads}
    job |= {"model": options.model, "num_params": MODELS[options.model].num_params()}
    job |= {"seq": options.seq, "batch": options.batch, "steps": options.steps}
    job |= {"policy": make_policy(BUDGETS[options.model][pins], "auto" if pins else "false")}
    job |= {"overrides": SETTINGS[setting]}
    try:
        outcome = run_worker(job, Path(sys.executable), timeout_s=1800)
    finally:
        shutil.rmtree(scratch)
        os.sync()
    if "error" in outcome:
        raise SystemExit(f"{placement}, {setting}: {outcome['error']}")
    steps = outcome["steps"][1:]
    seconds = statistics.fmean(step["total"] for step in steps)
    written = statistics.fmean(step["write"] for step in steps)
    print(f"{placement}, {setting}: {seconds:.3f} s/step, {written / 1e9:.2f} GB written")
    return seconds, written


def render(rows: Rows, facts: dict[str, str], options: argparse.Namespace) -> str:
    lines = [
        "# What checksums and commits cost",
        "",
        *[f"- {key}: {value}" for key, value in facts.items()],
        "",
        "| planes | setting | s/step | against plain (lowest to highest) | GB written per step |",
        "|---|---|---|---|---|",
    ]
    for (placement, setting), values in rows.items():
        seconds = [value[0] for value in values]
        ratios = [s / p[0] for s, p in zip(seconds, rows[placement, "plain"], strict=True)]
        lines.append(
            f"| {placement} | {setting} | {statistics.median(seconds):.3f} "
            f"| {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {statistics.median(value[1] for value in values) / 1e9:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
