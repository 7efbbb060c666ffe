"""What Adafactor and SCALE know of whole matrices: what is kept of it, and sums over gradients.

[Note: factors] A step needs sums over rows and columns of a whole gradient before its first element
can be updated, and the update streams tiles. So the sums are taken when a gradient lands, while it
is in RAM anyway; they are few, and wait beside it. The step itself is made when it starts: the
means in the plane `factors` then move on, once, and with them in hand the tiles are elementwise
again. The plane rests in RAM always. All of it is float64 elementwise and exact sums, rounded to
fp32 at the end, so no bit depends on a machine or a placement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from offload.torchstate import StateEntry

ROW_VAR, COL_VAR = "row_var", "col_var"  # torch.optim.Adafactor's words
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
SUM_NBYTES = 8 + 4  # of a row or a column: its sum, and its factor in an op


@dataclasses.dataclass(frozen=True, slots=True)
class FactorSums:
    """Sums of squares of a gradient by rows and by columns, float64, all matrices in order; of a
    vector `rows` is the gradient itself.
    """

    rows: torch.Tensor
    cols: torch.Tensor


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrices that a parameter is made of; a vector has one column. Of
    more than two dimensions the last two are matrices (experts), or all behind the first are
    columns (filters): what keeps less.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    ways = (shape[-2], shape[-1]), (shape[0], math.prod(shape[1:]))
    return min(ways, key=lambda way: num_sums(shape, way))


def num_sums(shape: Sequence[int], matrix: tuple[int, int]) -> int:
    """How many rows and columns a parameter's matrices have together."""
    numel, (num_rows, num_cols) = math.prod(shape), matrix
    return numel // num_cols + numel // num_rows


def factor_entries(shape: tuple[int, ...], begin: int) -> tuple[StateEntry, ...]:
    """What is kept of a parameter, from item `begin` of its chunk's plane on: means by row and by
    column, with a dimension in front where there are several matrices.
    """
    num_rows, num_cols = matrix_of(shape)
    num_matrices = math.prod(shape) // (num_rows * num_cols)
    front = (num_matrices,) if num_matrices > 1 else ()
    rows = StateEntry(name=ROW_VAR, shape=(*front, num_rows), dtype=torch.float32, offset=begin)
    if len(shape) < 2:
        return (rows,)
    end = begin + rows.num_items
    cols = StateEntry(name=COL_VAR, shape=(*front, num_cols), dtype=torch.float32, offset=end)
    return rows, cols


def vector_entries(shape: tuple[int, ...], begin: int) -> tuple[StateEntry, ...]:
    """What SCALE keeps of a parameter: Adam's moments of a vector, nothing of a matrix."""
    if len(shape) > 1:
        return ()
    first = StateEntry(name=EXP_AVG, shape=shape, dtype=torch.float32, offset=begin)
    end = begin + first.num_items
    return first, StateEntry(name=EXP_AVG_SQ, shape=shape, dtype=torch.float32, offset=end)


def flat_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """SCALE's one matrix of a parameter: its first dimension, and all others."""
    return (math.prod(shape), 1) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
