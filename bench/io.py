#!/usr/bin/env python3
"""How near is the I/O queue to the drive? This project, fio, DeepSpeed's DeepNVMe.

    python bench/io.py --dir /mnt/nvme/bench --deepspeed-python ENV/bin/python

One file, preallocated and written, is read, overwritten, and half read and half written, plane by
plane, with direct I/O. The best settings of fio and of DeepNVMe are searched first; then every
round runs all contenders of one test after the other, beginning with another one each time. Ratios
are taken within a round, because the speed of a drive drifts from one second to the next.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).with_name("_peers")))

import _io_report
import _train_report
from _io_report import TESTS, Bench, Sample
from fio import FioPoint, fio_version, huge_pages, run_fio
from io_workers import IoWorker

MIB = 1 << 20
# In KiB a block, and blocks in flight, which are all the memory that fio uses. `fio` moves through
# as much memory as a slab; `fio-hot` uses a few MiB again and again, which stay in some cache.
FIO_GRIDS = {
    "fio": ((512, 256), (1024, 128), (4096, 32)),
    "fio-hot": ((512, 16), (1024, 4), (1024, 8), (2048, 8)),
}
FIO_BUFFERS_NBYTES = 128 * MIB
HOT_NBYTES = 8 * MIB  # of offload-hot
# aio_handle's arguments: block bytes, queue depth, single submit, overlap events, parallelism
SHIPPED_HANDLE = (MIB, 8, False, True, 1)  # the defaults of DeepSpeed's `aio` section
HANDLE_GRID = ((MIB, 32, False, True, 1), (8 * MIB, 32, False, True, 1), (MIB, 32, False, True, 2))
NUM_BUFFERS = 8


def main() -> int:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # undo what was changed
    options.dir.mkdir(parents=True, exist_ok=True)
    need, free = options.file_nbytes + MIB, shutil.disk_usage(options.dir).free
    if free < need:
        say(f"needs {need >> 20} MiB in {options.dir}, {free >> 20} MiB are free")
        return 1
    scratch = Path(tempfile.mkdtemp(prefix="io-", dir=options.dir))
    try:
        bench = run_bench(scratch / "planes.bin", options)
    finally:
        shutil.rmtree(scratch)
    facts = _train_report.collect_facts(options.dir, shlex.join(sys.argv[1:]), script="io.py")
    text = _train_report.hide_paths(_io_report.render(bench, facts), options)
    print("\n" + text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dir", type=Path, default=Path("build/bench"), help="folder on the drive to test")
    add("--file-mib", type=int, default=2048, help="size of the file; all of it moves in a test")
    add("--plane-mib", type=int, default=64, help="size of one transfer")
    add("--rounds", type=int, default=3)
    add("--search-mib", type=int, default=512, help="bytes of one point of the search")
    add("--engines", default="offload,offload-hot", help="of ours; offload-threads is another")
    add("--limits", help="of the queue, as KiB of a block x blocks in flight: 512x64")
    add("--deepspeed-python", type=Path, help="an interpreter with DeepSpeed, to compare with it")
    add("--deepspeed-extensions", type=Path, help="its compiled operators (default: in its venv)")
    add("--out", type=Path, help="write the result as Markdown too")
    options = parser.parse_args()
    options.engines = options.engines.split(",")
    options.limits_name = options.limits or "the project's defaults"
    if options.limits:
        block_kib, depth = map(int, options.limits.split("x"))
        options.limits = (depth, block_kib * 1024)
    if "offload" not in options.engines:
        parser.error("--engines needs offload, to whom all others are compared")
    options.dir = options.dir.expanduser().absolute()
    options.plane_nbytes = options.plane_mib * MIB
    if min(options.plane_mib, options.rounds) < 1 or options.search_mib < 2 * options.plane_mib:
        parser.error("--plane-mib and --rounds are at least 1, --search-mib at least two planes")
    options.file_nbytes = options.file_mib * MIB // options.plane_nbytes * options.plane_nbytes
    options.search_nbytes = min(options.search_mib * MIB, options.file_nbytes)
    return options


Run = Callable[[str, int], dict[str, Any]]  # test, bytes -> what one move of them took


def run_bench(path: Path, options: argparse.Namespace) -> Bench:
    """Search the settings, then measure; every change of the system is undone at the end."""
    bench = Bench(
        num_rounds=options.rounds,
        file_nbytes=options.file_nbytes,
        plane_nbytes=options.plane_nbytes,
        fio=fio_version(),
    )
    with contextlib.ExitStack() as stack:
        contenders = start_workers(path, options, bench, stack)
        first = contenders["offload"]
        first("write", options.file_nbytes)  # unwritten extents cost more: not counted
        bench.fio_memory = stack.enter_context(huge_pages(FIO_BUFFERS_NBYTES))
        for name in FIO_GRIDS:
            contenders[name] = search_fio(name, path, options, bench)
        if "deepspeed-hugepages" in contenders:
            search = contenders["deepspeed-hugepages"]
            contenders["deepspeed-hugepages"] = search_handles(search, options, bench)
        for index in range(options.rounds):
            run_round(index, contenders, options.file_nbytes, bench)
    return bench


def start_workers(
    path: Path, options: argparse.Namespace, bench: Bench, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Start the contenders that live in processes of their own; says which cannot."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, options.file_nbytes)
    contenders: dict[str, Any] = {}
    engines = ["offload"]
    if options.deepspeed_python:
        engines += ["deepspeed", "deepspeed-hugepages"]
    for engine in engines:
        job = {"engine": engine, "path": str(path), "num_buffers": NUM_BUFFERS}
        job["plane_nbytes"] = options.plane_nbytes
        python = Path(sys.executable) if engine == "offload" else options.deepspeed_python
        try:
            worker = stack.enter_context(
                IoWorker(job, python, options.deepspeed_extensions, os.cpu_count() or 1)
            )
        except (RuntimeError, OSError) as error:
            if engine == "offload":
                raise
            bench.skipped[engine] = str(error)
            say(f"{engine} skipped: {error}")
            continue
        bench.huge_nbytes[engine] = int(worker.about["huge_nbytes"])
        if engine == "offload":
            for name, backend, window_nbytes in (
                ("offload", "uring", 0),
                ("offload-hot", "uring", HOT_NBYTES),
                ("offload-threads", "threads", 0),
            ):
                if name in options.engines:
                    settings = {"backend": backend, "limits": options.limits}
                    settings["window_nbytes"] = window_nbytes
                    bench.settings[name] = f"{backend}, {options.limits_name}"
                    contenders[name] = bind(worker, settings)
        elif engine == "deepspeed":
            contenders[engine] = bind(worker, {"handle": SHIPPED_HANDLE})
            bench.settings[engine] = handle_name(SHIPPED_HANDLE)
        else:
            contenders[engine] = worker
    return contenders


def bind(worker: IoWorker, settings: dict[str, Any]) -> Run:
    return lambda test, nbytes: worker.run(test, nbytes, settings)


def handle_name(handle: tuple[Any, ...]) -> str:
    return f"{handle[0] >> 10} KiB x {handle[1]}, parallelism {handle[4]}"


def search_fio(name: str, path: Path, options: argparse.Namespace, bench: Bench) -> Run:
    """Find fio's best point for each test; it gets another try with file and buffers registered."""
    memory = bench.fio_memory
    best: dict[str, FioPoint] = {}
    for test in TESTS:

        def measure(point: FioPoint, test: str = test) -> float:
            row = run_fio(path, test, options.search_nbytes, point, memory)
            bench.huge_nbytes[name] = max(bench.huge_nbytes.get(name, 0), int(row["huge_nbytes"]))
            return bench.note_search(name, test, str(point), row)

        points = (FioPoint(block_nbytes=b * 1024, depth=d) for b, d in FIO_GRIDS[name])
        speeds = {point: measure(point) for point in points}
        fixed = replace(max(speeds, key=lambda point: speeds[point]), fixed=True)
        speeds[fixed] = measure(fixed)
        best[test] = max(speeds, key=lambda point: speeds[point])
    bench.settings[name] = "; ".join(f"{test} {point}" for test, point in best.items())
    return lambda test, nbytes: run_fio(path, test, nbytes, best[test], memory)


def search_handles(worker: IoWorker, options: argparse.Namespace, bench: Bench) -> Run:
    """Find DeepNVMe's best handle for each test, on huge pages."""
    best = {}
    for test in TESTS:
        speeds = {}
        for handle in HANDLE_GRID:
            row = worker.run(test, options.search_nbytes, {"handle": handle})
            speeds[handle] = bench.note_search(
                "deepspeed-hugepages", test, handle_name(handle), row
            )
        best[test] = max(speeds, key=lambda handle: speeds[handle])
    named = "; ".join(f"{test} {handle_name(handle)}" for test, handle in best.items())
    bench.settings["deepspeed-hugepages"] = named
    return lambda test, nbytes: worker.run(test, nbytes, {"handle": best[test]})


def run_round(index: int, contenders: dict[str, Run], nbytes: int, bench: Bench) -> None:
    """Run every test once with every contender, each time another one first."""
    names = list(contenders)
    for position, test in enumerate(TESTS):
        shift = (index + position) % len(names)
        for name in names[shift:] + names[:shift]:
            row = contenders[name](test, nbytes)
            bench.samples.append(Sample.of(name, test, index, row))
            say(f"round {index + 1}: {bench.samples[-1]}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
