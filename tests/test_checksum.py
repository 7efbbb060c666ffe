"""Checksums: the same in every instruction set, and no read gives bytes that were not written."""

import errno
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import twins
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import _native, io
from offload._native import OP_READ, OP_WRITE, IoQueue
from offload.errors import StorageError

PAGE = 4096
BYTES = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
ISAS = _native.crc32c_isas()
KALLSYMS = Path("/proc/kallsyms")

U32 = npt.NDArray[np.uint32]
U8 = npt.NDArray[np.uint8]

pytestmark = pytest.mark.usefixtures("nothing_left")
needs_uring = pytest.mark.skipif(_native.uring_probe() != 0, reason="io_uring is refused here")


# --- CRC32C ---------------------------------------------------------------------------------------

# RFC 3720, B.4; the last is an iSCSI read command.
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (
        bytes.fromhex(
            "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018"
            "28000000 00000000 02000000 00000000"
        ),
        0xD9963A56,
    ),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


@pytest.mark.parametrize("isa", ["auto", *ISAS])
@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_known_values(data: bytes, expected: int, isa: str) -> None:
    array = np.frombuffer(data, np.uint8)
    assert twins.crc32c(data) == expected
    assert _native.crc32c(array.ctypes.data if data else 0, len(data), isa) == expected


@settings(deadline=None, max_examples=60)
@given(begin=st.integers(0, 100), nbytes=st.integers(0, 14_000))
def test_every_isa_agrees_with_the_slow_twin(begin: int, nbytes: int) -> None:
    expected = twins.crc32c(BYTES[begin : begin + nbytes].tobytes())
    found = {isa: _native.crc32c(BYTES.ctypes.data + begin, nbytes, isa) for isa in ISAS}
    assert found == dict.fromkeys(ISAS, expected)


@settings(deadline=None, max_examples=300)
@given(begin=st.integers(0, 100), nbytes=st.integers(0, BYTES.size - 100))
def test_every_isa_agrees_on_long_inputs(begin: int, nbytes: int) -> None:
    found = {_native.crc32c(BYTES.ctypes.data + begin, nbytes, isa) for isa in ISAS}
    assert len(found) == 1


def test_a_checksum_has_one_per_block_and_stays_inside() -> None:
    for nbytes in (0, 1, 999, 1000, 1001, 4096, 10_000):
        sums = np.full(12, 0xEEEEEEEE, np.uint32)
        io.crc32c_blocks(BYTES.ctypes.data, nbytes, 1000, sums.ctypes.data)
        blocks = [BYTES[at : min(at + 1000, nbytes)] for at in range(0, nbytes, 1000)]
        expected = [twins.crc32c(block.tobytes()) for block in blocks]
        assert sums.tolist() == expected + [0xEEEEEEEE] * (12 - len(expected))


def test_impossible_checksums_are_refused() -> None:
    with pytest.raises(ValueError, match="isa"):
        _native.crc32c(BYTES.ctypes.data, 1, "sse")
    with pytest.raises(ValueError, match="address 0"):
        _native.crc32c(0, 1)
    with pytest.raises(ValueError, match="block_nbytes"):
        _native.crc32c_blocks(BYTES.ctypes.data, 1, 0, BYTES.ctypes.data)
    with pytest.raises(ValueError, match="4-byte"):
        _native.crc32c_blocks(BYTES.ctypes.data, 1, 1, BYTES.ctypes.data + 1)
    with pytest.raises(ValueError, match="address 0"):
        _native.crc32c_blocks(BYTES.ctypes.data, 1, 1, 0)


# --- the queue ------------------------------------------------------------------------------------


