"""What the tests of the update worker share: chunks in memory and in files, and their twins."""

import contextlib
import dataclasses
import itertools
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import twins
from twins import AdamWOp

from offload import _native

PLANES = twins.PLANE_NAMES
STATE = PLANES[:6]
FORMAT_NAMES = tuple(twins.DTYPES)
FP32, EXACT, BF16, INT8 = range(4)
TILE_MULTIPLE = (4096, 4096, 4096, 65536)  # by format
PAGE = 4096

Segments = list[tuple[int, int, int]]
CheckedSegments = list[tuple[int, int, int, int]]


def pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory on a page boundary, as direct I/O wants it."""
    return np.frombuffer(mmap.mmap(-1, -(-nbytes // PAGE) * PAGE), np.uint8)[:nbytes]


def aligned_copy(array: npt.NDArray) -> npt.NDArray:
    copy = pages(array.nbytes).view(array.dtype)
    copy[:] = array
    return copy


@contextlib.contextmanager
def pipeline(
    backend: str,
    *,
    num_tiles: int = 3,
    tile_numel: int = 4096,
    isa: str = "auto",
    checksum_nbytes: int = 0,
) -> Iterator["_native.UpdatePipeline"]:
    queue = _native.IoQueue(backend, 8, 64 << 10, 4)
    try:
        with pipeline_on(queue, num_tiles, tile_numel, isa, checksum_nbytes) as worker:
            yield worker
    finally:
        queue.close()


@contextlib.contextmanager
def pipeline_on(
    queue: "_native.IoQueue",
    num_tiles: int = 3,
    tile_numel: int = 4096,
    isa: str = "auto",
    checksum_nbytes: int = 0,
) -> Iterator["_native.UpdatePipeline"]:
    nbytes = _native.update_buffer_nbytes(num_tiles, tile_numel)
    buffer = pages(nbytes)
    buffer[:] = 0xFF
    worker = _native.UpdatePipeline(
        queue, num_tiles, tile_numel, buffer.ctypes.data, nbytes, isa, checksum_nbytes
    )
    try:
        yield worker
    finally:
        worker.close()


def wait_for(worker: "_native.UpdatePipeline", count: int) -> list[tuple]:
    """The completions of `count` jobs by tag; fails when there are more or they take too long."""
    rows: list[tuple] = []
    deadline = time.monotonic() + 60
    while len(rows) < count and time.monotonic() < deadline:
        rows += worker.wait(1.0)
    assert len(rows) == count
    assert worker.wait(0.01) == []
    return sorted(rows)


class Disk:
    """Files opened for direct I/O, and extents of them handed out one after the other."""

    def __init__(self, folder: Path, num_files: int, piece_unit: int = PAGE) -> None:
        self.piece_unit = piece_unit  # every piece but a plane's last is a multiple of it
        self.fds = [
            os.open(folder / f"swap{i}", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
            for i in range(num_files)
        ]
        self.ends = [0] * num_files

    def allocate(self, nbytes: int, rng: np.random.Generator) -> Segments:
        """Extents over all files in turn, of uneven lengths where there is more than one file."""
        segments: Segments = []
        for file in itertools.cycle(range(len(self.fds))):
            if nbytes == 0:
                return segments
            most = -(-nbytes // self.piece_unit)
            taken = nbytes
            if len(self.fds) > 1:
                taken = min(nbytes, self.piece_unit * int(rng.integers(1, most + 1)))
            segments.append((self.fds[file], self.ends[file], taken))
            self.ends[file] += taken + PAGE * int(rng.integers(0, 3))
            nbytes -= taken
        return segments

    def write(self, segments: Segments, array: npt.NDArray) -> None:
        data = aligned_copy(array.view(np.uint8))
        for fd, offset, nbytes in segments:
            assert os.pwrite(fd, data[:nbytes], offset) == nbytes
            data = data[nbytes:]

    def read(self, segments: Segments, dtype: npt.DTypeLike) -> npt.NDArray:
        data = pages(sum(nbytes for _, _, nbytes in segments))
        begin = 0
        for fd, offset, nbytes in segments:
            assert os.preadv(fd, [data[begin : begin + nbytes]], offset) == nbytes
            begin += nbytes
        return data.view(dtype)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Tables:
    """The checksums of every piece that was attached, by where the piece begins."""

    def __init__(self, disk: Disk, checksum_nbytes: int) -> None:
        self.disk, self.checksum_nbytes = disk, checksum_nbytes
        self.arrays: dict[tuple[int, int, int], npt.NDArray[np.uint32]] = {}

    def attach(self, segments: Segments | None) -> CheckedSegments | None:
        """The segments with their checksums; pieces not seen before get those of the file."""
        if segments is None:
            return None
        for piece in segments:
            if piece not in self.arrays:
                self.arrays[piece] = self.of_file(piece)
        return [(*piece, self.arrays[piece].ctypes.data) for piece in segments]

    def of_file(self, piece: tuple[int, int, int]) -> npt.NDArray[np.uint32]:
        data = self.disk.read([piece], np.uint8)
        sums = np.zeros(-(-data.size // self.checksum_nbytes), np.uint32)
        _native.crc32c_blocks(data.ctypes.data, data.size, self.checksum_nbytes, sums.ctypes.data)
        return sums

    def wrong(self) -> list[tuple[int, int]]:
        """(fd, offset) of every block that is not what its checksum says."""
        return [
            (piece[0], piece[1] + int(block) * self.checksum_nbytes)
            for piece, sums in self.arrays.items()
            for block in np.nonzero(sums != self.of_file(piece))[0]
        ]


@dataclasses.dataclass
class Home:
    """Where one plane is: in memory, in extents, or both; writes may go to other extents."""

    memory: npt.NDArray | None
    read: Segments | None
    write: Segments | None
    tables: Tables | None = None

    @property
    def argument(self) -> tuple:
        address = 0 if self.memory is None else self.memory.ctypes.data
        if self.tables is None:
            return (address, self.read, self.write)
        return (address, self.tables.attach(self.read), self.tables.attach(self.write))


# How a plane can be placed. The last one reads into memory and writes elsewhere.
PLACES = ("ram", "file", "slot", "slot from file", "slot to file", "file to file")


class Chunk:
    """Random planes, where they are for the worker, and what the twins expect of them."""

    def __init__(self, fmt: int, numel: int, rng: np.random.Generator, *, with_low: bool = True):
        self.fmt, self.numel = fmt, numel
        self.dtypes = dict(twins.DTYPES[FORMAT_NAMES[fmt]])
        if not with_low:
            self.dtypes.pop("grad_lo", None)
        self.expected = random_planes(FORMAT_NAMES[fmt], numel, rng)
        if not with_low:
            self.expected.pop("grad_lo", None)
        self.homes: dict[str, Home] = {}

    def place(self, name: str, place: str, disk: Disk | None, rng: np.random.Generator) -> None:
        """Put the plane's current content where `place` says."""
        content = self.expected[name]
        is_state = name in STATE
        memory = read = write = None
        if place != "ram" and disk is not None:
            read = disk.allocate(content.nbytes, rng)
            disk.write(read, content)
            write = read
            if place in ("file to file", "slot to file"):
                write = disk.allocate(content.nbytes, rng)
                disk.write(write, content)
        if place == "ram":
            memory = aligned_copy(content)
        elif place.startswith("slot"):
            memory = pages(content.nbytes).view(content.dtype)
            memory.view(np.uint8)[:] = 0xEE
        if place == "slot from file" or not is_state:
            write = None
        if place == "slot to file":
            read = None
            memory[:] = content
        self.homes[name] = Home(memory, read, write)

    def place_all(self, place: str, disk: Disk | None, rng: np.random.Generator) -> None:
        for name in self.dtypes:
            self.place(name, place, disk, rng)

    def protect(self, tables: Tables) -> None:
        """Have checksums for all that lies in files."""
        for home in self.homes.values():
            home.tables = tables
            assert home.argument  # the checksums of what is there now

    def submit(self, worker: "_native.UpdatePipeline", tag: int, ops: list[AdamWOp]) -> None:
        """Submit the job, and let the twins do the same."""
        planes = tuple(self.homes[n].argument if n in self.homes else None for n in PLANES)
        worker.submit(tag, self.fmt, self.numel, planes, twins.pack_ops(ops))
        for op in ops:
            twins.update(FORMAT_NAMES[self.fmt], self.expected, op)

    def check(self, disk: Disk | None, touched: npt.NDArray[np.bool_] | None = None) -> None:
        """All that the worker should have written has the twins' bits, in memory and in files.

        `touched`: elements of tiles with an op; a slot that is only read into holds nothing else.
        """
        for name, home in self.homes.items():
            want = self.expected[name]
            if home.memory is not None:
                is_whole = touched is None or home.read is None or name == "weight"
                part = slice(None) if is_whole else items_in(name, touched)
                assert home.memory[part].tobytes() == want[part].tobytes(), f"{name} in memory"
            if home.write is not None:
                got = disk.read(home.write, want.dtype)
                assert got.tobytes() == want.tobytes(), f"{name} in its file"

    def nbytes(self, touched: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """Bytes that the job must read and write, given the elements of tiles with an op."""
        read = write = 0
        for name, home in self.homes.items():
            itemsize = np.dtype(self.dtypes[name]).itemsize
            is_fetch = name == "weight" and home.memory is not None
            num_touched = int(items_in(name, touched).sum())
            read += 0 if home.read is None else (self.numel if is_fetch else num_touched) * itemsize
            write += 0 if home.write is None else num_touched * itemsize
        return read, write


def random_planes(
    format: str, numel: int, rng: np.random.Generator, decades: tuple[float, float] = (-6, 1)
) -> twins.Planes:
    """Planes of a format around random values, of one magnitude each."""

    def values() -> twins.F32:
        return (rng.standard_normal(numel) * 10.0 ** rng.uniform(*decades)).astype(np.float32)

    planes = {
        name: np.zeros(twins.items_of(name, 0, numel).stop, dtype)
        for name, dtype in twins.DTYPES[format].items()
    }
    twins.store_master(format, planes, values())
    words = rng.integers(0, 2**32, numel, dtype=np.uint32)
    twins.store_exp_avg(format, planes, values(), words)
    twins.store_exp_avg_sq(format, planes, np.square(values()), words)
    if format == "fp32":
        planes["grad"][:] = values()
    else:
        planes["grad"][:], planes["grad_lo"][:] = twins.split_fp32(values())
    return planes


def items_in(name: str, touched: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which items of a plane belong to touched elements."""
    return touched[:: twins.GROUP] if "scale" in name else touched


def touched_by(ops: list[AdamWOp], numel: int, tile_numel: int) -> npt.NDArray[np.bool_]:
    """Which elements are in a tile that some op touches."""
    touched = np.zeros(numel, bool)
    for begin in range(0, numel, tile_numel):
        end = min(begin + tile_numel, numel)
        if any(op.begin < end and op.end > begin for op in ops):
            touched[begin:end] = True
    return touched


def random_ops(
    numel: int, rng: np.random.Generator, step: int = 1, multiple: int = 1
) -> list[AdamWOp]:
    """Ranges with holes between them, some on tile boundaries, each with its hyperparameters."""
    cuts = np.concatenate([rng.integers(0, numel + 1, 6), [4096, numel // 4096 * 4096]])
    cuts = np.unique(cuts // multiple * multiple)
    return [
        AdamWOp(
            begin=int(begin), end=int(end), step=step + i, lr=10.0 ** -(2 + i),
            weight_decay=0.1 * (i % 2), maximize=i == 1, grad_scale=[1.0, 0.3][i % 2], seed=i,
        )
        for i, (begin, end) in enumerate(itertools.pairwise(cuts))
        if i % 3 != 2
    ]  # fmt: skip


def run_one(
    backend: str, chunk: Chunk, ops: list[AdamWOp], disk: Disk | None, **options: int | str
) -> None:
    """Run one job and check every bit, every byte count and the completion."""
    tile_numel = int(options.get("tile_numel", 4096))
    touched = touched_by(ops, chunk.numel, tile_numel)
    with pipeline(backend, **options) as worker:
        chunk.submit(worker, 7, ops)
        (row,) = wait_for(worker, 1)
        tag, result, fd, offset, read, write, seconds, kernel_seconds, written = row
    assert (tag, result, fd, offset) == (7, 0, -1, 0)
    assert (read, write) == chunk.nbytes(touched)
    assert seconds > 0 and 0 <= kernel_seconds <= seconds
    assert sum(nbytes for _, nbytes in written) == write
    chunk.check(disk, touched)
