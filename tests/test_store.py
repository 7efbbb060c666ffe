"""The swap files: extents apart and striped, space taken at start, one run per folder."""

import fcntl
import math
import os
import signal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from leaks import open_files
from parity import bits

from offload import extents, io, store, swapfile
from offload.errors import BudgetError, StateError, StorageError
from offload.extents import Extent
from offload.slots import Slab
from offload.store import ChunkStore
from offload.swapfile import ALIGN_NBYTES, LOCK_NAME, SWAP_NAME

KIB = 1024


def make_paths(directory: Path, num: int) -> list[Path]:
    return [directory / f"drive{index}" for index in range(num)]


def files_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


# Shares


WEIGHTS = st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=1, max_size=6).filter(any)


@given(st.integers(0, 1 << 40), WEIGHTS, st.sampled_from([1, 512, ALIGN_NBYTES, 1 << 20]))
def test_shares_are_in_proportion(nbytes: int, weights: list[float], align: int) -> None:
    pieces = extents.shares(nbytes, weights, align)
    assert sum(pieces) == nbytes and len(pieces) == len(weights)
    total = sum(map(Fraction, weights))
    for piece, weight in zip(pieces, weights, strict=True):
        assert piece >= 0 and (weight > 0 or piece == 0)
        assert abs(piece - nbytes * Fraction(weight) / total) < align
    whole = [piece for piece in pieces if piece]
    assert all(piece % align == 0 for piece in whole[:-1])
    assert pieces == extents.shares(nbytes, [weight * 0.25 for weight in weights], align)


def test_shares_by_hand() -> None:
    assert extents.shares(10, [1, 1], 4) == [4, 6]
    assert extents.shares(100, [2, 0, 1, 0], 8) == [64, 0, 36, 0]
    assert extents.shares(3, [1, 1], 8) == [0, 3]
    assert extents.shares(0, [1, 2], 8) == [0, 0]


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [1.0, math.inf], [math.nan]])
def test_shares_need_a_sound_weight(weights: list[float]) -> None:
    with pytest.raises(StateError, match="weights"):
        extents.shares(4096, weights, 512)


