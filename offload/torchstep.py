"""One step of a torch optimizer on a chunk whose planes lie in memory: the slower, generic path.

[Note: torch step] Native updates stream tiles; an optimizer of torch wants whole tensors. So the
planes of one chunk are brought to memory whole, and its parameters take their steps one after the
other: the fp32 master and the fp32 gradient of one parameter at a time, with the class's own
step(), without foreach and fused. One parameter alone has the bits that it would have among all,
because that loop treats each on its own. Split again, a master of format `int8` is rounded to 24
bits: the one thing that this path ever rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offload.chunk import ChunkSpec, ParamSpec
from offload.errors import StateError
from offload.formats import Plane, join_master, split_master
from offload.torchstate import make_part

Planes = Mapping[Plane, torch.Tensor]  # flat, in their own dtypes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParamStep:
    """The step of one parameter, as captured at step(): all options of its group."""

    position: int
    options: Mapping[str, Any]
    is_first: bool  # it has no state yet
    grad_scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TorchStep:
    """The step of one chunk: those of its parameters that have a gradient."""

    cls: type[torch.optim.Optimizer]
    spec: ChunkSpec
    steps: Sequence[ParamStep]

    def apply(self, planes: Planes, work: torch.Tensor) -> None:
        """Take the step on the chunk's planes, in place. `work` is fp32 memory: two of the largest
        parameter where the weight plane is not the master itself. Consumes the gradient.
        """
        for step in self.steps:
            self._apply(step, self.spec.params[step.position], planes, work)

    def _apply(self, step: ParamStep, param: ParamSpec, planes: Planes, work: torch.Tensor) -> None:
        place = slice(param.offset, param.offset + param.numel)
        weight = planes[Plane.WEIGHT][place]
        residue = planes[Plane.RESIDUE][place] if Plane.RESIDUE in planes else None
        low = planes[Plane.GRAD_LO][place] if Plane.GRAD_LO in planes else None
        grad = planes[Plane.GRAD][place]
        master = weight
        if residue is not None:
            master, wide = work[: param.numel], work[param.numel : 2 * param.numel]
            join_master(weight, residue, master)
            join_master(grad, low, wide)
            grad = wide
        if step.grad_scale != 1.0:
            grad.mul_(step.grad_scale)
        leaf = master.view(param.shape)
        leaf.grad = grad.view(param.shape)
        self._step(leaf, step, param, planes.get(Plane.TORCH_STATE))
        if residue is not None:
            split_master(master, weight, residue)

    def _step(
        self, leaf: torch.Tensor, step: ParamStep, param: ParamSpec, plane: torch.Tensor | None
    ) -> None:
        part = make_part(self.cls, leaf, param.name, step.options)
        kept = {entry.name: entry.view(plane) for entry in param.state if plane is not None}
        if kept and not step.is_first:
            part.state[leaf] = dict(kept)
        part.step()
        state = part.state[leaf]
        if {key for key, value in state.items() if value is not None} != set(kept):
            raise StateError(
                f"{self.cls.__name__} keeps {sorted(state)} for {param.name}, and the plan has "
                f"{sorted(kept)}. Write the arguments that decide it into optimizer.options."
            )
        for key, home in kept.items():
            if state[key].data_ptr() != home.data_ptr():
                home.copy_(state[key])
