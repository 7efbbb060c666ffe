"""State formats: which planes a chunk has, their dtypes, and the exact split of an fp32 master.

[Note: residue]
`exact` keeps an fp32 master in two 16-bit planes. With b the 32 bits of the master,
weight = (b + 0x8000) >> 16 and residue = b & 0xFFFF, both modulo their width. The weight is the
bf16 that compute uses, and b can be rebuilt from both: upper = weight - (residue >= 0x8000).
Rounding to nearest even would not be invertible (a tie at 0x8000 goes either way), so the rule here
is nearest, ties away from zero. A gradient that accumulates in fp32 uses the same pair of planes.
`int8` does the same with 24 bits: the master is rounded to them, and its residue is one byte.

[Note: lossy moments]
`bf16` rounds its moments stochastically; the random bits are a hash of (seed, step, element of the
chunk), so they depend on no placement, tile or thread. `int8` stores them in bytes, with a bf16
scale for every 32 elements in a plane of its own. Parameters begin at multiples of 64 elements and
the padding behind them is zero, so no group has elements of two parameters. csrc/kernels.h has the
formulas.
"""

from __future__ import annotations

import dataclasses
import enum

import torch

from offload import _native


class Plane(enum.Enum):
    """One array of a chunk; those of STATE_BY_PARAM have a layout of their own by parameter, the
    others are elementwise parallel, scales by groups.
    """

    WEIGHT = "weight"
    RESIDUE = "residue"
    EXP_AVG = "exp_avg"  # of SGD its momentum buffer
    EXP_AVG_SQ = "exp_avg_sq"
    EXP_AVG_SCALE = "exp_avg_scale"
    EXP_AVG_SQ_SCALE = "exp_avg_sq_scale"
    TORCH_STATE = "torch_state"  # what a torch optimizer keeps; see [Note: torch state]
    FACTORS = "factors"  # row and column means of a second moment; always in RAM
    GRAD = "grad"
    GRAD_LO = "grad_lo"


SQUARES_PLANES = (Plane.EXP_AVG_SQ, Plane.EXP_AVG_SQ_SCALE)
SCALE_PLANES = (Plane.EXP_AVG_SCALE, Plane.EXP_AVG_SQ_SCALE)
_NATIVE_STATE_PLANES = (
    Plane.WEIGHT,
    Plane.RESIDUE,
    Plane.EXP_AVG,
    Plane.EXP_AVG_SQ,
    *SCALE_PLANES,
)
PACKED_PLANES = (Plane.WEIGHT, Plane.EXP_AVG, Plane.EXP_AVG_SQ)  # where they are floats
STATE_BY_PARAM = (Plane.TORCH_STATE, Plane.FACTORS)
STATE_PLANES = _NATIVE_STATE_PLANES + STATE_BY_PARAM
GRAD_PLANES = (Plane.GRAD, Plane.GRAD_LO)
NATIVE_PLANE_ORDER = _NATIVE_STATE_PLANES + GRAD_PLANES