@given(st.integers(0, 1 << 28), WEIGHTS, st.sampled_from([1 << 16, 1 << 20, (1 << 22) + 512]))
def test_stripes_take_turns(nbytes: int, weights: list[float], stripe_nbytes: int) -> None:
    """The pieces add up to the shares, and any window of them is in proportion, too."""
    pieces = extents.stripes(nbytes, weights, ALIGN_NBYTES, stripe_nbytes)
    sums = [sum(n for place, n in pieces if place == index) for index in range(len(weights))]
    assert sums == extents.shares(nbytes, weights, ALIGN_NBYTES)
    assert all(n % ALIGN_NBYTES == 0 for _, n in pieces[:-1])
    num_stripes = max(1, -(-nbytes // stripe_nbytes))
    for index, share in enumerate(sums):
        own = [n for place, n in pieces if place == index]
        assert all(abs(n - share / num_stripes) < ALIGN_NBYTES for n in own)
    if all(share >= num_stripes * ALIGN_NBYTES for share in sums):
        assert [place for place, _ in pieces] == list(range(len(weights))) * num_stripes


# Extents


@given(st.lists(st.integers(0, 300_000), max_size=12), st.integers(1, 4))
def test_extents_are_apart_aligned_and_even(sizes: list[int], num_paths: int) -> None:
    files = ChunkStore(make_paths(Path("drives"), num_paths))
    taken: list[list[tuple[int, int]]] = [[] for _ in range(num_paths)]
    for nbytes in sizes:
        extent = files.allocate(nbytes)
        assert extent.nbytes == nbytes
        shares = [0] * num_paths
        for index, offset, length in extent.pieces:
            assert length > 0 and offset % ALIGN_NBYTES == 0
            taken[index].append((offset, offset + length))
            shares[index] += length
        whole = [share for share in shares if share]
        assert max(shares) * num_paths < nbytes + num_paths * ALIGN_NBYTES
        assert all(share % ALIGN_NBYTES == 0 for share in whole[:-1])
    for spans in taken:
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert files.nbytes >= sum(sizes)
    ends = [max((end for _, end in spans), default=0) for spans in taken]
    assert sum(ends) <= files.nbytes < sum(ends) + num_paths * ALIGN_NBYTES


def move(queue: io.IoQueue, op: int, files: ChunkStore, extent: Extent, address: int) -> None:
    queue.submit(op, 1, files.io_segments(extent, address))
    done = queue.wait(10.0)
    assert [row.result for row in done] == [extent.nbytes]


def test_planes_come_back_from_three_drives(nvme_dir: Path) -> None:
    """Each plane reads back whole, whatever was written around it, from where its extent says."""
    paths, sizes = make_paths(nvme_dir, 3), [40 * KIB, 4 * KIB, 1000 * KIB, 12 * KIB]
    files = ChunkStore(paths)
    extents = [files.allocate(nbytes) for nbytes in sizes]
    files.open(None)
    queue, slab = io.IoQueue("threads"), Slab(2 << 20)
    buffer = slab.carve("buffer", 2 << 20).tensor
    contents = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes]
    for extent, content in zip(extents, contents, strict=True):
        buffer[: content.numel()].copy_(content)
        move(queue, io.WRITE, files, extent, buffer.data_ptr())
    for extent, content in reversed(list(zip(extents, contents, strict=True))):
        buffer.fill_(0xFF)
        move(queue, io.READ, files, extent, buffer.data_ptr())
        assert bits(buffer[: content.numel()]) == bits(content)
        assert bool((buffer[content.numel() :] == 0xFF).all())
    assert [len(extent.pieces) for extent in extents] == [3, 1, 3, 3]
    raw = b""
    for index, offset, nbytes in extents[2].pieces:
        raw += (paths[index] / SWAP_NAME).read_bytes()[offset : offset + nbytes]
    assert raw == contents[2].numpy().tobytes()
    queue.close()
    files.close()
    slab.close()


def test_segments_agree(nvme_dir: Path) -> None:
    """The update worker's view of an extent is the queue's, without addresses."""
    files = ChunkStore(make_paths(nvme_dir, 3))
    extent = files.allocate(100 * KIB)
    files.open(None)
    rows = files.io_segments(extent, 1 << 30)
    assert [(fd, offset, nbytes, sums) for fd, offset, _, nbytes, sums in rows] == files.segments(
        extent
    )
    starts = [address - (1 << 30) for _, _, address, *_ in rows]
    assert starts == [sum(row[3] for row in rows[:index]) for index in range(len(rows))]
    files.close()


# Opening and closing


def test_files_have_their_space_from_the_start(nvme_dir: Path) -> None:
    paths = make_paths(nvme_dir, 2)
    files = ChunkStore(paths)
    for nbytes in (3 << 20, 8 * KIB):
        files.allocate(nbytes)
    files.open(None)
    status = [(path / SWAP_NAME).stat() for path in paths]
    assert sum(row.st_size for row in status) == files.nbytes
    assert all(row.st_blocks * 512 >= row.st_size for row in status)
    files.close()
    files.close()
    assert files_of(nvme_dir) == []


def test_the_budget_is_exact(nvme_dir: Path) -> None:
    files = ChunkStore(make_paths(nvme_dir, 2))
    files.allocate(100 * KIB)
    with pytest.raises(BudgetError) as refused:
        files.open(files.nbytes - 1)
    assert f"to at least {files.nbytes}," in str(refused.value)
    assert files_of(nvme_dir) == []
    files.open(files.nbytes)
    files.close()


def test_a_store_without_extents_still_takes_its_folder(nvme_dir: Path) -> None:
    files, second = ChunkStore([nvme_dir]), ChunkStore([nvme_dir])
    files.open(None)
    with pytest.raises(StateError, match=f"pid {os.getpid()}"):
        second.open(None)
    files.close()
    second.open(None)
    second.close()


def hold_in_child(path: Path) -> int:
    """Fork a process that opens a store in `path` and waits to be killed; return its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            files = ChunkStore([path])
            files.allocate(1 << 20)
            files.open(None)
            os.write(writer, b"open")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    said = os.read(reader, 4)
    os.close(reader)
    assert said == b"open"
    return pid


def test_another_process_keeps_its_folder_until_it_dies(nvme_dir: Path) -> None:
    """The refusal names the holder and touches nothing; what a killed run left is taken over."""
    mine, theirs = make_paths(nvme_dir, 2)
    holder = hold_in_child(theirs)
    try:
        files = ChunkStore([mine, theirs])
        files.allocate(64 * KIB)
        with pytest.raises(StateError, match=rf"drive1 is in use .*pid {holder}\)"):
            files.open(None)
        assert files_of(mine) == [] and files_of(theirs) == [LOCK_NAME, SWAP_NAME]
        assert (theirs / SWAP_NAME).stat().st_size == 1 << 20
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert files_of(theirs) == [LOCK_NAME, SWAP_NAME]
    files.open(None)
    assert (theirs / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    assert (theirs / SWAP_NAME).stat().st_size == 32 * KIB
    files.close()
    assert files_of(nvme_dir) == []


def test_a_lock_file_that_its_holder_removes_is_no_lock(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and lock its last holder may have removed the file: lock the new one."""
    calls, flock = [], fcntl.flock

    def late_flock(fd: int, how: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            (nvme_dir / LOCK_NAME).unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late_flock)
    files = ChunkStore([nvme_dir])
    files.open(None)
    monkeypatch.undo()
    assert len(calls) == 2
    with pytest.raises(StateError, match="in use by another run"):
        ChunkStore([nvme_dir]).open(None)
    files.close()


# Failures


def test_a_missing_folder_is_made(nvme_dir: Path) -> None:
    path = nvme_dir / "a" / "b"
    files = ChunkStore([path])
    files.open(None)
    assert files_of(path) == [LOCK_NAME, SWAP_NAME]
    files.close()


@pytest.mark.parametrize("code", ["EROFS", "EACCES", "ENOSPC", "EIO"])
@pytest.mark.parametrize("call", ["open", "fallocate"])
def test_a_drive_that_refuses_is_named(
    call: str, code: str, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two drives fails: the error names it and a remedy; the first is left clean."""
    number = getattr(store.errno, code)
    good, bad = make_paths(nvme_dir, 2)
    owner = os if call == "open" else swapfile
    original = getattr(owner, call)

    def refuse(target: object, *args: int) -> object:
        name = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if str(bad) in name:
            raise OSError(number, os.strerror(number))
        return original(target, *args)

    files = ChunkStore([good, bad])
    files.allocate(64 * KIB)
    monkeypatch.setattr(owner, call, refuse)
    with pytest.raises(StorageError) as failed:
        files.open(None)
    monkeypatch.undo()
    assert failed.value.errno == number and str(bad) in failed.value.path
    head, _, remedy = str(failed.value).partition(os.strerror(number) + ". ")
    assert code in head and remedy.endswith(".")
    if code == "ENOSPC" and call == "fallocate":
        assert f"needs {32 * KIB} bytes there and " in str(failed.value)
    assert files_of(nvme_dir) == []
    files.open(None)
    files.close()


def test_a_file_system_that_cannot_preallocate_is_used_with_a_warning(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int, nbytes: int) -> None:
        raise OSError(store.errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(swapfile, "fallocate", refuse)
    files = ChunkStore([nvme_dir])
    files.allocate(1 << 20)
    files.open(None)
    assert (nvme_dir / SWAP_NAME).stat().st_size == 1 << 20
    assert "cannot preallocate" in caplog.text
    files.close()


def test_an_error_knows_its_file(nvme_dir: Path) -> None:
    files = ChunkStore(make_paths(nvme_dir, 2))
    extent = files.allocate(16 * KIB)
    files.open(None)
    fd = files.segments(extent)[1][0]
    error = files.error(5, "reading", fd, 8192, "layers.3")
    assert isinstance(error, StorageError)
    assert (error.errno, error.offset, error.chunk) == (5, 8192, "layers.3")
    assert error.path == str(nvme_dir / "drive1" / SWAP_NAME)
    assert files.error(5, "reading", -1, -1, "layers.3").path == "?"
    files.close()


def test_closing_goes_on_when_a_drive_is_gone(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be removed from the first drive: it is said, and all locks are given back."""
    gone, good = make_paths(nvme_dir, 2)
    files, held = ChunkStore([gone, good]), open_files()
    files.allocate(64 * KIB)
    files.open(None)
    original = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.parent == gone:
            raise OSError(store.errno.EIO, "gone")
        original(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    files.close()
    monkeypatch.undo()
    assert open_files() == held
    assert files_of(gone) == [LOCK_NAME, SWAP_NAME] and files_of(good) == []
    assert [str(gone) in line for line in caplog.messages] == [True, True]
    again = ChunkStore([gone, good])  # what stayed behind does not stand in the way
    again.open(None)
    again.close()
