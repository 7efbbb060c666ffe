#!/usr/bin/env python3
"""What do optimizers cost beside native AdamW, in tiles and through torch: seconds and bytes.

    python bench/generic.py --model 350m --dir /mnt/nvme/bench

The same model is trained with every optimizer, all in one process: a few steps of one, then of the
next, round after round, because the speed of a drive drifts within minutes. What a turn leaves to
do is waited for inside it. Ratios are taken within a round. All state is on the drive, under one
RAM budget for all; what a step moves is what the kernel counts for the process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

NATIVE = "native AdamW, exact"
SETTINGS: dict[str, list[str]] = {
    NATIVE: ["optimizer.kind=adamw", "state.format=exact"],
    "native Adafactor, exact": ["optimizer.kind=adafactor", "state.format=exact"],
    "native SCALE, exact": ["optimizer.kind=scale", "state.format=exact"],
    "native SCALE, int8": ["optimizer.kind=scale", "state.format=int8"],
    "torch AdamW, exact": ["optimizer.name=AdamW", "state.format=exact"],
    "torch Adafactor, exact": ["optimizer.name=Adafactor", "state.format=exact"],
}
BUDGETS = {"tiny": "512MiB", "350m": "2GiB", "1b": "4GiB"}  # of torch's AdamW, which needs the most
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Turn:
    """Means of a step: seconds, and bytes that the kernel counted."""

    seconds: float
    read: float
    written: float

    def __str__(self) -> str:
        read, written = self.read / GB, self.written / GB
        return f"{self.seconds:.3f} s/step, {read:.2f} GB read, {written:.2f} GB written"


Rows = dict[str, list[Turn]]


def main() -> int:
    options = parse_options()
    options.dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    rows, kept = run(options)
    command = f"`python bench/generic.py {shlex.join(sys.argv[1:])}`"
    facts = _train_report.collect_facts(options.dir, "") | {
        "command": command,
        "model": f"{options.model}, {MODELS[options.model].num_params() / 1e6:.0f} M parameters",
        "tokens per step": f"{options.batch} x {options.seq}",
        "RAM budget": f"{options.cpu_budget}, nothing pinned",
        "turns": f"{options.rounds} rounds of {options.steps} steps, after one that is dropped",
    }
    text = _train_report.hide_paths(render(rows, kept, facts, options), options)
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
    add("--cpu-budget", help=f"RAM for each of them; default by model: {BUDGETS}")
    add("--dir", type=Path, default=Path("build/bench"))
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--out", type=Path)
    options = parser.parse_args()
    options.dir = options.dir.expanduser().absolute()
    options.cpu_budget = options.cpu_budget or BUDGETS[options.model]
    return options


def run(options: argparse.Namespace) -> tuple[Rows, dict[str, int]]:
    """Train with every setting in turns. Also the bytes that each keeps between steps."""
    rows: Rows = {name: [] for name in SETTINGS}
    with contextlib.ExitStack() as stack:
        trainers = {name: make(name, options, stack) for name in SETTINGS}
        names = list(SETTINGS)
        for index in range(-1, options.rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                turn = take_turn(trainers[name], options)
                if index < 0:
                    continue  # fresh files and memory, and first steps, which make the state
                print(f"{name}: {turn}", file=sys.stderr, flush=True)
                rows[name].append(turn)
        kept = {name: trainer.state_nbytes() for name, trainer in trainers.items()}
    return rows, kept


def make(setting: str, options: argparse.Namespace, stack: contextlib.ExitStack) -> OffloadTrainer:
    """A trainer on a fresh folder; the stack takes both away."""
    scratch = Path(tempfile.mkdtemp(dir=options.dir))
    stack.callback(shutil.rmtree, scratch)
    job: dict[str, Any] = {"dir": str(scratch), "model": options.model}
    job["policy"] = make_policy(options.cpu_budget, "false")
    kind = [] if setting == NATIVE else ["optimizer.kind=torch"]
    trainer = start(job | {"overrides": kind + SETTINGS[setting]})
    stack.callback(trainer.close)
    return trainer


def take_turn(trainer: OffloadTrainer, options: argparse.Namespace) -> Turn:
    """Train for some steps, all pending work included."""
    before, begin = disk_bytes(), time.perf_counter()
    for _ in range(options.steps):
        tokens = torch.randint(0, 1000, (options.batch, options.seq))
        trainer.backward(trainer.forward(tokens))
        trainer.update()
    trainer.finish()
    seconds, after = time.perf_counter() - begin, disk_bytes()
    read, written = after["read"] - before["read"], after["write"] - before["write"]
    return Turn(seconds / options.steps, read / options.steps, written / options.steps)


def render(
    rows: Rows, kept: dict[str, int], facts: dict[str, str], options: argparse.Namespace
) -> str:
    num_params = MODELS[options.model].num_params()
    lines = [
        "# What optimizers cost beside native AdamW",
        "",
        *[f"- {key}: {value}" for key, value in facts.items()],
        "",
        "State is what persists between steps; bytes read and written are those of a step.",
        "",
        "| optimizer | state, B/param | s/step | against native AdamW (lowest to highest) "
        "| GB read | GB written | B/param read | B/param written |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, turns in rows.items():
        pairs = zip(turns, rows[NATIVE], strict=True)
        ratios = [turn.seconds / native.seconds for turn, native in pairs]
        seconds = statistics.median(turn.seconds for turn in turns)
        read = statistics.median(turn.read for turn in turns)
        written = statistics.median(turn.written for turn in turns)
        lines.append(
            f"| {name} | {kept[name] / num_params:.2f} | {seconds:.3f} "
            f"| {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {read / GB:.2f} | {written / GB:.2f} "
            f"| {read / num_params:.2f} | {written / num_params:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
