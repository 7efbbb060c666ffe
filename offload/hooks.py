"""Modules that are not blocks: fetched around their forward, and again wherever backward needs
their weights.

[Note: handles] Autograd saves weights for backward. A view into a slot must not be saved, because
the slot will hold something else by then. So around these forwards a saved-tensor hook swaps every
view of a weight for a handle (chunk, place, shape), recognised by its address, and backward fetches
the chunk when it unpacks one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload.engine import Engine
from offload.errors import NumericsError
from offload.formats import Plane
from offload.landing import Gradients

_current_node: Callable[[], object] = torch._C._current_autograd_node
_current_graph_task: Callable[[], int] = torch._C._current_graph_task_id
_queue_callback: Callable[[Callable[[], None]], None] = (
    torch.autograd.Variable._execution_engine.queue_callback
)


@dataclasses.dataclass(frozen=True, slots=True)
class WeightHandle:
    """What autograd keeps instead of a view of a weight. Offsets and strides in elements."""

    chunk: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Autograd:
    """What happens between the engine and autograd: handles, holds during backward, gradients
    landing.
    """

    def __init__(self, engine: Engine, gradients: Gradients) -> None:
        self.engine = engine
        self.gradients = gradients
        self.split = False  # a block is adding up its micro-batches
        self.outer_task = -1  # the user's backward while a block runs its own inside
        self.shared: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # [Note: shared inputs] in blocks.py
        self._held: set[int] = set()
        self._node: object = None
        self._task = -1  # the backward whose end callback is queued
        self._placeholders: dict[int, str] = {}
        for chunk in engine.chunks:
            self._placeholders.update(chunk.placeholder_addresses())

    # ---- forward ----

    @contextlib.contextmanager
    def using(self, indices: tuple[int, ...]) -> Iterator[None]:
        """Have these chunks on the compute device; weights that autograd saves meanwhile become
        handles.
        """
        record = torch.is_grad_enabled()
        entered = []
        try:
            for index in indices:
                self.engine.enter(index, record=record)
                entered.append(index)
            with self.saving():
                yield
        finally:
            for index in reversed(entered):
                self.engine.leave(index)

    def saving(self) -> contextlib.AbstractContextManager[object]:
        """The saved-tensor hooks. See [Note: handles]."""
        if not torch.is_grad_enabled():
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | WeightHandle:
        if self.outer_task != -1:
            return tensor  # a block's replay is over before its weights leave
        if tensor.layout is not torch.strided or tensor.device != self.engine.device.torch_device:
            return tensor
        absent = self._placeholders.get(tensor.untyped_storage().data_ptr())
        if absent is not None:
            raise NumericsError(
                f"parameter {absent} was read while its weights were not in memory: code uses it "
                "outside its "
                "module's forward. Wrap that code in `with engine.gathered(module_or_params):`."
            )
        place = self._locate(tensor.data_ptr())
        if place is None:
            return tensor
        index, nbytes = place
        return WeightHandle(
            index, nbytes // tensor.element_size(), tensor.shape, tensor.stride(), tensor.dtype
        )

    def _unpack(self, saved: torch.Tensor | WeightHandle) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self.hold(saved.chunk)
        flat = self.engine.bound_weight(saved.chunk).view(saved.dtype)
        return flat.as_strided(saved.shape, saved.stride, flat.storage_offset() + saved.offset)

    def _locate(self, address: int) -> tuple[int, int] | None:
        """Which chunk in use has `address` in its weights: (chunk index, byte offset), or None."""
        if (
            self.engine.device.is_host
            and not 0 <= address - self.engine.slab.address < self.engine.slab.nbytes
        ):
            return None
        for chunk in self.engine.chunks:
            if chunk.num_users and chunk.override is None:
                start = self.engine.bound_weight(chunk.spec.index).data_ptr()
                if start <= address < start + chunk.spec.nbytes(Plane.WEIGHT, self.engine.plan.fmt):
                    return chunk.spec.index, address - start
        return None

    def own(self, outputs: Any) -> Any:
        """Copy outputs that alias a weight: their slot will hold something else soon."""

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
                return leaf
            return leaf if self._locate(leaf.data_ptr()) is None else leaf.clone()

        return pytree.tree_map(copy, outputs)

    # ---- backward ----

    def hold(self, index: int) -> None:
        """Keep a chunk on the compute device until the autograd node that asked for it is done."""
        self.begin_backward()
        node = _current_node()
        if node is not self._node:
            self._release_holds()
            self._node = node
        if index not in self._held:
            self.engine.enter(index, record=True)
            self._held.add(index)

    def _release_holds(self) -> None:
        for index in sorted(self._held):
            self.engine.leave(index)
        self._held.clear()

    def begin_backward(self) -> None:
        """Note that a backward runs, and ask autograd to say when it ends."""
        task = _current_graph_task()
        if task not in (self._task, -1) and self.outer_task == -1:
            self._task = task
            self.gradients.num_backwards += 1
            _queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._task = -1
        self._node = None
        self._release_holds()
        for chunk in self.engine.chunks:
            chunk.num_pending_backwards = 0
        self.gradients.complete_all()

    def abandon(self) -> None:
        """Forget a backward that an exception ended."""
        self._task = self.outer_task = -1
        self._node = None
        self.split = False
        self.shared.clear()
        self._release_holds()

    def landing_hook(self, index: int, position: int) -> Callable[[torch.Tensor], None]:
        """What a parameter runs when autograd has accumulated its gradient."""
        chunk = self.engine.chunks[index]
        num_trainable = sum(param.trainable for param in chunk.spec.params)

        def land(param: torch.Tensor) -> None:
            grad, param.grad = param.grad, None
            if grad is None:
                return
            self.begin_backward()
            inside_block = self.outer_task != -1
            task = self.outer_task if inside_block else _current_graph_task()
            self.gradients.land(index, position, grad, task, split=self.split)
            if inside_block or chunk.gradient is None:
                return
            if len(chunk.gradient.graph_task) == num_trainable:
                self._complete_if_free(index)

        return land

    def _complete_if_free(self, index: int) -> None:
        """All gradients of a chunk that is not run as a block are there: its weights are not needed
        any more.
        """
        if index in self._held:
            self._held.discard(index)
            self.engine.leave(index)
        if self.engine.chunks[index].num_users == 0:
            self.gradients.complete(index)


class OwnerPass:
    """Stands in for the forward of a module that owns parameters and is not part of a block."""

    def __init__(self, module: nn.Module, indices: tuple[int, ...], autograd: Autograd) -> None:
        self.forward = module.forward
        self._indices = indices
        self._autograd = autograd

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._autograd.using(self._indices):
            return self._autograd.own(self.forward(*args, **kwargs))


class RootPass:
    """Stands in for the forward of the whole model: checks before, and hooks for weights read where
    they are not.
    """

    def __init__(self, module: nn.Module, autograd: Autograd, check: Callable[[], None]) -> None:
        self.forward = module.forward
        self._autograd = autograd
        self._check = check

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check()
        try:
            with self._autograd.saving():
                return self.forward(*args, **kwargs)
        finally:
            self._autograd.shared.clear()
