"""Looking into the tiers, parameter by parameter, and what a step cost."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from offload.chunk import Chunk
from offload.engine import Engine
from offload.errors import StateError
from offload.landing import Gradients
from offload.plan import Plan
from offload.planes import PlaneReader
from offload.report import MemoryReport, memory_report
from offload.stats import StepStats
from offload.timeline import Timeline
from offload.windows import PlaneWindows


class Inspection:
    """What an offloaded model shows of itself; a part of Session."""

    model: nn.Module
    plan: Plan
    timeline: Timeline
    gradients: Gradients
    _engine: Engine
    _planes: PlaneReader
    _places: dict[int, tuple[int, int]]  # (chunk index, position) by id of the parameter

    def _check_open(self) -> None:
        raise NotImplementedError

    def _chunk_of(self, param: torch.Tensor) -> tuple[Chunk, int]:
        index, position = self._places[id(param)]
        return self._engine.chunks[index], position

    def _find(self, name: str) -> tuple[Chunk, int]:
        for alias, param in self.model.named_parameters(remove_duplicate=False):
            if alias == name:
                return self._chunk_of(param)
        raise StateError(f"the model has no parameter named {name!r}.")

    def grad(self, name: str) -> torch.Tensor:
        """A copy of the gradient that landed for a parameter since the last step, on the CPU."""
        return self.gradients.grad(*self._find(name))

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Copies of a parameter's planes by name, on the CPU, with pending updates finished."""
        self._check_open()
        return self._planes.state(*self._find(name))

    def master(self, name: str) -> torch.Tensor:
        """A copy of a parameter's fp32 master, on the CPU, with pending updates finished. With
        format int8 it has 24 bits; where nothing of a chunk is trained, it is the weight.
        """
        self._check_open()
        chunk, position = self._find(name)
        param = chunk.spec.params[position]
        return PlaneWindows(self._engine).master(chunk, param).view(param.shape)

    def set_master(self, name: str, values: torch.Tensor) -> None:
        """Make `values` (fp32, the parameter's shape) a parameter's master, and what compute sees
        the weights of it. The moments stay. With format int8 it is rounded to 24 bits.
        """
        self._check_open()
        chunk, position = self._find(name)
        param = chunk.spec.params[position]
        if tuple(values.shape) != param.shape or values.dtype is not torch.float32:
            raise StateError(
                f"{name} has the shape {param.shape}; its master cannot be a tensor of shape "
                f"{tuple(values.shape)} and {values.dtype}. Give fp32 values of that shape."
            )
        if chunk.override is not None:
            raise StateError(f"{name} is gathered; leave gathered() first, or write there.")
        PlaneWindows(self._engine).set_master(chunk, param, values.detach().reshape(-1).cpu())
        self._planes.forget()

    def stats(self) -> StepStats:
        """Bytes, seconds and stalls of the last finished step."""
        return self._engine.stats.last

    def memory(self) -> MemoryReport:
        """Every byte of the slab by arena, the files, and the process."""
        return memory_report(self.plan, self._engine)

    def trace(self, path: str | Path) -> None:
        """Write the timeline as Chrome trace JSON, for ui.perfetto.dev."""
        self.timeline.write_trace(path)
