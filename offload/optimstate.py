"""Optimizer state as torch.optim keeps it, out of the tiers and into them, parameter by parameter.

A state_dict of torch numbers the parameters through all groups, and has for each what its optimizer
keeps: tensors of the parameter's shape, and a step count. In the tiers the same numbers lie in the
moment planes and on the chunk. All that can be wrong with a state_dict is found before anything is
changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from offload.chunk import Chunk, ParamSpec
from offload.engine import Engine
from offload.errors import StateError
from offload.formats import Plane
from offload.moments import pack, planes_of, unpack
from offload.planes import check_room
from offload.windows import PlaneWindows

# How torch computes, not what: keys of its groups that the tiers have no use for.
_IMPLEMENTATION = ("foreach", "capturable", "differentiable", "fused")
_NOT_HYPER = ("params", "param_names", *_IMPLEMENTATION, "amsgrad", "decoupled_weight_decay")
_STEP_MAX = 2**53


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One parameter of an optimizer, in the order in which torch numbers them."""

    chunk: Chunk
    position: int

    @property
    def spec(self) -> ParamSpec:
        return self.chunk.spec.params[self.position]

    @property
    def num_steps(self) -> int:
        return self.chunk.num_steps[self.position]


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """What a parameter gets: steps taken, and its moments (None: zeros)."""

    num_steps: int
    moments: dict[Plane, torch.Tensor | None]


class TorchState:
    """The state of one optimizer; `moments` says which plane torch's words stand for."""

    def __init__(
        self, engine: Engine, members: Sequence[tuple[Chunk, int]], moments: Mapping[str, Plane]
    ) -> None:
        self._engine = engine
        self._windows = PlaneWindows(engine)
        self._members = [Member(*member) for member in members]
        self._moments = dict(moments)

    @property
    def num_steps(self) -> list[int]:
        return [member.num_steps for member in self._members]

    # ---- out ----

    def stream(self) -> Iterator[tuple[int, str, dict[str, torch.Tensor]]]:
        """Yield (number, name, state) of every parameter that has taken a step. Memory: the state
        of one parameter in fp32. Raises StateError where a step is taken in between.
        """
        before = self.num_steps
        for index, member in enumerate(self._members):
            if self.num_steps != before:
                raise StateError(
                    "a step was taken while the optimizer's state was streamed, so it would be of "
                    "two steps. Read it to its end first."
                )
            if member.num_steps:
                yield index, member.spec.name, self._read(member)

    def full(self) -> dict[int, dict[str, Any]]:
        """All of it by number, where RAM has room: else StateError."""
        numel = sum(member.spec.numel for member in self._members if member.num_steps)
        needed = numel * len(self._moments) * torch.float32.itemsize
        check_room(
            self._engine.plan, needed, "full_state_dict()",
            "use optimizer.stream_state(), which streams",
        )  # fmt: skip
        return {index: state for index, _, state in self.stream()}

    def _read(self, member: Member) -> dict[str, torch.Tensor]:
        spec, fmt = member.spec, self._engine.plan.fmt
        state: dict[str, torch.Tensor] = {}
        if "momentum_buffer" not in self._moments:
            state["step"] = torch.tensor(float(member.num_steps))
        for name, plane in self._moments.items():
            items = self._windows.read(member.chunk, planes_of(plane, fmt), spec)
            state[name] = unpack(plane, items, spec.numel).view(spec.shape)
        return state

    # ---- in: what is given ----

    def check_groups(
        self, saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]],
        defaults: Mapping[str, Any],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The hyperparameters that each group gets. Raises StateError where they cannot be kept."""
        sizes = [len(group["params"]) for group in saved]
        wanted = [len(group["params"]) for group in groups]
        if sizes != wanted:
            raise StateError(
                f"the state_dict has groups of {sizes} parameters, this optimizer has {wanted}. "
                "Make the groups as they were."
            )
        take = _hyperparameters if self._moments else _all_hyperparameters
        return [take(index, row, defaults) for index, row in enumerate(saved)]

    def check(
        self, saved_ids: Sequence[Any], state: Mapping[Any, Any], counts: Sequence[int] | None
    ) -> list[_Entry] | None:
        """What every parameter gets, or None where the tiers hold it already, because the
        state_dict has no more than step counts. Raises StateError that names the parameter.
        """
        unknown = [key for key in state if key not in saved_ids]
        if unknown:
            raise StateError(
                f"the state_dict has state for parameter {unknown[0]!r}, which none of its groups "
                "has. It is damaged; save it again."
            )
        if counts is not None and len(counts) != len(self._members):
            raise StateError(
                f"the state_dict has {len(counts)} step counts for {len(self._members)} parameters."
                " It is damaged; save it again."
            )
        if not self._moments and (state or counts is None):
            raise StateError(
                "the state of this optimizer stays in the tiers, so it takes no other state_dict "
                "than its own state_dict(). Checkpoints and durability bring its state back."
            )
        if not state and counts is not None and (any(counts) or not self._moments):
            self._check_counts(counts)
            return None
        if not state and not any(self.num_steps):
            return None  # no steps there, none here: all moments are zero
        known = counts if counts is not None else [0] * len(self._members)
        rows = zip(self._members, saved_ids, known, strict=True)
        return [self._entry(member, state.get(key), count) for member, key, count in rows]

    def _check_counts(self, counts: Sequence[int]) -> None:
        other_way = ", or take optimizer.full_state_dict()" if self._moments else ""
        for member, count in zip(self._members, counts, strict=True):
            if member.num_steps != count:
                raise StateError(
                    f"{member.spec.name} has taken {member.num_steps} steps here and {count} in "
                    "the state_dict, which has no moments in it: those are in the tiers of the run "
                    "that it was made by. Go on with that run (weights='resume', or a checkpoint)"
                    f"{other_way}."
                )

    def _entry(self, member: Member, state: Any, count: int) -> _Entry:
        name, fresh = member.spec.name, dict.fromkeys(self._moments.values())
        if not state:
            if count:
                raise _refused(name, f"is missing, but its step count is {count}")
            return _Entry(0, dict(fresh))
        if not member.spec.trainable:
            raise _refused(name, "is there, but the parameter is frozen here and has no moments")
        rest = [key for key in state if key not in (*self._moments, "step")]
        if rest:
            raise _refused(name, f"has {rest[0]!r}, which this optimizer does not keep")
        if "momentum_buffer" in self._moments:
            if state.get("momentum_buffer") is None:
                return _Entry(0, dict(fresh))  # torch makes the buffer of the next gradient
            num_steps = _count(name, state.get("step", max(count, 1)))
        else:
            num_steps = _count(name, state.get("step", count or 1))
            if "step" not in state and len(self._moments) > 1:
                raise _refused(name, "has no 'step'")
        if count and num_steps != count:
            raise _refused(name, f"has step {num_steps}, but its step count is {count}")
        return _Entry(num_steps, {p: _moment(member, k, state) for k, p in self._moments.items()})

    # ---- in: what is changed ----

    def write(self, entries: Sequence[_Entry]) -> None:
        """Bring the entries into the tiers, chunk by chunk. Memory: some MiB beside them."""
        by_chunk: dict[int, list[tuple[Member, _Entry]]] = {}
        for member, entry in zip(self._members, entries, strict=True):
            if member.spec.trainable:
                row = by_chunk.setdefault(member.chunk.spec.index, [])
                row.append((member, entry))
        for _, row in sorted(by_chunk.items()):
            for plane in self._moments.values():
                self._write(plane, row)
            for member, entry in row:
                member.chunk.num_steps[member.position] = entry.num_steps

    def _write(self, plane: Plane, row: Sequence[tuple[Member, _Entry]]) -> None:
        fmt, chunk = self._engine.plan.fmt, row[0][0].chunk
        values = {member.spec: entry.moments[plane] for member, entry in row}

        def encode(spec: ParamSpec, begin: int, end: int) -> dict[Plane, torch.Tensor]:
            moment = values[spec]
            if moment is None:
                return pack(plane, torch.zeros(end - begin), fmt)
            part = moment.detach().reshape(-1)[begin:end].to("cpu", torch.float32)
            return pack(plane, part, fmt)

        self._windows.rewrite(chunk, planes_of(plane, fmt), list(values), encode)


def _refuse_missing(index: int, saved: Mapping[str, Any], names: Iterable[str]) -> None:
    missing = [name for name in names if name not in saved]
    if missing:
        raise StateError(
            f"group {index} of the state_dict has no {missing[0]!r}: it is of another optimizer. "
            "Create the optimizer that it was made by."
        )


def _all_hyperparameters(
    index: int, saved: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Of an optimizer whose groups are never those of another."""
    _refuse_missing(index, saved, defaults)
    return {key: value for key, value in saved.items() if key not in ("params", "param_names")}


