"""State formats: which planes a chunk has, their dtypes, and the exact split of an fp32 master.

[Note: residue]
`exact` keeps an fp32 master in two 16-bit planes. With b the 32 bits of the master,
weight = (b + 0x8000) >> 16 and residue = b & 0xFFFF, both modulo their width. The weight is the
bf16 that compute uses, and b can be rebuilt from both: upper = weight - (residue >= 0x8000).
Rounding to nearest even would not be invertible (a tie at 0x8000 goes either way), so the rule here
is nearest, ties away from zero. A gradient that accumulates in fp32 uses the same pair of planes.
"""

from __future__ import annotations

import dataclasses
import enum

import torch

from offload import _native


class Plane(enum.Enum):
    """One array of a chunk; all planes of a chunk are elementwise parallel."""

    WEIGHT = "weight"
    RESIDUE = "residue"
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"
    GRAD = "grad"
    GRAD_LO = "grad_lo"


STATE_PLANES = (Plane.WEIGHT, Plane.RESIDUE, Plane.EXP_AVG, Plane.EXP_AVG_SQ)
GRAD_PLANES = (Plane.GRAD, Plane.GRAD_LO)
NATIVE_PLANE_ORDER = STATE_PLANES + GRAD_PLANES


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StateFormat:
    """A format's planes with their dtypes. `native_code` is the update kernel's name for it."""

    name: str
    native_code: int
    dtypes: dict[Plane, torch.dtype]

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtypes[Plane.WEIGHT]

    @property
    def state_planes(self) -> tuple[Plane, ...]:
        """The planes that persist between steps, weight first."""
        return tuple(plane for plane in STATE_PLANES if plane in self.dtypes)

    @property
    def grad_planes(self) -> tuple[Plane, ...]:
        """The planes that a gradient can need: the second one only where it accumulates in fp32."""
        return tuple(plane for plane in GRAD_PLANES if plane in self.dtypes)

    def itemsize(self, plane: Plane) -> int:
        return self.dtypes[plane].itemsize

    @property
    def state_itemsize(self) -> int:
        """Bytes per parameter that persist between steps."""
        return sum(self.itemsize(plane) for plane in self.state_planes)


_MOMENTS = {Plane.EXP_AVG: torch.float32, Plane.EXP_AVG_SQ: torch.float32}
FORMATS: dict[str, StateFormat] = {
    "fp32": StateFormat(
        name="fp32",
        native_code=0,
        dtypes={Plane.WEIGHT: torch.float32, **_MOMENTS, Plane.GRAD: torch.float32},
    ),
    "exact": StateFormat(
        name="exact",
        native_code=1,
        dtypes={
            Plane.WEIGHT: torch.bfloat16,
            Plane.RESIDUE: torch.uint16,
            **_MOMENTS,
            Plane.GRAD: torch.bfloat16,
            Plane.GRAD_LO: torch.uint16,
        },
    ),
}

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_supported_dtype(dtype: torch.dtype) -> bool:
    """Whether a parameter of this dtype can be taken into the tiers (float64 would lose bits)."""
    return dtype in _FLOAT_DTYPES and dtype is not torch.float64


def split_master(master: torch.Tensor, weight: torch.Tensor, residue: torch.Tensor) -> None:
    """Split an fp32 master (N) into bf16 weight (N) and 16-bit residue (N), all contiguous."""
    _native.split_fp32(master.data_ptr(), weight.data_ptr(), residue.data_ptr(), master.numel())


def join_master(weight: torch.Tensor, residue: torch.Tensor | None, master: torch.Tensor) -> None:
    """Rebuild the fp32 master (N) from bf16 weight (N) and residue (N, or None for zero)."""
    low = 0 if residue is None else residue.data_ptr()
    _native.join_fp32(weight.data_ptr(), low, master.data_ptr(), master.numel())


class LandMode(enum.IntEnum):
    """How an arriving gradient meets what its plane already holds."""

    SET = 0
    ACCUMULATE_FP32 = 1
    ACCUMULATE_IN_DTYPE = 2  # what autograd itself does where one backward reaches a weight twice


def land_gradient(
    source: torch.Tensor, plane: torch.Tensor, plane_lo: torch.Tensor | None, mode: LandMode
) -> float:
    """Put a contiguous CPU gradient (N) into its grad plane (N); return the sum of squares of the
    result.

    The sum is float64 in a fixed order, so its bits do not depend on where anything lies.
    """
    kind = 1 if plane.dtype is torch.float32 else 0
    low = 0 if plane_lo is None else plane_lo.data_ptr()
    return float(
        _native.grad_land(plane.data_ptr(), low, source.data_ptr(), source.numel(), kind, int(mode))
    )


def gradient_sum_squares(plane: torch.Tensor) -> float:
    """Sum of squares of a landed gradient plane (N), in the same order as land_gradient's."""
    kind = 1 if plane.dtype is torch.float32 else 0
    return float(_native.sum_squares(plane.data_ptr(), 0, plane.numel(), kind))
