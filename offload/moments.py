"""Moments as plain fp32 and back: what a format keeps of an optimizer's state, outside of updates.

The update's kernel rounds the moments of `bf16` stochastically, because it adds small steps for
ever. What comes in from elsewhere is rounded once, so here it is to nearest. `int8` packs as its
kernel does ([Note: int8 groups] in csrc/kernels.h). `exact` and `fp32` keep every bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from offload.formats import GROUP_NUMEL, Plane, StateFormat

_SCALE_OF = {
    Plane.EXP_AVG: Plane.EXP_AVG_SCALE,
    Plane.EXP_AVG_SQ: Plane.EXP_AVG_SQ_SCALE,
}
_SCALE_MIN, _SCALE_MAX = 0x0080, 0x7F7F  # bf16 bits: the smallest normal number, the largest finite


def planes_of(moment: Plane, fmt: StateFormat) -> tuple[Plane, ...]:
    """The planes that hold a moment: itself, and its scales where the format has them."""
    scale = _SCALE_OF[moment]
    return (moment, scale) if scale in fmt.dtypes else (moment,)


def unpack(moment: Plane, items: Mapping[Plane, torch.Tensor], numel: int) -> torch.Tensor:
    """A moment in fp32 (numel,) from the items of its planes."""
    codes = items[moment]
    scales = items.get(_SCALE_OF[moment])
    if scales is None:
        return codes.float()
    values, bounds = codes.float(), _spread(scales, numel)
    if moment is Plane.EXP_AVG:
        return bounds * (values / (254.0 - values.abs()))
    root = values * (bounds / 255.0)
    return root * root


def pack(moment: Plane, values: torch.Tensor, fmt: StateFormat) -> dict[Plane, torch.Tensor]:
    """The items of a moment's planes for fp32 values (numel,) that begin with a group's first."""
    scale = _SCALE_OF[moment]
    if scale not in fmt.dtypes:
        return {moment: values.to(fmt.dtypes[moment])}
    if moment is Plane.EXP_AVG:
        scales = _scales(values)
        bounds = _spread(_divisors(scales), values.numel())
        codes = values / (bounds + values.abs()) * 254.0
        codes = codes.nan_to_num(nan=-127.0).clamp(-127.0, 127.0).round().to(torch.int8)
    else:
        root = values.sqrt()
        scales = _scales(root)
        codes = root * (255.0 / _spread(_divisors(scales), values.numel()))
        codes = codes.maximum((root > 0).float())  # what is not zero is not stored as zero
        codes = codes.nan_to_num(nan=0.0).clamp(max=255.0).round().to(torch.uint8)
    return {moment: codes, scale: scales}


def _scales(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of every group in bf16, rounded up; normal and finite, or 0."""
    num_groups = -(-values.numel() // GROUP_NUMEL)
    magnitudes = torch.zeros(num_groups * GROUP_NUMEL, dtype=torch.int64)
    magnitudes[: values.numel()] = values.contiguous().view(torch.int32) & 0x7FFFFFFF
    patterns = (magnitudes.view(num_groups, GROUP_NUMEL).amax(dim=1) + 0xFFFF) >> 16
    patterns = torch.where(patterns == 0, 0, patterns.clamp(_SCALE_MIN, _SCALE_MAX))
    return patterns.to(torch.int16).view(torch.bfloat16)


def _divisors(scales: torch.Tensor) -> torch.Tensor:
    """The scales, with the smallest in the place of zero."""
    smallest = torch.tensor(_SCALE_MIN, dtype=torch.int16).view(torch.bfloat16)
    return torch.where(scales == 0, smallest, scales)


def _spread(scales: torch.Tensor, numel: int) -> torch.Tensor:
    """The scale of every element in fp32."""
    return scales.float().repeat_interleave(GROUP_NUMEL)[:numel]
