"""A chunk: the parameters that move together, its frozen facts and its mutable state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from offload.errors import StateError
from offload.formats import NUMEL_MULTIPLE, Plane, StateFormat
from offload.slots import Region, Slot, round_up
from offload.store import PlaneExtents
from offload.tier import TRANSITIONS, DeviceEvent, Residency

_PARAM_MULTIPLE = 64  # elements; weights start on a cache line in every dtype, and groups with them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One parameter's place in its chunk; `offset` and `numel` in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    trainable: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpec:
    """Frozen facts of a chunk. `numel` counts padding, and is a multiple of 4096.

    `is_small` marks the chunk of the many little tensors, whose weights always stay in RAM.
    """

    index: int
    name: str
    params: tuple[ParamSpec, ...]
    numel: int
    is_block: bool
    is_small: bool = False

    @property
    def trainable(self) -> bool:
        return any(param.trainable for param in self.params)

    @property
    def num_params(self) -> int:
        """Parameters in the usual sense: elements without padding."""
        return sum(param.numel for param in self.params)

    def nbytes(self, plane: Plane, fmt: StateFormat) -> int:
        return fmt.nbytes(plane, self.numel)

    def aligned(self, fmt: StateFormat) -> ChunkSpec:
        """The same chunk with the padding that a format's planes want."""
        return dataclasses.replace(self, numel=round_up(self.numel, fmt.numel_multiple))

    def state_planes(self, fmt: StateFormat) -> tuple[Plane, ...]:
        """A chunk without trainable parameters needs its weight plane only."""
        return fmt.state_planes if self.trainable else (Plane.WEIGHT,)


def make_spec(
    index: int,
    name: str,
    params: Sequence[tuple[str, torch.Size, bool]],
    *,
    is_block: bool,
    is_small: bool = False,
) -> ChunkSpec:
    """Lay (name, shape, trainable) out one behind the other."""
    offset, placed = 0, []
    for param_name, shape, trainable in params:
        spec = ParamSpec(
            name=param_name,
            shape=tuple(shape),
            offset=offset,
            numel=shape.numel(),
            trainable=trainable,
        )
        placed.append(spec)
        offset = round_up(offset + spec.numel, _PARAM_MULTIPLE)
    return ChunkSpec(
        index=index,
        name=name,
        params=tuple(placed),
        numel=round_up(max(offset, 1), NUMEL_MULTIPLE),
        is_block=is_block,
        is_small=is_small,
    )


@dataclasses.dataclass(eq=False, slots=True)
class Gradient:
    """What has landed for one chunk since the last step. Lives in slots, or in extents once
    `spilled`.
    """

    hi: Slot | None = None
    lo: Slot | None = None
    has_lo: bool = False  # a low half exists: in `lo`, or in its extent
    spilled: bool = False
    moving: bool = False  # a spill or its way back is in flight
    sum_squares: dict[int, float] = dataclasses.field(default_factory=dict)  # by parameter position
    accumulated: set[int] = dataclasses.field(default_factory=set)  # over several backwards
    graph_task: dict[int, int] = dataclasses.field(
        default_factory=dict
    )  # the backward that landed last


@dataclasses.dataclass(eq=False, slots=True)
class Update:
    """A pending optimizer step of one chunk: kept at the latest by the chunk's next fetch."""

    ops: bytes
    started: bool = False


