"""The native update worker against the numpy twins: the same bits wherever the planes are."""

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from twins import AdamWOp, LionOp, Op, SGDOp
from update_rig import (
    EXACT,
    FORMAT_NAMES,
    FP32,
    INT8,
    PLACES,
    STATE,
    TILE_MULTIPLE,
    Chunk,
    Disk,
    Home,
    pages,
    pipeline,
    pipeline_on,
    random_ops,
    run_one,
    touched_by,
    wait_for,
)  # fmt: skip

from offload import _native

CLOSED_FD = 1 << 20  # beyond any limit on open files that a test runs under
BACKENDS = ["threads", "uring"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "uring" and _native.uring_probe() != 0:
        pytest.skip("this kernel refuses io_uring")
    return str(request.param)


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


pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("fmt", range(len(FORMAT_NAMES)), ids=FORMAT_NAMES)
@pytest.mark.parametrize("place", PLACES)
def test_one_op_over_a_chunk(backend: str, fmt: int, place: str, disk: Disk):
    rng = np.random.default_rng(0)
    tile_numel = TILE_MULTIPLE[fmt]
    chunk = Chunk(fmt, (7 if tile_numel == 4096 else 2) * tile_numel, rng)
    chunk.place_all(place, disk, rng)
    run_one(backend, chunk, [AdamWOp(end=chunk.numel, seed=3)], disk, tile_numel=tile_numel)


@pytest.mark.parametrize("op", [SGDOp(end=8192), LionOp(end=8192)], ids=["sgd", "lion"])
def test_rules_without_a_second_moment_need_no_plane_for_it(backend: str, op: Op, disk: Disk):
    rng = np.random.default_rng(1)
    chunk = Chunk(EXACT, 8192, rng)
    del chunk.dtypes["exp_avg_sq"], chunk.expected["exp_avg_sq"]
    chunk.place_all("file", disk, rng)
    run_one(backend, chunk, [op], disk)
    with pipeline(backend) as worker, pytest.raises(ValueError, match="exp_avg_sq is missing"):
        chunk.submit(worker, 1, [AdamWOp(end=8192)])


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
    fmt = int(rng.integers(0, len(FORMAT_NAMES)))
    multiple = TILE_MULTIPLE[fmt]
    numel = multiple * int(rng.integers(1, 20 if multiple == 4096 else 4))
    chunk = Chunk(fmt, numel, rng, with_low=bool(rng.integers(0, 2)))
    for name in chunk.dtypes:
        # A grad is never written, so the places that differ in their writes are one to it.
        places = PLACES if name in STATE else PLACES[:3]
        chunk.place(name, str(rng.choice(places)), disks, rng)
    options = {
        "num_tiles": int(rng.integers(1, 5)),
        "tile_numel": multiple * int(rng.integers(1, 6)),
        "isa": str(rng.choice(_native.supported_isas())),
    }
    ops = random_ops(numel, rng, multiple=32 if fmt == INT8 else 1)
    run_one(backend, chunk, ops, disks, **options)


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
    queue = _native.IoQueue(backend, 8, 1 << 20, 4)
    worker = _native.UpdatePipeline(queue, 2, 4096, buffer.ctypes.data, buffer.nbytes, "auto")
    del queue  # the pipeline keeps it
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
        ({"num_tiles": 0}, "num_tiles"),
        ({"tile_numel": 4095}, "tile_numel"),
        ({"buffer_address": 4097}, "buffer_address"),
        ({"buffer_nbytes": 100}, "smaller"),
        ({"isa": "sse"}, "isa"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, int | str], message: str):
    settings = {
        "queue": _native.IoQueue("threads", 8, 1 << 20, 1), "num_tiles": 2, "tile_numel": 4096,
        "buffer_address": 4096, "buffer_nbytes": 1 << 20, "isa": "auto",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _native.UpdatePipeline(**{**settings, **change})


@pytest.mark.parametrize("queue", [None, "threads", 7, object()])
def test_only_a_queue_is_taken_for_one(queue: object):
    with pytest.raises(TypeError, match="IoQueue"):
        _native.UpdatePipeline(queue, 2, 4096, 4096, 1 << 20, "auto")


def test_a_read_that_compute_waits_for_overtakes_an_update(disk: Disk):
    """One thread moves block after block, each late; the tile's transfer has 224 of them."""
    queue = _native.IoQueue("faults", 1, 4096, 1)
    rng = np.random.default_rng(3)
    chunk, page = Chunk(EXACT, 1 << 16, rng), pages(4096)
    chunk.place_all("file", disk, rng)
    place = disk.allocate(4096, rng)[0]
    disk.write([place], page)
    _native.set_fault_plan([("latency", 0, 1.0)], 1, 0.002)
    try:
        with pipeline_on(queue, 1, 1 << 16) as worker:
            chunk.submit(worker, 1, [AdamWOp(end=chunk.numel)])
            while (before := moved_nbytes(queue)) < 2 * 4096:
                continue
            segment = (*place[:2], page.ctypes.data, 4096)
            queue.submit(_native.OP_READ, 9, _native.PRIORITY_DEMAND, [segment])
            assert [row[:2] for row in queue.wait(60.0)] == [(9, 4096)]
            assert moved_nbytes(queue) - before <= 20 * 4096
            _native.clear_fault_plan()
            assert [row[:2] for row in wait_for(worker, 1)] == [(1, 0)]
    finally:
        _native.clear_fault_plan()
        queue.close()
    chunk.check(disk)


def moved_nbytes(queue: "_native.IoQueue") -> int:
    stats = queue.stats()
    return stats["read_bytes"] + stats["write_bytes"]


def test_a_closed_queue_ends_the_jobs_that_need_it(disk: Disk):
    queue = _native.IoQueue("threads", 8, 64 << 10, 1)
    rng = np.random.default_rng(4)
    chunk = Chunk(EXACT, 1 << 16, rng)
    chunk.place_all("file", disk, rng)
    with pipeline_on(queue) as worker:
        queue.close()
        chunk.submit(worker, 1, [AdamWOp(end=chunk.numel)])
        assert [row[:2] for row in wait_for(worker, 1)] == [(1, -errno.ECANCELED)]


RAM = (4096, None, None)
NO_SCALES = (None, None)
FILE = (0, [(0, 0, 4 * 4096)], [(0, 0, 4 * 4096)])


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        ((None, None, RAM, RAM, *NO_SCALES, RAM, None), "weight is missing"),
        ((RAM, RAM, RAM, RAM, *NO_SCALES, RAM, None), "residue is not part"),
        ((RAM, None, RAM, RAM, RAM, None, RAM, None), "exp_avg_scale is not part"),
        (((0, None, None), None, RAM, RAM, *NO_SCALES, RAM, None), "weight needs an address"),
        (((0, FILE[1], None), None, RAM, RAM, *NO_SCALES, RAM, None), "would be lost"),
        ((RAM, None, RAM, RAM, *NO_SCALES, FILE, None), "grad is never written"),
        ((RAM, None, (0, [(0, 0, 4096)], FILE[2]), RAM, *NO_SCALES, RAM, None), "do not add up"),
        ((RAM, None, RAM, RAM, RAM), "planes must be"),
    ],
)
def test_impossible_jobs_are_refused(planes: tuple, message: str):
    with pipeline("threads") as worker:
        with pytest.raises(ValueError, match=message):
            worker.submit(1, FP32, 4096, planes, AdamWOp(end=4096).pack())
        with pytest.raises(ValueError, match="numel"):
            worker.submit(1, FP32, 4095, (RAM, None, RAM, RAM, *NO_SCALES, RAM, None), b"")
        with pytest.raises(ValueError, match="multiples of 65536"):
            worker.submit(1, INT8, 65536, (None,) * 8, b"")  # the tiles are too small
        with pytest.raises(ValueError, match="format"):
            worker.submit(1, 4, 4096, (RAM, None, RAM, RAM, *NO_SCALES, RAM, None), b"")
        assert worker.wait(0.01) == []
