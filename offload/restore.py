"""Starting from a checkpoint: any placement, budget and number of paths, the same bits."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
from torch import nn

from offload import io, materialise, swapfile
from offload.chunk import Chunk
from offload.commit import read_checksums
from offload.engine import Engine
from offload.errors import StateError, StorageError
from offload.formats import Plane
from offload.manifest import Manifest
from offload.recovery import Recovered, adopt_rest
from offload.slots import Slab
from offload.store import Extent
from offload.swapfile import SWAP_NAME

_PART_NBYTES = 2 << 20  # a multiple of every checksum block


def restore(engine: Engine, model: nn.Module, manifest: Manifest, folder: Path) -> Recovered:
    """Copy all planes of a checkpoint into the tiers, each block verified. Memory: 2 MiB beside
    the slab.
    """
    with _Source(manifest, folder) as source:
        for chunk in engine.chunks:
            materialise.make_real(chunk)
            for plane in chunk.spec.state_planes(engine.plan.fmt):
                source.copy(engine, chunk, plane)
            chunk.filled = True
    return adopt_rest(engine, model, manifest)


class _Source:
    """A checkpoint's file, open for reading."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        if len(manifest.file_nbytes) != 1:
            raise StateError(
                f"the run in {folder} lies on {len(manifest.file_nbytes)} paths. Make a checkpoint "
                "of it with `offload checkpoint`, and start from that."
            )
        self._path = folder / SWAP_NAME
        self._extents: dict[tuple[int, Plane], Extent] = {}
        self._tables: dict[tuple[int, Plane], np.ndarray] = {}
        record, start = manifest.checksums, 0
        entries = read_checksums(folder, record) if record is not None else None
        self._block_nbytes = record.block_nbytes if record is not None else 0
        for index, plane, planes in manifest.planes():
            extent = planes.restored().newest
            self._extents[index, plane] = extent
            if entries is not None:
                count = sum(-(-n // self._block_nbytes) for _, _, n in extent.pieces)
                self._tables[index, plane] = entries[start : start + count]
                start += count
        if entries is not None and start != len(entries):
            raise StateError(f"the checksums in {folder} are of other extents.")
        self._slab = Slab(_PART_NBYTES)
        self._part = self._slab.carve("part", _PART_NBYTES)
        self._fd = swapfile.open_to_read(folder, swapfile.RunFiles(manifest.run).header(0))

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._slab.close()

    def copy(self, engine: Engine, chunk: Chunk, plane: Plane) -> None:
        """Bring one plane to where the plan has it."""
        key, at, entry = (chunk.spec.index, plane), 0, 0
        pinned = chunk.pinned.get(plane)
        for _, offset, nbytes in self._extents[key].pieces:
            for done in range(0, nbytes, _PART_NBYTES):
                part = min(_PART_NBYTES, nbytes - done)
                self._read(offset + done, part)
                if self._block_nbytes:
                    entry += self._verify(self._tables[key][entry:], offset + done, part, chunk)
                if pinned is not None:
                    pinned.tensor[at : at + part] = self._part.tensor[:part]
                else:
                    engine.write_part(chunk, plane, at, self._part.address, part)
                at += part
        chunk.changed(plane)

    def _read(self, offset: int, nbytes: int) -> None:
        view, done = self._part.tensor.numpy().data, 0
        while done < nbytes:
            try:
                num_read = os.preadv(self._fd, [view[done:nbytes]], offset + done)
            except OSError as error:
                raise self._error(error.errno or errno.EIO, offset + done) from error
            if num_read == 0:
                raise self._error(errno.ENODATA, offset + done)
            done += num_read

    def _verify(self, table: np.ndarray, offset: int, nbytes: int, chunk: Chunk) -> int:
        found = np.empty(-(-nbytes // self._block_nbytes), np.uint32)
        io.crc32c_blocks(self._part.address, nbytes, self._block_nbytes, found.ctypes.data)
        wrong = np.flatnonzero(found != table[: len(found)])
        if len(wrong):
            place = offset + int(wrong[0]) * self._block_nbytes
            raise self._error(errno.EBADMSG, place, chunk.name)
        return len(found)

    def _error(self, code: int, offset: int, chunk: str = "") -> StorageError:
        return StorageError(code, "reading", path=str(self._path), offset=offset, chunk=chunk)
