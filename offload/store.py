"""The swap files of a run: one per NVMe path, preallocated, locked against a second run.

Planes are striped over all paths, so several drives need no RAID. A file is made whole before
training starts: a full disk is an error then, not later.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from offload import forks, io, runfolder, swapfile
from offload.errors import BudgetError, OffloadError, StateError, StorageError
from offload.extents import (
    NO_TABLE,
    STRIPE_NBYTES,
    BlockTable,
    Extent,
    PlaneSegment,
    Runs,
    block_sizes,
    cut,
    stripes,
)
from offload.slots import Region, round_up
from offload.swapfile import ALIGN_NBYTES, LOCK_NAME, SWAP_NAME, RunFiles

logger = logging.getLogger("offload")


def _as_uint32(region: Region) -> np.ndarray:
    return region.tensor.numpy().view(np.uint32)


class ChunkStore:
    """Owns the swap files. `allocate` plans extents; `open` makes the files real; `close` removes
    them, unless they hold a committed run.

    With `checksum_nbytes` every block of that size has a CRC32C in `table` (see table_nbytes),
    apart from the data: the native code stores it before a write and compares it after a read. With
    `packs` the second half of the table has the length of each block as it is packed.
    `weights` are the paths' speeds, in any unit; without them all are equal.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        run: RunFiles | None = None,
        checksum_nbytes: int = 0,
        table: Region | None = None,
        packs: bool = False,
        weights: Sequence[float] = (),
    ) -> None:
        self.paths = tuple(paths)
        self.weights = tuple(weights) or (1.0,) * len(self.paths)
        self.run = run
        self.checksum_nbytes = checksum_nbytes if table is not None else 0
        entries = np.empty(0, np.uint32) if table is None else _as_uint32(table)
        self.pack_stride = len(entries) // 2 if packs else 0  # from a checksum to its length
        self._entries = entries[: self.pack_stride or None]
        self._lengths = entries[self.pack_stride : 2 * self.pack_stride]
        self._num_entries = 0
        self._tables: dict[Extent, BlockTable] = {}
        self._runs: dict[Extent, Runs] = {}
        self._zero_checksums: dict[int, int] = {}
        self._file_nbytes = [0] * len(paths)
        if run is not None:
            self._file_nbytes = list(run.used_nbytes) or [ALIGN_NBYTES] * len(paths)
        self._locks: list[int] = []
        self._fds: list[int] = []
        self._made: list[Path] = []  # folders that open() has made

    @property
    def nbytes(self) -> int:
        return sum(self._file_nbytes)

    @property
    def file_nbytes(self) -> tuple[int, ...]:
        """Bytes of each swap file."""
        return tuple(self._file_nbytes)

    def allocate(self, nbytes: int, runs: Runs | None = None) -> Extent:
        """Book space for one plane, striped over the files in proportion to their weights. With
        `runs` it can be packed.
        """
        pieces: list[tuple[int, int, int]] = []
        align = self.checksum_nbytes or ALIGN_NBYTES
        stripe = STRIPE_NBYTES if len(self.paths) > 1 else nbytes
        for index, piece in stripes(nbytes, self.weights, align, max(stripe, 1)):
            pieces.append((index, self._file_nbytes[index], piece))
            self._file_nbytes[index] += round_up(piece, ALIGN_NBYTES)
        extent = Extent(tuple(pieces))
        self.cover(extent, runs)
        return extent

    # ---- checksums ----

    def cover(self, extent: Extent, runs: Runs | None = None) -> None:
        """Give an extent its part of the table: it holds plain zeros, which a new file does."""
        if not self.checksum_nbytes:
            return
        sizes = block_sizes(extent, self.checksum_nbytes)
        end = self._num_entries + len(sizes)
        if end > len(self._entries):
            raise StateError("the checksum table is too small; the plan's sum is wrong.")
        blocks, lengths = slice(self._num_entries, end), np.array(sizes, np.uint32)
        if self.pack_stride:
            self._lengths[blocks] = lengths
            lengths = self._lengths[blocks]
            if runs is not None:
                self._runs[extent] = runs
        self._tables[extent] = BlockTable(self._entries[blocks], lengths)
        self._entries[blocks] = [self._zero_checksum(nbytes) for nbytes in sizes]
        self._num_entries = end

    def table(self, extent: Extent) -> BlockTable:
        """Of an extent's blocks; shares memory. Empty where there are no checksums."""
        return self._tables.get(extent, NO_TABLE)

    def runs(self, extent: Extent) -> Runs | None:
        """How an extent is packed, if it can be."""
        return self._runs.get(extent)

    def _zero_checksum(self, nbytes: int) -> int:
        if nbytes not in self._zero_checksums:
            zeros = np.zeros(nbytes, np.uint8)
            self._zero_checksums[nbytes] = io.crc32c(zeros.ctypes.data, nbytes)
        return self._zero_checksums[nbytes]

    def _checksum_addresses(self, extent: Extent) -> list[int]:
        """Where the checksums of each piece begin; 0 where there are none."""
        if not self.checksum_nbytes:
            return [0] * len(extent.pieces)
        address, addresses = self._tables[extent].checksums.ctypes.data, []
        for _, _, nbytes in extent.pieces:
            addresses.append(address)
            address += 4 * -(-nbytes // self.checksum_nbytes)
        return addresses

    # ---- files ----

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
        forks.register(self)
        try:
            for path in self.paths:
                self._made += swapfile.make_folders(path)
                self._locks.append(swapfile.lock(path))
            if not is_old:
                runfolder.refuse_committed(self.paths)
                runfolder.refuse_foreign(self.paths)
                runfolder.remove_small_files(self.paths)  # of a run that died without a commit
            for index, path in enumerate(self.paths):
                nbytes = max(self._file_nbytes[index], ALIGN_NBYTES)
                self._fds.append(self._open_swap(index, path, nbytes))
        except BaseException:
            self.close(keep=is_old)
            self.remove_folders()
            raise

    def remove_folders(self) -> None:
        """Remove the folders that open() made, where nothing has come into them: for a start that
        failed.
        """
        swapfile.remove_folders(self._made)
        self._made.clear()

    def _open_swap(self, index: int, path: Path, nbytes: int) -> int:
        if self.run is None:
            return swapfile.open_swap(path, nbytes, None, used_nbytes=0)
        used = self.run.used_nbytes[index] if self.run.used_nbytes else 0
        return swapfile.open_swap(path, nbytes, self.run.header(index), used_nbytes=used)

    def segments(self, extent: Extent) -> list[PlaneSegment]:
        """(fd, offset, nbytes, checksums) of the extent's pieces, for the update worker."""
        addresses = self._checksum_addresses(extent)
        return [
            (self._fds[index], offset, nbytes, checksums)
            for (index, offset, nbytes), checksums in zip(extent.pieces, addresses, strict=True)
        ]

    def io_segments(
        self, extent: Extent, address: int, begin: int = 0, nbytes: int | None = None
    ) -> list[io.Segment]:
        """(fd, offset, address, nbytes, checksums) of the extent's pieces against a buffer at
        `address`; of `nbytes` from `begin` of the plane, which must be whole blocks. What can be
        packed comes run by run, with the size of its items.
        """
        end = extent.nbytes if nbytes is None else begin + nbytes
        runs = self._runs.get(extent)
        if runs is not None:
            return self._run_segments(extent, runs, address, begin, end)
        segments: list[io.Segment] = []
        start = 0
        for fd, offset, piece, checksums in self.segments(extent):
            first, last = max(begin, start), min(end, start + piece)
            if first < last:
                skip = first - start
                entry = checksums + 4 * (skip // self.checksum_nbytes) if checksums else 0
                segments.append((fd, offset + skip, address + first - begin, last - first, entry))
            start += piece
        return segments

    def _run_segments(
        self, extent: Extent, runs: Runs, address: int, begin: int, end: int
    ) -> list[io.Segment]:
        table, block = self._tables[extent].checksums.ctypes.data, self.checksum_nbytes
        pieces = [(self._fds[index], offset, nbytes) for index, offset, nbytes in extent.pieces]
        return [
            (fd, offset, address + at - begin, part, table + 4 * (at // block), runs.item_nbytes)
            for fd, offset, part, at in cut(pieces, runs.nbytes, begin, end)
        ]

    def holds_whole_runs(self, extent: Extent, begin: int, nbytes: int) -> bool:
        """Whether a part of a plane can be read by itself."""
        runs = self._runs.get(extent)
        if runs is None or nbytes == extent.nbytes:
            return True
        starts = {at for _, _, _, at in cut(extent.pieces, runs.nbytes)} | {extent.nbytes}
        return begin in starts and begin + nbytes in starts

    def by_drive(self, pieces: Iterable[tuple[int, int]]) -> tuple[int, ...]:
        """Sum (fd, nbytes) by path."""
        totals = [0] * len(self.paths)
        for fd, nbytes in pieces:
            totals[self._fds.index(fd)] += nbytes
        return tuple(totals)

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

    def check_owned(self) -> None:
        """Raise StorageError where the files of the run are not those that its folders show: what
        is committed then would be somebody else's.
        """
        for index, path in enumerate(self.paths):
            if not self._owns(index):
                raise StorageError(
                    errno.ESTALE, "committing", path=str(path / SWAP_NAME),
                    remedy=f"Somebody removed {LOCK_NAME} or {SWAP_NAME} while the run was using "
                    "it, and another run may have begun there. What was committed before stands "
                    "as it is.",
                )  # fmt: skip

    def _owns(self, index: int) -> bool:
        """Whether a path's files are still this run's. A lock whose file somebody removed (a tool
        that clears old files does) is taken again, unless another run has it.
        """
        path = self.paths[index]
        try:
            if not swapfile.is_same_file(self._locks[index], path / LOCK_NAME):
                if not path.exists():
                    return False
                lock = swapfile.lock(path)
                swapfile.close(self._locks[index])
                self._locks[index] = lock
                logger.warning("%s was removed and is locked again", path / LOCK_NAME)
            return swapfile.is_same_file(self._fds[index], path / SWAP_NAME)
        except OffloadError:
            return False
        except OSError:
            return True  # its drive is gone, and so is nobody else there

    def trim(self) -> None:
        """Give back what lies behind the last extent, such as gradients of an earlier plan. Raises
        StorageError.
        """
        for fd, path, nbytes in zip(self._fds, self.paths, self._file_nbytes, strict=True):
            try:
                if os.fstat(fd).st_size > nbytes:
                    os.ftruncate(fd, nbytes)
            except OSError as error:
                raise StorageError(
                    error.errno or errno.EIO, "trimming", path=str(path / SWAP_NAME)
                ) from error

    def close(self, *, keep: bool = False) -> None:
        """Give the locks back; remove the swap files, or keep a committed run. Idempotent; raises
        for no drive: one that is gone removes nothing, and what is open still closes.

        The order is that of [Note: members].
        """
        owned = [] if keep else [i for i in range(len(self._fds)) if self._owns(i)]
        if self.run is not None:
            runfolder.remove_marks([self.paths[index] for index in owned])
        for index in reversed(range(len(self._fds))):
            if index in owned:
                swapfile.remove_own(self._fds[index], self.paths[index] / SWAP_NAME)
            swapfile.close(self._fds[index])
        self._fds.clear()
        for lock, path in zip(self._locks, self.paths, strict=False):
            swapfile.unlock(lock, path)
        self._locks.clear()

    def let_go(self) -> None:
        """In a forked child: drop the descriptors, which would keep the locks when the parent dies,
        and touch no file. See [Note: forks].
        """
        for fd in (*self._fds, *self._locks):
            swapfile.close(fd)
        self._fds.clear()
        self._locks.clear()
