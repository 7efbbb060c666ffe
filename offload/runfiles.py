"""The small files of a run, manifest and checksums: written so that a crash leaves the old or the
new one, whole, and read as files of unknown origin.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from offload import manifest, swapfile
from offload.errors import StorageError, storage_errors
from offload.manifest import ChecksumsRecord, Manifest
from offload.runfolder import lies_there
from offload.swapfile import CHECKSUM_NAMES, MANIFEST_NAME, open_own


def write_durably(path: Path, content: bytes) -> None:
    """Replace a small file so that a crash leaves the old one or the new one, whole. Raises
    StorageError.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        with storage_errors("committing", path):
            write_synced(temporary, [content])
            os.rename(temporary, path)
    except StorageError:
        swapfile.remove(temporary)
        raise
    sync_folder(path.parent)


def make_file(path: Path) -> None:
    """Have a file of this name, with what it holds if there is one. Raises StorageError."""
    with storage_errors("making", path):
        os.close(open_own(path, os.O_WRONLY | os.O_CREAT))


def write_synced(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write a file from its start and flush it. Raises OSError."""
    fd = open_own(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.ftruncate(fd, 0)
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def write_checksums(
    folder: Path, slot: int, block_nbytes: int, tables: Sequence[np.ndarray]
) -> ChecksumsRecord:
    """Make checksums durable, their file's name too, and return what a manifest says of them.
    Raises StorageError.
    """
    path, crc = folder / CHECKSUM_NAMES[slot], 0
    is_new = not lies_there(path)
    for table in tables:
        crc = zlib.crc32(table.data, crc)
    with storage_errors("committing", path):
        write_synced(path, [table.data for table in tables])
    if is_new:
        sync_folder(folder)  # the manifest that names it must not be there without it
    return ChecksumsRecord.model_construct(
        slot=slot,
        block_nbytes=block_nbytes,
        nbytes=sum(table.nbytes for table in tables),
        crc32=crc,
    )


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Raises StorageError."""
    with storage_errors("flushing", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _read_whole(path: Path, nbytes_max: int) -> bytes:
    """A file of a run, or its first `nbytes_max` bytes. Raises OSError; never waits for a pipe."""
    with open(open_own(path, os.O_RDONLY), "rb") as file:
        # read(n) takes memory for n bytes at once, and n may be a hostile manifest's
        return file.read(min(os.fstat(file.fileno()).st_size, nbytes_max))


def read_checksums(folder: Path, record: ChecksumsRecord) -> np.ndarray:
    """The uint32 checksums of a commit. Raises StorageError where the file is not what it was."""
    path = folder / CHECKSUM_NAMES[record.slot]
    with storage_errors("reading", path):
        content = _read_whole(path, record.nbytes + 1)
    if len(content) != record.nbytes or zlib.crc32(content) != record.crc32:
        raise StorageError(errno.EBADMSG, "reading", path=str(path))
    return np.frombuffer(content, np.uint32)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder. Raises StorageError where there is none, or it is broken."""
    path = folder / MANIFEST_NAME
    with storage_errors("reading", path):
        try:
            content = _read_whole(path, manifest.MANIFEST_NBYTES_MAX + 1)
        except FileNotFoundError as error:
            remedy = f"There is no committed run in {folder}."
            raise StorageError(errno.ENOENT, "reading", path=str(path), remedy=remedy) from error
    return manifest.decode(content, str(path))
