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
from offload.extents import NO_TABLE, Part, PlaneSegment, parts_of, runs_of
from offload.formats import FORMATS, Plane
from offload.manifest import Manifest, encode
from offload.runfiles import read_manifest, read_tables
from offload.swapfile import SWAP_NAME

PART_NBYTES = 2 << 20  # what is read at a time; a multiple of every checksum block
ErrorAt = Callable[[int, int, int], StorageError]  # errno, fd, offset


def part_nbytes(run_numel: int) -> int:
    """Bytes of the largest part of a plane whose runs have so many elements."""
    return max(PART_NBYTES, run_numel * torch.float32.itemsize)


class PartBuffer:
    """Aligned memory through which files are read part by part, each block verified."""

    def __init__(self, block_nbytes: int, nbytes: int = PART_NBYTES) -> None:
        """`block_nbytes` is what one checksum stands for; 0 is no checksums."""
        self.block_nbytes = block_nbytes
        self.memory = mmap.mmap(-1, nbytes)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.uint8)

    def load(self, part: Part, error: ErrorAt) -> None:
        """Read a part as it is stored. Raises what `error` makes."""
        done, nbytes = 0, part.stored_nbytes
        while done < nbytes:
            view, at = memoryview(self.memory)[done:nbytes], part.offset + done
            try:
                num_read = os.preadv(part.fd, [view], at)
            except OSError as found:
                raise error(found.errno or errno.EIO, part.fd, at) from found
            if num_read == 0:
                raise error(errno.ENODATA, part.fd, at)
            done += num_read

    def verify(self, part: Part, error: ErrorAt) -> None:
        """Unpack the part that has been loaded, and compare it with its blocks' checksums. Raises
        what `error` makes.
        """
        if not self.block_nbytes:
            return
        wrong = 0
        if self._unpack(part):
            checksums = self.checksums(part.nbytes)
            differing = np.flatnonzero(checksums != part.table.checksums)
            if not len(differing):
                return
            wrong = int(differing[0])
        raise error(errno.EBADMSG, part.fd, part.offset + wrong * self.block_nbytes)

    def _unpack(self, part: Part) -> bool:
        if not part.item_nbytes:
            return True
        lengths, address = part.table.lengths.ctypes.data, self.tensor.data_ptr()
        return io.unpack_run(part.item_nbytes, address, part.nbytes, self.block_nbytes, lengths)

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
        self._tables = read_tables(folders[0], manifest)
        self._planes = {(index, plane): record for index, plane, record in manifest.planes()}
        record = manifest.checksums
        self.block_nbytes = record.block_nbytes if record is not None else 0
        self.run_numel = record.run_numel if record is not None else 0
        self._buffer = PartBuffer(self.block_nbytes, part_nbytes(self.run_numel))
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

    def parts_of(self, index: int, plane: Plane) -> Iterator[Part]:
        """A plane's runs, or parts of PART_NBYTES, as they lie."""
        fmt = FORMATS[self.manifest.state_format]
        table = self._tables.get((index, plane), NO_TABLE)
        runs = runs_of(fmt, plane, self.run_numel)
        pieces = [piece[:3] for piece in self.pieces(index, plane)]
        return parts_of(pieces, table, self.block_nbytes, runs, PART_NBYTES)

    def parts(self, index: int, plane: Plane) -> Iterator[tuple[int, torch.Tensor]]:
        """A plane part by part: from which byte on, and memory (uint8) that the next part takes."""

        def error(code: int, fd: int, offset: int) -> StorageError:
            return self.error(code, fd, offset, self.manifest.chunks[index].name)

        for part in self.parts_of(index, plane):
            self._buffer.load(part, error)
            self._buffer.verify(part, error)
            yield part.begin, self._buffer.tensor[: part.nbytes]

    def error(self, code: int, fd: int, offset: int, chunk: str = "") -> StorageError:
        """The StorageError for a failed read."""
        path = self._folders[self._fds.index(fd)] / SWAP_NAME
        return StorageError(code, "reading", path=str(path), offset=offset, chunk=chunk)


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
