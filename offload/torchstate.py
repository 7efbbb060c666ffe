"""What a torch optimizer keeps for a parameter, found by trying it on a tiny one.

[Note: torch state] An optimizer of torch says nowhere which state it will keep: it makes it in its
first step. So its class makes one step on a stand-in whose dimensions are small different primes;
what is in its state then names, by these primes, the shapes for a real parameter (1 stays 1, and a
scalar is a scalar). All of it lies one behind the other in the chunk's plane `torch_state`: fp32
items, a float64 scalar in two of them. Scalars such as `step` lie there too, so they are read,
written, verified, committed and copied with the moments that they belong to. A parameter whose step
count is 0 has no state yet, whatever the plane holds: the optimizer makes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from offload.errors import PolicyError

ITEM_DTYPE = torch.float32
_ENTRY_MULTIPLE = 16  # items; every tensor starts on a cache line
_PRIMES = (7, 5, 11, 13, 17, 19, 23, 29)
_ONE_BY_ONE = ("foreach", "fused")  # the loop over single tensors: the same bits for any neighbours
_NOT_HERE = (*_ONE_BY_ONE, "capturable", "differentiable")
Frozen = tuple[tuple[str, Any], ...]  # options as a key


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StateEntry:
    """One tensor of an optimizer's state of one parameter; `offset` in items of the plane."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0

    @property
    def num_items(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize // ITEM_DTYPE.itemsize

    def __str__(self) -> str:
        """For messages, and for manifests to tell one layout from another."""
        return f"{self.name} {list(self.shape)} {str(self.dtype)[6:]} at {self.offset}"

    def view(self, plane: torch.Tensor) -> torch.Tensor:
        """This tensor in a plane's items (N); shares memory."""
        items = plane[self.offset : self.offset + self.num_items]
        return items.view(self.dtype).view(self.shape)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of a name that the policy accepts."""
    found: type[torch.optim.Optimizer] = getattr(torch.optim, name)
    return found


def defaults_of(
    cls: type[torch.optim.Optimizer], options: Mapping[str, Any], what: str = "optimizer.options"
) -> dict[str, Any]:
    """All options of an optimizer, checked by itself. Raises PolicyError for those that it refuses,
    and those that cannot be here.
    """
    for key in _NOT_HERE:
        if options.get(key):
            raise PolicyError(f"{what}: {key} has no place here: a chunk is stepped one by one.")
    known = inspect.signature(cls).parameters
    unknown = sorted(set(options) - (set(known) - {"params", "args", "kwargs"}))
    if unknown:
        raise PolicyError(f"{what}: {cls.__name__} has no {', '.join(unknown)}.")
    try:
        with plain_torch():
            defaults: dict[str, Any] = cls([torch.zeros(1)], **options).defaults
    except (TypeError, ValueError, RuntimeError) as error:
        raise PolicyError(f"{what}: {cls.__name__} refuses {dict(options)}: {error}") from error
    return defaults


def make_part(
    cls: type[torch.optim.Optimizer], leaf: torch.Tensor, name: str, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of one parameter alone, with all options of its group."""
    known = inspect.signature(cls).parameters
    options = {**options, **{key: False for key in _ONE_BY_ONE if key in options}}
    member: Any = (name, leaf) if getattr(cls, "needs_names", False) else leaf
    arguments = {key: value for key, value in options.items() if key in known}
    return cls([{**options, "params": [member]}], **arguments)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """torch as an optimizer expects it, whatever context a forward or backward has around it."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        yield


def freeze(options: Mapping[str, Any]) -> Frozen:
    """Options that can be a key; lists of the YAML become tuples."""
    return tuple(
        (key, tuple(value) if isinstance(value, list) else value)
        for key, value in sorted(options.items())
    )


def entries_of(
    cls: type[torch.optim.Optimizer], options: Frozen, name: str, shape: tuple[int, ...], begin: int
) -> tuple[StateEntry, ...]:
    """The state that a parameter will have, from item `begin` of its chunk's plane on. Pure.

    Raises PolicyError for state that has no place in the plane.
    """
    dims = iter(_PRIMES)
    stand_in = tuple(next(dims, 31) if n > 1 else n for n in shape)
    real = dict(zip(stand_in, shape, strict=True))
    entries = []
    needs_name = getattr(cls, "needs_names", False)
    for key, dims_of, dtype in _probe(
        cls,  # type: ignore[arg-type]
        options,
        name if needs_name else "",
        stand_in,
    ):
        if any(dim not in real and dim != 1 for dim in dims_of):
            raise _refusal(cls, f"{key} of a shape that follows from no parameter's")
        begin = -(-begin // _ENTRY_MULTIPLE) * _ENTRY_MULTIPLE
        shape_of = tuple(real.get(dim, 1) for dim in dims_of)
        entries.append(StateEntry(name=key, shape=shape_of, dtype=dtype, offset=begin))
        begin += entries[-1].num_items
    return tuple(entries)


@functools.lru_cache(maxsize=4096)
def _probe(
    cls: type[torch.optim.Optimizer], options: Frozen, name: str, shape: tuple[int, ...]
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    with plain_torch():
        leaf = torch.ones(shape)
        leaf.grad = torch.ones(shape)
        try:
            part = make_part(cls, leaf, name, dict(options))
            part.step()
        except (TypeError, ValueError, RuntimeError) as error:
            raise _refusal(
                cls, f"nothing of a parameter of {len(shape)} dimensions: {error}"
            ) from error
        state = part.state[leaf]
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise _refusal(cls, f"{key}, which is no tensor")
        wide = value.dtype is torch.float64 and value.ndim == 0
        if value.dtype is not ITEM_DTYPE and not wide:
            raise _refusal(cls, f"{key} in {value.dtype}")
    return tuple((key, tuple(value.shape), value.dtype) for key, value in state.items())


def _refusal(cls: type[torch.optim.Optimizer], what: str) -> PolicyError:
    return PolicyError(f"optimizer.name: {cls.__name__} keeps {what}. Name another optimizer.")
