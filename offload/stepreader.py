"""A committed step read out of its files, every block verified: to restore, to copy, to export."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from offload import io, swapfile
from offload.errors import StateError, StorageError
from offload.formats import Plane
from offload.manifest import Manifest, encode
from offload.runfiles import read_checksums, read_manifest
from offload.store import PlaneSegment
from offload.swapfile import SWAP_NAME

PART_NBYTES = 2 << 20  # what is read at a time; a multiple of every checksum block
ErrorAt = Callable[[int, int, int], StorageError]  # errno, fd, offset


class PartBuffer:
    """Aligned memory of PART_NBYTES through which files are read, each block verified."""

    def __init__(self, block_nbytes: int) -> None:
        """`block_nbytes` is what one checksum stands for; 0 is no checksums."""
        self.block_nbytes = block_nbytes
        self.memory = mmap.mmap(-1, PART_NBYTES)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.uint8)

    def read(self, fd: int, offset: int, nbytes: int, table: np.ndarray, error: ErrorAt) -> int:
        """Fill the first `nbytes`, and compare them with the first checksums of `table`; returns
        how many those were. Raises what `error` makes.
        """
        done = 0
        while done < nbytes:
            try:
                num_read = os.preadv(fd, [memoryview(self.memory)[done:nbytes]], offset + done)
            except OSError as found:
                raise error(found.errno or errno.EIO, fd, offset + done) from found
            if num_read == 0:
                raise error(errno.ENODATA, fd, offset + done)
            done += num_read
        if not self.block_nbytes:
            return 0
        checksums = self.checksums(nbytes)
        wrong = np.flatnonzero(checksums != table[: len(checksums)])
        if len(wrong):
            raise error(errno.EBADMSG, fd, offset + int(wrong[0]) * self.block_nbytes)
        return len(checksums)

    def checksums(self, nbytes: int) -> np.ndarray:
        """Those of the blocks that the buffer holds now."""
        found = np.empty(-(-nbytes // self.block_nbytes), np.uint32)
        io.crc32c_blocks(self.tensor.data_ptr(), nbytes, self.block_nbytes, found.ctypes.data)
        return found


class StepReader:
    """The swap files of a committed step, open for reading. Use as a context manager."""

    def __init__(self, manifest: Manifest, folders: Sequence[Path]) -> None:
        """Raises StateError for another number of folders than the step lies on, StorageError where
        their files are not those of the manifest.
        """
        if len(folders) != len(manifest.file_nbytes):
            raise StateError(
                f"the {manifest.kind} in {folders[0]} lies on {len(manifest.file_nbytes)} paths. "
                "Name them all, in the order of the run (`offload checkpoint` makes one of them)."
            )
        self.manifest = manifest
        self._folders = tuple(folders)
        self._tables = _tables_of(manifest, folders[0])
        self._planes = {(index, plane): record for index, plane, record in manifest.planes()}
        record = manifest.checksums
        self._buffer = PartBuffer(record.block_nbytes if record is not None else 0)
        self._fds: list[int] = []
        try:
            run = swapfile.RunFiles(manifest.run)
            for index, folder in enumerate(folders):
                self._fds.append(swapfile.open_to_read(folder, run.header(index)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StepReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Idempotent."""
        while self._fds:
            swapfile.close(self._fds.pop())

    def pieces(self, index: int, plane: Plane) -> list[PlaneSegment]:
        """Where a plane of chunk `index` lies, without its checksums."""
        record = self._planes[index, plane]
        return [(self._fds[f], offset, n, 0) for f, offset, n in record.extents[record.committed]]

    def table(self, index: int, plane: Plane) -> np.ndarray:
        """The checksums of a plane's blocks; none where the step has none."""
        return self._tables.get((index, plane), np.empty(0, np.uint32))

    def parts(self, index: int, plane: Plane) -> Iterator[tuple[int, torch.Tensor]]:
        """A plane part by part: from which byte on, and memory (uint8) that the next part takes."""
        begin, entry, table = 0, 0, self.table(index, plane)

        def error(code: int, fd: int, offset: int) -> StorageError:
            return self.error(code, fd, offset, self.manifest.chunks[index].name)

        for fd, offset, nbytes, _ in self.pieces(index, plane):
            for done in range(0, nbytes, PART_NBYTES):
                part = min(PART_NBYTES, nbytes - done)
                entry += self._buffer.read(fd, offset + done, part, table[entry:], error)
                yield begin, self._buffer.tensor[:part]
                begin += part

    def error(self, code: int, fd: int, offset: int, chunk: str = "") -> StorageError:
        """The StorageError for a failed read."""
        path = self._folders[self._fds.index(fd)] / SWAP_NAME
        return StorageError(code, "reading", path=str(path), offset=offset, chunk=chunk)


def _tables_of(manifest: Manifest, folder: Path) -> dict[tuple[int, Plane], np.ndarray]:
    tables: dict[tuple[int, Plane], np.ndarray] = {}
    record, start = manifest.checksums, 0
    if record is None:
        return tables
    entries = read_checksums(folder, record)
    for index, plane, planes in manifest.planes():
        sizes = [nbytes for _, _, nbytes in planes.extents[planes.committed]]
        count = sum(-(-nbytes // record.block_nbytes) for nbytes in sizes)
        tables[index, plane] = entries[start : start + count]
        start += count
    return tables


@contextlib.contextmanager
def open_step(folders: Sequence[Path], expected: Manifest | None = None) -> Iterator[StepReader]:
    """The step that lies in these folders, of a run or a checkpoint. A run's locks are held: a
    commit would write over it. Raises StateError where it is live, or no longer the expected one.
    """
    manifest = read_manifest(folders[0])
    with contextlib.ExitStack() as stack:
        if manifest.kind == "run":
            stack.enter_context(swapfile.locked(folders))
            manifest = read_manifest(folders[0])
        if expected is not None and encode(manifest) != encode(expected):
            raise StateError(f"the run in {folders[0]} has committed since. Start again.")
        yield stack.enter_context(StepReader(manifest, folders))
