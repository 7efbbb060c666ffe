"""The steps of Adafactor and SCALE: state that moves on when a step starts, ops with their factors.
See [Note: factors] in factors.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from offload.factors import COL_VAR, EXP_AVG, EXP_AVG_SQ, ROW_VAR, FactorSums
from offload.torchstate import StateEntry
from offload.update import FactoredOp, pack_ops

_FP32 = torch.finfo(torch.float32)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FactoredParam:
    """The step of one parameter, as captured at step(). `op` lacks its factors."""

    position: int
    op: FactoredOp
    state: tuple[StateEntry, ...]

    def resolve(self, plane: torch.Tensor, sums: FactorSums) -> FactoredOp:
        """Move what is kept in `plane` on by the gradient's sums; return the op with factors."""
        raise NotImplementedError

    def _kept(self, plane: torch.Tensor) -> dict[str, torch.Tensor]:
        return {entry.name: entry.view(plane).view(-1) for entry in self.state}

    def _with(self, rows: torch.Tensor, cols: torch.Tensor, **changes: bool) -> FactoredOp:
        return dataclasses.replace(self.op, rows=_packed(rows), cols=_packed(cols), **changes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdafactorParam(FactoredParam):
    """Adafactor's. `weight` is that of the new mean against the old one: 1 - beta2 of this step."""

    weight: float

    def resolve(self, plane: torch.Tensor, sums: FactorSums) -> FactoredOp:
        op, kept = self.op, self._kept(plane)
        if COL_VAR not in kept:
            squares = self._move(kept[ROW_VAR], sums.rows.square(), 1)
            return self._with(_overflowed(squares), torch.ones(1))
        rows = self._move(kept[ROW_VAR], sums.rows, op.num_cols)
        cols = self._move(kept[COL_VAR], sums.cols, op.num_rows)
        matrices = rows.double().view(-1, op.num_rows)
        means = [math.fsum(row.tolist()) / op.num_rows for row in matrices]
        divisors = torch.tensor([mean or 1.0 for mean in means], dtype=torch.float64)
        shares = (matrices / divisors.view(-1, 1)).clamp_min(_FP32.tiny)  # 0 x inf is no factor
        return self._with(shares, _overflowed(cols))

    def _move(self, means: torch.Tensor, sums: torch.Tensor, count: int) -> torch.Tensor:
        """Set `means` (N, fp32) to what they are after this gradient; return them. An inf would
        stay for good.
        """
        old, new = means.double(), sums * (self.op.grad_scale * self.op.grad_scale) / count
        return means.copy_((old + (new - old) * self.weight).clamp_max(_FP32.max))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScaleParam(FactoredParam):
    """SCALE's: rows or (`by_cols`) columns are divided by their norms, or with `rms` by the
    root of their mean squares. A vector takes a step of Adam.
    """

    by_cols: bool
    rms: bool
    betas: tuple[float, float]
    vector_eps: float

    def resolve(self, plane: torch.Tensor, sums: FactorSums) -> FactoredOp:
        op, kept = self.op, self._kept(plane)
        if kept:
            step = self._adam(kept[EXP_AVG], kept[EXP_AVG_SQ], sums.rows)
            return self._with(step, torch.ones(1), is_direct=True)
        squares = sums.cols if self.by_cols else sums.rows
        squares = squares * (op.grad_scale * op.grad_scale)
        if self.rms:
            squares = squares / (op.num_rows if self.by_cols else op.num_cols)
        ones = torch.ones(op.num_rows if self.by_cols else op.num_cols)
        return self._with(ones, squares) if self.by_cols else self._with(squares, ones)

    def _adam(self, mean: torch.Tensor, square: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        op, (beta1, beta2) = self.op, self.betas
        grad = grad * (-op.grad_scale if op.maximize else op.grad_scale)
        mean.copy_(mean.double() * beta1 + grad * (1 - beta1))
        square.copy_(square.double() * beta2 + grad.square() * (1 - beta2))
        root = (square.double() / (1 - beta2**op.step)).sqrt() + self.vector_eps
        return mean.double() / (1 - beta1**op.step) / root


@dataclasses.dataclass(frozen=True, slots=True)
class FactoredStep:
    """The step of one chunk: those of its parameters that have a gradient."""

    params: tuple[FactoredParam, ...]

    def pack(self, plane: torch.Tensor, sums: Mapping[int, FactorSums]) -> bytes:
        """The native form, made once and when the step starts: moves what is kept in `plane` on."""
        return pack_ops([param.resolve(plane, sums[param.position]) for param in self.params])


def _overflowed(means: torch.Tensor) -> torch.Tensor:
    """Means as factors: inf in place of what fp32 could not hold. Its weights stand still for this
    step; divided by the root of a smaller mean, a gradient of 1e25 would move them by 1e5.
    """
    return torch.where(means == _FP32.max, math.inf, means)


def _packed(values: torch.Tensor) -> bytes:
    return values.to(torch.float32).numpy().tobytes()
