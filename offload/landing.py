"""Gradients: how they land, accumulate, wait, spill, and are measured. Their state lives on the
chunk.

A gradient leaves `Parameter.grad` the moment autograd has made it. The sum of squares is taken in
the same pass, in a fixed order, so the global norm's bits do not depend on where anything lies.

[Note: postponed] Backward reaches the last chunk of the forward first, and the next forward needs
it last. Its eager update is given out behind all others, so that the drive has work while the next
forward computes (the idea of GreedySnake's delayed updates, arXiv 2512.17570, for one chunk). It
costs one gradient slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping

import torch

from offload import io
from offload.chunk import Chunk, Gradient, Ops
from offload.engine import Engine
from offload.errors import BudgetError, NumericsError, StateError
from offload.factors import FactorSums
from offload.formats import (
    LandMode,
    Plane,
    gradient_sum_squares,
    gradient_sums,
    join_master,
    land_gradient,
)
from offload.slots import Slot
from offload.stats import UPDATE
from offload.tier import Link

OpsOf = Callable[[Chunk], Ops | None]


class Gradients:
    """Lands gradients on the engine's chunks. `ops_of` gives the update of a chunk that is complete
    (eager).
    """

    def __init__(self, engine: Engine, *, eager: bool) -> None:
        self.engine = engine
        self.eager = eager
        self.loss_finite = True  # of the backward that runs
        self._tainted = False  # something landed from a loss that was not finite
        self._ending = False  # backward is over, and only what was postponed is left
        self.mode_chosen = False  # `auto` has decided
        self.ops_of: OpsOf | None = None
        self.num_backwards = 0  # since the last step
        self.must_zero = False  # step() has consumed the gradients, zero_grad() has not been called
        self._arriving: dict[
            int, set[int]
        ] = {}  # chunk index -> positions on their way from the device
        self._bounces: dict[int, Slot] = {}
        self._sums: dict[
            int, dict[int, float]
        ] = {}  # sums of squares of this step, kept beyond eager updates
        self._updated: set[int] = set()  # chunks whose eager update has been given out in this step

    # ---- landing ----

    def land(
        self, index: int, position: int, grad: torch.Tensor, graph_task: int, *, split: bool
    ) -> None:
        """Take one parameter's gradient from autograd. `split` says that micro-batches of a block
        add up in fp32.
        """
        with self.engine.lock:
            chunk = self.engine.chunks[index]
            name = chunk.spec.params[position].name
            self._check(chunk, name, grad)
            self._tainted = self._tainted or not self.loss_finite
            gradient = chunk.gradient or self._begin(chunk)
            self._bring_back(chunk, gradient)
            mode = self._mode(gradient, position, graph_task, split=split)
            gradient.graph_task[position] = graph_task
            if mode is LandMode.ACCUMULATE_FP32:
                self._ensure_low_half(chunk, gradient)
            if self.engine.device.is_host:
                self._settle(chunk, position, grad.contiguous().view(-1), mode)
            else:
                self._land_from_device(chunk, position, grad, mode)

    def _check(self, chunk: Chunk, name: str, grad: torch.Tensor) -> None:
        if self.must_zero:
            raise StateError(
                "backward() after optimizer.step() without zero_grad(): the engine does not keep "
                "gradients "
                "beyond step(), so nothing is there to accumulate onto. Call optimizer.zero_grad() "
                "after each step."
            )
        if chunk.spec.index in self._updated:
            raise StateError(
                f"a second gradient for {name} came after its update was given out. "
                "optimizer.update eager takes "
                "one backward() per step(); set optimizer.update: deferred for gradient "
                "accumulation."
            )
        if grad.layout is not torch.strided:
            raise StateError(
                f"{name} has a sparse gradient; build the embedding with sparse=False."
            )
        self.engine.finish_update(chunk, wait=True)

    def _begin(self, chunk: Chunk) -> Gradient:
        gradient = Gradient()
        self._sums[chunk.spec.index] = gradient.sum_squares
        gradient.hi = self._slot(chunk)
        chunk.gradient = gradient
        return gradient

    def _slot(self, chunk: Chunk) -> Slot:
        return self.engine.acquire_grad_slot(chunk, lambda: self._spill_another(chunk))

    def _mode(self, gradient: Gradient, position: int, graph_task: int, *, split: bool) -> LandMode:
        if position not in gradient.sum_squares and position not in gradient.graph_task:
            return LandMode.SET
        same = gradient.graph_task[position] == graph_task
        if same and not split and position not in gradient.accumulated:
            return LandMode.ACCUMULATE_IN_DTYPE
        gradient.accumulated.add(position)
        return LandMode.ACCUMULATE_FP32

    def _ensure_low_half(self, chunk: Chunk, gradient: Gradient) -> None:
        if gradient.has_lo or Plane.GRAD_LO not in self.engine.plan.fmt.grad_planes:
            return
        try:
            gradient.lo = self._slot(chunk)
        except StateError as error:
            nbytes = sum(
                s.nbytes(Plane.GRAD_LO, self.engine.plan.fmt) for s in self.engine.plan.specs
            )
            raise BudgetError(
                f"gradient accumulation in fp32 needs {nbytes} bytes more. Raise tiers.cpu.budget "
                "by that much, "
                "or name a drive in tiers.nvme.paths."
            ) from error
        gradient.lo.region.tensor.zero_()
        gradient.has_lo = True

    def _view(self, chunk: Chunk, slot: Slot, plane: Plane, position: int) -> torch.Tensor:
        param = chunk.spec.params[position]
        return slot.region.view(self.engine.plan.fmt.dtypes[plane], param.numel, param.offset)

    def _settle(self, chunk: Chunk, position: int, source: torch.Tensor, mode: LandMode) -> None:
        """Bring a host gradient (numel,) into its plane and book its sum of squares."""
        gradient = chunk.gradient
        if gradient is None or gradient.hi is None:
            raise StateError(f"chunk {chunk.name} has no slot for its gradient.")
        high = self._view(chunk, gradient.hi, Plane.GRAD, position)
        low = (
            None if gradient.lo is None else self._view(chunk, gradient.lo, Plane.GRAD_LO, position)
        )
        gradient.sum_squares[position] = land_gradient(source, high, low, mode)
        self._book_factors(chunk, gradient, position, high, low)

    def _book_factors(
        self, chunk: Chunk, gradient: Gradient, position: int, high: torch.Tensor,
        low: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """The sums of [Note: factors], of what the planes hold now."""
        param = chunk.spec.params[position]
        if param.matrix is not None:
            sums = gradient_sums(high, low, param.matrix, is_vector=len(param.shape) < 2)
            gradient.factor_sums[position] = FactorSums(*sums)

    def _land_from_device(
        self, chunk: Chunk, position: int, grad: torch.Tensor, mode: LandMode
    ) -> None:
        """Copy out beside compute. The first gradient goes straight to its plane, later ones
        through a bounce slot.
        """
        index = chunk.spec.index
        arriving = self._arriving.setdefault(index, set())
        while position in arriving:
            self.engine.block(Link.D2H.value)
        gradient = chunk.gradient
        if gradient is None or gradient.hi is None:
            raise StateError(f"chunk {chunk.name} has no slot for its gradient.")
        slot = gradient.hi
        if mode is not LandMode.SET:
            if index not in self._bounces:
                self._bounces[index] = self._slot(chunk)
            slot = self._bounces[index]
        target = self._view(chunk, slot, Plane.GRAD, position)
        arriving.add(position)

        def finish(result: int, fd: int, offset: int) -> None:
            if mode is LandMode.SET:
                gradient.sum_squares[position] = gradient_sum_squares(target)
                self._book_factors(chunk, gradient, position, target, None)
            else:
                self._settle(chunk, position, target, mode)
            arriving.discard(position)
            if not arriving and index in self._bounces:
                bounce = self._bounces.pop(index)
                bounce.pool.release(bounce)

        self.engine.start_d2h(chunk, target, grad.contiguous().view(-1), finish)

    def _await_arrivals(self, chunk: Chunk) -> None:
        while self._arriving.get(chunk.spec.index):
            self.engine.block(Link.D2H.value)

    # ---- complete: spill or update ----

    def complete(self, index: int) -> None:
        """A chunk has all the gradients this backward will bring: update it (eager), or let them
        wait.
        """
        with self.engine.lock:
            chunk = self.engine.chunks[index]
            if chunk.gradient is None or index in self._updated or chunk.spec.is_small:
                return  # the small chunk stays bound; step() updates it in place
            if self.eager and self.ops_of is not None:
                if index == self.engine.plan.postponed and not self._ending:
                    return
                self._await_arrivals(chunk)
                self.check_finite([chunk])
                ops = self.ops_of(chunk)  # where the optimizer refuses, nothing has been updated
                self._updated.add(index)
                if ops:
                    self.engine.update_now(index, ops)
            elif not (
                self.engine.plan.grads_resident or chunk.gradient.spilled or chunk.gradient.moving
            ):
                self._await_arrivals(chunk)
                self._spill(chunk, chunk.gradient)

    def complete_all(self) -> None:
        """Backward is over: complete every chunk that has landed and not been completed."""
        self._ending = True
        try:
            for chunk in self.landed():
                self.complete(chunk.spec.index)
        finally:
            self._ending = False

    def _spill(self, chunk: Chunk, gradient: Gradient) -> None:
        """Write a waiting gradient to its extents and give the slots back when that is done."""
        halves = [(Plane.GRAD, gradient.hi), (Plane.GRAD_LO, gradient.lo)]
        moves = [(plane, slot) for plane, slot in halves if slot is not None]
        left = {plane for plane, _ in moves}
        gradient.moving = True
        for plane, slot in moves:

            def finish(result: int, fd: int, offset: int, plane: Plane = plane) -> None:
                self._raise_on_error(result, "writing the gradient to", fd, offset, chunk)
                left.discard(plane)
                if not left:
                    self._release_slots(gradient)
                    gradient.moving, gradient.spilled = False, True

            self._start_move(io.WRITE, chunk, plane, slot, finish)

    def _release_slots(self, gradient: Gradient) -> None:
        for slot in (gradient.hi, gradient.lo):
            if slot is not None:
                slot.pool.release(slot)
        gradient.hi = gradient.lo = None

    def _bring_back(self, chunk: Chunk, gradient: Gradient) -> None:
        """Read a spilled gradient back into slots, because more of it arrives."""
        while gradient.moving:
            self.engine.block(Link.WRITE.value)
        if not gradient.spilled:
            return
        gradient.hi = self._slot(chunk)
        gradient.lo = self._slot(chunk) if gradient.has_lo else None
        for plane, slot in ((Plane.GRAD, gradient.hi), (Plane.GRAD_LO, gradient.lo)):
            if slot is not None:
                self.engine.move_plane(io.READ, chunk, plane, slot.region.address)
        gradient.spilled = False

    def _spill_another(self, chunk: Chunk) -> bool:
        """Make room: spill the partial gradient of another chunk of the same size class."""
        for other in self.engine.chunks:
            gradient = other.gradient
            if (
                other is chunk
                or gradient is None
                or gradient.hi is None
                or Plane.GRAD not in other.extents
            ):
                continue
            mine = self.engine.plan.pool_of(chunk.spec.index)
            if other.spec.index in mine.members and not gradient.moving and other.update is None:
                self._await_arrivals(other)
                self._spill(other, gradient)
                return True
        return False

    def _start_move(
        self,
        op: int,
        chunk: Chunk,
        plane: Plane,
        slot: Slot,
        finish: Callable[[int, int, int], None],
    ) -> None:
        extent = chunk.extents[plane].newest
        self.engine.start_plane(op, extent, slot.region.address, chunk, finish, io.WRITE_BACK)

    def _raise_on_error(self, result: int, action: str, fd: int, offset: int, chunk: Chunk) -> None:
        if result < 0 and self.engine.store is not None:
            raise self.engine.store.error(-result, action, fd, offset, chunk.name)

    # ---- norm, step, zero ----

    def landed(self) -> list[Chunk]:
        """The chunks that hold a gradient which no update has taken yet."""
        return [c for c in self.engine.chunks if c.gradient is not None and c.update is None]

    def settle(self) -> None:
        """Wait until every gradient that left the device has arrived."""
        for chunk in self.engine.chunks:
            self._await_arrivals(chunk)

    def norm(
        self,
        members: Container[tuple[int, int]] | None = None,
        scales: Mapping[tuple[int, int], float] | None = None,
    ) -> float:
        """2-norm of what has landed since the last step: float64 sums per parameter, added in model
        order.

        `members` limits it to these (chunk index, position), `scales` has factors for some. Eager
        updates keep their sums until step().
        """
        self.settle()
        total = math.nan if self._tainted else 0.0
        for chunk in self.engine.chunks:
            squares = self._sums.get(chunk.spec.index, {})
            for position in sorted(squares):
                place = (chunk.spec.index, position)
                if members is None or place in members:
                    scale = scales.get(place, 1.0) if scales else 1.0
                    total += squares[position] * (scale * scale)
        return math.sqrt(total) if math.isfinite(total) else total

    def contributors(self) -> set[tuple[int, int]]:
        """(chunk index, position) of every gradient that landed since the last step."""
        return {(index, position) for index, squares in self._sums.items() for position in squares}

    @property
    def anything_updated(self) -> bool:
        """Whether an eager update of this step has been given out."""
        return bool(self._updated)

    def check_finite(self, chunks: Iterable[Chunk]) -> None:
        """Raise NumericsError where a gradient has a NaN or Inf; nothing has been changed by it
        yet.
        """
        for chunk in chunks:
            if chunk.gradient is None:
                continue
            for position, squares in chunk.gradient.sum_squares.items():
                if not math.isfinite(squares):
                    raise NumericsError(
                        f"the gradient of {chunk.spec.params[position].name} is not finite: the "
                        "loss was NaN or "
                        "Inf, or code read a weight outside its module's forward (see "
                        "engine.gathered). No weight "
                        "has been updated with it. Lower the learning rate, or call zero_grad() to "
                        "skip this step."
                    )
        if self._tainted:
            raise NumericsError(
                "backward() ran from a loss that is NaN or Inf: the numbers overflowed, or code "
                "read a "
                "weight outside its module's forward (see engine.gathered). No weight has been "
                "updated with it. Call zero_grad() to skip this step."
            )

    def zero(self) -> None:
        """Drop everything that has landed and has not been given to an update."""
        with self.engine.lock:
            if self._updated:
                raise StateError(
                    "zero_grad() before step(): optimizer.update eager has already applied these "
                    "gradients. "
                    "Set optimizer.update: deferred to be able to drop them."
                )
            self.settle()
            for chunk in self.landed():
                while chunk.gradient is not None and chunk.gradient.moving:
                    self.engine.block(UPDATE)
                self.engine.release_gradient(chunk)
            self._sums.clear()
            self._tainted = False
            self.must_zero = False
            self.num_backwards = 0

    def end_step(self) -> None:
        """step() has taken the gradients."""
        self._updated.clear()
        self._sums.clear()
        self._tainted = False
        self.num_backwards = 0
        self.must_zero = True

    def grad(self, chunk: Chunk, position: int) -> torch.Tensor:
        """A copy of one landed gradient, in fp32 where it has accumulated, else in its own dtype,
        on the CPU.
        """
        with self.engine.lock:
            gradient, param = chunk.gradient, chunk.spec.params[position]
            self._await_arrivals(chunk)
            if gradient is None or position not in gradient.sum_squares:
                raise StateError(
                    f"{param.name} has no gradient: none has landed since the last step."
                )
            self._bring_back(chunk, gradient)
            if gradient.hi is None:
                raise StateError(f"the gradient of {param.name} has been given to its update.")
            high = self._view(chunk, gradient.hi, Plane.GRAD, position)
            if gradient.lo is None:
                return high.clone().view(param.shape)
            low = self._view(chunk, gradient.lo, Plane.GRAD_LO, position)
            joined = torch.empty(param.numel, dtype=torch.float32)
            join_master(high, low, joined)
            return joined.view(param.shape)