def _hyperparameters(
    index: int, saved: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    _refuse_missing(index, saved, (key for key in defaults if key != "maximize"))
    if saved.get("amsgrad"):
        raise StateError(
            f"group {index} of the state_dict has amsgrad=True, which keeps a third moment that "
            "the tiers have no plane for. Train without amsgrad."
        )
    if not saved.get("decoupled_weight_decay", True) and saved.get("weight_decay"):
        raise StateError(
            f"group {index} of the state_dict is of torch.optim.Adam with a weight_decay of "
            f"{saved['weight_decay']}, which it adds to the gradient; AdamW decays the weights. "
            "Train with torch.optim.AdamW, or without weight decay."
        )
    taken = {key: value for key, value in saved.items() if key not in _NOT_HYPER}
    return {**{key: defaults[key] for key in defaults if key == "maximize"}, **taken}


def _refused(name: str, what: str) -> StateError:
    return StateError(
        f"the state_dict's state of {name} {what}. Nothing has been changed; give the optimizer a "
        "state_dict of the same kind and the same parameters."
    )


def _count(name: str, value: Any) -> int:
    number = float(value)
    if not (math.isfinite(number) and number.is_integer() and 0 <= number <= _STEP_MAX):
        raise _refused(name, f"has step {number}, which is no count")
    return int(number)


def _moment(member: Member, key: str, state: Mapping[str, Any]) -> torch.Tensor:
    tensor, spec = state.get(key), member.spec
    if not isinstance(tensor, torch.Tensor):
        raise _refused(spec.name, f"has no tensor {key!r}")
    if tuple(tensor.shape) != spec.shape:
        raise _refused(spec.name, f"has {key} of shape {tuple(tensor.shape)}, not {spec.shape}")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
        raise _refused(spec.name, f"has {key} that is no dense tensor of floats in memory")
    return tensor
