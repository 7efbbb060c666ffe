"""Checkpoints: a step copied to a folder of its own, whole, while training goes on.

[Note: copy before overwrite] A checkpoint copies extents that hold the planes of one step. Training
may write the first of them a step later (under durability, two). Whoever is about to write one asks
here first: if it has not been copied, it is copied next, and the writer waits for that plane alone.
Planes that rest in RAM change in place, so they are copied before the call returns.
"""

from __future__ import annotations

import collections
import logging
import threading
from pathlib import Path

from offload import swapfile
from offload.checkpointfile import CheckpointFile
from offload.chunk import Chunk
from offload.commit import StepRecord, manifest_of
from offload.engine import Engine
from offload.errors import StateError, StorageError
from offload.extents import Extent, parts_of
from offload.formats import Plane
from offload.homes import PlaneKey
from offload.plan import CHECKSUM_NBYTES
from offload.stepreader import PART_NBYTES

logger = logging.getLogger("offload")


class Checkpoint:
    """A checkpoint under way. `wait` blocks until it is whole; training may go on meanwhile."""

    def __init__(
        self, engine: Engine, record: StepRecord, folder: Path, *, rate_nbytes: int | None
    ) -> None:
        """Begin to copy the state as it is now, with no update pending. `rate_nbytes` is the most
        that is copied in a second, so that training keeps the drive; None is no limit.
        """
        if rate_nbytes is not None and rate_nbytes < 1:
            raise StateError(
                f"rate_nbytes {rate_nbytes}: name at least one byte a second, or None."
            )
        self._engine = engine
        fmt, store = engine.plan.fmt, engine.store
        keys = [(c, p) for c in engine.chunks for p in c.spec.state_planes(fmt)]
        sizes = [((c.spec.index, p), c.spec.nbytes(p, fmt)) for c, p in keys]
        block = store.checksum_nbytes if store is not None else CHECKSUM_NBYTES
        self._manifest = manifest_of(engine, record, run="")
        run_numel = engine.plan.tile_numel if store is not None and store.pack_stride else 0
        self._file = CheckpointFile(folder, sizes, block, run_numel)
        self._rate = rate_nbytes
        self._changed = threading.Condition()
        self._todo: dict[Extent, PlaneKey] = {}
        self._wanted: collections.deque[Extent] = collections.deque()
        self._error: BaseException | None = None
        self._is_done = False
        try:
            for chunk, plane in keys:
                key = (chunk.spec.index, plane)
                if _is_on_drive(chunk, plane):
                    self._todo[chunk.extents[plane].newest] = key
                else:
                    self._file.add_memory(key, chunk.pinned[plane])
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
        """Block until it has ended, well or not, at full speed: nothing else needs the drive."""
        with self._changed:
            self._rate = None
            self._changed.notify_all()
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
            if extent in self._todo and not self._is_done:
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
            self._file.finish(self._manifest)
            self._warn_of_room()
        except BaseException as error:
            self._error = error
            logger.warning("the checkpoint in %s failed: %s", self._file.folder, error)
        finally:
            try:
                self._file.close(keep=self._error is None)
            finally:  # whatever happened: nobody waits for this copy any longer
                with self._changed:
                    self._is_done = True
                    self._todo.clear()
                    self._changed.notify_all()

    def _warn_of_room(self) -> None:
        """Swap files are preallocated so that no drive fills up in training. What is shared has
        lost that: it takes room when the run writes it next.
        """
        free = swapfile.free_nbytes(self._file.folder)
        if free < self._file.num_cloned:
            logger.warning(
                "the checkpoint in %s shares %d bytes with the run, which takes as much room as it "
                "writes them anew, and %d are free. Free space, or move the checkpoint to another "
                "drive.", self._file.folder, self._file.num_cloned, free,
            )  # fmt: skip

    def _next(self) -> Extent | None:
        with self._changed:
            while self._wanted and self._wanted[0] not in self._todo:
                self._wanted.popleft()
            if self._wanted:  # it stays there until it is copied: meanwhile nothing is throttled
                return self._wanted[0]
            return next(iter(self._todo), None)

    def _copy(self, extent: Extent) -> None:
        store = self._engine.store
        if store is None:
            raise StateError("an extent without a store.")
        key = self._todo[extent]
        chunk = self._engine.chunks[key[0]].name

        def error(code: int, fd: int, offset: int) -> StorageError:
            return store.error(code, "copying", fd, offset, chunk)

        pieces = store.segments(extent)
        parts = parts_of(
            [piece[:3] for piece in pieces], store.table(extent), store.checksum_nbytes,
            store.runs(extent), PART_NBYTES,
        )  # fmt: skip
        self._file.add_pieces(key, pieces, parts, error=error, pace=self._pace)

    def _pace(self, nbytes: int) -> None:
        """Sleep so long that the rate is kept; a writer that waits, and the end, cut it short."""
        with self._changed:
            if self._rate is not None:
                self._changed.wait_for(
                    lambda: self._wanted or self._rate is None, timeout=nbytes / self._rate
                )


def _is_on_drive(chunk: Chunk, plane: Plane) -> bool:
    """Whether an extent holds the plane as it is now. Where commits have saved a plane that rests
    in RAM it does, and copying that needs nobody to wait.
    """
    return plane in chunk.extents and (plane not in chunk.pinned or plane not in chunk.unsaved)
