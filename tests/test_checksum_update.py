"""The update worker with checksums: the same bits, tables that match the files, and no step on a
block that is not what was written.
"""

import dataclasses
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from twins import AdamWOp
from update_rig import (
    EXACT,
    FP32,
    PAGE,
    PLACES,
    PLANES,
    STATE,
    Chunk,
    Disk,
    Segments,
    Tables,
    pipeline,
    random_ops,
    run_one,
    wait_for,
)  # fmt: skip

from offload import _native

pytestmark = pytest.mark.usefixtures("nothing_left")
U8 = npt.NDArray[np.uint8]


@pytest.fixture(params=["threads", "uring"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "uring" and _native.uring_probe() != 0:
        pytest.skip("this kernel refuses io_uring")
    return str(request.param)


@pytest.fixture
def make_disk(nvme_dir: Path) -> Iterator[Callable[..., Disk]]:
    disks: list[Disk] = []

    def make(checksum_nbytes: int, num_files: int = 2) -> Disk:
        disks.append(Disk(nvme_dir, num_files, checksum_nbytes))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


MakeDisk = Callable[..., Disk]
SIZES = [  # tile_numel, checksum_nbytes; the last two have tiles of several stretches
    (4096, 4096),
    (4096, 8192),
    (6 * 4096, 3 * 4096),
    (16 * 4096, 16384),
    (48 * 4096, 65536),
]


# --- nothing else changes -------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_many_steps_with_and_without_checksums(
    backend: str, seed: int, size: tuple[int, int], make_disk: MakeDisk
):
    """run_one compares every bit with the twins', so both runs have the same result."""
    tile_numel, checksum_nbytes = size
    for is_checked in (False, True):
        rng = np.random.default_rng(seed)
        disk = make_disk(checksum_nbytes)
        numel = 4096 * int(rng.integers(1, min(3 * tile_numel // 4096, 64) + 1))
        chunk = Chunk(seed % 2, numel, rng, with_low=bool(rng.integers(0, 2)))
        for name in chunk.dtypes:
            places = PLACES if name in STATE else PLACES[:3]
            chunk.place(name, str(rng.choice(places)), disk, rng)
        options = {"num_tiles": int(rng.integers(1, 5)), "tile_numel": tile_numel}
        tables = Tables(disk, checksum_nbytes)
        if is_checked:
            chunk.protect(tables)
            options["checksum_nbytes"] = checksum_nbytes
        for step in range(1, 4):
            run_one(backend, chunk, random_ops(numel, rng, step), disk, **options)
            assert tables.wrong() == []
            for name in set(STATE) & set(chunk.homes):  # what is read next is what came of this
                home = chunk.homes[name]
                if home.read and not home.write:
                    home.memory[:] = chunk.expected[name]
                home.read = home.write if home.read else None


def test_jobs_that_follow_each_other_hand_the_tables_on(backend: str, make_disk: MakeDisk):
    rng = np.random.default_rng(1)
    disk = make_disk(8192)
    chunk, tables = Chunk(EXACT, 10 * 4096, rng), Tables(disk, 8192)
    chunk.place_all("file", disk, rng)
    chunk.protect(tables)
    with pipeline(backend, num_tiles=4, tile_numel=2 * 4096, checksum_nbytes=8192) as worker:
        for step in range(1, 9):
            chunk.submit(worker, step, [AdamWOp(begin=100, end=chunk.numel - 100, step=step)])
        assert [row[:2] for row in wait_for(worker, 8)] == [(step, 0) for step in range(1, 9)]
    chunk.check(disk)
    assert tables.wrong() == []


# --- what is wrong is found -----------------------------------------------------------------------


@dataclasses.dataclass
class Block:
    """One checksum block of a plane in its file, and what was in the plane before."""

    disk: Disk
    piece: tuple[int, int, int]
    at: int  # in the piece
    nbytes: int
    old: U8  # the whole plane, of an earlier step
    plane_at: int

    @property
    def place(self) -> tuple[int, int]:
        return self.piece[0], self.piece[1] + self.at

    def segment(self, shift: int = 0) -> Segments:
        fd, offset = self.place
        return [(fd, offset + shift, self.nbytes)]

    def content(self) -> U8:
        return self.disk.read(self.segment(), np.uint8).copy()

    def put(self, content: U8) -> None:
        self.disk.write(self.segment(), content)

    def other(self) -> U8:
        return self.old[self.plane_at : self.plane_at + self.nbytes]


def flip_first(block: Block) -> None:
    content = block.content()
    content[0] ^= 0x80
    block.put(content)


def flip_last(block: Block) -> None:
    content = block.content()
    content[-1] ^= 0x01
    block.put(content)


def tear(block: Block) -> None:
    content = block.content()
    content[block.nbytes // 2 :] = block.other()[block.nbytes // 2 :]
    block.put(content)


def make_stale(block: Block) -> None:
    block.put(block.other())


def misdirect(block: Block) -> None:
    """The block of another place of the same plane lies here."""
    block.put(np.roll(block.old, 5 * PAGE)[block.plane_at :][: block.nbytes])


DAMAGES = [flip_first, flip_last, tear, make_stale, misdirect]


def blocks_of(disk: Disk, pieces: Segments, checksum_nbytes: int, old: U8) -> list[Block]:
    blocks, plane_at = [], 0
    for piece in pieces:
        for at in range(0, piece[2], checksum_nbytes):
            nbytes = min(checksum_nbytes, piece[2] - at)
            blocks.append(Block(disk, piece, at, nbytes, old, plane_at + at))
        plane_at += piece[2]
    return blocks


def files_of(chunk: Chunk, disk: Disk) -> dict[str, U8]:
    return {
        name: disk.read(home.write, np.uint8).copy()
        for name, home in chunk.homes.items()
        if home.write is not None
    }


@pytest.mark.parametrize(
    ("plane", "place"),
    [*((p, "file") for p in PLANES if not p.endswith("scale")), ("exp_avg", "file to file")],
)
def test_damage_to_any_plane_stops_the_job_before_the_tile_is_written(
    backend: str, plane: str, place: str, make_disk: MakeDisk
):
    tile_numel, checksum_nbytes, numel = 12 * 4096, 3 * 4096, 3 * 12 * 4096 - 4096
    rng = np.random.default_rng(2)
    disk = make_disk(checksum_nbytes)
    chunk, tables = Chunk(EXACT, numel, rng), Tables(disk, checksum_nbytes)
    chunk.place_all("file" if plane.startswith("grad") else place, disk, rng)
    chunk.protect(tables)
    old = Chunk(EXACT, numel, rng).expected[plane].view(np.uint8)
    blocks = blocks_of(disk, chunk.homes[plane].read, checksum_nbytes, old)
    itemsize = chunk.expected[plane].itemsize
    with pipeline(
        backend, num_tiles=1, tile_numel=tile_numel, checksum_nbytes=checksum_nbytes
    ) as worker:
        for i, damage in enumerate(DAMAGES):  # the first block, the last, and one of every tile
            block = blocks[i * (len(blocks) - 1) // (len(DAMAGES) - 1)]
            content, before = block.content(), files_of(chunk, disk)
            damage(block)
            damaged = files_of(chunk, disk)
            expected = {name: array.copy() for name, array in chunk.expected.items()}
            chunk.submit(worker, 1, [AdamWOp(end=numel)])
            ((_, result, fd, offset, *_),) = wait_for(worker, 1)
            assert (result, (fd, offset)) == (-errno.EBADMSG, block.place)
            assert tables.wrong() == [block.place]  # no entry has run ahead of its file
            # One tile at a time: those before the bad one are written, it and the others are not.
            tile_begin = block.plane_at // itemsize // tile_numel * tile_numel
            after = files_of(chunk, disk)
            for name, found in after.items():
                cut = tile_begin * chunk.expected[name].itemsize
                assert found[:cut].tobytes() == chunk.expected[name].tobytes()[:cut]
                assert found[cut:].tobytes() == damaged[name][cut:].tobytes()
            # Mend it all for the next one.
            chunk.expected = expected
            block.put(content)
            for name, data in before.items():
                disk.write(chunk.homes[name].write, data)
            tables.arrays.clear()
            chunk.protect(tables)


@pytest.mark.parametrize("num_tiles", [1, 3])
def test_damage_ends_its_job_once_and_no_other(backend: str, num_tiles: int, make_disk: MakeDisk):
    rng = np.random.default_rng(3)
    disk = make_disk(8192)
    tables = Tables(disk, 8192)
    before, broken, after = (Chunk(EXACT, 12 * 4096, rng) for _ in range(3))
    for chunk in (before, broken, after):
        chunk.place_all("file", disk, rng)
        chunk.protect(tables)
    block = blocks_of(disk, broken.homes["exp_avg"].read, 8192, np.zeros(0, np.uint8))[11]
    flip_last(block)
    with pipeline(backend, num_tiles=num_tiles, checksum_nbytes=8192) as worker:
        for tag, chunk in enumerate((before, broken, after)):
            chunk.submit(worker, tag, [AdamWOp(end=chunk.numel)])
        rows = wait_for(worker, 3)
    assert [row[1] for row in rows] == [0, -errno.EBADMSG, 0]
    assert rows[1][2:4] == block.place
    before.check(disk)
    after.check(disk)
    assert tables.wrong() == [block.place]  # whatever else was written of it is as it should be


def test_a_weight_that_is_only_fetched_is_verified(backend: str, make_disk: MakeDisk):
    rng = np.random.default_rng(4)
    disk = make_disk(8192)
    chunk, tables = Chunk(EXACT, 9 * 4096, rng), Tables(disk, 8192)
    chunk.place_all("file", disk, rng)
    chunk.place("weight", "slot", disk, rng)
    chunk.protect(tables)
    blocks = blocks_of(disk, chunk.homes["weight"].read, 8192, np.zeros(0, np.uint8))
    with pipeline(backend, num_tiles=2, checksum_nbytes=8192) as worker:
        for ops in ([], [AdamWOp(begin=4096, end=4097)]):
            for block in (blocks[0], blocks[-1]):
                content = block.content()
                flip_first(block)
                chunk.submit(worker, 1, ops)
                (row,) = wait_for(worker, 1)
                assert row[1:4] == (-errno.EBADMSG, *block.place)
                block.put(content)
                for name in ("weight", "residue", "exp_avg", "exp_avg_sq"):
                    dtype = chunk.expected[name].dtype
                    chunk.expected[name] = disk.read(chunk.homes[name].read, dtype).copy()
            chunk.submit(worker, 2, ops)
            assert wait_for(worker, 1)[0][1] == 0
            chunk.check(disk, np.arange(chunk.numel) // 4096 == 1)
    assert tables.wrong() == []


def test_what_no_op_needs_is_neither_read_nor_written(backend: str, make_disk: MakeDisk):
    rng = np.random.default_rng(5)
    disk = make_disk(8192)
    chunk, tables = Chunk(EXACT, 6 * 4096, rng), Tables(disk, 8192)
    chunk.place_all("file", disk, rng)
    chunk.protect(tables)
    block = blocks_of(disk, chunk.homes["weight"].read, 8192, np.zeros(0, np.uint8))[3]
    content = block.content()
    flip_first(block)
    with pipeline(backend, checksum_nbytes=8192) as worker:
        chunk.submit(worker, 1, [AdamWOp(end=3 * 4096), AdamWOp(begin=4 * 4096, end=5 * 4096)])
        assert wait_for(worker, 1)[0][1] == 0
    assert tables.wrong() == [block.place]
    block.put(content)
    chunk.check(disk)


# --- what cannot be right is refused --------------------------------------------------------------


@pytest.mark.parametrize(
    ("checksum_nbytes", "pieces", "message"),
    [
        (0, [(0, 0, 4 * 8192, 64)], "checksum_nbytes is 0"),
        (8192, [(0, 0, 4 * 8192, 65)], "4-byte"),
        (8192, [(0, 0, 4 * 8192, 64, 0)], "a plane's segment"),
        (3 * 4096, [(0, 0, 4 * 8192, 64)], "where checksum blocks do"),
        (8192, [(0, 0, 4096, 64), (0, 8192, 7 * 4096, 64)], "where checksum blocks do"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(
    checksum_nbytes: int, pieces: list[tuple[int, ...]], message: str
):
    ram = (4096, None, None)
    with pipeline("threads", checksum_nbytes=checksum_nbytes) as worker:
        for row in ((4096, pieces, None), (4096, None, pieces)):
            with pytest.raises(ValueError, match=message):
                worker.submit(1, FP32, 8192, (row, None, ram, ram, None, None, ram, None), b"")
        assert worker.wait(0.01) == []


@pytest.mark.parametrize("checksum_nbytes", [1, 4096 + 512, 1 << 31])
def test_impossible_checksum_nbytes_are_refused(checksum_nbytes: int):
    with (
        pytest.raises(ValueError, match="checksum_nbytes"),
        pipeline("threads", checksum_nbytes=checksum_nbytes),
    ):
        pass
