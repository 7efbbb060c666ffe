"""Where the planes of a run lie, made real as the plan says: in the slab, or in swap files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from offload.chunk import Chunk
from offload.extents import PlaneExtents
from offload.formats import GRAD_PLANES, Plane
from offload.plan import Plan
from offload.slots import Slab
from offload.store import ChunkStore

PlaneKey = tuple[int, Plane]  # (chunk index, plane)


def carve_pinned(plan: Plan, chunks: Sequence[Chunk], slab: Slab, device: torch.device) -> None:
    """Give every chunk the regions of its pinned planes, and its placeholders on `device`."""
    for chunk in chunks:
        for plane in chunk.spec.state_planes(plan.fmt):
            if (chunk.spec.index, plane) in plan.pinned:
                nbytes = chunk.spec.nbytes(plane, plan.fmt)
                chunk.pinned[plane] = slab.carve(f"pinned {plane.value}", nbytes)
        chunk.residency = chunk.resting
        chunk.make_placeholders(plan.fmt.weight_dtype, device)


def allocate_extents(
    plan: Plan, chunks: Sequence[Chunk], store: ChunkStore, homes: Mapping[PlaneKey, PlaneExtents]
) -> None:
    """Give every plane its extents: those that `homes` has from an earlier run, or new ones.

    Gradients come last, so that state lies the same however gradients are planned.
    """
    wanted = [(chunk, plane) for chunk in chunks for plane in plan.nvme_planes(chunk.spec)]
    for chunk, plane in sorted(wanted, key=lambda key: key[1] in GRAD_PLANES):
        home, runs = homes.get((chunk.spec.index, plane)), plan.runs(plane)
        if home is None:
            nbytes = chunk.spec.nbytes(plane, plan.fmt)
            num_extents = plan.num_extents(chunk.spec, plane)
            home = PlaneExtents([store.allocate(nbytes, runs) for _ in range(num_extents)])
        else:
            for extent in home.extents:
                store.cover(extent, runs)
        chunk.extents[plane] = home
