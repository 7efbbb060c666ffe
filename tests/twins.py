"""Slow twins of the native kernels in numpy: the same bits by other means, for tests to compare.

A bf16 array is its uint16 bit patterns. Arrays are one-dimensional; functions that change state
change their arguments, as the kernels do.
"""

import dataclasses
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
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
class Op:
    """One step on the elements [begin, end): the record that the native code takes."""

    begin: int = 0
    end: int
    step: int = 1
    lr: float = 1e-3
    weight_decay: float = 1e-2
    maximize: bool = False
    grad_scale: float = 1.0
    seed: int = 0

    def pack(self) -> bytes:
        rule, flags, beta1, beta2, eps = self.rule()
        hyper = (self.lr, beta1, beta2, eps, self.weight_decay, self.grad_scale)
        flags |= int(self.maximize)
        return struct.pack(
            "<qqiiddddddQq", self.begin, self.end, rule, flags, *hyper, self.seed, self.step
        )

    def rule(self) -> tuple[int, int, float, float, float]:
        """(rule, flags, beta1, beta2, eps) of the record."""
        raise NotImplementedError

    def apply(self, p: F32, m: F32, v: F32, g: F32) -> tuple[F32, F32, F32]:
        """New weight, first and second moment."""
        raise NotImplementedError

    def grad(self, g: F32) -> F32:
        g = g * np.float32(self.grad_scale)
        return g * np.float32(-1) if self.maximize else g

    def decay(self) -> float:
        """1 - lr * weight_decay, rounded once."""
        return float(1 - Fraction(self.lr) * Fraction(self.weight_decay))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWOp(Op):
    """torch.optim.AdamW(fused=True).

    Which multiply-adds are fused is what torch's compiler chose; see AdamwRule in kernels_rules.h.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def rule(self) -> tuple[int, int, float, float, float]:
        return 0, 0, self.beta1, self.beta2, self.eps

    def apply(self, p: F32, m: F32, v: F32, g: F32) -> tuple[F32, F32, F32]:
        return _adamw(p, m, v, g, self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGDOp(Op):
    """torch.optim.SGD: every multiply-add is fused."""

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    def rule(self) -> tuple[int, int, float, float, float]:
        return 1, 2 * int(self.nesterov), self.momentum, self.dampening, 0.0

    def apply(self, p: F32, m: F32, v: F32, g: F32) -> tuple[F32, F32, F32]:
        f = np.float32
        with np.errstate(all="ignore"):
            g = self.grad(g)
            if self.weight_decay:
                g = fma(p, f(self.weight_decay), g)
            if self.momentum:
                old = m * f(self.momentum)
                m = g if self.step == 1 else fma(g, f(1 - self.dampening), old)
                g = fma(m, f(self.momentum), g) if self.nesterov else m
            return fma(g, f(-self.lr), p), m, v


@dataclasses.dataclass(frozen=True, kw_only=True)
class LionOp(Op):
    """Lion (arXiv 2302.06675) as in its authors' PyTorch code."""

    beta1: float = 0.9
    beta2: float = 0.99

    def rule(self) -> tuple[int, int, float, float, float]:
        return 2, 0, self.beta1, self.beta2, 0.0

    def apply(self, p: F32, m: F32, v: F32, g: F32) -> tuple[F32, F32, F32]:
        f = np.float32
        with np.errstate(all="ignore"):
            g = self.grad(g)
            c = fma(g, f(1 - self.beta1), m * f(self.beta1))
            direction = np.where(c > 0, f(1), np.where(c < 0, f(-1), f(0)))
            p = fma(direction, f(-self.lr), p * f(1 - self.lr * self.weight_decay))
            return p, fma(g, f(1 - self.beta2), m * f(self.beta2)), v


def pack_ops(ops: Sequence[Op]) -> bytes:
    return b"".join(op.pack() for op in ops)


# --- formats ------------------------------------------------------------------------------------

