"""Planes as tensors outside of training: export, inspection, gathered weights, and giving a model
back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence

import torch

from offload import io, machine
from offload.chunk import Chunk
from offload.engine import Engine
from offload.errors import StateError
from offload.formats import SCALE_PLANES, STATE_BY_PARAM, Plane, join_master
from offload.plan import Plan
from offload.sizes import format_nbytes
from offload.slots import Slab

logger = logging.getLogger("offload")
_ROOM_FACTOR = 1.1  # beside the weights that are given back, for the model's first forward


def check_room(plan: Plan, needed: int, who: str, instead: str) -> None:
    """Raise StateError where copies of so many bytes are more than the budget leaves."""
    room = max(plan.cpu_budget_nbytes - plan.slab_nbytes, 0)
    if needed > room:
        raise StateError(
            f"{who} needs {format_nbytes(needed)} beside the slab, of which tiers.cpu.budget "
            f"leaves {format_nbytes(room)}. Raise it, or {instead}."
        )


class PlaneReader:
    """Copies planes out of the tiers and back; each call finishes a pending update first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last: tuple[tuple[int, tuple[int, ...]], torch.Tensor] | None = None

    def _read(self, chunk: Chunk, plane: Plane) -> torch.Tensor:
        """A copy of all items of a plane. Memory: the plane, twice for a moment where it lies on
        NVMe.
        """
        engine, fmt = self._engine, self._engine.plan.fmt
        dtype = fmt.dtypes[plane]
        with engine.lock:
            engine.finish_update(chunk, wait=True)
            if plane in chunk.pinned:
                num_items = chunk.spec.num_items(plane, fmt)
                return chunk.pinned[plane].view(dtype, num_items).clone()
            with self._staging(chunk, plane) as buffer:
                engine.move_plane(io.READ, chunk, plane, buffer.data_ptr())
                return buffer.view(dtype).clone()

    def _write(self, chunk: Chunk, plane: Plane, content: torch.Tensor) -> None:
        engine, dtype = self._engine, self._engine.plan.fmt.dtypes[plane]
        engine.before_change()
        if plane in chunk.pinned:
            chunk.pinned[plane].view(dtype, chunk.spec.numel).copy_(content)
            chunk.changed(plane)
            return
        with self._staging(chunk, plane) as buffer:
            buffer.view(dtype).copy_(content)
            engine.move_plane(io.WRITE, chunk, plane, buffer.data_ptr())

    @contextlib.contextmanager
    def _staging(self, chunk: Chunk, plane: Plane) -> Iterator[torch.Tensor]:
        """Aligned memory of one plane (uint8), outside the slab: none of its slots need be free
        here.
        """
        nbytes = chunk.spec.nbytes(plane, self._engine.plan.fmt)
        slab = Slab(nbytes)
        try:
            yield slab.tensor[:nbytes]
        finally:
            slab.close()

    # ---- out ----

    def master(self, chunk: Chunk) -> torch.Tensor:
        """The fp32 master (numel,) of a chunk; where nothing is trained, its weights in fp32."""
        weight = self._read(chunk, Plane.WEIGHT)
        if weight.dtype is torch.float32:
            return weight
        if Plane.RESIDUE not in chunk.spec.state_planes(self._engine.plan.fmt):
            return weight.float()
        master = torch.empty(chunk.spec.numel, dtype=torch.float32)
        join_master(weight, self._read(chunk, Plane.RESIDUE), master)
        return master

    def weights(self, chunk: Chunk, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """A chunk's parameters by name: the weights of compute, or with dtype the master in that
        dtype.
        """
        if dtype is None or dtype is self._engine.plan.fmt.weight_dtype:
            flat = self._read(chunk, Plane.WEIGHT)
        else:
            flat = self.master(chunk).to(dtype)
        return {
            p.name: flat[p.offset : p.offset + p.numel].view(p.shape) for p in chunk.spec.params
        }

    def check_fits(self, params: Iterable[torch.Tensor]) -> None:
        """Raise StateError where copies of these parameters are more than the budget leaves."""
        plan = self._engine.plan
        needed = sum(param.numel() for param in params) * plan.fmt.weight_dtype.itemsize
        check_room(plan, needed, "state_dict()", "use engine.export(folder), which streams")

    def forget(self) -> None:
        """Planes were changed outside of a step."""
        self._last = None

    def weight(self, chunk: Chunk, position: int) -> torch.Tensor:
        """A copy of one parameter as compute sees it. Reads its chunk, or what the last call read
        of it.
        """
        stamp = (chunk.spec.index, tuple(chunk.num_steps))
        if self._last is None or self._last[0] != stamp:
            self._last = (stamp, self._read(chunk, Plane.WEIGHT))
        param = chunk.spec.params[position]
        return self._last[1][param.offset : param.offset + param.numel].view(param.shape).clone()

    def state(self, chunk: Chunk, position: int) -> dict[str, torch.Tensor]:
        """Copies of one parameter's planes by name, in the parameter's shape; scales are flat. What
        is kept by parameter has its own names and shapes, behind `torch_state.` or `factors.`.
        """
        param, fmt = chunk.spec.params[position], self._engine.plan.fmt
        planes = {}
        for plane in chunk.spec.state_planes(fmt):
            items = self._read(chunk, plane)
            if plane in STATE_BY_PARAM:
                for entry in param.state:
                    planes[f"{plane.value}.{entry.name}"] = entry.view(items).clone()
                continue
            piece = items[fmt.items(plane, param.offset, param.numel)]
            planes[plane.value] = piece if plane in SCALE_PLANES else piece.view(param.shape)
        return planes

    def give_back(self, chunk: Chunk, dtypes: dict[int, torch.dtype]) -> None:
        """Give a chunk's parameters their own memory again, in the dtypes that they came with."""
        wanted = {dtypes[id(param)] for param in chunk.params}
        as_computed = wanted == {self._engine.plan.fmt.weight_dtype}
        flat = self._read(chunk, Plane.WEIGHT) if as_computed else self.master(chunk)
        for param, spec in zip(chunk.params, chunk.spec.params, strict=True):
            piece = flat[spec.offset : spec.offset + spec.numel].view(spec.shape)
            param.data = piece.to(dtypes[id(param)], copy=True)
        chunk.filled = False

    def give_back_all(self, dtypes: dict[int, torch.dtype]) -> None:
        """The same for all chunks that hold a model's weights; where RAM does not have room for
        them, a warning says so.
        """
        chunks = [chunk for chunk in self._engine.chunks if chunk.filled]
        needed = sum(p.numel() * dtypes[id(p)].itemsize for c in chunks for p in c.params)
        available = machine.memory_available()
        if needed * _ROOM_FACTOR > available:
            logger.warning(
                "the model keeps placeholders: its weights need %s and %s are available. "
                "engine.export() writes them without loading them.",
                format_nbytes(needed), format_nbytes(available),
            )  # fmt: skip
            return
        for chunk in chunks:
            self.give_back(chunk, dtypes)

    def hide(self) -> None:
        """Show placeholders in every chunk whose parameters still point at memory of the engine.

        That memory goes with the engine, and reads as zeros then: a model without its weights would
        compute with wrong numbers. See [Note: small chunk] for what stays bound until the end.
        """
        slab = self._engine.slab
        for chunk in self._engine.chunks:
            own = [(slab.address, slab.nbytes)]
            if chunk.gpu_slot is not None:
                own.append((chunk.gpu_slot.tensor.data_ptr(), chunk.gpu_slot.tensor.nbytes))
            addresses = [param.data_ptr() for param in chunk.params]
            if any(begin <= a < begin + nbytes for a in addresses for begin, nbytes in own):
                chunk.unbind()

    # ---- out and back ----

    @contextlib.contextmanager
    def gathered(self, indices: Sequence[int]) -> Iterator[None]:
        """Show real weights in the parameters of these chunks; write back what changed."""
        engine = self._engine
        chunks = [engine.chunks[index] for index in indices]
        engine.flush()
        before = {}
        for chunk in chunks:
            if chunk.override is not None:
                raise StateError(
                    f"chunk {chunk.name} is gathered already; leave the inner gathered() first."
                )
            before[chunk.spec.index] = self._read(chunk, Plane.WEIGHT)
        for chunk in chunks:
            chunk.override = before[chunk.spec.index].to(engine.device.torch_device, copy=True)
            chunk.bind(chunk.override)
        try:
            yield
        finally:
            for chunk in chunks:
                self._put_back(chunk, before[chunk.spec.index])

    def _put_back(self, chunk: Chunk, before: torch.Tensor) -> None:
        """Elements that were written become the new master; the others keep their low bits."""
        override, chunk.override = chunk.override, None
        if override is None:
            raise StateError(f"chunk {chunk.name} was not gathered.")
        index, stays_bound = chunk.spec.index, bool(chunk.num_users)
        if stays_bound:
            chunk.bind(self._engine.bound_weight(index))
        else:
            chunk.unbind()
        now = override.cpu()
        integers = torch.int32 if now.dtype is torch.float32 else torch.int16
        changed = now.view(integers) != before.view(integers)
        if not bool(changed.any()):
            return
        has_device_copy = stays_bound and not self._engine.device.is_host
        if has_device_copy:
            self._engine.leave(index)
        self._engine.invalidate(chunk)
        self._last = None
        self._write(chunk, Plane.WEIGHT, now)
        if Plane.RESIDUE in chunk.spec.state_planes(self._engine.plan.fmt):
            residue = self._read(chunk, Plane.RESIDUE)
            signed = {1: torch.int8, 2: torch.int16}[residue.dtype.itemsize]
            residue.view(signed)[changed] = 0  # torch cannot index-write uint16
            self._write(chunk, Plane.RESIDUE, residue)
        if has_device_copy:
            self._engine.enter(index, record=False)
