"""The swap files of a run: one per NVMe path, preallocated, locked against a second run.

Planes are striped over all paths, so several drives need no RAID. A file is made whole before
training starts: a full disk is an error then, not later.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from offload import machine
from offload.errors import BudgetError, StateError, StorageError
from offload.slots import round_up

logger = logging.getLogger("offload")
ALIGN_NBYTES = 4096
SWAP_NAME = "offload.swap"
LOCK_NAME = "offload.lock"


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """Where one plane lies: pieces (file index, offset, nbytes) in plane order."""

    pieces: tuple[tuple[int, int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(piece[2] for piece in self.pieces)


class ChunkStore:
    """Owns the swap files. `allocate` plans extents; `open` makes the files real; `close` removes
    them.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._file_nbytes = [0] * len(paths)
        self._locks: list[int] = []
        self._fds: list[int] = []

    @property
    def nbytes(self) -> int:
        return sum(self._file_nbytes)

    def allocate(self, nbytes: int) -> Extent:
        """Book space for one plane, striped evenly over the files."""
        pieces: list[tuple[int, int, int]] = []
        share = round_up(-(-nbytes // len(self.paths)), ALIGN_NBYTES)
        left = nbytes
        for index in range(len(self.paths)):
            piece = min(share, left)
            if piece:
                pieces.append((index, self._file_nbytes[index], piece))
                self._file_nbytes[index] += round_up(piece, ALIGN_NBYTES)
                left -= piece
        return Extent(tuple(pieces))

    def open(self, budget_nbytes: int | None) -> None:
        """Lock the paths and preallocate the files.

        Raises BudgetError over budget, StateError where another run holds a path, StorageError for
        the rest.
        """
        if budget_nbytes is not None and self.nbytes > budget_nbytes:
            raise BudgetError(
                f"the swap files need {self.nbytes} bytes, tiers.nvme.budget allows "
                f"{budget_nbytes}. "
                f"Raise tiers.nvme.budget to at least {self.nbytes}, or raise tiers.cpu.budget."
            )
        try:
            for path in self.paths:
                self._locks.append(_lock(path))
            for path, nbytes in zip(self.paths, self._file_nbytes, strict=True):
                self._fds.append(_make_file(path / SWAP_NAME, max(nbytes, ALIGN_NBYTES)))
        except BaseException:
            self.close()
            raise

    def segments(self, extent: Extent) -> list[tuple[int, int, int]]:
        """(fd, offset, nbytes) of the extent's pieces, for the update worker."""
        return [(self._fds[index], offset, nbytes) for index, offset, nbytes in extent.pieces]

    def io_segments(self, extent: Extent, address: int) -> list[tuple[int, int, int, int]]:
        """(fd, offset, address, nbytes) of the extent's pieces against a buffer at `address`."""
        segments = []
        for index, offset, nbytes in extent.pieces:
            segments.append((self._fds[index], offset, address, nbytes))
            address += nbytes
        return segments

    def error(self, code: int, action: str, fd: int, offset: int, chunk: str) -> StorageError:
        """The StorageError for a failed completion."""
        path = self.paths[self._fds.index(fd)] / SWAP_NAME if fd in self._fds else "?"
        return StorageError(code, action, path=str(path), offset=offset, chunk=chunk)

    def close(self) -> None:
        """Remove the swap files and give the locks back. Idempotent."""
        for fd, path in zip(self._fds, self.paths, strict=False):
            os.close(fd)
            (path / SWAP_NAME).unlink(missing_ok=True)
        self._fds.clear()
        for lock, path in zip(self._locks, self.paths, strict=False):
            (path / LOCK_NAME).unlink(missing_ok=True)
            os.close(lock)
        self._locks.clear()


def _lock(path: Path) -> int:
    """Take the path's lock. It dies with the process: a stale one never stands in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            error.errno or errno.EIO, "making the run directory", path=str(path)
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StateError(
            f"{path} is in use by another run (pid {holder}). "
            "Wait for it to end, or name another folder in tiers.nvme.paths."
        ) from error
    if not _is_same_file(fd, path / LOCK_NAME):  # its last holder removed it meanwhile
        os.close(fd)
        return _lock(path)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _make_file(path: Path, nbytes: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    fd = -1
    try:
        fd = _open_direct(path, flags)
        _preallocate(fd, path, nbytes)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
            path.unlink(missing_ok=True)
        raise _creation_error(error, path, nbytes) from error
    return fd


def _open_direct(path: Path, flags: int) -> int:
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        logger.warning(
            "%s: this file system has no direct I/O; transfers go through the page cache, which "
            "costs "
            "memory outside the budget and CPU time for the copies", path,
        )  # fmt: skip
        return os.open(path, flags, 0o600)
    if machine.is_tmpfs(path.parent):
        logger.warning("%s lies on tmpfs: its bytes are RAM, outside tiers.cpu.budget", path)
    align = machine.dioalign(path)
    if align is not None and max(align) > ALIGN_NBYTES:
        os.close(fd)
        raise OSError(errno.EINVAL, f"needs {max(align)}-byte alignment")
    return fd


def _preallocate(fd: int, path: Path, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        logger.warning("%s: this file system cannot preallocate, so a full disk shows late", path)
        os.ftruncate(fd, nbytes)


def _creation_error(error: OSError, path: Path, nbytes: int) -> StorageError:
    code = error.errno or errno.EIO
    if code == errno.ENOSPC:
        free = machine.free_nbytes(path.parent)
        remedy = (
            f"The run needs {nbytes} bytes there and {free} are free. Free space, name more or "
            "other "
            "paths in tiers.nvme.paths, or raise tiers.cpu.budget."
        )
        return StorageError(code, "preallocating", path=str(path), remedy=remedy)
    return StorageError(code, "making the swap file", path=str(path))