def pages(nbytes: int) -> U8:
    return np.frombuffer(mmap.mmap(-1, -(-nbytes // PAGE) * PAGE), np.uint8)[:nbytes]


class Rig:
    """One queue, and one piece at an offset of a file with a buffer and a table of checksums."""

    offset = 3 * PAGE  # not a multiple of any checksum block

    def __init__(self, queue: IoQueue, fd: int, checksum_nbytes: int, nbytes: int) -> None:
        self.queue, self.fd, self.checksum_nbytes = queue, fd, checksum_nbytes
        self.source, self.target = pages(nbytes), pages(nbytes)
        self.source[:] = BYTES[:nbytes]
        self.table: U32 = np.zeros(-(-nbytes // checksum_nbytes), np.uint32)

    @property
    def nbytes(self) -> int:
        return self.source.size

    def submit(self, op: int, tag: int, segments: list[tuple[int, ...]]) -> None:
        self.queue.submit(op, tag, 0, segments)  # type: ignore[arg-type]

    def run(self, op: int, segments: list[tuple[int, ...]]) -> tuple[int, int, int]:
        self.submit(op, 1, segments)
        ((_, *row, _),) = self.queue.wait(60.0)
        return tuple(row)

    def segment(self, op: int, begin: int = 0, end: int | None = None) -> tuple[int, ...]:
        """The blocks [begin, end) of the piece."""
        start = begin * self.checksum_nbytes
        stop = self.nbytes if end is None else min(end * self.checksum_nbytes, self.nbytes)
        memory = self.source if op == OP_WRITE else self.target
        table = self.table.ctypes.data + 4 * begin
        return (self.fd, self.offset + start, memory.ctypes.data + start, stop - start, table)

    def write(self) -> None:
        assert self.run(OP_WRITE, [self.segment(OP_WRITE)]) == (self.nbytes, -1, 0)

    def read(self) -> tuple[int, int, int]:
        self.target[:] = 0
        return self.run(OP_READ, [self.segment(OP_READ)])

    def bad(self, block: int) -> tuple[int, int, int]:
        return (-errno.EBADMSG, self.fd, self.offset + block * self.checksum_nbytes)

    def expected_table(self) -> list[int]:
        step = self.checksum_nbytes
        return [
            _native.crc32c(self.source.ctypes.data + at, min(step, self.nbytes - at), "portable")
            for at in range(0, self.nbytes, step)
        ]

    def corrupt(self, at: int, data: bytes | U8) -> None:
        """Change the file behind the queue's back."""
        raw = bytes(data)
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR)
        try:
            assert os.pwrite(fd, raw, self.offset + at) == len(raw)
        finally:
            os.close(fd)

    def block(self, index: int) -> U8:
        return self.source[index * self.checksum_nbytes :][: self.checksum_nbytes]


MakeRig = Callable[..., Rig]
SHAPES = {  # block_nbytes, checksum_nbytes, depth
    "larger blocks": (1 << 16, 1 << 14, 4),
    "equal": (1 << 14, 1 << 14, 4),
    "smaller blocks": (PAGE, 1 << 14, 4),
    "odd": (7 * PAGE, 3 * PAGE, 4),
    "depth 1": (1 << 15, 1 << 14, 1),
}


@pytest.fixture(params=[pytest.param("uring", marks=needs_uring), "threads"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_rig(backend: str, tmp_path: Path) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(shape: str = "larger blocks", *, tail: int = PAGE, num_blocks: int = 9) -> Rig:
        block_nbytes, checksum_nbytes, depth = SHAPES[shape]
        direct = os.O_DIRECT if tail % PAGE == 0 else 0
        fd = os.open(tmp_path / f"swap{len(rigs)}", os.O_RDWR | os.O_CREAT | direct, 0o600)
        queue = IoQueue(backend, depth, block_nbytes, min(depth, 2), checksum_nbytes)
        rigs.append(Rig(queue, fd, checksum_nbytes, num_blocks * checksum_nbytes + tail))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.queue.close()
        os.close(rig.fd)


@pytest.mark.parametrize("tail", [0, PAGE, 77], ids=["whole", "short last", "odd last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_fills_the_table(make_rig: MakeRig, shape: str, tail: int) -> None:
    rig = make_rig(shape, tail=tail)
    rig.write()
    assert rig.table.tolist() == rig.expected_table()
    assert rig.read() == (rig.nbytes, -1, 0)
    assert rig.target.tobytes() == rig.source.tobytes()


@pytest.mark.parametrize("tail", [PAGE, 77])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_flipped_bit_is_found_wherever_it_is(make_rig: MakeRig, shape: str, tail: int) -> None:
    rig = make_rig(shape, tail=tail)
    rig.write()
    for block in range(len(rig.table)):
        content = rig.block(block)
        for place in (0, content.size // 2, content.size - 1):
            at = block * rig.checksum_nbytes + place
            rig.corrupt(at, [int(content[place]) ^ (1 << (block % 8))])
            assert rig.read() == rig.bad(block)
            rig.corrupt(at, content[place : place + 1])
    assert rig.read() == (rig.nbytes, -1, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_torn_misdirected_and_stale_blocks_are_found(make_rig: MakeRig, shape: str) -> None:
    rig = make_rig(shape)
    step = rig.checksum_nbytes
    rig.write()
    old = rig.source.copy()
    rig.source[:] = BYTES[12345 : 12345 + rig.nbytes]
    rig.write()

    rig.corrupt(4 * step + step // 2, old[4 * step + step // 2 : 5 * step])  # half is old
    assert rig.read() == rig.bad(4)
    rig.corrupt(4 * step, old[4 * step : 5 * step])  # all of it is old
    assert rig.read() == rig.bad(4)
    rig.corrupt(4 * step, rig.block(4))
    assert rig.read() == (rig.nbytes, -1, 0)

    rig.corrupt(2 * step, rig.block(3))  # two blocks have changed places
    rig.corrupt(3 * step, rig.block(2))
    assert rig.read() in (rig.bad(2), rig.bad(3))
    rig.corrupt(2 * step, rig.block(2))
    assert rig.read() == rig.bad(3)


def test_a_write_that_ends_halfway_is_found(make_rig: MakeRig) -> None:
    rig = make_rig("depth 1", tail=77)
    rig.write()
    rig.source[:] = BYTES[1000 : 1000 + rig.nbytes]
    limit = rig.offset + 4 * rig.checksum_nbytes + 1234
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        row = rig.run(OP_WRITE, [rig.segment(OP_WRITE)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert row == (-errno.EFBIG, rig.fd, limit)
    assert rig.read() == rig.bad(4)


def test_blocks_in_the_middle_of_a_piece(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.write()
    rig.corrupt(0, b"wrong" if bytes(rig.source[:5]) != b"wrong" else b"bytes")
    assert rig.run(OP_READ, [rig.segment(OP_READ, 1, 6)])[0] == 5 * rig.checksum_nbytes
    assert rig.run(OP_READ, [rig.segment(OP_READ, 6)])[0] == 3 * rig.checksum_nbytes + PAGE
    assert rig.run(OP_READ, [rig.segment(OP_READ, 0, 1)]) == rig.bad(0)
    rig.table[:] = 0xEEEEEEEE
    rig.run(OP_WRITE, [rig.segment(OP_WRITE, 2, 5)])
    expected = [0xEEEEEEEE] * len(rig.table)
    expected[2:5] = rig.expected_table()[2:5]
    assert rig.table.tolist() == expected


def test_a_transfer_of_many_segments_names_the_bad_one(make_rig: MakeRig) -> None:
    first, second = make_rig(), make_rig(num_blocks=5)
    rows = [(rig, op) for op in (OP_WRITE, OP_READ) for rig in (first, second)]
    segments = {op: [rig.segment(op) for rig, its in rows if its == op] for _, op in rows}
    total = first.nbytes + second.nbytes
    assert first.run(OP_WRITE, segments[OP_WRITE]) == (total, -1, 0)
    assert first.run(OP_READ, segments[OP_READ]) == (total, -1, 0)
    second.corrupt(3 * second.checksum_nbytes, ~second.block(3)[:1])
    assert first.run(OP_READ, segments[OP_READ]) == second.bad(3)
    assert first.run(OP_READ, segments[OP_READ][:1]) == (first.nbytes, -1, 0)
    unchecked = [segments[OP_READ][0], (*segments[OP_READ][1][:4], 0)]
    assert first.run(OP_READ, unchecked) == (total, -1, 0)
    assert first.run(OP_READ, [row[:4] for row in segments[OP_READ]]) == (total, -1, 0)


def test_a_bad_block_spares_the_other_transfers(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.write()
    rig.corrupt(5 * rig.checksum_nbytes + 9, ~rig.block(5)[9:10])
    for tag in range(9):
        rig.submit(OP_READ, tag, [rig.segment(OP_READ, tag, tag + 1)])
    results: dict[int, tuple[int, int, int]] = {}
    while len(results) < 9:
        results |= {tag: tuple(row) for tag, *row, _ in rig.queue.wait(60.0)}
    good = (rig.checksum_nbytes, -1, 0)
    assert results == {tag: rig.bad(5) if tag == 5 else good for tag in range(9)}


@pytest.mark.skipif(not os.access(KALLSYMS, os.R_OK), reason="no /proc/kallsyms")
def test_short_reads_are_verified_when_they_are_whole(backend: str) -> None:
    """The kernel gives this file out a page or less at a time, and it does not change."""
    nbytes = 40_000
    fd = os.open(KALLSYMS, os.O_RDONLY)
    queue = IoQueue(backend, 4, 1 << 16, 2, 1 << 14)
    try:
        content = b""
        while len(content) < nbytes:
            content += os.pread(fd, nbytes - len(content), len(content))
        blocks = [content[at : at + (1 << 14)] for at in range(0, nbytes, 1 << 14)]
        table = np.array([twins.crc32c(block) for block in blocks], np.uint32)
        target = pages(nbytes)
        segment = (fd, 0, target.ctypes.data, nbytes, table.ctypes.data)
        queue.submit(OP_READ, 1, 0, [segment])
        assert queue.wait(60.0)[0][1:4] == (nbytes, -1, 0)
        assert queue.stats()["num_short"] > 2
        assert target.tobytes() == content
        for block in range(len(table)):
            table[block] ^= 1
            queue.submit(OP_READ, 1, 0, [segment])
            assert queue.wait(60.0)[0][1:4] == (-errno.EBADMSG, fd, block << 14)
            table[block] ^= 1
    finally:
        queue.close()
        os.close(fd)


@pytest.mark.parametrize("checksum_nbytes", [-4096, 1, PAGE + 512, (1 << 30) + PAGE])
def test_impossible_checksum_nbytes_are_refused(checksum_nbytes: int) -> None:
    with pytest.raises(ValueError, match="checksum_nbytes"):
        IoQueue("threads", 4, PAGE, 1, checksum_nbytes)


def test_impossible_tables_are_refused(make_rig: MakeRig) -> None:
    rig = make_rig()
    *segment, table = rig.segment(OP_WRITE)
    with pytest.raises(ValueError, match="4-byte"):
        rig.run(OP_WRITE, [(*segment, table + 1)])
    with pytest.raises(ValueError, match="a segment is"):
        rig.run(OP_WRITE, [(*segment, table, 0, 0)])
    plain = io.IoQueue("threads")
    try:
        with pytest.raises(ValueError, match="checksum_nbytes is 0"):
            plain.submit(io.WRITE, 1, [rig.segment(OP_WRITE)])  # type: ignore[list-item]
    finally:
        plain.close()
    assert rig.queue.stats()["num_in_flight"] == 0


def test_the_error_says_what_it_means_and_what_to_do() -> None:
    error = StorageError(errno.EBADMSG, "reading", path="a/swap", offset=8192, chunk="layer.3")
    text = str(error)
    for part in ("a/swap", "8192", "layer.3", "EBADMSG", "other bytes than were written"):
        assert part in text
    assert "checkpoint" in text and "health" in text
    assert error.errno == errno.EBADMSG
