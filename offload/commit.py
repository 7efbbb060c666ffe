"""Commits: a finished step made durable in the background, so that a crash loses at most the next.

[Note: commit] The protocol, in this order, each step after the one before has ended:
1. every update of the step has written its planes to extents that are not committed, and what
   rests in RAM has been written likewise;
2. fdatasync of every swap file;
3. the checksums of the newest extents, into the one of two files that the manifest does not name,
   and fsync;
4. the manifest to a temporary file, fsync, rename over the old one, fsync of the folder.
Whenever it dies, the manifest on disk is whole, and names extents and checksums that nothing has
written since. The next step computes beside all this; only its first write waits, because the
extents that it writes are those of the last commit.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import enum
import logging
import time
from typing import Any

from offload import io, manifest, runfolder
from offload.chunk import Chunk, ChunkSpec
from offload.engine import Engine
from offload.errors import StateError
from offload.extents import PlaneExtents
from offload.formats import Plane
from offload.homes import PlaneKey
from offload.manifest import (
    ChecksumsRecord,
    ChunkRecord,
    Manifest,
    ParamRecord,
    PlaneRecord,
    TensorRecord,
    WearRecord,
)
from offload.runfiles import make_file, sync_folder, write_checksums, write_durably
from offload.store import ChunkStore
from offload.swapfile import CHECKSUM_NAMES, MANIFEST_NAME, MEMBER_NAME
from offload.tier import Link

logger = logging.getLogger("offload")
_CAUSE = "commit"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What a step leaves beside its planes. Frozen: the next step may be under way when it is
    written.
    """

    step: int
    num_steps: tuple[tuple[int, ...], ...]  # by chunk and parameter
    buffers: dict[str, TensorRecord]
    rng: dict[str, str]
    progress: dict[str, Any]
    wear: WearRecord


class _Phase(enum.Enum):
    IDLE = "idle"
    UPDATING = "updating"  # updates of the step are still to come
    SAVING = "saving"  # planes that rest in RAM are on their way to the drive
    SYNCING = "syncing"  # the thread flushes and renames


