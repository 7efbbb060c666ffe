"""Frozen facts of a chunk: which parameters move together, and where each lies in its planes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from offload.factors import factor_entries, flat_matrix, matrix_of, vector_entries
from offload.formats import NUMEL_MULTIPLE, STATE_BY_PARAM, Plane, StateFormat
from offload.slots import round_up
from offload.torchstate import ITEM_DTYPE, Frozen, StateEntry, entries_of

_STATE_MULTIPLE = 1024  # items of STATE_BY_PARAM: 4 KiB
_PARAM_MULTIPLE = 64  # elements; weights start on a cache line in every dtype, and groups with them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One parameter's place in its chunk; `offset` and `numel` in elements. `state` is what an
    optimizer keeps for it in the chunk's state_plane; `matrix` the rows and columns of the matrices
    in it whose sums of squares are taken when a gradient lands.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    trainable: bool
    state: tuple[StateEntry, ...] = ()
    matrix: tuple[int, int] | None = None


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
    state_plane: Plane = Plane.TORCH_STATE  # of STATE_BY_PARAM

    @property
    def trainable(self) -> bool:
        return any(param.trainable for param in self.params)

    @property
    def num_params(self) -> int:
        """Parameters in the usual sense: elements without padding."""
        return sum(param.numel for param in self.params)

    def nbytes(self, plane: Plane, fmt: StateFormat) -> int:
        if plane in STATE_BY_PARAM:
            return self.num_items(plane, fmt) * ITEM_DTYPE.itemsize
        return fmt.nbytes(plane, self.numel)

    def num_items(self, plane: Plane, fmt: StateFormat) -> int:
        """Items of a plane: those of STATE_BY_PARAM follow from the parameters, in whole
        pages.
        """
        if plane not in STATE_BY_PARAM:
            return fmt.num_items(plane, self.numel)
        ends = [entry.offset + entry.num_items for param in self.params for entry in param.state]
        return round_up(max(ends, default=0), _STATE_MULTIPLE)

    def aligned(self, fmt: StateFormat) -> ChunkSpec:
        """The same chunk with the padding that a format's planes want."""
        return dataclasses.replace(self, numel=round_up(self.numel, fmt.numel_multiple))

    def state_planes(self, fmt: StateFormat) -> tuple[Plane, ...]:
        """A chunk without trainable parameters needs its weight plane only; one for which the
        optimizer keeps nothing has no plane for that.
        """
        if not self.trainable:
            return (Plane.WEIGHT,)
        kept = any(param.state for param in self.params)
        by_param = (self.state_plane,) if kept else ()
        return tuple(p for p in fmt.state_planes if p in by_param or p not in STATE_BY_PARAM)

    def with_torch_state(self, cls: type[torch.optim.Optimizer], options: Frozen) -> ChunkSpec:
        """The same chunk with room for what a torch optimizer keeps. Raises PolicyError where that
        has no place; see [Note: torch state]. Frozen parameters beside trained ones get room, too,
        as they do in every plane: they may be trained later.
        """
        return self._with_state(
            lambda param, begin: entries_of(cls, options, param.name, param.shape, begin)
        )

    def with_factors(self) -> ChunkSpec:
        """The same chunk with room for the factors of its second moments. See [Note: factors]."""
        return self._with_state(lambda param, begin: factor_entries(param.shape, begin), matrix_of)

    def with_vectors(self) -> ChunkSpec:
        """The same chunk with room for the moments of its vectors, as SCALE has them."""
        return self._with_state(
            lambda param, begin: vector_entries(param.shape, begin), flat_matrix
        )

    def _with_state(
        self,
        entries: Callable[[ParamSpec, int], tuple[StateEntry, ...]],
        cut: Callable[[Sequence[int]], tuple[int, int]] | None = None,
    ) -> ChunkSpec:
        if not self.trainable:
            return self
        params, begin = [], 0
        for param in self.params:
            state = entries(param, begin)
            begin = max((entry.offset + entry.num_items for entry in state), default=begin)
            matrix = cut(param.shape) if cut is not None else None
            params.append(dataclasses.replace(param, state=state, matrix=matrix))
        plane = Plane.TORCH_STATE if cut is None else Plane.FACTORS
        return dataclasses.replace(self, params=tuple(params), state_plane=plane)


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