GROUP_NUMEL = 32  # elements that share one scale
NUMEL_MULTIPLE = 4096  # every tile of every plane then starts and ends on a 4 KiB boundary


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

    @property
    def numel_multiple(self) -> int:
        """Elements that chunks and tiles are multiples of: 4 KiB of the narrowest plane that the
        format can have where the worker updates it.
        """
        in_tiles = not self.is_stepped_in_torch
        has_scales = in_tiles and any(plane in _DTYPES[self.name] for plane in SCALE_PLANES)
        return NUMEL_MULTIPLE * GROUP_NUMEL // 2 if has_scales else NUMEL_MULTIPLE

    @property
    def is_stepped_in_torch(self) -> bool:
        """Whether no chunk goes through the update worker."""
        return Plane.TORCH_STATE in self.dtypes and Plane.FACTORS not in self.dtypes

    def num_items(self, plane: Plane, numel: int) -> int:
        """Items of a plane for so many elements."""
        return -(-numel // GROUP_NUMEL) if plane in SCALE_PLANES else numel

    def nbytes(self, plane: Plane, numel: int) -> int:
        """Bytes of a plane for so many elements."""
        return self.num_items(plane, numel) * self.dtypes[plane].itemsize

    def packed_item_nbytes(self, plane: Plane) -> int:
        """Bytes of an item of a plane of floats, which can be packed on a drive; else 0."""
        dtype = self.dtypes.get(plane) if plane in PACKED_PLANES else None
        return dtype.itemsize if dtype in (torch.float32, torch.bfloat16) else 0

    def items(self, plane: Plane, begin: int, numel: int) -> slice:
        """The items of a plane for the elements from `begin`, which is a group's first."""
        first = self.num_items(plane, begin)
        return slice(first, first + self.num_items(plane, numel))

    @property
    def state_itemsize(self) -> float:
        """Bytes per parameter that persist between steps, but for STATE_BY_PARAM."""
        planes = [plane for plane in self.state_planes if plane not in STATE_BY_PARAM]
        return sum(self.nbytes(plane, GROUP_NUMEL) for plane in planes) / GROUP_NUMEL


def _moments(dtype: torch.dtype, dtype_sq: torch.dtype) -> dict[Plane, torch.dtype]:
    return {Plane.EXP_AVG: dtype, Plane.EXP_AVG_SQ: dtype_sq}


_SCALES = dict.fromkeys(SCALE_PLANES, torch.bfloat16)
_BF16_GRADS = {Plane.GRAD: torch.bfloat16, Plane.GRAD_LO: torch.uint16}
_EXACT_MASTER = {Plane.WEIGHT: torch.bfloat16, Plane.RESIDUE: torch.uint16}
_INT8_MASTER = {Plane.WEIGHT: torch.bfloat16, Plane.RESIDUE: torch.int8}
_DTYPES = {
    "fp32": {
        Plane.WEIGHT: torch.float32,
        **_moments(torch.float32, torch.float32),
        Plane.GRAD: torch.float32,
    },
    "exact": {**_EXACT_MASTER, **_moments(torch.float32, torch.float32), **_BF16_GRADS},
    "bf16": {**_EXACT_MASTER, **_moments(torch.bfloat16, torch.bfloat16), **_BF16_GRADS},
    "int8": {**_INT8_MASTER, **_moments(torch.int8, torch.uint8), **_SCALES, **_BF16_GRADS},
}  # in the order of the native codes
FORMATS = {
    name: StateFormat(name=name, native_code=code, dtypes=dtypes)
    for code, (name, dtypes) in enumerate(_DTYPES.items())
}


def state_format(name: str, optimizer: str = "adamw") -> StateFormat:
    """The format as an optimizer needs it: only AdamW keeps a second moment by element,
    Adafactor its factors, SCALE no moments, and one of torch a plane for whatever it keeps.
    """
    fmt = FORMATS[name]
    if optimizer == "adamw":
        return fmt
    if optimizer in ("torch", "scale"):
        kept = (Plane.WEIGHT, Plane.RESIDUE, *GRAD_PLANES)
        dtypes = {plane: dtype for plane, dtype in fmt.dtypes.items() if plane in kept}
        dtypes[Plane.TORCH_STATE] = torch.float32  # of SCALE that of the last layer
        if optimizer == "scale":
            dtypes[Plane.FACTORS] = torch.float32
    else:
        dtypes = {plane: d for plane, d in fmt.dtypes.items() if plane not in SQUARES_PLANES}
        if optimizer == "adafactor":
            dtypes[Plane.FACTORS] = torch.float32
    return dataclasses.replace(fmt, dtypes=dtypes)


_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_supported_dtype(dtype: torch.dtype) -> bool:
    """Whether a parameter of this dtype can be taken into the tiers (float64 would lose bits)."""
    return dtype in _FLOAT_DTYPES and dtype is not torch.float64


def split_master(master: torch.Tensor, weight: torch.Tensor, residue: torch.Tensor) -> None:
    """Split an fp32 master (N) into bf16 weight (N) and residue (N), all contiguous.

    A residue of 16 bits keeps the master; one of 8 bits rounds it.
    """
    nbytes = residue.dtype.itemsize
    addresses = master.data_ptr(), weight.data_ptr(), residue.data_ptr()
    _native.split_fp32(*addresses, master.numel(), nbytes)


def join_master(weight: torch.Tensor, residue: torch.Tensor | None, master: torch.Tensor) -> None:
    """Rebuild the fp32 master (N) from bf16 weight (N) and residue (N, or None for zero)."""
    low, nbytes = (0, 2) if residue is None else (residue.data_ptr(), residue.dtype.itemsize)
    _native.join_fp32(weight.data_ptr(), low, master.data_ptr(), master.numel(), nbytes)


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


def gradient_sums(
    plane: torch.Tensor, plane_lo: torch.Tensor | None, matrix: tuple[int, int], *, is_vector: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares of a landed gradient (N) by rows (N / num_cols) and by columns (N / num_rows)
    of its matrices, in float64 and in a fixed order. Of a vector itself, and nothing.
    """
    num_rows, num_cols = matrix
    if is_vector:
        values = torch.empty(plane.numel(), dtype=torch.float32, device="cpu")
        if plane.dtype is torch.float32:
            values.copy_(plane)
        else:
            join_master(plane, plane_lo, values)
        return values.double(), torch.empty(0, dtype=torch.float64, device="cpu")
    # native code writes to their addresses, so the user's default device must not be theirs
    rows = torch.empty(plane.numel() // num_cols, dtype=torch.float64, device="cpu")
    cols = torch.empty(plane.numel() // num_rows, dtype=torch.float64, device="cpu")
    kind = 1 if plane.dtype is torch.float32 else 0
    low = 0 if plane_lo is None else plane_lo.data_ptr()
    _native.factor_sums(
        plane.data_ptr(), low, kind, num_rows, num_cols, plane.numel(),
        rows.data_ptr(), cols.data_ptr(),
    )  # fmt: skip
    return rows, cols