Planes = dict[str, npt.NDArray[Any]]
GROUP = 32
PLANE_NAMES = (
    "weight", "residue", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale",
    "grad", "grad_lo",
)  # fmt: skip
_EXACT = {"weight": np.uint16, "residue": np.uint16}
_GRADS = {"grad": np.uint16, "grad_lo": np.uint16}
DTYPES: dict[str, dict[str, Any]] = {  # by format, in the order of the native codes
    "fp32": dict.fromkeys(("weight", "exp_avg", "exp_avg_sq", "grad"), np.float32),
    "exact": {**_EXACT, "exp_avg": np.float32, "exp_avg_sq": np.float32, **_GRADS},
    "bf16": {**_EXACT, "exp_avg": np.uint16, "exp_avg_sq": np.uint16, **_GRADS},
    "int8": {
        "weight": np.uint16, "residue": np.int8, "exp_avg": np.int8, "exp_avg_sq": np.uint8,
        "exp_avg_scale": np.uint16, "exp_avg_sq_scale": np.uint16, **_GRADS,
    },
}  # fmt: skip
CODES = {name: code for code, name in enumerate(DTYPES)}


def items_of(name: str, begin: int, end: int) -> slice:
    """The items of a plane for the elements [begin, end)."""
    return slice(begin // GROUP, -(-end // GROUP)) if "scale" in name else slice(begin, end)


def update(format: str, planes: Planes, op: Op, origin: int = 0) -> None:
    """One step on the op's range of planes that begin at element `origin` of their chunk, in place.
    An absent grad_lo is zero; only AdamW needs and touches the second moment.
    """
    part = {name: plane[items_of(name, op.begin, op.end)] for name, plane in planes.items()}
    p, g = load_master(format, part), load_grad(format, part)
    m, v = load_moments(format, part, p)
    p, m, v = op.apply(p, m, v, g)
    store_master(format, part, p)
    words = random_words(op.seed, op.step, origin + op.begin, origin + op.end)
    store_exp_avg(format, part, m, words)
    if isinstance(op, AdamWOp):
        store_exp_avg_sq(format, part, v, words)


def load_master(format: str, part: Planes) -> F32:
    if format == "fp32":
        return part["weight"]
    return (
        join_fp24(part["weight"], part["residue"])
        if format == "int8"
        else join_fp32(part["weight"], part["residue"])
    )


def load_grad(format: str, part: Planes) -> F32:
    return part["grad"] if format == "fp32" else join_fp32(part["grad"], part.get("grad_lo"))


def store_master(format: str, part: Planes, master: F32) -> None:
    if format == "fp32":
        part["weight"][:] = master
    else:
        split = split_fp24 if format == "int8" else split_fp32
        part["weight"][:], part["residue"][:] = split(master)


def load_moments(format: str, part: Planes, like: F32) -> tuple[F32, F32]:
    """First and second moment; zeros where there is no plane for the second."""
    m, v = part["exp_avg"], part.get("exp_avg_sq", np.zeros_like(like))
    if format == "bf16":
        m = join_fp32(m)
        v = join_fp32(v) if "exp_avg_sq" in part else v
    elif format == "int8":
        code = m.astype(np.float32)
        m = spread(part["exp_avg_scale"], m.size) * (code / (np.float32(254) - abs(code)))
        if "exp_avg_sq" in part:
            step = spread(part["exp_avg_sq_scale"], v.size) / np.float32(255)
            root = v.astype(np.float32) * step
            with np.errstate(over="ignore"):
                v = root * root
    return m, v


def store_exp_avg(format: str, part: Planes, m: F32, words: U32) -> None:
    if format == "bf16":
        m = round_random(m, words & np.uint32(0xFFFF))
    elif format == "int8":
        part["exp_avg_scale"][:] = scales = scales_of(m)
        bound = spread(np.where(scales == 0, np.uint16(0x0080), scales), m.size)
        with np.errstate(all="ignore"):
            code = m / (bound + abs(m)) * np.float32(254)
        code = np.where(np.isnan(code), np.float32(-127), code)
        m = np.rint(np.clip(code, -127, 127)).astype(np.int8)
    part["exp_avg"][:] = m


def store_exp_avg_sq(format: str, part: Planes, v: F32, words: U32) -> None:
    if format == "bf16":
        v = round_random(v, words >> np.uint32(16))
    elif format == "int8":
        with np.errstate(all="ignore"):
            root = np.sqrt(v)
            part["exp_avg_sq_scale"][:] = scales = scales_of(root)
            bound = spread(np.where(scales == 0, np.uint16(0x0080), scales), v.size)
            code = root * (np.float32(255) / bound)
        code = np.where(np.isnan(code), np.float32(0), np.maximum(code, root > 0))
        v = np.rint(np.minimum(code, 255)).astype(np.uint8)
    part["exp_avg_sq"][:] = v


def split_fp24(master: F32) -> tuple[U16, npt.NDArray[np.int8]]:
    """Round the bits to 24, ties up; return (weight as bf16 bits, the signed byte below it)."""
    b = (bits(master) + np.uint32(0x80)) >> np.uint32(8)
    weight = ((b + np.uint32(0x80)) >> np.uint32(8)).astype(np.uint16)
    return weight, (b & np.uint32(0xFF)).astype(np.uint8).view(np.int8)


def join_fp24(weight: U16, residue: npt.NDArray[np.int8]) -> F32:
    """Undo split_fp24, but for what it rounded away."""
    low = residue.astype(np.int32).view(np.uint32) << np.uint32(8)
    return from_bits((weight.astype(np.uint32) << np.uint32(16)) + low)


def spread(scales: U16, numel: int) -> F32:
    """The scale of every element, from the bf16 bits of every group."""
    return join_fp32(np.repeat(scales, GROUP)[:numel])


def scales_of(values: F32) -> U16:
    """The largest magnitude of every group as bf16 bits, rounded up; normal and finite, or 0."""
    magnitudes = np.zeros(-(-values.size // GROUP) * GROUP, np.uint64)
    magnitudes[: values.size] = bits(values) & np.uint32(0x7FFFFFFF)
    top = magnitudes.reshape(-1, GROUP).max(axis=1)
    scales = (top + np.uint64(0xFFFF)) >> np.uint64(16)
    return np.where(scales == 0, 0, np.clip(scales, 0x0080, 0x7F7F)).astype(np.uint16)


def round_random(values: F32, words: U32) -> U16:
    """Add 16 random bits below the bf16 and cut; every NaN becomes 0x7FC0."""
    rounded = (bits(values) + words) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def mix(value: int) -> int:
    """The finalizer of splitmix64."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def random_words(seed: int, step: int, begin: int, end: int) -> U32:
    """The random word of every element: a hash of (seed, step, element) and nothing else."""
    key = mix(mix(seed) ^ step)
    x = np.arange(begin, end, dtype=np.uint64).astype(np.uint32)  # their low 32 bits
    x = x ^ np.uint32(key & 0xFFFFFFFF)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15)) ^ np.uint32(key >> 32)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def adamw_fp32(weight: F32, exp_avg: F32, exp_avg_sq: F32, grad: F32, op: AdamWOp) -> None:
    """One step of AdamW on the op's range, in place; grad stays."""
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
    lerp = f(1 - op.beta1)
    with np.errstate(all="ignore"):
        g = op.grad(g)
        p = p * f(op.decay())
        m = fma(lerp, g - m, m) if abs(lerp) < 0.5 else fma(lerp - f(1), g - m, g)
        v = fma(f(1 - op.beta2) * g, g, v * f(op.beta2))
        denominator = np.sqrt(v) / f(correction_sqrt) + f(op.eps)
        p = p + (f(step_size) * m) / denominator
    return p, m, v
