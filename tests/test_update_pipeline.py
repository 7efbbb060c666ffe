"""The native update worker against the numpy twins: the same bits wherever the planes are."""

import contextlib
import dataclasses
import errno
import itertools
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import twins
from twins import AdamWOp

from offload import _native

PLANES = ("weight", "residue", "exp_avg", "exp_avg_sq", "grad", "grad_lo")
STATE = PLANES[:4]
DTYPES = {
    0: dict(zip(PLANES, (np.float32, None, np.float32, np.float32, np.float32, None), strict=True)),
    1: dict(
        zip(PLANES, (np.uint16, np.uint16, np.float32, np.float32) + (np.uint16,) * 2, strict=True)
    ),
}
FP32, EXACT = 0, 1
PAGE = 4096
CLOSED_FD = 1 << 20  # beyond any limit on open files that a test runs under
BACKENDS = ["threads", "uring"]

Segments = list[tuple[int, int, int]]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "uring" and _native.uring_probe() != 0:
        pytest.skip("this kernel refuses io_uring")
    return str(request.param)


def pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory on a page boundary, as direct I/O wants it."""
    return np.frombuffer(mmap.mmap(-1, -(-nbytes // PAGE) * PAGE), np.uint8)[:nbytes]


def aligned_copy(array: npt.NDArray) -> npt.NDArray:
    copy = pages(array.nbytes).view(array.dtype)
    copy[:] = array
    return copy


@contextlib.contextmanager
def pipeline(
    backend: str, *, num_tiles: int = 3, tile_numel: int = 4096, isa: str = "auto"
) -> Iterator["_native.UpdatePipeline"]:
    nbytes = _native.update_buffer_nbytes(num_tiles, tile_numel)
    buffer = pages(nbytes)
    buffer[:] = 0xFF
    worker = _native.UpdatePipeline(
        backend, 8, 64 << 10, num_tiles, tile_numel, buffer.ctypes.data, nbytes, isa
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

    def __init__(self, folder: Path, num_files: int) -> None:
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
            most = nbytes // PAGE
            taken = nbytes if len(self.fds) == 1 else PAGE * int(rng.integers(1, most + 1))
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


@pytest.fixture
def disk(nvme_dir: Path) -> Iterator[Disk]:
    disk = Disk(nvme_dir, 1)
    yield disk
    disk.close()


@pytest.fixture
def disks(nvme_dir: Path) -> Iterator[Disk]:
    disk = Disk(nvme_dir, 2)
    yield disk
    disk.close()


@dataclasses.dataclass
class Home:
    """Where one plane is: in memory, in extents, or both; writes may go to other extents."""

    memory: npt.NDArray | None
    read: Segments | None
    write: Segments | None

    @property
    def argument(self) -> tuple[int, Segments | None, Segments | None]:
        return (0 if self.memory is None else self.memory.ctypes.data, self.read, self.write)


# How a plane can be placed. The last one reads into memory and writes elsewhere.
PLACES = ("ram", "file", "slot", "slot from file", "slot to file", "file to file")


class Chunk:
    """Random planes, where they are for the worker, and what the twins expect of them."""

    def __init__(self, fmt: int, numel: int, rng: np.random.Generator, *, with_low: bool = True):
        self.fmt, self.numel = fmt, numel
        self.dtypes = {name: dtype for name, dtype in DTYPES[fmt].items() if dtype is not None}
        if not with_low:
            self.dtypes.pop("grad_lo", None)
        self.expected = {name: self._random(name, rng) for name in self.dtypes}
        self.homes: dict[str, Home] = {}

    def _random(self, name: str, rng: np.random.Generator) -> npt.NDArray:
        values = (rng.standard_normal(self.numel) * 10.0 ** rng.uniform(-6, 1)).astype(np.float32)
        if name == "exp_avg_sq":
            values *= values
        if self.dtypes[name] == np.uint16:
            return twins.split_fp32(values)[name in ("residue", "grad_lo")]
        return values

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
            memory[:] = 0xEE
        if place == "slot from file" or not is_state:
            write = None
        if place == "slot to file":
            read = None
            memory[:] = content
        self.homes[name] = Home(memory, read, write)

    def place_all(self, place: str, disk: Disk | None, rng: np.random.Generator) -> None:
        for name in self.dtypes:
            self.place(name, place, disk, rng)

    def submit(self, worker: "_native.UpdatePipeline", tag: int, ops: list[AdamWOp]) -> None:
        """Submit the job, and let the twins do the same."""
        planes = tuple(self.homes[n].argument if n in self.homes else None for n in PLANES)
        worker.submit(tag, self.fmt, self.numel, planes, twins.pack_ops(ops))
        e = self.expected
        for op in ops:
            if self.fmt == FP32:
                twins.adamw_fp32(e["weight"], e["exp_avg"], e["exp_avg_sq"], e["grad"], op)
            else:
                twins.adamw_exact(
                    e["weight"], e["residue"], e["exp_avg"], e["exp_avg_sq"], e["grad"],
                    e.get("grad_lo"), op,
                )  # fmt: skip

    def check(self, disk: Disk | None, touched: npt.NDArray[np.bool_] | None = None) -> None:
        """All that the worker should have written has the twins' bits, in memory and in files.

        `touched`: elements of tiles with an op; a slot that is only read into holds nothing else.
        """
        for name, home in self.homes.items():
            want = self.expected[name]
            if home.memory is not None:
                is_whole = touched is None or home.read is None or name == "weight"
                part = slice(None) if is_whole else touched
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
            numel = self.numel if is_fetch else int(touched.sum())
            read += 0 if home.read is None else numel * itemsize
            write += 0 if home.write is None else int(touched.sum()) * itemsize
        return read, write


def touched_by(ops: list[AdamWOp], numel: int, tile_numel: int) -> npt.NDArray[np.bool_]:
    """Which elements are in a tile that some op touches."""
    touched = np.zeros(numel, bool)
    for begin in range(0, numel, tile_numel):
        end = min(begin + tile_numel, numel)
        if any(op.begin < end and op.end > begin for op in ops):
            touched[begin:end] = True
    return touched


def random_ops(numel: int, rng: np.random.Generator, step: int = 1) -> list[AdamWOp]:
    """Ranges with holes between them, some on tile boundaries, each with its hyperparameters."""
    cuts = np.unique(np.concatenate([rng.integers(0, numel + 1, 6), [4096, numel // 4096 * 4096]]))
    return [
        AdamWOp(
            begin=int(begin), end=int(end), step=step + i, lr=10.0 ** -(2 + i),
            weight_decay=0.1 * (i % 2), maximize=i == 1, grad_scale=[1.0, 0.3][i % 2],
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
        ((tag, result, fd, offset, read, write, seconds, kernel_seconds),) = wait_for(worker, 1)
    assert (tag, result, fd, offset) == (7, 0, -1, 0)
    assert (read, write) == chunk.nbytes(touched)
    assert seconds > 0 and 0 <= kernel_seconds <= seconds
    chunk.check(disk, touched)


pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("fmt", [FP32, EXACT], ids=["fp32", "exact"])
@pytest.mark.parametrize("place", PLACES)
def test_one_op_over_a_chunk(backend: str, fmt: int, place: str, disk: Disk):
    rng = np.random.default_rng(0)
    chunk = Chunk(fmt, 7 * 4096, rng)
    chunk.place_all(place, disk, rng)
    run_one(backend, chunk, [AdamWOp(end=chunk.numel)], disk)


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 4])
@pytest.mark.parametrize("tile_numel", [4096, 3 * 4096, 64 * 4096])
def test_tiles_of_any_size_and_number(backend: str, num_tiles: int, tile_numel: int, disks: Disk):
    rng = np.random.default_rng(num_tiles)
    chunk = Chunk(EXACT, 10 * 4096, rng)
    chunk.place_all("file", disks, rng)
    ops = random_ops(chunk.numel, rng)
    run_one(backend, chunk, ops, disks, num_tiles=num_tiles, tile_numel=tile_numel)


@pytest.mark.parametrize("seed", range(25))
def test_mixed_places_stripes_and_holes(backend: str, seed: int, disks: Disk):
    rng = np.random.default_rng(seed)
    numel = 4096 * int(rng.integers(1, 20))
    chunk = Chunk(int(rng.integers(0, 2)), numel, rng, with_low=bool(rng.integers(0, 2)))
    for name in chunk.dtypes:
        # A grad is never written, so the places that differ in their writes are one to it.
        places = PLACES if name in STATE else PLACES[:3]
        chunk.place(name, str(rng.choice(places)), disks, rng)
    options = {
        "num_tiles": int(rng.integers(1, 5)),
        "tile_numel": 4096 * int(rng.integers(1, 6)),
        "isa": str(rng.choice(_native.supported_isas())),
    }
    run_one(backend, chunk, random_ops(numel, rng), disks, **options)


def test_tiles_without_an_op_move_only_the_weight_that_is_fetched(backend: str, disk: Disk):
    rng = np.random.default_rng(1)
    chunk = Chunk(EXACT, 8 * 4096, rng)
    chunk.place_all("file", disk, rng)
    chunk.place("weight", "slot", disk, rng)
    ops = [AdamWOp(begin=4096, end=4097), AdamWOp(begin=5 * 4096 - 1, end=5 * 4096)]
    run_one(backend, chunk, ops, disk)
    assert chunk.nbytes(touched_by(ops, chunk.numel, 4096)) == (
        8 * 4096 * 2 + 2 * 4096 * (2 + 4 + 4 + 2 + 2),
        2 * 4096 * (2 + 2 + 4 + 4),
    )


def test_a_job_without_ops_is_a_fetch(backend: str, disk: Disk):
    rng = np.random.default_rng(2)
    chunk = Chunk(EXACT, 5 * 4096, rng)
    chunk.place("weight", "slot from file", disk, rng)
    run_one(backend, chunk, [], disk, num_tiles=2)


def test_a_job_with_nothing_to_do_completes(backend: str):
    rng = np.random.default_rng(3)
    chunk = Chunk(FP32, 400 * 4096, rng)
    chunk.place_all("ram", None, rng)
    run_one(backend, chunk, [], None, num_tiles=2)


def test_jobs_on_the_same_planes_run_in_order(backend: str, disk: Disk):
    rng = np.random.default_rng(4)
    chunk = Chunk(EXACT, 6 * 4096, rng)
    chunk.place_all("file", disk, rng)
    with pipeline(backend, num_tiles=4) as worker:
        for step in range(1, 13):
            chunk.submit(worker, step, [AdamWOp(end=chunk.numel, step=step)])
        rows = wait_for(worker, 12)
    assert [row[:2] for row in rows] == [(step, 0) for step in range(1, 13)]
    chunk.check(disk)


def test_jobs_that_share_memory_wait_for_each_other(backend: str, disk: Disk):
    """The worker notices that two jobs touch the same bytes: one's weight is the other's grad."""
    rng = np.random.default_rng(5)
    first, second = (Chunk(FP32, 3 * 4096, rng) for _ in range(2))
    first.place_all("file", disk, rng)
    first.place("weight", "slot", disk, rng)
    second.place_all("ram", None, rng)
    second.homes["grad"] = Home(first.homes["weight"].memory, None, None)
    with pipeline(backend) as worker:
        first.submit(worker, 1, [AdamWOp(end=first.numel)])
        second.expected["grad"] = first.expected["weight"]
        second.submit(worker, 2, [AdamWOp(end=second.numel)])
        wait_for(worker, 2)
    first.check(disk)
    second.check(disk)


def test_many_jobs_on_different_chunks(backend: str, disks: Disk):
    rng = np.random.default_rng(6)
    chunks = [Chunk(i % 2, 4096 * (1 + i % 5), rng) for i in range(20)]
    with pipeline(backend, num_tiles=3) as worker:
        for tag, chunk in enumerate(chunks):
            chunk.place_all(PLACES[tag % len(PLACES)], disks, rng)
            chunk.submit(worker, tag, [AdamWOp(end=chunk.numel, step=tag + 1)])
        rows = wait_for(worker, len(chunks))
    assert [row[:2] for row in rows] == [(tag, 0) for tag in range(len(chunks))]
    for chunk in chunks:
        chunk.check(disks)


# --- failures -----------------------------------------------------------------------------------


def closed_read(chunk: Chunk, disk: Disk) -> tuple[int, int]:
    chunk.homes["exp_avg"].read = [(CLOSED_FD, 0, chunk.numel * 4)]
    return CLOSED_FD, errno.EBADF


def closed_read_in_a_later_tile(chunk: Chunk, disk: Disk) -> tuple[int, int]:
    good = disk.allocate(5 * 4096 * 4, np.random.default_rng(0))
    disk.write(good, chunk.expected["exp_avg"][: 5 * 4096])
    rest = (chunk.numel - 5 * 4096) * 4
    chunk.homes["exp_avg"].read = [*good, (CLOSED_FD, 0, rest)]
    return CLOSED_FD, errno.EBADF


def closed_write(chunk: Chunk, disk: Disk) -> tuple[int, int]:
    chunk.homes["weight"].write = [(CLOSED_FD, 0, chunk.expected["weight"].nbytes)]
    return CLOSED_FD, errno.EBADF


def read_beyond_the_end(chunk: Chunk, disk: Disk) -> tuple[int, int]:
    chunk.homes["grad"].read = [(disk.fds[0], 1 << 40, chunk.expected["grad"].nbytes)]
    return disk.fds[0], errno.ENODATA


FAULTS = [closed_read, closed_read_in_a_later_tile, closed_write, read_beyond_the_end]


@pytest.mark.parametrize("num_tiles", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_ends_its_job_once_and_no_other(
    backend: str, fault: Callable[[Chunk, Disk], tuple[int, int]], num_tiles: int, disk: Disk
):
    rng = np.random.default_rng(7)
    before, broken, after = (Chunk(EXACT, 12 * 4096, rng) for _ in range(3))
    for chunk in (before, broken, after):
        chunk.place_all("file", disk, rng)
    bad_fd, code = fault(broken, disk)
    with pipeline(backend, num_tiles=num_tiles) as worker:
        for tag, chunk in enumerate((before, broken, after)):
            chunk.submit(worker, tag, [AdamWOp(end=chunk.numel)])
        rows = wait_for(worker, 3)
        assert [row[1] for row in rows] == [0, -code, 0]
        assert rows[1][2] == bad_fd
        assert rows[1][3] >= (1 << 40 if fault is read_beyond_the_end else 0)
        read, write = broken.nbytes(np.ones(broken.numel, bool))
        assert rows[1][4] < read and rows[1][5] < write
        before.check(disk)
        after.submit(worker, 9, [AdamWOp(end=after.numel, step=2)])
        assert wait_for(worker, 1)[0][:2] == (9, 0)
        after.check(disk)


def test_a_file_closed_under_a_running_job(backend: str, nvme_dir: Path):
    rng = np.random.default_rng(8)
    disk = Disk(nvme_dir, 1)
    chunk = Chunk(EXACT, 400 * 4096, rng)
    chunk.place_all("file", disk, rng)
    with pipeline(backend) as worker:
        chunk.submit(worker, 1, [AdamWOp(end=chunk.numel)])
        disk.close()
        (row,) = wait_for(worker, 1)
    assert row[1] in (0, -errno.EBADF)  # 0: everything had started by then


# --- life cycle ---------------------------------------------------------------------------------


def test_close_finishes_what_was_submitted_and_refuses_more(backend: str, disk: Disk):
    rng = np.random.default_rng(9)
    chunks = [Chunk(EXACT, 20 * 4096, rng) for _ in range(3)]
    with pipeline(backend) as worker:
        for tag, chunk in enumerate(chunks):
            chunk.place_all("file", disk, rng)
            chunk.submit(worker, tag, [AdamWOp(end=chunk.numel)])
        worker.close()
        worker.close()
        assert [row[:2] for row in sorted(worker.poll())] == [(0, 0), (1, 0), (2, 0)]
        assert worker.wait(10.0) == []
        with pytest.raises(RuntimeError, match="closed"):
            chunks[0].submit(worker, 3, [])
    for chunk in chunks:
        chunk.check(disk)


def test_wait_times_out_and_dropping_without_close_joins(backend: str):
    buffer = pages(_native.update_buffer_nbytes(2, 4096))
    worker = _native.UpdatePipeline(
        backend, 8, 1 << 20, 2, 4096, buffer.ctypes.data, buffer.nbytes, "auto"
    )
    begin = time.monotonic()
    assert worker.wait(0.05) == []
    assert time.monotonic() - begin >= 0.04
    assert worker.poll() == []
    del worker


def test_buffer_holds_every_plane_of_a_tile():
    assert _native.update_buffer_nbytes(3, 8192) == 3 * 8192 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "aio"}, "backend"),
        ({"depth": 0}, "depth"),
        ({"block_nbytes": 5000}, "block_nbytes"),
        ({"num_tiles": 0}, "num_tiles"),
        ({"tile_numel": 4095}, "tile_numel"),
        ({"buffer_address": 4097}, "buffer_address"),
        ({"buffer_nbytes": 100}, "smaller"),
        ({"isa": "sse"}, "isa"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, int | str], message: str):
    settings = {
        "backend": "threads", "depth": 8, "block_nbytes": 1 << 20, "num_tiles": 2,
        "tile_numel": 4096, "buffer_address": 4096, "buffer_nbytes": 1 << 20, "isa": "auto",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _native.UpdatePipeline(**{**settings, **change})


RAM = (4096, None, None)
FILE = (0, [(0, 0, 4 * 4096)], [(0, 0, 4 * 4096)])


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        ((None, None, RAM, RAM, RAM, None), "weight is missing"),
        ((RAM, RAM, RAM, RAM, RAM, None), "residue is not part"),
        (((0, None, None), None, RAM, RAM, RAM, None), "weight needs an address"),
        (((0, FILE[1], None), None, RAM, RAM, RAM, None), "would be lost"),
        ((RAM, None, RAM, RAM, FILE, None), "grad is never written"),
        ((RAM, None, (0, [(0, 0, 4096)], FILE[2]), RAM, RAM, None), "do not add up"),
        ((RAM, None, RAM, RAM, RAM), "planes must be"),
    ],
)
def test_impossible_jobs_are_refused(planes: tuple, message: str):
    with pipeline("threads") as worker:
        with pytest.raises(ValueError, match=message):
            worker.submit(1, FP32, 4096, planes, AdamWOp(end=4096).pack())
        with pytest.raises(ValueError, match="numel"):
            worker.submit(1, FP32, 4095, (RAM, None, RAM, RAM, RAM, None), b"")
        with pytest.raises(ValueError, match="format"):
            worker.submit(1, 2, 4096, (RAM, None, RAM, RAM, RAM, None), b"")
        assert worker.wait(0.01) == []
