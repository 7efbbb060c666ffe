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
from offload.extents import BlockTable, Extent, block_sizes
from offload.formats import FORMATS, Plane
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
    folder: Path, slot: int, block_nbytes: int, tables: Sequence[BlockTable], run_numel: int = 0
) -> ChecksumsRecord:
    """Make checksums durable, and the lengths of what may be packed in runs of `run_numel` elements
    (0: nothing is), their file's name too, and return what a manifest says of them. Raises
    StorageError.
    """
    arrays = [table.checksums for table in tables]
    arrays += [table.lengths for table in tables if run_numel]
    path, crc = folder / CHECKSUM_NAMES[slot], 0
    is_new = not lies_there(path)
    for array in arrays:
        crc = zlib.crc32(array.data, crc)
    with storage_errors("committing", path):
        write_synced(path, [array.data for array in arrays])
    if is_new:
        sync_folder(folder)  # the manifest that names it must not be there without it
    return ChecksumsRecord.model_construct(
        slot=slot,
        block_nbytes=block_nbytes,
        nbytes=sum(array.nbytes for array in arrays),
        crc32=crc,
        run_numel=run_numel,
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


def read_tables(folder: Path, step: Manifest) -> dict[tuple[int, Plane], BlockTable]:
    """The blocks of every committed plane; none where there are no checksums. Raises StorageError
    where the file is not what it was.
    """
    record, start = step.checksums, 0
    if record is None:
        return {}
    entries, fmt = read_checksums(folder, record), FORMATS[step.state_format]
    checksums, lengths = np.split(
        entries, [len(entries) // 2 if record.run_numel else len(entries)]
    )
    tables: dict[tuple[int, Plane], BlockTable] = {}
    for index, plane, planes in step.planes():
        sizes = block_sizes(Extent(planes.extents[planes.committed]), record.block_nbytes)
        blocks, plain = slice(start, start + len(sizes)), np.array(sizes, np.uint32)
        found = lengths[blocks] if record.run_numel else plain
        least = 1 if fmt.packed_item_nbytes(plane) else plain
        if (found < least).any() or (found > plain).any():
            path = folder / CHECKSUM_NAMES[record.slot]
            raise StorageError(errno.EBADMSG, "reading", path=str(path))
        tables[index, plane] = BlockTable(checksums[blocks], found)
        start += len(sizes)
    return tables


def read_checksums(folder: Path, record: ChecksumsRecord) -> np.ndarray:
    """The uint32 of a commit's checksum file. Raises StorageError where it is not what it was."""
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
