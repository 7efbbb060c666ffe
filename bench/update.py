#!/usr/bin/env python3
"""Does the streaming update keep pace with the drive? All state of a model, beside fio.

    python bench/update.py --dir /mnt/nvme/bench --out bench/results/update_NAME_202601.md

Every plane of every chunk lies in one swap file; gradients lie in memory, and so does nothing else.
One pass reads, computes and writes all of it, tile by tile: with checksums and without. fio moves
bytes of the same drive, half of them read and half written, right before and after each pass; the
mean of the two is what the drive could do meanwhile. The limit of a pass is its bytes at that
speed. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("_peers")))
sys.path.append(str(Path(__file__).parents[1]))

import _train_report
from _train_report import GB, spread, table
from fio import FioPoint, fio_version, huge_pages, run_fio

from offload import io
from offload.extents import Extent, table_nbytes
from offload.formats import NATIVE_PLANE_ORDER, Plane, state_format
from offload.plan import CHECKSUM_NBYTES
from offload.slots import Region, Slab
from offload.store import ChunkStore
from offload.update import (
    NUM_TILES,
    AdamWOp,
    PlaneArgument,
    UpdatePipeline,
    pack_ops,
    tile_buffer_nbytes,
)

MIB = 1 << 20
FIO_POINTS = ((512, 256), (1024, 128), (4096, 32))  # KiB a block, blocks in flight
FIO_BUFFERS_NBYTES = 128 * MIB
CASES = {"with checksums": CHECKSUM_NBYTES, "without": 0}


@dataclass(frozen=True)
class Pass:
    """One update of all chunks: `nbytes` both ways, and fio's speed around it in bytes/s."""

    seconds: float
    kernel_seconds: float
    nbytes: int
    fio_speed: float

    @property
    def ratio(self) -> float:
        """The time of the limit in that of the pass: 1 is the drive's own pace."""
        return self.nbytes / self.fio_speed / self.seconds


class Model:
    """Chunks of equal size whose planes lie in a store of their own, and one gradient for all."""

    def __init__(self, folder: Path, options: argparse.Namespace, checksum_nbytes: int) -> None:
        self.fmt = state_format(options.format)
        self.numel = options.chunk_mparams * MIB
        num_chunks = round(options.mparams * 1e6 / self.numel)
        sizes = [self.fmt.nbytes(p, self.numel) for p in self.fmt.state_planes] * num_chunks
        sums_nbytes = table_nbytes(sizes, 1, checksum_nbytes)
        tile_numel = options.tile_kib_elements * 1024
        tiles_nbytes = tile_buffer_nbytes(tile_numel)
        grad_nbytes = self.fmt.nbytes(Plane.GRAD, self.numel)
        self.slab = Slab(tiles_nbytes + sums_nbytes + grad_nbytes + MIB)
        tiles = self.slab.carve("tiles", tiles_nbytes)
        self.gradient = self.slab.carve("gradient", grad_nbytes)
        sums = self.slab.carve("checksums", sums_nbytes) if sums_nbytes else None
        self.slab.populate()
        self.store = ChunkStore([folder], checksum_nbytes=checksum_nbytes, table=sums)
        self.extents: list[dict[Plane, Extent]] = [
            {p: self.store.allocate(self.fmt.nbytes(p, self.numel)) for p in self.fmt.state_planes}
            for _ in range(num_chunks)
        ]
        self.store.open(None)
        self.queue = io.IoQueue(io.choose_backend("auto")[0], checksum_nbytes=checksum_nbytes)
        self.worker = UpdatePipeline(self.queue, tile_numel, tiles, checksum_nbytes=checksum_nbytes)
        self.num_steps = 0
        self._write_zeros(tiles)

    def _write_zeros(self, buffer: Region) -> None:
        """Unwritten space costs more to write: not counted."""
        buffer.tensor.zero_()
        for extents in self.extents:
            for extent in extents.values():
                for begin in range(0, extent.nbytes, CHECKSUM_NBYTES * 64):
                    nbytes = min(CHECKSUM_NBYTES * 64, extent.nbytes - begin)
                    segments = self.store.io_segments(extent, buffer.address, begin, nbytes)
                    self.queue.submit(io.WRITE, 0, segments)
                    (done,) = self.queue.wait(600.0)
                    if done.result != nbytes:
                        raise SystemExit(f"writing the planes failed: {done.result}")

    def update(self) -> tuple[float, float, int]:
        """One step of all chunks: seconds, of them in kernels, and bytes both ways."""
        self.num_steps += 1
        op = AdamWOp(
            begin=0, end=self.numel, step=self.num_steps, lr=1e-4, weight_decay=0.01, beta1=0.9,
            beta2=0.999, eps=1e-8,
        )  # fmt: skip
        begin = time.perf_counter()
        for tag, extents in enumerate(self.extents):
            planes = [self._argument(extents, plane) for plane in NATIVE_PLANE_ORDER]
            self.worker.submit(tag, self.fmt.native_code, self.numel, planes, pack_ops([op]))
        kernel_seconds, nbytes, left = 0.0, 0, len(self.extents)
        while left:
            for done in self.worker.wait(600.0):
                if done.result:
                    raise SystemExit(f"chunk {done.tag} failed: {done.result}")
                left -= 1
                kernel_seconds += done.kernel_seconds
                nbytes += done.read_nbytes + done.write_nbytes
        return time.perf_counter() - begin, kernel_seconds, nbytes

    def _argument(self, extents: dict[Plane, Extent], plane: Plane) -> PlaneArgument | None:
        if plane is Plane.GRAD:
            return PlaneArgument(self.gradient.address)
        if plane not in extents:
            return None
        segments = self.store.segments(extents[plane])
        return PlaneArgument(0, segments, segments)

    def close(self) -> None:
        self.worker.close()
        self.queue.close()
        self.store.close()
        self.slab.close()


