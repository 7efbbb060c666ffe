"""The file of a checkpoint: all planes of a step, one behind the other, in a folder of its own."""

from __future__ import annotations

import bisect
import errno
import fcntl
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from offload import runfolder, swapfile
from offload.errors import StorageError
from offload.extents import NO_TABLE, BlockTable, Extent, Part, PlaneSegment, block_sizes
from offload.homes import PlaneKey
from offload.manifest import ChecksumsRecord, Manifest, PlaneRecord, decode, encode
from offload.runfiles import sync_folder, write_checksums, write_durably
from offload.slots import Region
from offload.stepreader import PART_NBYTES, ErrorAt, PartBuffer, part_nbytes
from offload.swapfile import ALIGN_NBYTES, MANIFEST_NAME, SWAP_NAME

_FICLONERANGE = 0x4020940D
_NO_REFLINK = (
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EBADF,
    errno.EPERM,
    errno.ETXTBSY,
)


class CheckpointFile:
    """Takes the planes of a step in any order. Used by one thread at a time."""

    def __init__(
        self,
        folder: Path,
        planes: Sequence[tuple[PlaneKey, int]],
        block_nbytes: int,
        run_numel: int = 0,
    ) -> None:
        """`planes` are (key, bytes) in the manifest's order; `block_nbytes` 0 is no checksums,
        `run_numel` the elements of packed runs, 0 where nothing is packed.

        Raises StateError where the folder holds a run or a checkpoint, StorageError for the rest.
        """
        self.folder, self.block_nbytes, self.run_numel = folder, block_nbytes, run_numel
        self.run = os.urandom(16).hex()  # its own: the file is not the run's, nor another step's
        self.sizes = dict(planes)
        self.offsets: dict[PlaneKey, int] = {}
        self.nbytes = ALIGN_NBYTES
        for key, nbytes in planes:
            self.offsets[key] = self.nbytes
            self.nbytes += nbytes
        self.num_cloned = 0  # bytes that the file system shares instead of copying
        self._path = folder / SWAP_NAME
        self._clones = True  # until the file system says that it cannot
        self._tables: dict[PlaneKey, BlockTable] = {}
        self._pieces = {key: [(0, self.offsets[key], nbytes)] for key, nbytes in planes}
        self._buffer = PartBuffer(block_nbytes, part_nbytes(run_numel))
        self._lock, self._fd = swapfile.lock(folder), -1
        try:
            runfolder.refuse_committed([folder])
            runfolder.refuse_foreign([folder])
            self._fd = swapfile.create(folder, swapfile.RunFiles(self.run).header(0))
        except BaseException:
            self.close(keep=False)
            raise

    def add_memory(self, key: PlaneKey, source: Region) -> None:
        """Copy a plane that lies in RAM, plain."""
        checksums = [np.empty(0, np.uint32)]
        for at in range(0, source.nbytes, PART_NBYTES):
            nbytes = min(PART_NBYTES, source.nbytes - at)
            self._buffer.tensor[:nbytes] = source.tensor[at : at + nbytes]
            if self.block_nbytes:
                checksums.append(self._buffer.checksums(nbytes))
            self._write(self.offsets[key] + at, nbytes)
        sizes = block_sizes(Extent(tuple(self._pieces[key])), self.block_nbytes or source.nbytes)
        self._tables[key] = BlockTable(np.concatenate(checksums), np.array(sizes, np.uint32))

    def add_pieces(
        self,
        key: PlaneKey,
        pieces: Sequence[PlaneSegment],
        parts: Iterable[Part],
        *,
        error: ErrorAt,
        pace: Callable[[int], None],
        verify_clones: bool = False,
    ) -> None:
        """Share or copy a plane from an extent's pieces, as it is stored, `parts` of which can be
        read by themselves. What is copied is verified by its checksums, where there are some; what
        is shared only with `verify_clones`. `pace` is told how many bytes were copied, and may
        sleep.
        """
        at, is_shared = self.offsets[key], {}
        self._pieces[key] = []
        for fd, offset, nbytes, _ in pieces:
            is_shared[fd, offset] = self._clone(fd, offset, nbytes, at)
            self._pieces[key].append((0, at, nbytes))  # the same pieces, so the same runs
            at += nbytes
        tables, is_packed = [NO_TABLE], False
        ends = list(itertools.accumulate(nbytes for _, _, nbytes, _ in pieces))
        for part in parts:
            tables.append(part.table)
            is_packed |= part.item_nbytes > 0
            fd, offset, *_ = pieces[bisect.bisect_right(ends, part.begin)]
            if is_shared[fd, offset] and not verify_clones:
                continue
            self._buffer.load(part, error)
            if not is_shared[fd, offset]:  # before it is verified: that unpacks it
                self._write(self.offsets[key] + part.begin, part.stored_nbytes)
                pace(part.stored_nbytes)
            self._buffer.verify(part, error)
        if not is_packed:
            self._pieces[key] = [(0, self.offsets[key], self.sizes[key])]
        self._tables[key] = BlockTable(
            np.concatenate([table.checksums for table in tables]),
            np.concatenate([table.lengths for table in tables]),
        )

    def _clone(self, fd: int, offset: int, nbytes: int, at: int) -> bool:
        if not self._clones:
            return False
        request = struct.pack("qQQQ", fd, offset, nbytes, at)
        try:
            fcntl.ioctl(self._fd, _FICLONERANGE, request)
        except OSError as error:
            if error.errno not in _NO_REFLINK:
                raise self._error(error, "cloning to") from error
            self._stop_cloning()
            return False
        self.num_cloned += nbytes
        return True

    def _stop_cloning(self) -> None:
        """From now on bytes are copied: book their space, so that a full drive shows at once."""
        self._clones = False
        try:
            swapfile.fallocate(self._fd, self.nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise self._error(error, "preallocating") from error

    def _write(self, at: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            try:
                view = memoryview(self._buffer.memory)[done:nbytes]
                num_written = os.pwrite(self._fd, view, at + done)
                if num_written == 0:
                    raise OSError(errno.EIO, "nothing was written")
            except OSError as error:
                raise self._error(error, "writing") from error
            done += num_written

    def finish(self, manifest: Manifest) -> None:
        """Make the checkpoint of this step durable, its manifest last: without one a folder is no
        checkpoint.
        """
        try:
            os.ftruncate(self._fd, self.nbytes)
            os.fsync(self._fd)
            record = self._write_checksums()
        except OSError as error:
            raise self._error(error, "flushing") from error
        sync_folder(self.folder)  # a manifest without the files that it names is worse than none
        content = encode(self._manifest(manifest, record))
        decode(content, "the manifest of this checkpoint")  # what is kept can be read back
        write_durably(self.folder / MANIFEST_NAME, content)
        sync_folder(self.folder.parent)

    def _write_checksums(self) -> ChecksumsRecord | None:
        if not self.block_nbytes:
            return None
        tables = [self._tables[key] for key in self.sizes]
        return write_checksums(self.folder, 0, self.block_nbytes, tables, self.run_numel)

    def _manifest(self, step: Manifest, checksums: ChecksumsRecord | None) -> Manifest:
        """The manifest of a run's step, with the extents of this file."""
        planes: list[dict[str, PlaneRecord]] = [{} for _ in step.chunks]
        for (index, plane), pieces in self._pieces.items():
            record = PlaneRecord(extents=(tuple(pieces),), committed=0)
            planes[index][plane.value] = record
        chunks = [
            chunk.model_copy(update={"planes": planes[index]})
            for index, chunk in enumerate(step.chunks)
        ]
        changes = {
            "run": self.run,
            "chunks": tuple(chunks),
            "file_nbytes": (self.nbytes,),
            "checksums": checksums,
            "kind": "checkpoint",
        }
        return step.model_copy(update=changes)

    def close(self, *, keep: bool) -> None:
        """Give everything back; without `keep` the files go. Idempotent; raises nothing."""
        if self._fd >= 0:
            if not keep:
                runfolder.remove_marks([self.folder])
                swapfile.remove_own(self._fd, self._path)
            swapfile.close(self._fd)
            self._fd = -1
        if self._lock >= 0:
            swapfile.unlock(self._lock, self.folder)
            self._lock = -1

    def _error(self, error: OSError, action: str) -> StorageError:
        code = error.errno or errno.EIO
        remedy = ""
        if code == errno.ENOSPC:
            free = swapfile.free_nbytes(self.folder)
            remedy = (
                f"The checkpoint takes {self.nbytes} bytes and {free} are free. Free space there, "
                "or name a folder on another drive. The run itself is as it was."
            )
        return StorageError(code, action, path=str(self._path), remedy=remedy)
