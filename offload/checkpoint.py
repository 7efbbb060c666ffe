"""Checkpoints: a step copied to a folder of its own, whole, while training goes on.

[Note: copy before overwrite] A checkpoint copies extents that hold the planes of one step. Training
may write the first of them a step later (under durability, two). Whoever is about to write one asks
here first: if it has not been copied, it is copied next, and the writer waits for that plane alone.
Planes that rest in RAM change in place, so they are copied before the call returns.
"""

from __future__ import annotations

import collections
import errno
import fcntl
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from offload import io, swapfile
from offload.commit import StepRecord, manifest_of, write_durably, write_synced
from offload.engine import Engine
from offload.errors import StateError, StorageError
from offload.homes import PlaneKey
from offload.manifest import ChecksumsRecord, Manifest, PlaneRecord, encode
from offload.slots import Region
from offload.store import Extent, PlaneSegment
from offload.swapfile import ALIGN_NBYTES, CHECKSUM_NAMES, LOCK_NAME, MANIFEST_NAME, SWAP_NAME

PART_NBYTES = 4 << 20  # what is copied at a time; a multiple of every checksum block
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
    """The one file of a checkpoint: all planes, one behind the other. Used by one thread at a
    time.
    """

    def __init__(
        self, folder: Path, planes: Sequence[tuple[PlaneKey, int]], run: str, block_nbytes: int
    ) -> None:
        """`planes` are (key, bytes) in the manifest's order; `block_nbytes` 0 is no checksums.

        Raises StateError where the folder holds a run or a checkpoint, StorageError for the rest.
        """
        self.folder, self.block_nbytes = folder, block_nbytes
        self.sizes = dict(planes)
        self.offsets: dict[PlaneKey, int] = {}
        self.nbytes = ALIGN_NBYTES
        for key, nbytes in planes:
            self.offsets[key] = self.nbytes
            self.nbytes += nbytes
        self.num_cloned = 0  # bytes that the file system shares instead of copying
        self._path = folder / SWAP_NAME
        self._clones = True  # until the file system says that it cannot
        self._tables: dict[PlaneKey, list[np.ndarray]] = {key: [] for key, _ in planes}
        self._buffer = mmap.mmap(-1, PART_NBYTES)
        self._address = torch.frombuffer(self._buffer, dtype=torch.uint8).data_ptr()
        self._lock, self._fd = swapfile.lock(folder), -1
        try:
            swapfile.refuse_committed(folder)
            self._fd = swapfile.create(folder, swapfile.RunFiles(run).header(0))
        except BaseException:
            self.close(keep=False)
            raise

    def add_memory(self, key: PlaneKey, source: Region) -> None:
        """Copy a plane that lies in RAM."""
        self._stop_cloning()
        for at in range(0, source.nbytes, PART_NBYTES):
            nbytes = min(PART_NBYTES, source.nbytes - at)
            self._buffer[:nbytes] = source.tensor[at : at + nbytes].numpy().tobytes()
            if self.block_nbytes:
                self._tables[key].append(self._checksums(nbytes))
            self._write(self.offsets[key] + at, nbytes)

    def add_pieces(
        self,
        key: PlaneKey,
        pieces: Sequence[PlaneSegment],
        table: np.ndarray,
        pace: Callable[[int], None],
    ) -> None:
        """Copy a plane from an extent's pieces, verified by the checksums in `table` where there
        are some. `pace` is told how many bytes were copied, and may sleep.
        """
        at, entry = self.offsets[key], 0
        self._tables[key].append(table.copy())
        for fd, offset, nbytes, _ in pieces:
            if self._clone(fd, offset, nbytes, at):
                at += nbytes
                entry += -(-nbytes // self.block_nbytes) if self.block_nbytes else 0
                continue
            for done in range(0, nbytes, PART_NBYTES):
                part = min(PART_NBYTES, nbytes - done)
                self._read(fd, offset + done, part)
                if self.block_nbytes:
                    entry += self._verify(table[entry:], part, offset + done)
                self._write(at, part)
                at += part
                pace(part)

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
        if self._clones:
            self._clones = False
            try:
                swapfile.fallocate(self._fd, self.nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise self._error(error, "preallocating") from error

    def _read(self, fd: int, offset: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            try:
                num_read = os.preadv(fd, [memoryview(self._buffer)[done:nbytes]], offset + done)
            except OSError as error:
                raise self._source_error(error.errno or errno.EIO, offset + done) from error
            if num_read == 0:
                raise self._source_error(errno.ENODATA, offset + done)
            done += num_read

    def _verify(self, table: np.ndarray, nbytes: int, offset: int) -> int:
        """Compare what was read with its checksums; returns how many there were."""
        found = self._checksums(nbytes)
        wrong = np.flatnonzero(found != table[: len(found)])
        if len(wrong):
            raise self._source_error(errno.EBADMSG, offset + int(wrong[0]) * self.block_nbytes)
        return len(found)

    def _checksums(self, nbytes: int) -> np.ndarray:
        found = np.empty(-(-nbytes // self.block_nbytes), np.uint32)
        io.crc32c_blocks(self._address, nbytes, self.block_nbytes, found.ctypes.data)
        return found

    def _write(self, at: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            try:
                done += os.pwrite(self._fd, memoryview(self._buffer)[done:nbytes], at + done)
            except OSError as error:
                raise self._error(error, "writing") from error

    def finish(self, make_manifest: Callable[[ChecksumsRecord | None], Manifest]) -> None:
        """Make the checkpoint durable, its manifest last: without one a folder is no checkpoint."""
        try:
            os.ftruncate(self._fd, self.nbytes)
            os.fsync(self._fd)
            record = self._write_checksums()
        except OSError as error:
            raise self._error(error, "flushing") from error
        write_durably(self.folder / MANIFEST_NAME, encode(make_manifest(record)))

    def _write_checksums(self) -> ChecksumsRecord | None:
        if not self.block_nbytes:
            return None
        tables = [table.data for tables in self._tables.values() for table in tables]
        crc = 0
        for table in tables:
            crc = zlib.crc32(table, crc)
        write_synced(self.folder / CHECKSUM_NAMES[0], tables)
        nbytes = sum(table.nbytes for table in tables)
        return ChecksumsRecord(slot=0, block_nbytes=self.block_nbytes, nbytes=nbytes, crc32=crc)

    def close(self, *, keep: bool) -> None:
        """Give everything back; without `keep` the files go. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not keep:
                swapfile.remove_run_files(self.folder)
                self._path.unlink(missing_ok=True)
        if self._lock >= 0:
            (self.folder / LOCK_NAME).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def _error(self, error: OSError, action: str) -> StorageError:
        return StorageError(error.errno or errno.EIO, action, path=str(self._path))

    def _source_error(self, code: int, offset: int) -> StorageError:
        return StorageError(code, "copying from the run", path="its swap file", offset=offset)


def checkpoint_manifest(
    manifest: Manifest, file: CheckpointFile, checksums: ChecksumsRecord | None
) -> Manifest:
    """The manifest of a run's step, with the extents of its checkpoint."""
    planes: list[dict[str, PlaneRecord]] = [{} for _ in manifest.chunks]
    for (index, plane), offset in file.offsets.items():
        piece = (0, offset, file.sizes[index, plane])
        planes[index][plane.value] = PlaneRecord(extents=((piece,),), committed=0)
    chunks = [
        chunk.model_copy(update={"planes": planes[index]})
        for index, chunk in enumerate(manifest.chunks)
    ]
    return manifest.model_copy(
        update={
            "chunks": tuple(chunks),
            "file_nbytes": (file.nbytes,),
            "checksums": checksums,
            "kind": "checkpoint",
        }
    )


class Checkpoint:
    """A checkpoint under way. `wait` blocks until it is whole; training may go on meanwhile."""

    def __init__(
        self, engine: Engine, record: StepRecord, folder: Path, *, rate_nbytes: int | None
    ) -> None:
        """Begin to copy the state as it is now, with no update pending. `rate_nbytes` is the most
        that is copied in a second, so that training keeps the drive; None is no limit.
        """
        self._engine = engine
        fmt, store = engine.plan.fmt, engine.store
        keys = [(c, p) for c in engine.chunks for p in c.spec.state_planes(fmt)]
        sizes = [((c.spec.index, p), c.spec.nbytes(p, fmt)) for c, p in keys]
        block = store.checksum_nbytes if store is not None else 0
        run = store.run.run if store is not None and store.run is not None else os.urandom(16).hex()
        self._file = CheckpointFile(folder, sizes, run, block)
        self._manifest = manifest_of(engine, record, run)
        self._rate = rate_nbytes
        self._changed = threading.Condition()
        self._todo: dict[Extent, PlaneKey] = {}
        self._wanted: collections.deque[Extent] = collections.deque()
        self._error: BaseException | None = None
        self._is_done = False
        try:
            for chunk, plane in keys:
                key = (chunk.spec.index, plane)
                if plane in chunk.pinned:
                    self._file.add_memory(key, chunk.pinned[plane])
                else:
                    self._todo[chunk.extents[plane].newest] = key
        except BaseException:
            self._file.close(keep=False)
            raise
        engine.before_overwrite = self._copy_first
        self._thread = threading.Thread(target=self._run, name="offload-copy", daemon=True)
        self._thread.start()

    def wait(self) -> Path:
        """Block until the checkpoint is durable, and return its folder. Raises StorageError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._file.folder

    def join(self) -> None:
        """Block until it has ended, well or not."""
        self._thread.join()

    @property
    def is_done(self) -> bool:
        """Whether it is durable, or has failed."""
        return not self._thread.is_alive()

    @property
    def num_cloned(self) -> int:
        """Bytes that the file system shares with the run instead of copying them."""
        return self._file.num_cloned

    def _copy_first(self, extent: Extent) -> None:
        with self._changed:
            if extent in self._todo:
                self._wanted.append(extent)
                self._changed.notify_all()
                self._changed.wait_for(lambda: extent not in self._todo or self._is_done)

    def _run(self) -> None:
        try:
            while (extent := self._next()) is not None:
                self._copy(extent)
                with self._changed:
                    del self._todo[extent]
                    self._changed.notify_all()
            self._file.finish(self._final_manifest)
        except BaseException as error:
            self._error = error
        finally:
            self._file.close(keep=self._error is None)
            with self._changed:
                self._is_done = True
                self._todo.clear()
                self._changed.notify_all()

    def _final_manifest(self, checksums: ChecksumsRecord | None) -> Manifest:
        return checkpoint_manifest(self._manifest, self._file, checksums)

    def _next(self) -> Extent | None:
        with self._changed:
            while self._wanted:
                extent = self._wanted.popleft()
                if extent in self._todo:
                    return extent
            return next(iter(self._todo), None)

    def _copy(self, extent: Extent) -> None:
        store = self._engine.store
        if store is None:
            raise StateError("an extent without a store.")
        table = store.checksums(extent) if store.checksum_nbytes else np.empty(0, np.uint32)
        self._file.add_pieces(self._todo[extent], store.segments(extent), table, self._pace)

    def _pace(self, nbytes: int) -> None:
        if self._rate is not None and not self._wanted:
            time.sleep(nbytes / self._rate)