class Commits:
    """Commits every so many steps. All methods run on the engine's thread; one thread of its own
    flushes.
    """

    def __init__(self, engine: Engine, store: ChunkStore, run: str) -> None:
        self._engine = engine
        self._store = store
        self._run = run
        self._slot = 0  # of the checksum file to write next
        self._phase = _Phase.IDLE
        self._record: StepRecord | None = None
        self._saving: set[PlaneKey] = set()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "offload-commit")
        self._future: concurrent.futures.Future[tuple[int, int]] | None = None
        self._start = 0.0
        self._is_first = True
        self.last_step: int | None = None  # the newest one that is durable
        self.last_progress: dict[str, Any] = {}  # what was kept with it
        engine.before_change = self.settle
        engine.after_poll = self.advance

    def continue_from(self, manifest: Manifest) -> None:
        """This run has been committed before."""
        self.last_step, self.last_progress = manifest.step, dict(manifest.progress)
        if manifest.checksums is not None:
            self._slot = 1 - manifest.checksums.slot

    def begin(self, record: StepRecord) -> None:
        """Commit the state that this step leaves, as soon as its updates are done. Does not
        block.
        """
        if self._phase is not _Phase.IDLE:
            raise StateError("a commit began while another was under way.")
        self._record, self._phase = record, _Phase.UPDATING
        self._start = time.perf_counter()
        self.advance()

    def advance(self) -> None:
        """Go as far as is possible without waiting. Behind a failure only what the thread has
        begun: a plane may be half written, and then it is not the step's.
        """
        if not self._engine.failed:
            if self._phase is _Phase.UPDATING and not self._pending():
                self._save()
            if self._phase is _Phase.SAVING and not self._saving:
                self._sync()
        if self._phase is _Phase.SYNCING and self._future is not None and self._future.done():
            self._finish(self._future)

    def settle(self) -> None:
        """Wait until nothing is left to commit. Raises StorageError where it failed, StateError
        where the engine has stopped at an earlier error.
        """
        self._engine.check_alive()
        if self._phase is _Phase.IDLE:
            return
        for chunk in self._pending():
            self._engine.finish_update(chunk, wait=True)
        self.advance()
        while self._phase is _Phase.SAVING:
            self._engine.block(Link.WRITE.value)
            self.advance()
        if self._future is not None:
            start = time.perf_counter()
            concurrent.futures.wait([self._future])
            self._engine.stats.stalled(_CAUSE, time.perf_counter() - start)
            self._finish(self._future)

    def is_behind(self, record: StepRecord) -> bool:
        """Whether there is anything to commit: a step, progress, or planes that were written
        outside of a step.
        """
        return (
            (self.last_step, self.last_progress) != (record.step, record.progress)
            or any(chunk.unsaved for chunk in self._engine.chunks)
            or any(
                extents.newest_index != extents.committed
                for chunk in self._engine.chunks
                for extents in self._state_extents(chunk)
            )
        )

    def close(self) -> None:
        """Wait for the thread, whatever becomes of its commit. Idempotent."""
        self._thread.shutdown(wait=True)
        if self._future is None:
            return
        error = self._future.exception()
        if error is None:
            self._committed(self._future.result()[0])
        else:
            logger.warning("the last commit failed, the one before it stands: %s", error)
        self._future = None

    @property
    def is_durable(self) -> bool:
        """Whether a step is committed, or is just being committed."""
        return self.last_step is not None or self._future is not None

    def _pending(self) -> list[Chunk]:
        return [chunk for chunk in self._engine.chunks if chunk.update is not None]

    def _save(self) -> None:
        """Write what rests in RAM and has changed. Interrupted, it goes on where it was."""
        for chunk in self._engine.chunks:
            for plane in sorted(chunk.unsaved, key=lambda plane: plane.value):
                self._save_plane(chunk, plane)
                chunk.unsaved.discard(plane)
        self._phase = _Phase.SAVING

    def _save_plane(self, chunk: Chunk, plane: Plane) -> None:
        extents, key = chunk.extents[plane], (chunk.spec.index, plane)

        def finish(result: int, fd: int, offset: int) -> None:
            self._saving.discard(key)
            if result < 0:
                raise self._store.error(-result, "committing", fd, offset, chunk.name)
            extents.wrote()

        address = chunk.pinned[plane].address
        self._engine.start_plane(io.WRITE, extents.target, address, chunk, finish, io.WRITE_BACK)
        self._saving.add(key)

    def _sync(self) -> None:
        self._future = self._thread.submit(self._write)
        self._phase = _Phase.SYNCING

    def _finish(self, future: concurrent.futures.Future[tuple[int, int]]) -> None:
        """Take the thread's commit as the newest. Until the last line it can be done again: a
        Ctrl-C in the middle must not leave some extents as if the commit had not been.
        """
        try:
            slot, nbytes = future.result()
        except Exception as error:
            self._engine.fail(error)
            self._future, self._phase = None, _Phase.IDLE
            raise
        self._engine.stats.moved(Link.WRITE, nbytes, 0.0)
        self._engine.stats.wrote([nbytes])
        for chunk in self._engine.chunks:
            for extents in self._state_extents(chunk):
                extents.commit()
        self._committed(slot)
        end = time.perf_counter()
        self._engine.timeline.record(_CAUSE, f"step {self.last_step}", _CAUSE, self._start, end, 0)
        self._future, self._phase = None, _Phase.IDLE

    def _committed(self, slot: int) -> None:
        self._slot, self._is_first = 1 - slot, False
        if self._record is not None:
            self.last_step, self.last_progress = self._record.step, self._record.progress

    def _state_extents(self, chunk: Chunk) -> list[PlaneExtents]:
        return [chunk.extents[plane] for plane in chunk.spec.state_planes(self._engine.plan.fmt)]

    # ---- on the thread: what it reads does not change before _finish ----

    def _write(self) -> tuple[int, int]:
        """Returns which of the two checksum files it has taken, and how many bytes of checksums and
        manifest the first path has got.
        """
        self._store.check_owned()
        self._store.sync()
        if self._is_first:
            self._claim_folders()
        checksums = self._write_checksums()
        content = manifest.encode(self._manifest(checksums))
        if self._is_first:
            manifest.decode(content, "the manifest of this run")  # what is kept can be read back
        write_durably(self._store.paths[0] / MANIFEST_NAME, content)
        return self._slot, len(content) + (checksums.nbytes if checksums is not None else 0)

    def _claim_folders(self) -> None:
        """Mark the other paths as parts of a run, and make the names of all files durable, which a
        flush of the files alone does not.
        """
        self._store.trim()
        first, *others = self._store.paths
        for index, path in enumerate(others, start=1):
            write_durably(path / MEMBER_NAME, runfolder.member_content(self._run, index))
        for name in CHECKSUM_NAMES:
            make_file(first / name)
        sync_folder(first)
        for path in self._store.paths:
            sync_folder(path.parent)

    def _write_checksums(self) -> ChecksumsRecord | None:
        """The checksums of the newest extents, in the manifest's order."""
        store, plan = self._store, self._engine.plan
        if not store.checksum_nbytes:
            return None
        tables = [
            store.table(extents.newest)
            for chunk in self._engine.chunks
            for extents in self._state_extents(chunk)
        ]
        run_numel = plan.tile_numel if plan.packs else 0
        return write_checksums(store.paths[0], self._slot, store.checksum_nbytes, tables, run_numel)

    def _manifest(self, checksums: ChecksumsRecord | None) -> Manifest:
        if self._record is None:
            raise StateError("a commit without a step.")
        return manifest_of(self._engine, self._record, self._run, checksums)


def manifest_of(
    engine: Engine, record: StepRecord, run: str, checksums: ChecksumsRecord | None = None
) -> Manifest:
    """The manifest of the step that the newest extents hold."""
    chunks = zip(engine.chunks, record.num_steps, strict=True)
    return Manifest.model_construct(
        run=run,
        step=record.step,
        state_format=engine.plan.fmt.name,
        file_nbytes=engine.store.file_nbytes if engine.store is not None else (0,),
        checksums=checksums,
        chunks=tuple(_chunk_record(engine, chunk, counts) for chunk, counts in chunks),
        buffers=record.buffers,
        rng=record.rng,
        progress=record.progress,
        kind="run",
        wear=record.wear,
    )


def _chunk_record(engine: Engine, chunk: Chunk, num_steps: tuple[int, ...]) -> ChunkRecord:
    return ChunkRecord.model_construct(
        name=chunk.name,
        numel=chunk.spec.numel,
        params=param_records_of(chunk.spec),
        num_steps=num_steps,
        planes={
            plane.value: PlaneRecord.model_construct(
                extents=tuple(extent.pieces for extent in chunk.extents[plane].extents),
                committed=chunk.extents[plane].newest_index,
            )
            for plane in chunk.spec.state_planes(engine.plan.fmt)
            if plane in chunk.extents
        },
    )


def param_records_of(spec: ChunkSpec) -> tuple[ParamRecord, ...]:
    """The layout of a chunk, as the manifest has it."""
    return tuple(
        ParamRecord.model_construct(
            name=param.name,
            shape=param.shape,
            offset=param.offset,
            numel=param.numel,
            trainable=param.trainable,
            state=tuple(map(str, param.state)),
        )
        for param in spec.params
    )
