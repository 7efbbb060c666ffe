"""Parts of planes outside of training, window by window: however large a chunk is, no more of it
than a few MiB is in memory beside what the caller asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from offload.chunk import Chunk, ParamSpec
from offload.engine import Engine
from offload.errors import StateError
from offload.formats import Plane, join_master, split_master
from offload.slots import Region, Slab, round_up

WINDOW_NUMEL = 1 << 20  # 4 MiB of fp32
# The new items of a parameter's elements [begin, end), by plane.
Encode = Callable[[ParamSpec, int, int], Mapping[Plane, torch.Tensor]]


class PlaneWindows:
    """Reads parts of planes, and writes parts of their next versions. Finishes a chunk's pending
    update first.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._fmt = engine.plan.fmt

    def read(
        self, chunk: Chunk, planes: Sequence[Plane], param: ParamSpec
    ) -> dict[Plane, torch.Tensor]:
        """Copies of a parameter's items in these planes, flat."""
        with self._engine.lock:
            self._engine.check_alive()
            self._engine.finish_update(chunk, wait=True)
            return {plane: self._read(chunk, plane, param) for plane in planes}

    def master(self, chunk: Chunk, param: ParamSpec) -> torch.Tensor:
        """A parameter's fp32 master (numel,); where its chunk trains nothing, its weights."""
        planes = self._master_planes(chunk)
        items = self.read(chunk, planes, param)
        weight = items[Plane.WEIGHT]
        if Plane.RESIDUE not in items:
            return weight.float()
        master = torch.empty(param.numel, dtype=torch.float32)
        join_master(weight, items[Plane.RESIDUE], master)
        return master

    def set_master(self, chunk: Chunk, param: ParamSpec, values: torch.Tensor) -> None:
        """Make fp32 values (numel,) a parameter's master; compute sees its new weights from the
        next use on.
        """
        engine, index = self._engine, chunk.spec.index
        planes = self._master_planes(chunk)

        def encode(spec: ParamSpec, begin: int, end: int) -> dict[Plane, torch.Tensor]:
            part = values[begin:end].contiguous()
            if Plane.WEIGHT in planes and self._fmt.weight_dtype is torch.float32:
                return {Plane.WEIGHT: part}
            residue_dtype = self._fmt.dtypes[Plane.RESIDUE]
            weight = torch.empty(end - begin, dtype=self._fmt.weight_dtype)
            residue = torch.empty(end - begin, dtype=residue_dtype)
            split_master(part, weight, residue)
            return {Plane.WEIGHT: weight, Plane.RESIDUE: residue}

        with engine.lock:
            engine.finish_update(chunk, wait=True)
            is_bound_copy = chunk.spec.is_small and not engine.device.is_host
            if is_bound_copy:
                engine.leave(index)
            elif chunk.num_users and not chunk.spec.is_small:
                raise StateError(f"{param.name} is in use; write its master between steps.")
            engine.invalidate(chunk)
            self.rewrite(chunk, planes, [param], encode)
            if is_bound_copy:
                engine.enter(index, record=False)

    def rewrite(
        self, chunk: Chunk, planes: Sequence[Plane], params: Sequence[ParamSpec], encode: Encode
    ) -> None:
        """Give these parameters new items in these planes; all else stays as it is. Where a plane
        has two versions, all of it goes to the next one. Blocks; raises StorageError.
        """
        engine = self._engine
        with engine.lock:
            engine.check_alive()
            engine.before_change()
            engine.finish_update(chunk, wait=True)
            with self._staging(chunk, 0, chunk.spec.numel) as buffer:
                for first, last in self._windows(chunk, 0, chunk.spec.numel):
                    new = {
                        (param, begin): encode(param, begin, end)
                        for param in params
                        for begin, end in [_overlap(param, first, last)]
                        if begin < end
                    }
                    for plane in planes:
                        self._overlay(chunk, plane, (first, last), new, buffer)
            for plane in planes:
                chunk.changed(plane)

    def _master_planes(self, chunk: Chunk) -> tuple[Plane, ...]:
        planes = chunk.spec.state_planes(self._fmt)
        return tuple(plane for plane in (Plane.WEIGHT, Plane.RESIDUE) if plane in planes)

    def _windows(self, chunk: Chunk, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Elements [first, last) in whole tiles: their bytes are whole blocks in every plane."""
        tile_numel = self._engine.plan.tile_numel
        step = tile_numel * max(1, WINDOW_NUMEL // tile_numel)
        start = begin // tile_numel * tile_numel
        stop = min(round_up(end, tile_numel), chunk.spec.numel)
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    @contextlib.contextmanager
    def _staging(self, chunk: Chunk, begin: int, end: int) -> Iterator[Region]:
        """Aligned memory for the largest window of any plane, outside the engine's slab."""
        numel = max(last - first for first, last in self._windows(chunk, begin, end))
        slab = Slab(numel * torch.float32.itemsize)
        try:
            yield slab.carve("window", slab.nbytes)
        finally:
            slab.close()

    def _pinned(self, chunk: Chunk, plane: Plane) -> torch.Tensor:
        num_items = self._fmt.num_items(plane, chunk.spec.numel)
        return chunk.pinned[plane].view(self._fmt.dtypes[plane], num_items)

    def _read(self, chunk: Chunk, plane: Plane, param: ParamSpec) -> torch.Tensor:
        wanted = self._fmt.items(plane, param.offset, param.numel)
        if plane in chunk.pinned:
            return self._pinned(chunk, plane)[wanted].clone()
        found = torch.empty(wanted.stop - wanted.start, dtype=self._fmt.dtypes[plane])
        begin, end = param.offset, param.offset + param.numel
        with self._staging(chunk, begin, end) as buffer:
            for first, last in self._windows(chunk, begin, end):
                part = self._load(chunk, plane, first, last, buffer)
                start = self._fmt.num_items(plane, first)
                low, high = max(wanted.start, start), min(wanted.stop, start + len(part))
                target = found[low - wanted.start : high - wanted.start]
                target.copy_(part[low - start : high - start])
        return found

    def _load(
        self, chunk: Chunk, plane: Plane, first: int, last: int, buffer: Region
    ) -> torch.Tensor:
        """A window of a plane in the buffer, as items."""
        begin, nbytes = self._fmt.nbytes(plane, first), self._fmt.nbytes(plane, last - first)
        self._engine.read_part(chunk, plane, begin, buffer.address, nbytes)
        return buffer.view(self._fmt.dtypes[plane], self._fmt.num_items(plane, last - first))

    def _overlay(
        self, chunk: Chunk, plane: Plane, window: tuple[int, int],
        new: Mapping[tuple[ParamSpec, int], Mapping[Plane, torch.Tensor]], buffer: Region,
    ) -> None:  # fmt: skip
        """Bring the new items of a window into its plane, and write what lies on NVMe."""
        first, last = window
        is_pinned = plane in chunk.pinned
        if is_pinned:
            part, start = self._pinned(chunk, plane), 0
        else:
            extents = chunk.extents[plane]
            if not new and extents.newest is extents.target:
                return
            part = self._load(chunk, plane, first, last, buffer)
            start = self._fmt.num_items(plane, first)
        for (param, begin), items in new.items():
            place = self._fmt.num_items(plane, param.offset + begin) - start
            part[place : place + len(items[plane])] = items[plane]
        if not is_pinned:
            begin, nbytes = self._fmt.nbytes(plane, first), self._fmt.nbytes(plane, last - first)
            self._engine.write_part(chunk, plane, begin, buffer.address, nbytes)


def _overlap(param: ParamSpec, first: int, last: int) -> tuple[int, int]:
    """The elements of a parameter that lie in a window, counted from the parameter's first."""
    begin = max(param.offset, first) - param.offset
    return begin, min(param.offset + param.numel, last) - param.offset
