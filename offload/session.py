"""What `offload.offload()` gives: the engine attached to a model, as a context manager."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from offload import forks, materialise, routing
from offload.attach import Attachment
from offload.checkpoint import Checkpoint
from offload.chunk import Chunk, Ops
from offload.clipping import Clipping
from offload.errors import NumericsError, StateError
from offload.export import export_model
from offload.formats import Plane, state_format
from offload.hooks import Autograd
from offload.inspection import Inspection
from offload.landing import Gradients
from offload.manifest import Manifest
from offload.opening import (
    RESUME,
    find_drives,
    manifest_to_restore,
    manifest_to_resume,
    open_commits,
    open_engine,
    settle,
)
from offload.openmp import Calm
from offload.optimstate import TorchState
from offload.partition import Partition, partition
from offload.plan import make_plan
from offload.planes import PlaneReader
from offload.policy import OffloadPolicy
from offload.recovery import Recovered, adopt
from offload.restore import restore
from offload.runstate import RunState
from offload.spec import ParamSpec
from offload.stats import StepResult
from offload.timeline import Timeline
from offload.transfer import Device, make_device

logger = logging.getLogger("offload")
TIMELINE_CAPACITY = 200_000


class Session(Inspection):
    """An offloaded model. Use as a context manager; leaving it gives back an ordinary model.

    Everything that a plain PyTorch loop does keeps working inside; the optimizer must be an offload
    one.
    """

    def __init__(
        self, model: nn.Module, policy: OffloadPolicy, weights: str | Path | None = None, *,
        device: Device | None = None, poison: bool = False,
    ) -> None:  # fmt: skip
        self.model = model
        self.policy = policy
        self._closed = False
        self._why_closed = "this engine is closed; offload the model again."
        self._half_done = False  # step() has begun to change things, and has not ended
        self._attachment: Attachment | None = None
        self._optimizer: Any = None
        self._captured: list[tuple[Any, ...]] | None = None  # for this step's eager updates
        self.recovered: Recovered | None = None
        routing.refuse_twice(model.parameters())
        parts = partition(model, policy.optimizer)
        materialise.check_source(model, weights)
        self.timeline = Timeline(TIMELINE_CAPACITY)
        self.device = device or make_device(policy.tiers.gpu.device)
        fmt = state_format(policy.state.format, policy.optimizer.kind)
        host = self.device.is_host
        try:
            drives = find_drives(policy)
            policy = settle(policy, drives, weights)
            speeds = drives.weights if drives else ()
            self.plan = make_plan(parts.specs, fmt, policy, host_compute=host, weights=speeds)
            manifest = manifest_to_resume(policy, weights, self.plan, model)
            saved = manifest_to_restore(weights, self.plan, model)
            self._engine = open_engine(
                policy, self.plan, parts.params, drives=drives, device=self.device,
                timeline=self.timeline, poison=poison, manifest=manifest,
            )  # fmt: skip
        except BaseException:
            self.device.close()
            raise
        self._calm: Calm | None = None
        self._watch: contextlib.AbstractContextManager[object] | None = None
        saved = manifest or saved
        try:
            commits = open_commits(self._engine, manifest)
            self.run = RunState(self._engine, model, commits, saved)
            self._dtypes = {id(p): p.dtype for c in self._engine.chunks for p in c.params}
            self._planes = PlaneReader(self._engine)
            self._calm = Calm() if self.device.is_host else None
        except BaseException:
            self._engine.close(keep=manifest is not None)
            raise
        forks.register(self)
        atexit.register(self._shut)  # a program that ends inside the context leaves no files
        try:
            self._materialise(weights, saved)
            self._attach(parts)
            self.run.pause()  # an earlier process may have written all that a day allows
        except BaseException:
            self._abort(constructing=True)
            if self._engine.store is not None:
                self._engine.store.remove_folders()
            raise

    # ---- construction ----

    def _materialise(self, weights: str | Path | None, saved: Manifest | None) -> None:
        if saved is not None and weights == RESUME:
            self.recovered = adopt(self._engine, self.model, saved)
        elif saved is not None:
            self.recovered = restore(self._engine, self.model, saved, Path(str(weights)))
        elif weights is None:
            materialise.from_memory(self._engine)
        elif weights == "init":
            materialise.from_initialisers(self._engine, self.model)
        else:
            materialise.from_folder(self._engine, self.model, Path(weights))
        if not self.device.is_host:
            materialise.move_buffers(self.model, self.device.torch_device)

    def _attach(self, parts: Partition) -> None:
        self.gradients = Gradients(self._engine, eager=self.policy.optimizer.update == "eager")
        self.autograd = Autograd(self._engine, self.gradients)
        self._places = {
            id(p): (c.spec.index, i) for c in self._engine.chunks for i, p in enumerate(c.params)
        }
        self.clipping = Clipping(self.gradients, self._places)
        self._attachment = Attachment(self.model, self._engine, self.autograd)
        self._attachment.replace_forwards(parts, self.policy.activations)
        self._attachment.replace(self.model, "zero_grad", self._model_zero_grad)
        self._attachment.hook_state_dicts(
            lambda module: self._planes.check_fits(module.parameters()), self._weight_of
        )
        self._attachment.refuse_loading(lambda p: self._chunk_of(p)[0].override is not None)
        for chunk in self._engine.chunks:
            if chunk.spec.is_small:  # stays bound: see [Note: small chunk] in partition.py
                self._engine.enter(chunk.spec.index, record=False)
        routing.register(self)

    def _weight_of(self, param: torch.Tensor) -> torch.Tensor:
        return self._planes.weight(*self._chunk_of(param))

    # ---- the loop ----

    def attach(self, optimizer: Any) -> None:
        """Called by an offload optimizer for itself; a later optimizer takes the place of an
        earlier one. Raises StateError where the planes are laid out for another kind.
        """
        kind = self.policy.optimizer.kind
        if optimizer.kind != kind:
            raise StateError(
                f"offload.{type(optimizer).__name__} was created for a model whose state is laid "
                f"out for {kind}. Set optimizer.kind: {optimizer.kind} in the policy."
            )
        self._optimizer = optimizer
        self.gradients.ops_of = self._eager_ops

    def _eager_ops(self, chunk: Chunk) -> Ops | None:
        self._captured = self._captured or self._optimizer.hyperparameters()
        return self._ops(chunk)

    def _ops(self, chunk: Chunk) -> Ops | None:
        landed = chunk.gradient.sum_squares if chunk.gradient is not None else {}
        ops: Ops | None = self._optimizer.update_of(chunk, landed, self.clipping.scales)
        return ops

    def optimizer_step(self, optimizer: Any) -> StepResult:
        """Turn what has landed into pending updates. See [Note: updates] in engine.py."""
        self._check_open()
        if optimizer is not self._optimizer:
            raise StateError("another optimizer was created for this model since; step() that one.")
        if self._half_done:
            raise StateError(
                "an earlier step() or load_state_dict() was interrupted, so the tiers are part old "
                "and part new. "
                "Leave the context; under durability, weights='resume' goes on from the last step "
                "that was committed."
            )
        self.gradients.settle()
        self._check_captured()
        landed = self.gradients.landed()
        if not landed and not self.gradients.anything_updated:
            self._refuse_second_step()
            return StepResult(norm=None)  # as torch: no gradient anywhere, nothing to do
        result = StepResult(norm=self.clipping.norm)
        try:
            self.gradients.check_finite(landed)
        except NumericsError as error:
            if self.policy.optimizer.nonfinite == "raise":
                raise
            return self._skip(dataclasses.replace(result, skipped=True, reason=str(error)))
        self._half_done = True
        updates = {chunk.spec.index: ops for chunk in landed if (ops := self._ops(chunk))}
        for chunk in landed:  # norms and biases stay bound: see [Note: small chunk] in partition.py
            if chunk.spec.is_small and chunk.spec.index in updates:
                self._engine.update_in_place(chunk.spec.index, updates.pop(chunk.spec.index))
        self._engine.set_updates(updates)
        self._choose_update_mode()
        self.gradients.end_step()
        self._engine.end_step()
        self._half_done = False
        self.run.end_step()
        self._forget_step()
        return result

    def _skip(self, result: StepResult) -> StepResult:
        """Drop the gradients. No count moves, so nothing later can tell that they were there."""
        logger.warning("step skipped: %s", result.reason)
        self.gradients.zero()
        self.gradients.end_step()
        self._engine.end_step()
        self._forget_step()
        return result

    def _forget_step(self) -> None:
        if self._attachment is not None:
            self._attachment.checked = False
        self.clipping.clear()
        self._captured = None

    def _refuse_second_step(self) -> None:
        if self.gradients.must_zero:
            raise StateError(
                "step() twice for one backward(): the first has consumed the gradients. Call "
                "zero_grad() and backward() before the next step()."
            )

    def _check_captured(self) -> None:
        if self._captured is not None and self._captured != self._optimizer.hyperparameters():
            raise StateError(
                "hyperparameters changed between backward() and step(); optimizer.update eager "
                "captured them in backward(). Call the scheduler after optimizer.step(), or set "
                "optimizer.update: deferred."
            )

    def _choose_update_mode(self) -> None:
        """`auto`: after the first step it is known whether anything needs the whole gradient before
        an update.
        """
        if self.policy.optimizer.update != "auto" or self.gradients.mode_chosen:
            return
        self.gradients.mode_chosen = True
        why_wait = self.clipping.why_wait(
            resident=self.plan.grads_resident, skips=self.policy.optimizer.nonfinite == "skip"
        )
        self.gradients.eager = not why_wait
        reason = why_wait or "one backward() per step and no clipping: gradients need not wait"
        logger.info("updates are %s: %s", "deferred" if why_wait else "eager", reason)

    def zero_grad(self) -> None:
        """Drop gradients that no step() has taken."""
        self._check_open()
        self.gradients.zero()
        self.clipping.clear()

    def _model_zero_grad(self, set_to_none: bool = True) -> None:
        self.zero_grad()

    def clip_grad_norm_(
        self, params: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor:
        """Scale the landed gradients of `params` so that their 2-norm is at most max_norm; return
        the norm (fp32).
        """
        members = [params] if isinstance(params, torch.Tensor) else list(params)
        total = self.total_norm(norm_type, members)
        self.scale_gradients(members, max_norm, total)
        return total

    def total_norm(
        self, norm_type: float, params: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The norm of the landed gradients (fp32 scalar, CPU), of all parameters or of `params`."""
        return self.clipping.total_norm(norm_type, params)

    def scale_gradients(
        self, params: Sequence[torch.Tensor], max_norm: float, total: torch.Tensor
    ) -> None:
        """clip_grad_norm_'s second half: scale so that `total` becomes at most max_norm."""
        self.clipping.clip(params, max_norm, total)

    def unscale_gradients(self, params: Sequence[torch.Tensor], factor: float) -> bool | None:
        """Undo GradScaler's factor; whether the gradients are finite, None where none landed."""
        return self.clipping.unscale(params, factor)

    def expect_scaled_loss(self) -> None:
        """GradScaler is about to scale a loss, perhaps this model's."""
        self.clipping.expect_scaled_loss(may_wait=self.policy.optimizer.update == "auto")

    # ---- Owner: what routing asks ----

    def owns(self, param: torch.Tensor) -> bool:
        return id(param) in getattr(self, "_places", {})

    def spec_of(self, param: torch.Tensor) -> ParamSpec:
        chunk, position = self._chunk_of(param)
        return chunk.spec.params[position]

    def note_loss(self, *, finite: bool) -> None:
        """Backward runs from a loss that is not finite, or is over."""
        self.gradients.loss_finite = finite

    def has_gradients(self) -> bool:
        return bool(self.gradients.contributors())

    def step_counts(self, params: list[torch.Tensor]) -> list[int]:
        places = [self._places[id(param)] for param in params]
        return [self._engine.chunks[index].num_steps[position] for index, position in places]

    def torch_state(
        self, params: Sequence[torch.Tensor], moments: Mapping[str, Plane]
    ) -> TorchState:
        """An optimizer's state, to be read or written as torch has it."""
        self._check_open()
        return TorchState(self._engine, [self._chunk_of(param) for param in params], moments)

    @contextlib.contextmanager
    def changing_state(self, who: str) -> Iterator[None]:
        """What changes the tiers outside of a step: all of it, or nothing goes on."""
        self._check_open()
        if not self._is_between_steps:
            raise StateError(f"{who} between backward() and step(): call it after step().")
        self._half_done = True
        yield
        self._half_done = False
        self._planes.forget()

    # ---- between steps ----

    def flush(self) -> None:
        """Finish every pending update, and the commit that waits for it."""
        self._check_open()
        self._engine.flush()
        self.run.settle()

    @property
    def _is_between_steps(self) -> bool:
        """Whether the tiers hold what a step has left, and nothing of the next."""
        return not (self._half_done or self.gradients.anything_updated)

    def commit(self) -> None:
        """Make the state that the last step left durable now, whatever the cadence. Blocks."""
        self._check_open()
        self.run.commit(is_between_steps=self._is_between_steps)

    def checkpoint(
        self, folder: str | Path, *, wait: bool = True, rate_nbytes: int | None = None
    ) -> Checkpoint:
        """Copy the state that the last step left to an empty folder, for weights=<that folder>.

        Shares the bytes where the file system has reflinks. With wait=False training goes on while
        the rest is copied, at most `rate_nbytes` a second; the result's wait() then ends it.
        """
        self._check_open()
        self.flush()
        return self.run.checkpoint(
            Path(folder), is_between_steps=self._is_between_steps, wait=wait,
            rate_nbytes=rate_nbytes,
        )  # fmt: skip

    @contextlib.contextmanager
    def gathered(self, what: nn.Module | torch.Tensor | Iterable[torch.Tensor]) -> Iterator[None]:
        """Have real weights outside of forward, to read or to write; what was written goes back to
        the tiers.

        Memory: two copies of the weights of every chunk that is touched, beside the slab.
        """
        self._check_open()
        params = list(what.parameters()) if isinstance(what, nn.Module) else what
        members = [params] if isinstance(params, torch.Tensor) else list(params)
        indices = sorted({self._places[id(param)][0] for param in members})
        with self._planes.gathered(indices):
            yield

    def export(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write a folder that transformers loads: safetensors in shards, and the config.

        The weights are those that compute uses; dtype=torch.float32 writes the fp32 masters.
        """
        self._check_open()
        self._engine.flush()

        def read(chunk: Chunk) -> dict[str, torch.Tensor]:
            return self._planes.weights(chunk, dtype)

        return export_model(self.model, self._engine.chunks, read, Path(folder))

    # ---- ends ----

    def __enter__(self) -> Session:
        self._check_open()
        self._watch = self.autograd.saving()  # finds absent weights read outside of the model
        self._watch.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None
        if kind is None:
            self.close()
        else:
            self._abort()

    def _check_open(self) -> None:
        if self._closed:
            raise StateError(self._why_closed)

    def close(self, *, give_back: bool = True, discard: bool = False) -> None:
        """Finish updates, give the weights back to the model where RAM allows, remove the files.

        Under durability the last step is committed and the files stay, for weights="resume";
        `discard` removes them. With give_back=False the model keeps placeholders. Idempotent.
        """
        if self._closed:
            return
        try:
            self._engine.flush()
            if self._is_between_steps and not discard:
                self.run.commit_last()
            if give_back:
                self._planes.give_back_all(self._dtypes)
        finally:
            self._shut(discard=discard)

    def _abort(self, *, constructing: bool = False) -> None:
        """After an exception: keep what can be kept, and leave no thread, file or lock behind.

        After an I/O error in training some planes may be half written, so the weights stay away.
        While the model is still moving in, what has moved can be read back, and the rest has not
        left.
        """
        if self._closed:
            return
        try:
            if hasattr(self, "autograd"):
                self.autograd.abandon()
            self._engine.drain()
            if constructing:
                self._planes.give_back_all(self._dtypes)
            elif not self._engine.failed:
                self.flush()
                self._planes.give_back_all(self._dtypes)
            else:
                logger.warning(
                    "the weights are not given back, because an update may be half written; "
                    "the model keeps placeholders."
                )
        except Exception as error:
            logger.warning("the weights could not be given back: %s", error)
        finally:
            self._shut()

    def _shut(self, *, discard: bool = False) -> None:
        self._closed = True
        atexit.unregister(self._shut)
        with contextlib.ExitStack() as rest:  # last first; also behind one that is interrupted
            if not self.device.is_host:
                rest.callback(materialise.move_buffers, self.model, torch.device("cpu"))
            if self._calm is not None:
                rest.callback(self._calm.close)
            rest.callback(self._close_engine, discard=discard)
            rest.callback(self._planes.hide)
            rest.callback(self.run.end)
            if self._attachment is not None:
                rest.callback(self._attachment.undo)
            rest.callback(routing.unregister, self)

    def _close_engine(self, *, discard: bool) -> None:
        self._engine.close(keep=self.run.is_durable and not discard)

    def let_go(self) -> None:
        """In a forked child: be closed, without a wait and without a change that the parent would
        see. See [Note: forks].
        """
        self._closed, self._why_closed = True, forks.REFUSAL
        atexit.unregister(self._shut)
        self._planes.hide()  # the child's slab is empty
