#!/usr/bin/env python3
"""What checksums and commits cost: seconds and bytes written per step, beside the run without.

    python bench/durability.py --model 350m --dir /mnt/nvme/bench

The same model is trained once with every setting, all in one process: a few steps of one setting,
then of the next, round after round, because the speed of a drive drifts within minutes. What a turn
leaves to do (updates, its last commit) is waited for inside it. Ratios are taken within a round.
`nvme` keeps every plane on the drive, where a commit has nothing to write but the manifest;
`pinned` lets planes rest in RAM, which a commit then has to write.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).with_name("_peers")))

import _train_report
import torch
from engine_offload import OffloadTrainer, start
from models import MODELS
from train import make_policy
from worker import disk_bytes

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
    torch.set_num_threads(options.threads)
    rows: Rows = {}
    for placement in options.placements:
        run_placement(placement, options, rows)
    command = f"`python bench/durability.py {shlex.join(sys.argv[1:])}`"
    facts = _train_report.collect_facts(options.dir, "") | {"command": command}
    text = _train_report.hide_paths(render(rows, facts, options), options)
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
    add("--steps", type=int, default=4, help="steps of a turn")
    add("--rounds", type=int, default=4, help="turns of every setting, after one that is dropped")
    add("--placements", default="nvme,pinned")
    add("--dir", type=Path, default=Path("build/bench"))
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--out", type=Path)
    options = parser.parse_args()
    options.dir = options.dir.expanduser().absolute()
    options.placements = options.placements.split(",")
    return options


def run_placement(placement: str, options: argparse.Namespace, rows: Rows) -> None:
    """Train with every setting in turns."""
    with contextlib.ExitStack() as stack:
        trainers = {name: make(placement, name, options, stack) for name in SETTINGS}
        names = list(SETTINGS)
        for index in range(-1, options.rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                seconds, written = take_turn(trainers[name], options)
                if index < 0:
                    continue  # fresh files and memory
                print(f"{placement}, {name}: {seconds:.3f} s/step, {written / 1e9:.2f} GB written",
                      file=sys.stderr, flush=True)  # fmt: skip
                rows.setdefault((placement, name), []).append((seconds, written))


def make(
    placement: str, setting: str, options: argparse.Namespace, stack: contextlib.ExitStack
) -> OffloadTrainer:
    """A trainer on a fresh folder; the stack takes both away."""
    scratch = Path(tempfile.mkdtemp(dir=options.dir))
    stack.callback(shutil.rmtree, scratch)
    pins = placement == "pinned"
    job: dict[str, Any] = {"dir": str(scratch), "model": options.model}
    job["policy"] = make_policy(BUDGETS[options.model][pins], "auto" if pins else "false")
    trainer = start(job | {"overrides": SETTINGS[setting]})
    stack.callback(trainer.close)
    return trainer


def take_turn(trainer: OffloadTrainer, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds and bytes written per step, the commit of the last step included."""
    before, begin = disk_bytes()["write"], time.perf_counter()
    for _ in range(options.steps):
        tokens = torch.randint(0, 1000, (options.batch, options.seq))
        trainer.backward(trainer.forward(tokens))
        trainer.update()
    trainer.finish()
    seconds = time.perf_counter() - begin
    return seconds / options.steps, (disk_bytes()["write"] - before) / options.steps


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
