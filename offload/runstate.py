"""The steps of a run: counted, and committed where the policy says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from offload.checkpoint import Checkpoint
from offload.commit import Commits, StepRecord
from offload.engine import Engine
from offload.errors import StateError
from offload.manifest import Manifest, WearRecord, pack_progress
from offload.meter import WearMeter
from offload.recovery import persistent_buffers, random_states
from offload.wear import Writes


class RunState:
    """Counts optimizer steps and hands each that is due to the commits. `progress` is the user's:
    what JSON can hold, kept with every commit.
    """

    def __init__(
        self, engine: Engine, model: nn.Module, commits: Commits | None, manifest: Manifest | None
    ) -> None:
        self.num_steps = manifest.step if manifest is not None else 0
        self.progress: dict[str, Any] = dict(manifest.progress) if manifest is not None else {}
        self._engine = engine
        self._model = model
        self._commits = commits
        self._checkpoint: Checkpoint | None = None
        self.wear = WearMeter(engine, _earlier_writes(engine, manifest))

    def end_step(self) -> None:
        """An optimizer step has been given out. Blocks only for tiers.nvme.max_writes_per_day."""
        self.num_steps += 1
        self.wear.end_step()
        if self._commits is not None and self.num_steps % self._engine.plan.commit_every == 0:
            self._commits.begin(self._record())
        self.pause()

    def pause(self) -> None:
        """Wait where tiers.nvme.max_writes_per_day says so, with all that has been done durable."""
        self.wear.pause(self._finish_step)

    def _finish_step(self) -> None:
        self._engine.flush()
        self.settle()

    def settle(self) -> None:
        """Wait for the commit under way."""
        if self._commits is not None:
            self._commits.settle()

    def commit(self, *, is_between_steps: bool) -> None:
        """Make the state that the last step left durable now."""
        if self._commits is None:
            raise StateError("there is nothing to commit to: set durability: step in the policy.")
        if not is_between_steps:
            raise StateError("commit() between backward() and step(): call it after step().")
        self._engine.flush()
        self._commits.settle()
        record = self._record()
        if self._commits.is_behind(record):
            self._commits.begin(record)
            self._commits.settle()

    def commit_last(self) -> None:
        """The same at the end of a run; nothing where there are no commits."""
        if self._commits is not None and self.num_steps:
            self.commit(is_between_steps=True)

    def checkpoint(
        self, folder: Path, *, is_between_steps: bool, wait: bool, rate_nbytes: int | None
    ) -> Checkpoint:
        """Begin a checkpoint of the last step, when the one before has ended."""
        if not is_between_steps:
            raise StateError("checkpoint() between backward() and step(): call it after step().")
        self._end_checkpoint()
        self._checkpoint = Checkpoint(self._engine, self._record(), folder, rate_nbytes=rate_nbytes)
        if wait:
            self._checkpoint.wait()
        return self._checkpoint

    def _end_checkpoint(self) -> None:
        """A copy under way reads the run's files, so it ends before they do."""
        if self._checkpoint is not None:
            self._checkpoint.join()

    def end(self) -> None:
        """Stop the threads. Idempotent."""
        try:
            self._end_checkpoint()
        finally:
            if self._commits is not None:
                self._commits.close()

    @property
    def is_durable(self) -> bool:
        """Whether there is a committed step to come back to, or may be."""
        return self._commits is not None and self._commits.is_durable

    def _record(self) -> StepRecord:
        wear = self.wear.expected()
        return StepRecord(
            step=self.num_steps,
            num_steps=tuple(tuple(chunk.num_steps) for chunk in self._engine.chunks),
            buffers=persistent_buffers(self._model),
            rng=random_states(self._engine.device.torch_device),
            progress=pack_progress(self.progress),
            wear=WearRecord.model_construct(total=wear.total, hours=wear.hours),
        )


def _earlier_writes(engine: Engine, manifest: Manifest | None) -> Writes:
    """What the same run wrote to the same drives; a checkpoint may have come from others."""
    num_drives = len(engine.store.paths) if engine.store is not None else 0
    if manifest is None or manifest.kind != "run" or len(manifest.wear.total) != num_drives:
        return Writes()
    return Writes(manifest.wear.total, manifest.wear.hours)
