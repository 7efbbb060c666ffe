"""The step of Adafactor: means that move on when it starts, and ops with their factors. See
[Note: factors] in factors.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from offload.factors import COL_VAR, ROW_VAR, FactorSums
from offload.torchstate import StateEntry
from offload.update import FactoredOp, pack_ops


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FactoredParam:
    """The step of one parameter, as captured at step(). `op` lacks its factors."""

    position: int
    op: FactoredOp
    state: tuple[StateEntry, ...]
    weight: float  # of the new mean against the old one: 1 - beta2 of this step

    def resolve(self, plane: torch.Tensor, sums: FactorSums) -> FactoredOp:
        """Move the means in `plane` on by the gradient's sums; return the op with its factors."""
        op, kept = self.op, {entry.name: entry.view(plane) for entry in self.state}
        rows = self._move(kept[ROW_VAR], sums.rows, op.num_cols)
        if COL_VAR not in kept:
            return dataclasses.replace(op, rows=_packed(rows), cols=_packed(torch.ones(1)))
        cols = self._move(kept[COL_VAR], sums.cols, op.num_rows)
        matrices = rows.double().view(-1, op.num_rows)
        means = [math.fsum(row.tolist()) / op.num_rows for row in matrices]
        divisors = torch.tensor([mean or 1.0 for mean in means], dtype=torch.float64)
        shares = matrices / divisors.view(-1, 1)
        return dataclasses.replace(op, rows=_packed(shares), cols=_packed(cols))

    def _move(self, means: torch.Tensor, sums: torch.Tensor, count: int) -> torch.Tensor:
        """Set `means` (any shape, fp32) to what they are after this gradient; return them flat."""
        flat = means.view(-1)
        old, new = flat.double(), sums * (self.op.grad_scale * self.op.grad_scale) / count
        flat.copy_(old + (new - old) * self.weight)
        return flat


@dataclasses.dataclass(frozen=True, slots=True)
class FactoredStep:
    """The step of one chunk: those of its parameters that have a gradient."""

    params: tuple[FactoredParam, ...]

    def pack(self, plane: torch.Tensor, sums: Mapping[int, FactorSums]) -> bytes:
        """The native form, made once and when the step starts: moves the means in `plane` on."""
        return pack_ops([param.resolve(plane, sums[param.position]) for param in self.params])


def _packed(values: torch.Tensor) -> bytes:
    return values.to(torch.float32).numpy().tobytes()
