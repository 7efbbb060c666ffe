"""How the update worker reaches the planes of a chunk: in RAM, in a slot, or through extents."""

from __future__ import annotations

from offload.chunk import Chunk
from offload.errors import StateError
from offload.formats import GRAD_PLANES, NATIVE_PLANE_ORDER, Plane, StateFormat
from offload.store import ChunkStore
from offload.update import PlaneArgument


def plane_arguments(
    chunk: Chunk, fmt: StateFormat, store: ChunkStore | None, *, fresh: bool
) -> list[PlaneArgument | None]:
    """One argument per plane in the worker's order; None where the chunk has no such plane.

    `fresh` says that the chunk's weight slot is empty: the worker reads the weights into it first.
    """
    arguments: list[PlaneArgument | None] = []
    for plane in NATIVE_PLANE_ORDER:
        if plane in GRAD_PLANES:
            arguments.append(_gradient(chunk, plane, store))
        elif plane in fmt.state_planes:
            arguments.append(_state(chunk, plane, store, fresh=fresh))
        else:
            arguments.append(None)
    return arguments


def _state(chunk: Chunk, plane: Plane, store: ChunkStore | None, *, fresh: bool) -> PlaneArgument:
    if plane in chunk.pinned:
        return PlaneArgument(chunk.pinned[plane].address)
    if store is None:
        raise StateError(f"chunk {chunk.name}: plane {plane.value} has no home.")
    extents = chunk.extents[plane]
    source, target = store.segments(extents.newest), store.segments(extents.target)
    if plane is Plane.WEIGHT and chunk.slot is not None:
        return PlaneArgument(chunk.slot.region.address, source if fresh else None, target)
    return PlaneArgument(0, source, target)


def _gradient(chunk: Chunk, plane: Plane, store: ChunkStore | None) -> PlaneArgument | None:
    gradient = chunk.gradient
    if gradient is None or (plane is Plane.GRAD_LO and not gradient.has_lo):
        return None
    if gradient.spilled and store is not None:
        return PlaneArgument(0, store.segments(chunk.extents[plane].newest))
    slot = gradient.hi if plane is Plane.GRAD else gradient.lo
    return None if slot is None else PlaneArgument(slot.region.address)
