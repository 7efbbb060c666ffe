"""Planes striped over drives of different speed: every drive moves its share, and every byte of it
comes back. How fast that is, bench/striping.py says.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from loop_drives import LoopDrive, Unavailable, loop_drives, throttled
from parity import bits

from offload import extents, io
from offload.io import IoQueue, choose_backend
from offload.slots import Slab
from offload.store import ALIGN_NBYTES

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("nothing_left")]
MIB = 1 << 20
RATES = (50 * MIB, 100 * MIB, 150 * MIB, 200 * MIB)
PLANE_NBYTES = 10 * MIB + ALIGN_NBYTES
METADATA_NBYTES = 128 << 10  # what ext4 may move beside the data
Pieces = list[tuple[int, int]]
LAYOUTS: dict[str, Callable[[list[int]], Pieces]] = {
    "shares": lambda rates: list(enumerate(extents.shares(PLANE_NBYTES, rates, ALIGN_NBYTES))),
    "stripes": lambda rates: extents.stripes(PLANE_NBYTES, rates, ALIGN_NBYTES, 2 * MIB),
}


@pytest.fixture(scope="module")
def drives() -> Iterator[list[LoopDrive]]:
    folder = Path("/dev/shm") / f"offload-drives-{os.getpid()}"
    folder.mkdir()
    try:
        with loop_drives(folder, len(RATES), 64 * MIB) as made, throttled(made, RATES):
            yield made
    except Unavailable as missing:
        pytest.skip(str(missing))
    finally:
        folder.rmdir()


@contextlib.contextmanager
def made_files(drives: Sequence[LoopDrive], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Files whose blocks have been written, so that later writes change no metadata of extents."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT
    fds = [os.open(drive.folder / "planes", flags, 0o600) for drive in drives]
    try:
        for fd, nbytes in zip(fds, sizes, strict=True):
            with mmap.mmap(-1, nbytes) as zeros:
                os.pwrite(fd, zeros, 0)
            os.fsync(fd)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def segments_of(pieces: Pieces, fds: list[int], address: int) -> list[io.Segment]:
    """Pieces follow each other in the buffer, and in each drive's file."""
    rows, ends = [], [0] * len(fds)
    for place, nbytes in pieces:
        if nbytes:
            rows.append((fds[place], ends[place], address, nbytes))
        ends[place] += nbytes
        address += nbytes
    return rows


def move(queue: IoQueue, op: int, segments: list[io.Segment]) -> None:
    queue.submit(op, 1, segments)
    done = queue.wait(60.0)
    assert [row.result for row in done] == [sum(row[3] for row in segments)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_paths", [1, 2, 4])
def test_drives_move_their_shares(drives: list[LoopDrive], num_paths: int, layout: str) -> None:
    used = drives[:num_paths]
    pieces = LAYOUTS[layout](list(RATES[:num_paths]))
    shares = extents.shares(PLANE_NBYTES, RATES[:num_paths], ALIGN_NBYTES)
    slab = Slab(2 * PLANE_NBYTES)
    content = slab.carve("content", PLANE_NBYTES).tensor
    back = slab.carve("back", PLANE_NBYTES).tensor
    content.random_(generator=torch.Generator().manual_seed(num_paths))
    queue = IoQueue(choose_backend("auto")[0])
    with made_files(used, shares) as fds:
        start = [drive.moved_nbytes() for drive in drives]
        move(queue, io.WRITE, segments_of(pieces, fds, content.data_ptr()))
        written = [drive.moved_nbytes() for drive in drives]
        move(queue, io.READ, segments_of(pieces, fds, back.data_ptr()))
        read = [drive.moved_nbytes() for drive in drives]
        queue.close()
    assert bits(back) == bits(content)
    for index in range(len(drives)):
        share = shares[index] if index < num_paths else 0
        own = written[index][1] - start[index][1], read[index][0] - written[index][0]
        assert all(share <= nbytes <= share + METADATA_NBYTES for nbytes in own)
    expected = [b""] * num_paths
    for (place, _), part in zip(pieces, content.split([n for _, n in pieces]), strict=True):
        expected[place] += part.numpy().tobytes()
    assert [(drive.folder / "planes").read_bytes() for drive in used] == expected
    slab.close()