def main() -> int:
    options = parse_options()
    options.dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="update-", dir=options.dir))
    passes: dict[str, list[Pass]] = {name: [] for name in CASES}
    try:
        with huge_pages(FIO_BUFFERS_NBYTES) as memory:
            point = run(scratch, options, memory, passes)
    finally:
        shutil.rmtree(scratch)
    facts = _train_report.collect_facts(options.dir, shlex.join(sys.argv[1:]), script="update.py")
    text = render(passes, facts | {"fio": f"{fio_version()}, mix, {point}"}, options)
    text = _train_report.hide_paths(text, options)
    print("\n" + text)
    if options.out:
        options.out.write_text(text)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dir", type=Path, default=Path("build/bench"), help="folder on the drive to test")
    add("--mparams", type=float, default=64, help="parameters, in millions; 1100 for a real model")
    add("--chunk-mparams", type=int, default=32, help="of a chunk, in 2**20")
    add("--format", default="exact")
    add("--tile-kib-elements", type=int, default=256, help="elements of a tile, in 1024")
    add("--rounds", type=int, default=3)
    add("--fio-mib", type=int, default=2048, help="what fio moves before and after a pass")
    add("--out", type=Path, help="write the result as Markdown too")
    options = parser.parse_args()
    options.dir = options.dir.expanduser().absolute()
    return options


def run(
    scratch: Path, options: argparse.Namespace, memory: str, passes: dict[str, list[Pass]]
) -> FioPoint:
    """Make the models, find fio's best point, and take the rounds."""
    models = {}
    for name, checksum_nbytes in CASES.items():
        models[name] = Model(scratch / name.replace(" ", "-"), options, checksum_nbytes)
    file = scratch / "fio.bin"
    with file.open("wb") as bytes_of_fio:
        os.posix_fallocate(bytes_of_fio.fileno(), 0, options.fio_mib * MIB)
    run_fio(file, "write", options.fio_mib * MIB, FioPoint(block_nbytes=MIB, depth=32), memory)

    def fio(point: FioPoint) -> float:
        row = run_fio(file, "mix", options.fio_mib * MIB, point, memory)
        return float(row["nbytes"]) / float(row["seconds"])

    points = [FioPoint(block_nbytes=kib * 1024, depth=depth) for kib, depth in FIO_POINTS]
    best = max(points, key=fio)
    for index in range(options.rounds):
        names = list(CASES)
        before = fio(best)
        for name in names[index % 2 :] + names[: index % 2]:
            seconds, kernel_seconds, moved = models[name].update()
            after = fio(best)
            passes[name].append(Pass(seconds, kernel_seconds, moved, (before + after) / 2))
            line = f"round {index + 1}: {name}: {moved / seconds / GB:.2f} GB/s, fio"
            print(f"{line} {before / GB:.2f}, {after / GB:.2f}", file=sys.stderr)
            before = after
    for model in models.values():
        model.close()
    return best


def render(
    passes: dict[str, list[Pass]], facts: dict[str, str], options: argparse.Namespace
) -> str:
    """Return the whole result file."""
    rows = [
        [
            name,
            spread([p.seconds for p in taken]),
            spread([p.nbytes / p.seconds / GB for p in taken]),
            spread([p.fio_speed / GB for p in taken]),
            spread([p.ratio for p in taken]),
            f"{statistics.median(p.kernel_seconds for p in taken):.2f}",
        ]
        for name, taken in passes.items()
    ]
    tile_numel = options.tile_kib_elements * 1024
    return "\n".join(
        [
            f"# Streaming update of {options.mparams:g} M parameters, format {options.format}",
            "",
            "All state on the drive, gradients in memory. One pass reads, updates and writes it;",
            "fio moves bytes both ways before and after each pass. Seconds, GB/s and ratios are",
            f"medians (lowest-highest) of {options.rounds} rounds. Tile buffers: {NUM_TILES} of",
            f"{tile_numel} "
            f"elements, {tile_buffer_nbytes(tile_numel) / MIB:.0f} MiB.",
            "",
            table(["fact", "value"], [[key, value] for key, value in facts.items()]),
            "",
            table(
                ["checksums", "s", "GB/s", "fio mix GB/s", "pace: limit / time", "kernels s"],
                rows,
            ),
            "",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
