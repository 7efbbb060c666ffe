"""Slow twins of the native kernels in numpy: the same bits by other means, for tests to compare.

A bf16 array is its uint16 bit patterns. Arrays are one-dimensional; functions that change state
change their arguments, as the kernels do.
"""

import dataclasses
import math
import struct
from fractions import Fraction

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
F64 = npt.NDArray[np.float64]

CRC_POLYNOMIAL = 0x82F63B78
SUM_TILE_NUMEL = 65536
NUM_LANES = 16
SET, ACCUMULATE_FP32, ACCUMULATE_IN_DTYPE = 0, 1, 2


def bits(values: F32) -> npt.NDArray[np.uint32]:
    return values.view(np.uint32)


def from_bits(patterns: npt.ArrayLike) -> F32:
    return np.asarray(patterns, dtype=np.uint32).view(np.float32)


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(value >> 1) ^ (CRC_POLYNOMIAL * (value & 1)) for value in table]
    return table


CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def split_fp32(master: F32) -> tuple[U16, U16]:
    """Return (weight as bf16 bits, residue): b -> (b + 0x8000) >> 16 and b & 0xFFFF."""
    b = bits(master)
    weight = ((b + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)  # the sum wraps at 2**32
    return weight, (b & np.uint32(0xFFFF)).astype(np.uint16)


def join_fp32(weight: U16, residue: U16 | None = None) -> F32:
    """Undo split_fp32; a missing residue is zero."""
    low = np.zeros_like(weight) if residue is None else residue
    upper = weight - (low >= 0x8000).astype(np.uint16)  # wraps at 2**16
    return from_bits((upper.astype(np.uint32) << np.uint32(16)) | low)


def round_bf16(values: F32) -> U16:
    """Round to nearest, ties to even, as torch does; every NaN becomes 0x7FC0."""
    b = bits(values)
    rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> F32:
    """a * b + c in fp32 with one rounding.

    The product is exact in float64. Rounding the sum to float64 and then to fp32 would round twice,
    so the first rounding is made to odd: the sum's exact error decides between its neighbours.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    is_even = (total.view(np.uint64) & np.uint64(1)) == 0
    is_inexact = np.isfinite(total) & (error != 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    odd = np.where(is_inexact & is_even, np.nextafter(total, toward), total)
    return odd.astype(np.float32)


def sum_squares(values: F32) -> float:
    """Sum in float64: 16 lanes within tiles of 65536, lanes as a tree, tiles in order."""
    total = 0.0
    for begin in range(0, values.size, SUM_TILE_NUMEL):
        tile = values[begin : begin + SUM_TILE_NUMEL].astype(np.float64)
        padded = np.zeros(-(-tile.size // NUM_LANES) * NUM_LANES)
        padded[: tile.size] = tile
        lanes: F64 = np.cumsum(np.square(padded).reshape(-1, NUM_LANES), axis=0)[-1]
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        total += float(lanes[0])
    return total


def grad_land(dst: F32 | U16, dst_lo: U16 | None, src: F32 | U16, mode: int) -> float:
    """Set or accumulate src into dst (+ dst_lo) in place; return the result's sum of squares."""
    if dst.dtype == np.float32:
        dst[:] = src if mode == SET else dst + src
        return sum_squares(dst)
    if mode == ACCUMULATE_FP32:
        result = join_fp32(dst, dst_lo) + join_fp32(src)
        dst[:], dst_lo[:] = split_fp32(result)
        return sum_squares(result)
    dst[:] = src if mode == SET else round_bf16(join_fp32(dst, dst_lo) + join_fp32(src))
    if dst_lo is not None:
        dst_lo[:] = 0
    return sum_squares(join_fp32(dst))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWOp:
    """AdamW on the elements [begin, end): the record that the native code takes."""

    begin: int = 0
    end: int
    step: int = 1
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False
    grad_scale: float = 1.0

    def pack(self) -> bytes:
        hyper = (self.lr, self.beta1, self.beta2, self.eps, self.weight_decay, self.grad_scale, 0.0)
        return struct.pack(
            "<qqiidddddddq", self.begin, self.end, 0, int(self.maximize), *hyper, self.step
        )


def pack_ops(ops: list[AdamWOp]) -> bytes:
    return b"".join(op.pack() for op in ops)


def adamw_fp32(weight: F32, exp_avg: F32, exp_avg_sq: F32, grad: F32, op: AdamWOp) -> None:
    """One step of torch.optim.AdamW(fused=True) on the op's range, in place; grad stays.

    Which multiply-adds are fused is what torch's compiler chose; see adamw_lanes in kernels_body.h.
    """
    part = slice(op.begin, op.end)
    new_weight, new_exp_avg, new_exp_avg_sq = _adamw(
        weight[part], exp_avg[part], exp_avg_sq[part], grad[part], op
    )
    weight[part], exp_avg[part], exp_avg_sq[part] = new_weight, new_exp_avg, new_exp_avg_sq


def adamw_exact(
    weight: U16,
    residue: U16,
    exp_avg: F32,
    exp_avg_sq: F32,
    grad: U16,
    grad_lo: U16 | None,
    op: AdamWOp,
) -> None:
    """The same on the joined master and gradient; the master is split again."""
    part = slice(op.begin, op.end)
    master = join_fp32(weight[part], residue[part])
    full_grad = join_fp32(grad[part], None if grad_lo is None else grad_lo[part])
    master, exp_avg[part], exp_avg_sq[part] = _adamw(
        master, exp_avg[part], exp_avg_sq[part], full_grad, op
    )
    weight[part], residue[part] = split_fp32(master)


def _adamw(p: F32, m: F32, v: F32, g: F32, op: AdamWOp) -> tuple[F32, F32, F32]:
    f = np.float32
    step_size = -(op.lr / (1 - math.pow(op.beta1, op.step)))
    correction_sqrt = math.sqrt(1 - math.pow(op.beta2, op.step))
    decay = float(1 - Fraction(op.lr) * Fraction(op.weight_decay))  # rounded once
    lerp = f(1 - op.beta1)
    with np.errstate(all="ignore"):
        g = g * f(op.grad_scale)
        if op.maximize:
            g = g * f(-1)
        p = p * f(decay)
        m = fma(lerp, g - m, m) if abs(lerp) < 0.5 else fma(lerp - f(1), g - m, g)
        v = fma(f(1 - op.beta2) * g, g, v * f(op.beta2))
        denominator = np.sqrt(v) / f(correction_sqrt) + f(op.eps)
        p = p + (f(step_size) * m) / denominator
    return p, m, v
