"""A chunk: the parameters that move together, and their mutable state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from offload.errors import StateError
from offload.extents import PlaneExtents
from offload.factored import FactoredStep
from offload.factors import FactorSums
from offload.formats import Plane
from offload.slots import Region, Slot
from offload.spec import ChunkSpec as ChunkSpec
from offload.spec import ParamSpec as ParamSpec
from offload.spec import make_spec as make_spec
from offload.tier import TRANSITIONS, DeviceEvent, Residency


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
    factor_sums: dict[int, FactorSums] = dataclasses.field(default_factory=dict)
    accumulated: set[int] = dataclasses.field(default_factory=set)  # over several backwards
    graph_task: dict[int, int] = dataclasses.field(
        default_factory=dict
    )  # the backward that landed last


class PlaneStep(Protocol):
    """An optimizer step that wants all planes of a chunk in memory at once."""

    def apply(self, planes: Mapping[Plane, torch.Tensor], work: torch.Tensor) -> None:
        """Take the step, in place; `work` is fp32 memory that the plan has for it."""


Ops = bytes | FactoredStep | PlaneStep


@dataclasses.dataclass(eq=False, slots=True)
class Update:
    """A pending optimizer step of one chunk: kept at the latest by the chunk's next fetch. `ops` is
    what the native worker reads, what it is made of when the step starts, or a step on whole
    planes.
    """

    ops: Ops
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
