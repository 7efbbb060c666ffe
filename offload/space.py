"""What has to be in memory at once: slots by size class, scratch of torch optimizers. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from offload.factors import SUM_NBYTES, num_sums
from offload.formats import STATE_BY_PARAM, Plane, StateFormat
from offload.sizes import short_nbytes
from offload.slots import round_up
from offload.spec import ChunkSpec
from offload.swapfile import ALIGN_NBYTES

_CLASS_RATIO = 0.6  # a chunk joins the class of a larger one if it fills this share of the slot
TORCH_TEMPORARIES = 3  # of a parameter, in fp32: the most that torch allocates in its step


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """One size class: equal slots for the weights and gradients of `members`."""

    name: str
    slot_nbytes: int
    members: tuple[int, ...]
    num_weight_slots: int
    num_grad_slots: int
    num_gpu_slots: int = 0

    @property
    def nbytes(self) -> int:
        return self.slot_nbytes * (self.num_weight_slots + self.num_grad_slots)


def size_classes(specs: Sequence[ChunkSpec]) -> list[tuple[int, ...]]:
    """Group chunks by size, so that no slot is wasted on a chunk much smaller than it."""
    ordered = sorted(specs, key=lambda spec: (spec.is_small, -spec.numel))
    classes: list[list[ChunkSpec]] = []
    for spec in ordered:
        head = classes[-1][0] if classes else None
        if head and head.is_small == spec.is_small and spec.numel >= _CLASS_RATIO * head.numel:
            classes[-1].append(spec)
        else:
            classes.append([spec])
    return [tuple(sorted(spec.index for spec in members)) for members in classes]


def always_in_ram(specs: Sequence[ChunkSpec], fmt: StateFormat) -> frozenset[tuple[int, Plane]]:
    """Planes that rest in RAM whatever the budget is: small tensors, and [Note: factors]."""
    pairs = [(s, p) for s in specs for p in s.state_planes(fmt)]
    return frozenset((s.index, p) for s, p in pairs if s.is_small or p is Plane.FACTORS)


def saving(pool: PoolSpec, spec: ChunkSpec, plane: Plane) -> int:
    """Bytes of traffic a step that a byte of a plane saves in RAM: weights are read twice, unless
    slots hold all of their pool, and what is trained is written.
    """
    if plane is not Plane.WEIGHT:
        return 2 if spec.trainable else 0
    return (2 if len(pool.members) > pool.num_weight_slots else 0) + spec.trainable


def steps_in_torch(fmt: StateFormat) -> bool:
    """Whether no chunk is updated in tiles."""
    return Plane.TORCH_STATE in fmt.dtypes and Plane.FACTORS not in fmt.dtypes


def _stepped_in_torch(specs: Sequence[ChunkSpec], fmt: StateFormat) -> list[ChunkSpec]:
    """The chunks whose planes are brought to memory whole. See [Note: torch step]."""
    if Plane.TORCH_STATE not in fmt.dtypes:
        return []
    return [s for s in specs if s.trainable and s.state_plane is Plane.TORCH_STATE]


def _largest_param_nbytes(specs: Sequence[ChunkSpec]) -> int:
    """Of those that are trained, in fp32."""
    return max((4 * p.numel for s in specs for p in s.params if p.trainable), default=0)


def work_nbytes(specs: Sequence[ChunkSpec], fmt: StateFormat) -> int:
    """The fp32 master and gradient of one parameter, where a format splits them."""
    stepped = _stepped_in_torch(specs, fmt)
    if Plane.RESIDUE not in fmt.dtypes:
        return 0
    return round_up(2 * _largest_param_nbytes(stepped), ALIGN_NBYTES)


def scratch_nbytes(
    specs: Sequence[ChunkSpec], fmt: StateFormat, moving: Mapping[int, Sequence[Plane]]
) -> int:
    """work_nbytes, and all planes of one chunk that do not rest in RAM (`moving`, by chunk)."""
    stepped = _stepped_in_torch(specs, fmt)
    chunks = [sum(s.nbytes(p, fmt) for p in moving[s.index]) for s in stepped]
    return max(chunks, default=0) + work_nbytes(specs, fmt)


def beside_nbytes(specs: Sequence[ChunkSpec], fmt: StateFormat) -> int:
    """What lies beside the slab. Of a torch optimizer what torch allocates for itself in the step
    of one parameter, at most: temporaries, and in its first step the state, which is then copied to
    its plane. Of Adafactor the sums that wait beside gradients.
    """
    params = [p for s in _stepped_in_torch(specs, fmt) for p in s.params]
    in_torch = max(
        (
            TORCH_TEMPORARIES * 4 * p.numel + 4 * sum(entry.num_items for entry in p.state)
            for p in params
        ),
        default=0,
    )
    sums = [
        SUM_NBYTES * num_sums(p.shape, p.matrix)
        for s in specs
        for p in s.params
        if p.trainable and p.matrix is not None
    ]
    return in_torch + sum(sums)


def beside_line(specs: Sequence[ChunkSpec], nbytes: int, fmt: StateFormat) -> str:
    """Says what beside_nbytes is for."""
    torch_step = ["what torch allocates in the step of one parameter"]
    what = torch_step if _stepped_in_torch(specs, fmt) else []
    if any(p.trainable and p.matrix is not None for s in specs for p in s.params):
        what.append("sums over rows and columns of gradients")
    return f"  and {short_nbytes(nbytes)} beside it, for {' and '.join(what)}"


def state_itemsize(specs: Sequence[ChunkSpec], fmt: StateFormat) -> float:
    """Bytes per parameter that persist between steps."""
    trained = [spec for spec in specs if spec.trainable]
    planes = [plane for plane in STATE_BY_PARAM if plane in fmt.dtypes]
    nbytes = sum(
        spec.nbytes(plane, fmt)
        for spec in trained
        for plane in planes
        if plane in spec.state_planes(fmt)
    )
    return fmt.state_itemsize + round(nbytes / max(sum(s.numel for s in trained), 1), 3)
