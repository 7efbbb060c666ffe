#!/usr/bin/env python3
"""Do several drives of different speed add up? Planes striped over 1, 2 and 4 throttled drives.

    python bench/striping.py --rounds 3

The drives are ext4 on loop devices over memory, each throttled to a known speed, so the sum of the
throttles is what a perfect queue would reach. Planes are laid out in equal pieces, in pieces in
proportion to the drives' speeds (`shares`), and the same in turns of a few MiB (`stripes`), and
several planes are in flight, as in training. Needs root; uses no drive of the machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from loop_drives import LoopDrive, Unavailable, loop_drives, throttled

from offload import extents, io
from offload.io import IoQueue
from offload.slots import Slab

MIB = 1 << 20
ALIGN_NBYTES = 4096
LAYOUTS = ("equal", "shares", "stripes")


def main() -> int:
    options = parse_options()
    folder = Path("/dev/shm") / f"offload-striping-{os.getpid()}"
    folder.mkdir()
    try:
        image_nbytes = options.file_nbytes + 64 * MIB
        with (
            loop_drives(folder, len(options.rates), image_nbytes) as drives,
            throttled(drives, options.rates),
        ):
            rows = run_rounds(drives, options)
    except Unavailable as missing:
        print(f"cannot make drives here: {missing}", file=sys.stderr)
        return 1
    finally:
        folder.rmdir()
    print(render(rows, options))
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rates", default="40,80,120,160", help="MiB/s of the drives, comma separated")
    add("--seconds", type=float, default=1.5, help="that a perfect run of one case takes")
    add("--plane-mib", type=int, default=32)
    add("--stripe-mib", type=int, default=4, help="of `stripes`")
    add("--rounds", type=int, default=3)
    add("--backend", default="uring", choices=("uring", "threads"))
    options = parser.parse_args()
    options.rates = [int(rate) * MIB for rate in options.rates.split(",")]
    options.plane_nbytes = options.plane_mib * MIB
    # The equal layout gives the slowest of two drives half of what both move.
    most = sum(options.rates) * options.seconds / len(options.rates)
    options.file_nbytes = (
        int(max(most, max(options.rates) * options.seconds)) + options.plane_nbytes
    )
    return options


Case = tuple[int, str, str]  # number of drives, layout, read or write


def run_rounds(drives: Sequence[LoopDrive], options: argparse.Namespace) -> dict[Case, list[float]]:
    """Return the share of the sum of the throttles that each case reached, by round."""
    slab = Slab(4 * options.plane_nbytes)
    slab.tensor.random_()
    fds = [os.open(drive.folder / "planes", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
           for drive in drives]  # fmt: skip
    for fd in fds:
        os.posix_fallocate(fd, 0, options.file_nbytes)
    counts = [number for number in (1, 2, 4) if number <= len(drives)]
    rows: dict[Case, list[float]] = {}
    for _ in range(options.rounds):
        for case in itertools.product(counts, LAYOUTS, ("write", "read")):
            if case[0] > 1 or case[1] == "equal":  # one drive has one layout
                rows.setdefault(case, []).append(run_case(case, fds, slab, options))
    for fd in fds:
        os.close(fd)
    slab.close()
    return rows


def run_case(case: Case, fds: Sequence[int], slab: Slab, options: argparse.Namespace) -> float:
    num_drives, layout, test = case
    rates = options.rates[:num_drives]
    pieces = lay_out(layout, rates, options)
    num_planes = max(4, int(sum(rates) * options.seconds / options.plane_nbytes))
    op = io.READ if test == "read" else io.WRITE
    ends = [0] * num_drives
    queue = IoQueue(options.backend)
    start = time.perf_counter()
    num_in_flight = 0
    for index in range(num_planes):
        if num_in_flight == 4:
            num_in_flight -= len(checked(queue))
        address = slab.address + index % 4 * options.plane_nbytes
        segments = []
        for place, nbytes in pieces:
            ends[place] = ends[place] if ends[place] + nbytes <= options.file_nbytes else 0
            segments.append((fds[place], ends[place], address, nbytes))
            ends[place] += nbytes
            address += nbytes
        queue.submit(op, index, segments)
        num_in_flight += 1
    while num_in_flight:
        num_in_flight -= len(checked(queue))
    seconds = time.perf_counter() - start
    queue.close()
    return num_planes * options.plane_nbytes / seconds / sum(rates)


def checked(queue: IoQueue) -> list[io.IoCompletion]:
    done = queue.wait(60.0)
    for row in done:
        if row.result < 0:
            raise OSError(-row.result, os.strerror(-row.result))
    return done


def lay_out(
    layout: str, rates: Sequence[int], options: argparse.Namespace
) -> list[tuple[int, int]]:
    """Return the pieces of one plane, (drive, bytes) in plane order."""
    if layout == "stripes":
        stripe_nbytes = options.stripe_mib * MIB
        return extents.stripes(options.plane_nbytes, rates, ALIGN_NBYTES, stripe_nbytes)
    weights = rates if layout == "shares" else [1] * len(rates)
    return list(enumerate(extents.shares(options.plane_nbytes, weights, ALIGN_NBYTES)))


def render(rows: dict[Case, list[float]], options: argparse.Namespace) -> str:
    lines = [
        f"Throttles {', '.join(f'{rate // MIB}' for rate in options.rates)} MiB/s; planes of "
        f"{options.plane_mib} MiB, stripes of {options.stripe_mib} MiB; {options.backend}.",
        "",
        "| drives | layout | test | MiB/s | of the sum of the throttles: median (min-max) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (num_drives, layout, test), shares in rows.items():
        median = statistics.median(shares)
        rate = median * sum(options.rates[:num_drives]) / MIB
        spread = f"{median:.2f} ({min(shares):.2f}-{max(shares):.2f})"
        lines.append(f"| {num_drives} | {layout} | {test} | {rate:.0f} | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
