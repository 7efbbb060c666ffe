#!/usr/bin/env python3
"""Does one parked thread stop OpenMP from spinning, and what is that worth beside a busy thread?

    python bench/openmp.py --rounds 5

libgomp's threads spin after each parallel region. While they do, a thread of ours that works beside
compute (the optimizer's, here one that hashes without the GIL) finds no core. Each case runs in a
process of its own, because libgomp reads OMP_WAIT_POLICY when it is loaded, and each round starts
every case once, beginning with another one. Ratios are taken within a round against `passive`,
which is the cure that a library comes too late for; `+calm` is offload.openmp.Calm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

CASES = ("passive", "unset", "unset+calm", "active", "active+calm")
BLOCK_NBYTES = 1 << 20
WARM_UP_S = 0.3


def main() -> int:
    options = parse_options()
    if options.worker:
        print(json.dumps(work(options.worker, options)))
        return 0
    rounds = [run_round(index, options) for index in range(options.rounds)]
    text = render(rounds, options)
    print(text)
    if options.out:
        options.out.write_text(text)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=2.0, help="timed seconds of a case in a round")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    add("--rows", type=int, default=64, help="rows of x in gelu(x @ w), x [rows, 512]")
    add("--idle", action="store_true", help="without the busy thread, for comparison")
    add("--out", type=Path, help="write the result as Markdown too")
    add("--worker", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


# One case, in its own process


def work(case: str, options: argparse.Namespace) -> dict[str, float]:
    """Time compute and the busy thread beside each other; rates per second."""
    import torch

    from offload.openmp import Calm

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x, w = torch.randn(options.rows, 512), torch.randn(512, 512)

    def step() -> None:
        torch.nn.functional.gelu(x @ w)

    step()
    calm = Calm() if case.endswith("+calm") else None
    busy = Busy()
    if not options.idle:
        busy.start()
    repeat(step, WARM_UP_S)
    blocks_before = busy.num_blocks
    num_steps, seconds = repeat(step, options.seconds)
    num_blocks = busy.num_blocks - blocks_before
    busy.stop()
    if calm is not None:
        calm.close()
    return {"steps": num_steps / seconds, "blocks": num_blocks / seconds}


def repeat(step: object, seconds: float) -> tuple[int, float]:
    """Call for that long; return how often, and the seconds it took."""
    start, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < start + seconds:
        step()  # type: ignore[operator]
        count += 1
    return count, now - start


class Busy(threading.Thread):
    """Works without the GIL until told to stop; counts what it has done."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.num_blocks = 0
        self._done = threading.Event()

    def run(self) -> None:
        block = bytes(BLOCK_NBYTES)
        while not self._done.is_set():
            hashlib.sha256(block)
            self.num_blocks += 1

    def stop(self) -> None:
        self._done.set()
        if self.is_alive():
            self.join()


# All cases


def run_round(index: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    shift = index % len(CASES)  # nobody always runs right after the same neighbour
    order = CASES[shift:] + CASES[:shift]
    return {case: run_case(case, options) for case in order}


def run_case(case: str, options: argparse.Namespace) -> dict[str, float]:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    policy = case.partition("+")[0]
    if policy != "unset":
        environment["OMP_WAIT_POLICY"] = policy
    root = str(Path(__file__).resolve().parent.parent)
    known = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else root
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def render(rounds: list[dict[str, dict[str, float]]], options: argparse.Namespace) -> str:
    """A table with medians over the rounds, and ratios within rounds: median (least to most)."""
    import torch

    lines = [
        f"gelu(x @ w), x [{options.rows}, 512], on {options.threads} of torch's threads beside "
        f"{'nothing' if options.idle else 'a thread that hashes 1 MiB blocks'}; "
        f"{len(rounds)} rounds of {options.seconds:g} s; torch {torch.__version__}, "
        f"Python {platform.python_version()}, "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the end.",
        "",
        "| case | steps/s | steps, of passive | hashed MiB/s | hashed, of passive |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        cells = [case]
        for key in ("steps", "blocks"):
            rates = [row[case][key] for row in rounds]
            cells.append(f"{statistics.median(rates):.0f}")
            ratios = [row[case][key] / row["passive"][key] for row in rounds if row["passive"][key]]
            cells.append(spread(ratios))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
