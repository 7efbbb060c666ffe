"""The swap files of a run: one per NVMe path, preallocated, locked against a second run.

Planes are striped over all paths, so several drives need no RAID. A file is made whole before
training starts: a full disk is an error then, not later.

[Note: two extents] Under durability a plane has two extents. What is committed is never written:
an update reads the newest version and writes the extent that is not committed. `PlaneExtents` is
that rule, and the only place that knows it.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from offload import swapfile
from offload.errors import BudgetError, StateError, StorageError
from offload.slots import round_up
from offload.swapfile import ALIGN_NBYTES, LOCK_NAME, SWAP_NAME, RunFiles


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """Where one plane lies: pieces (file index, offset, nbytes) in plane order."""

    pieces: tuple[tuple[int, int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(piece[2] for piece in self.pieces)


class PlaneExtents:
    """The versions of one plane on NVMe; see [Note: two extents]. `committed` indexes `extents`;
    None before the first commit.
    """

    __slots__ = ("_newest", "committed", "extents")

    def __init__(self, extents: Sequence[Extent], committed: int | None = None) -> None:
        self.extents = tuple(extents)
        self.committed = committed
        self._newest = committed or 0

    @property
    def newest(self) -> Extent:
        """What to read."""
        return self.extents[self._newest]

    @property
    def target(self) -> Extent:
        """What to write: never the committed version, where there are two."""
        return self.extents[self._target]

    @property
    def _target(self) -> int:
        if len(self.extents) == 1 or self.committed is None:
            return self._newest
        return 1 - self.committed

    def target_of(self, chunk: str) -> Extent:
        """The target, for code other than an update; StateError where that is the committed one."""
        if len(self.extents) == 1 and self.committed is not None:
            raise StateError(
                f"chunk {chunk} is frozen, and a commit names its only copy: writing it would "
                "break recovery. Set durability: off, or let it require gradients from the start."
            )
        return self.target

    def wrote(self) -> None:
        """The whole target has been written: it is the newest version now."""
        self._newest = self._target

    @property
    def newest_index(self) -> int:
        """Where in `extents` the newest version is."""
        return self._newest

    def commit(self) -> None:
        """A manifest that names the newest version is durable."""
        self.committed = self._newest


class ChunkStore:
    """Owns the swap files. `allocate` plans extents; `open` makes the files real; `close` removes
    them, unless they hold a committed run.
    """

    def __init__(self, paths: Sequence[Path], *, run: RunFiles | None = None) -> None:
        self.paths = tuple(paths)
        self.run = run
        self._file_nbytes = [0] * len(paths)
        if run is not None:
            self._file_nbytes = list(run.used_nbytes) or [ALIGN_NBYTES] * len(paths)
        self._locks: list[int] = []
        self._fds: list[int] = []

    @property
    def nbytes(self) -> int:
        return sum(self._file_nbytes)

    @property
    def file_nbytes(self) -> tuple[int, ...]:
        """Bytes of each swap file."""
        return tuple(self._file_nbytes)

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
        is_old = self.run is not None and bool(self.run.used_nbytes)
        try:
            for path in self.paths:
                self._locks.append(swapfile.lock(path))
                if not is_old:
                    swapfile.refuse_committed(path)
            for index, path in enumerate(self.paths):
                nbytes = max(self._file_nbytes[index], ALIGN_NBYTES)
                self._fds.append(self._open_swap(index, path, nbytes))
        except BaseException:
            self.close(keep=is_old)
            raise

    def _open_swap(self, index: int, path: Path, nbytes: int) -> int:
        if self.run is None:
            return swapfile.open_swap(path, nbytes, None, used_nbytes=0)
        used = self.run.used_nbytes[index] if self.run.used_nbytes else 0
        return swapfile.open_swap(path, nbytes, self.run.header(index), used_nbytes=used)

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

    def sync(self) -> None:
        """Flush what has been written to the drives. Blocks; raises StorageError."""
        for fd, path in zip(self._fds, self.paths, strict=True):
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise StorageError(
                    error.errno or errno.EIO, "flushing", path=str(path / SWAP_NAME)
                ) from error

    def close(self, *, keep: bool = False) -> None:
        """Give the locks back; remove the swap files, or keep a committed run. Idempotent."""
        for fd, path in zip(self._fds, self.paths, strict=False):
            os.close(fd)
            if not keep:
                (path / SWAP_NAME).unlink(missing_ok=True)
                swapfile.remove_run_files(path)
        self._fds.clear()
        for lock, path in zip(self._locks, self.paths, strict=False):
            (path / LOCK_NAME).unlink(missing_ok=True)
            os.close(lock)
        self._locks.clear()
