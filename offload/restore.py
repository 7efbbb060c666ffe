"""Starting from a checkpoint: any placement, budget and number of paths, the same bits."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from offload import materialise
from offload.engine import Engine
from offload.manifest import Manifest
from offload.recovery import Recovered, adopt_rest
from offload.stepreader import open_step


def restore(engine: Engine, model: nn.Module, manifest: Manifest, folder: Path) -> Recovered:
    """Copy all planes of a checkpoint into the tiers, each block verified. Memory: 2 MiB beside
    the slab.
    """
    with open_step([folder], manifest) as step:
        for chunk in engine.chunks:
            materialise.make_real(chunk)
            for plane in chunk.spec.state_planes(engine.plan.fmt):
                pinned = chunk.pinned.get(plane)
                for begin, part in step.parts(chunk.spec.index, plane):
                    if pinned is not None:
                        pinned.tensor[begin : begin + len(part)] = part
                    else:
                        engine.write_part(chunk, plane, begin, part.data_ptr(), len(part))
                chunk.changed(plane)
            chunk.filled = True
    return adopt_rest(engine, model, manifest)