class Chunk:
    """Mutable state of one chunk. Only the engine calls the methods that change it."""

    def __init__(self, spec: ChunkSpec, params: Sequence[torch.nn.Parameter]) -> None:
        self.spec = spec
        self.params = list(params)
        self.residency = Residency.NVME
        self.pinned: dict[Plane, Region] = {}
        self.extents: dict[Plane, PlaneExtents] = {}
        self.unsaved: set[Plane] = set()  # pinned planes that have changed since they were written
        self.slot: Slot | None = None  # host slot of the weight plane
        self.gpu_slot: GpuSlot | None = None
        self.upload: DeviceEvent | None = None  # the copy that fills gpu_slot from the host copy
        self.override: torch.Tensor | None = (
            None  # what the parameters show instead, inside gathered()
        )
        self.num_users = 0
        self.filled = False  # the planes hold the parameters' values; until then the parameters do
        self.wanted = False  # about to be bound: not to be evicted
        self.gradient: Gradient | None = None
        self.update: Update | None = None
        self.num_steps = [0] * len(self.params)  # optimizer steps taken, per parameter
        self.num_pending_backwards = 0  # forwards whose backward has not come yet
        self._placeholders: list[torch.Tensor] = []

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def weight_pinned(self) -> bool:
        return Plane.WEIGHT in self.pinned

    @property
    def resting(self) -> Residency:
        """Where the weight plane is when nothing holds it."""
        return Residency.CPU if self.weight_pinned else Residency.NVME

    def to(self, residency: Residency) -> None:
        """Move along one edge of TRANSITIONS; anything else is a bug in the engine."""
        if (self.residency, residency) not in TRANSITIONS:
            raise StateError(
                f"chunk {self.name}: {self.residency.value} -> {residency.value} is not a legal "
                "move."
            )
        self.residency = residency

    @property
    def has_versions(self) -> bool:
        """Whether a plane's next version goes to another extent than its newest one."""
        return any(extents.target is not extents.newest for extents in self.extents.values())

    def changed(self, plane: Plane) -> None:
        """All of a state plane has been written where the plan has it: in RAM, or to its target."""
        if plane in self.pinned:
            self.unsaved.add(plane)
        else:
            self.extents[plane].wrote()

    def host_weight(self) -> Region | None:
        """The host copy of the weight plane, pinned or in a slot, or None."""
        if self.weight_pinned:
            return self.pinned[Plane.WEIGHT]
        return None if self.slot is None else self.slot.region

    # Parameters point at a slot while their chunk is in use, else at a NaN placeholder of the right
    # shape.

    def make_placeholders(self, dtype: torch.dtype, device: torch.device) -> None:
        """One element, expanded: a use of absent weights shows as NaN, not as a wrong number."""
        self._placeholders = [
            torch.full((), float("nan"), dtype=dtype, device=device).expand(param.shape)
            for param in self.spec.params
        ]

    def placeholder(self, position: int) -> torch.Tensor:
        return self._placeholders[position]

    def placeholder_addresses(self) -> dict[int, str]:
        return {
            tensor.data_ptr(): param.name
            for tensor, param in zip(self._placeholders, self.spec.params, strict=True)
        }

    def bind(self, flat: torch.Tensor) -> None:
        """Point the parameters at the weight plane `flat` (numel,)."""
        for param, spec in zip(self.params, self.spec.params, strict=True):
            param.data = flat[spec.offset : spec.offset + spec.numel].view(spec.shape)

    def unbind(self) -> None:
        for param, placeholder in zip(self.params, self._placeholders, strict=True):
            param.data = placeholder

    def check_bound(self, flat: torch.Tensor) -> None:
        """The same for a chunk that stays bound to the weight plane `flat`."""
        for param, spec in zip(self.params, self.spec.params, strict=True):
            if param.data_ptr() != flat.data_ptr() + spec.offset * flat.element_size():
                raise self._changed(spec)

    def _changed(self, spec: ParamSpec) -> StateError:
        return StateError(
            f"parameter {spec.name} was changed outside the engine (model.to(), .half() or .data = "
            "...). Convert the model before offload.offload(), or use engine.gathered() to write."
        )

    def check_unbound(self) -> None:
        """Raise StateError where somebody else moved a parameter's data (model.to, .half, a
        re-assignment).
        """
        for param, placeholder, spec in zip(
            self.params, self._placeholders, self.spec.params, strict=True
        ):
            if param.data_ptr() != placeholder.data_ptr():
                raise self._changed(spec)


@dataclasses.dataclass(eq=False, slots=True)
class GpuSlot:
    """One weight buffer on the compute device. `free_event` is when compute has finished with its
    last bytes.
    """

    index: int
    tensor: torch.Tensor  # uint8 on the device
    free_event: DeviceEvent | None = None
