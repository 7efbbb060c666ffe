"""Slow twins of Adafactor's factored second moment, in numpy."""

import dataclasses
import math
import struct
from collections.abc import Sequence

import numpy as np
from twins import F32, F64, NUM_LANES, Op, Planes, fma, load_grad, load_master, store_master

FLT_MAX = np.finfo(np.float32).max
FLT_MIN = np.finfo(np.float32).tiny


def eps_squared(eps: float) -> np.float32:
    """What squares below it count as; never 0, and without a gradient 0 / 0."""
    return np.float32(max(eps * eps, float(FLT_MIN)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoredOp(Op):
    """Adafactor's second moment as rows x cols of every matrix; see [Note: factored]."""

    beta1: float = 0.9
    eps: float = 1e-8
    rows: F32  # (matrices, rows)
    cols: F32  # (matrices, cols)

    def rule(self) -> tuple[int, int, float, float, float]:
        return 3, 0, self.beta1, 0.0, self.eps

    def pack(self) -> bytes:
        shape = struct.pack("<QQ", self.rows.shape[1], self.cols.shape[1])
        return super().pack() + shape + self.rows.tobytes() + self.cols.tobytes()

    def apply(self, p: F32, m: F32, v: F32, g: F32) -> tuple[F32, F32, F32]:
        f = np.float32
        with np.errstate(all="ignore"):
            g = self.grad(g)
            square = (self.rows[:, :, None] * self.cols[:, None, :]).reshape(-1)
            u = g / np.sqrt(np.maximum(square, eps_squared(self.eps)))
            m = fma(f(1 - self.beta1), u - m, m)
            return fma(m, f(-self.lr), p * f(self.decay())), m, v


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledOp(Op):
    """SCALE without momentum: squares of norms as rows x cols; `is_direct`: the step itself."""

    eps: float = 1e-8
    is_direct: bool = False
    rows: F32  # (matrices, rows)
    cols: F32  # (matrices, cols)

    def rule(self) -> tuple[int, int, float, float, float]:
        return 4, 4 * int(self.is_direct), 0.0, 0.0, self.eps

    def pack(self) -> bytes:
        shape = struct.pack("<QQ", self.rows.shape[1], self.cols.shape[1])
        return super().pack() + shape + self.rows.tobytes() + self.cols.tobytes()

    def apply_to(self, format: str, planes: Planes) -> None:
        """The same on planes without moments, in place."""
        part = {name: plane[self.begin : self.end] for name, plane in planes.items()}
        f, p = np.float32, load_master(format, part)
        with np.errstate(all="ignore"):
            direction = (self.rows[:, :, None] * self.cols[:, None, :]).reshape(-1)
            if not self.is_direct:
                root = np.sqrt(np.maximum(direction, eps_squared(self.eps)))
                direction = self.grad(load_grad(format, part)) / root
            store_master(format, part, fma(direction, f(-self.lr), p * f(self.decay())))


def factor_sums(values: F32, num_rows: int, num_cols: int) -> tuple[F64, F64]:
    """Sums of squares by row (16 lanes, as a tree) and by column (in order) of every matrix."""
    squares = np.square(values.astype(np.float64)).reshape(-1, num_rows, num_cols)
    padded = np.zeros((squares.shape[0] * num_rows, -(-num_cols // NUM_LANES) * NUM_LANES))
    padded[:, :num_cols] = squares.reshape(-1, num_cols)
    lanes = np.cumsum(padded.reshape(padded.shape[0], -1, NUM_LANES), axis=1)[:, -1]
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    return lanes[:, 0].copy(), np.cumsum(squares, axis=1)[:, -1].reshape(-1)


class FactoredMoment:
    """What Adafactor keeps of one parameter's second moment, and how a gradient moves it on."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.is_matrix = len(shape) > 1
        self.num_rows = shape[-2] if self.is_matrix else math.prod(shape)
        self.num_cols = shape[-1] if self.is_matrix else 1
        if len(shape) == 4:  # filters of a convolution
            self.num_rows, self.num_cols = shape[0], math.prod(shape[1:])
        num_matrices = math.prod(shape) // (self.num_rows * self.num_cols)
        self.row_var = np.zeros((num_matrices, self.num_rows), np.float32)
        self.col_var = np.zeros((num_matrices, self.num_cols), np.float32)

    def move(self, grad: F32, scale: float, step: int, decay: float) -> tuple[F32, F32]:
        """The op's factors of rows and of columns."""
        rows, cols = factor_sums(grad, self.num_rows, self.num_cols)
        for var, sums, count in (
            (self.row_var, rows, self.num_cols),
            (self.col_var, cols, self.num_rows),
        ):
            old, mean = var.astype(np.float64), sums.reshape(var.shape) * (scale * scale) / count
            var[:] = np.minimum(old + (mean - old) * step**decay, float(FLT_MAX))
        if not self.is_matrix:
            return overflowed(self.row_var), np.ones((1, 1), np.float32)
        means = [math.fsum(map(float, row)) / self.num_rows or 1.0 for row in self.row_var]
        shares = self.row_var.astype(np.float64) / np.array(means)[:, None]
        return np.maximum(shares, float(FLT_MIN)).astype(np.float32), overflowed(self.col_var)


def overflowed(means: F32) -> F32:
    """Means as factors: inf, and so no step, in place of what fp32 could not hold."""
    return np.where(means == FLT_MAX, np.float32(np.inf), means)
