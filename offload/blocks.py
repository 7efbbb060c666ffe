"""The block pass: a block's weights are there for its forward, and again for its replay in
backward.

[Note: block pass] Forward runs under no_grad and keeps only the block's inputs. Backward fetches
the weights, replays the forward with the random state and autocast mode of the first time, and
backpropagates through it. The engine owns the recompute: Hugging Face moved its checkpointing
between versions, and module hooks do not run in it everywhere.

[Note: vertical micro-batches] (GreedySnake, arXiv 2512.17570) The pass splits its batch inside the
block, so weights move once per step however large the batch is. Micro-batches run in their order,
and their gradients add up in fp32.

[Note: shared inputs] An input that several blocks read and that needs a gradient (T5's encoder
states) is handed from block to block as an alias. Its gradient then gathers in autograd's own
order, each block adding its uses one by one to what later blocks sent, so the bits are those of the
model without blocks.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload.chunk import Chunk
from offload.hooks import Autograd, _current_graph_task

logger = logging.getLogger("offload")
_PLAIN_LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    enum.Enum,
)


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated layers: children of every outermost ModuleList or Sequential of two or more of
    one class.

    A child that shares parameters with the rest of the model, or that stands in the list twice, is
    none.
    """
    found: list[tuple[str, nn.Module]] = []

    def walk(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if _is_block_list(child):
                found.extend((f"{path}.{key}", block) for key, block in child.named_children())
            else:
                walk(path, child)

    if _is_block_list(model):
        found.extend(model.named_children())
    else:
        walk("", model)
    counts = _owner_counts(model)
    return [(name, block) for name, block in found if _is_private(block, counts)]


def _is_block_list(module: nn.Module) -> bool:
    children = list(module._modules.values())
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(children) < 2:
        return False
    has_params = all(
        child is not None and any(True for _ in child.parameters()) for child in children
    )
    return has_params and len({type(child) for child in children}) == 1


def _owner_counts(model: nn.Module) -> dict[int, int]:
    """How many places in the tree of modules each parameter hangs in."""
    counts: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for param in module._parameters.values():
            if param is not None:
                counts[id(param)] = counts.get(id(param), 0) + 1
    return counts


def _is_private(block: nn.Module, counts: dict[int, int]) -> bool:
    inside = _owner_counts(block)
    return all(counts[key] == count for key, count in inside.items())


class BlockPass:
    """Stands in for a block's forward. See [Note: block pass]."""

    def __init__(
        self,
        module: nn.Module,
        chunk: Chunk,
        autograd: Autograd,
        *,
        keep: bool,
        micro_batch: int | None,
    ) -> None:
        self.module = module
        self.forward = module.forward
        self.chunk = chunk
        self.autograd = autograd
        self.micro_batch = micro_batch
        self._index = chunk.spec.index
        self._keep = keep  # activations stay; the block is an ordinary module
        self._probed: set[bool] = (
            set()
        )  # training modes in which the block is known to be replayable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run_plain(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self._keep or not self._is_replayable(leaves, args, kwargs):
            with self.autograd.using((self._index,)):
                return self.autograd.own(self.forward(*args, **kwargs))
        call = _BlockCall(self, leaves, spec)
        return call.run() if call.needs_grad() else self.run_plain(args, kwargs)

    def run_plain(self, args: Any, kwargs: Any) -> Any:
        engine = self.autograd.engine
        engine.enter(self._index, record=torch.is_grad_enabled())
        try:
            with torch.no_grad():
                return self.autograd.own(self.forward(*args, **kwargs))
        finally:
            engine.leave(self._index)

    def _is_replayable(self, leaves: Sequence[Any], args: Any, kwargs: Any) -> bool:
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *_PLAIN_LEAVES)) and not callable(leaf):
                self._warn_once(
                    f"it was given a {type(leaf).__name__}, which a replay would change again"
                )
                return False
        if self.module.training in self._probed:
            return True
        if not _changes_buffers(self, args, kwargs):
            self._probed.add(self.module.training)
            return True
        self._keep = True
        self._warn_once("its forward changes its buffers (batch-norm statistics or a cache)")
        return False

    def _warn_once(self, reason: str) -> None:
        if not getattr(self, "_warned", False):
            self._warned = True
            logger.info("block %s keeps its activations: %s", self.chunk.name, reason)


def _changes_buffers(block: BlockPass, args: Any, kwargs: Any) -> bool:
    """Run the block once and look at its buffers; everything it changed is put back."""
    before = [
        (buffer, buffer._version, buffer.detach().clone()) for buffer in block.module.buffers()
    ]
    if not before:
        return False
    with _RandomState.preserved():
        block.run_plain(args, kwargs)
    changed = False
    for buffer, version, content in before:
        # Contents too: F.batch_norm writes its statistics without counting a version.
        if buffer._version != version or not torch.equal(buffer, content):
            changed = True
            buffer.detach().copy_(content)
    return changed or [id(b) for b in block.module.buffers()] != [id(row[0]) for row in before]


class _BlockCall:
    """One call of a block that backward will replay."""

    def __init__(self, block: BlockPass, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        self.block = block
        self.autograd = block.autograd
        self._leaves = leaves
        self._spec = spec
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self._tensors = [leaves[i] for i in self._places]
        self._originals: dict[int, torch.Tensor] = {}
        self._extra = self._thread_shared_inputs()
        self._requires_grad = [tensor.requires_grad for tensor in self._tensors]
        for place in self._places:
            leaves[place] = None  # autograd keeps the tensors; this object must not
        self._out_leaves: list[Any] = []
        self._out_spec: Any = None
        self._states: list[_RandomState] = []

    def needs_grad(self) -> bool:
        return any(self._requires_grad) or self.block.chunk.spec.trainable

    def run(self) -> Any:
        """Forward now, and a node in the graph that will replay it."""
        originals = self._originals
        anchor = torch.empty(0, requires_grad=True)  # a node even where no input needs a gradient
        tensors, self._tensors = self._tensors, []
        node: Any = _BlockFunction  # apply is untyped
        flat = node.apply(self, anchor, *tensors)
        num_out = len(flat) - len(self._extra)
        for key, alias in zip(self._extra, flat[num_out:], strict=True):
            self.autograd.shared[id(originals[key])] = (originals[key], alias)
        self._originals = {}
        outputs = iter(flat[:num_out])
        leaves = [next(outputs) if leaf is _TENSOR else leaf for leaf in self._out_leaves]
        return pytree.tree_unflatten(leaves, self._out_spec)

    def _thread_shared_inputs(self) -> list[int]:
        """Swap known shared inputs for their latest alias; return the positions to hand on."""
        extra = []
        for position, tensor in enumerate(self._tensors):
            if position == 0 or not tensor.requires_grad or not tensor.is_floating_point():
                continue
            original, alias = self.autograd.shared.get(id(tensor), (tensor, tensor))
            self._originals[position] = original
            self._tensors[position] = alias
            extra.append(position)
        return extra

    # ---- inside the autograd function ----

    def forward(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run without a graph; return the output tensors, then the shared inputs to hand on."""
        engine, index = self.autograd.engine, self.block.chunk.spec.index
        self.block.chunk.num_pending_backwards += 1
        engine.enter(index, record=True)
        try:
            parts = []
            for piece in self._pieces(tensors):
                self._states.append(_RandomState())
                parts.append(self._flat_forward(piece))
        finally:
            engine.leave(index)
        outputs = parts[0] if len(parts) == 1 else _concatenate(parts, tensors[0].shape[0])
        return outputs + [tensors[position] for position in self._extra]

    def _flat_forward(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        outputs = self.block.forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            outputs = self.autograd.own(outputs)
        flat, self._out_spec = pytree.tree_flatten(outputs)
        self._out_leaves = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        return [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]

    def _pieces(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """The micro-batches; tensors of 2 or more dimensions split where the first is the batch."""
        size = self.block.micro_batch
        num_rows = tensors[0].shape[0] if tensors and tensors[0].dim() > 1 else 0
        if size is None or num_rows <= size:
            yield list(tensors)
            return
        for start in range(0, num_rows, size):
            yield [_rows(tensor, num_rows, start, size) for tensor in tensors]

    def backward(
        self, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Replay and backpropagate; parameter gradients land on the chunk, input gradients are
        returned.
        """
        autograd, chunk = self.autograd, self.block.chunk
        autograd.begin_backward()
        autograd.engine.enter(chunk.spec.index, record=True)
        autograd.outer_task = _current_graph_task()
        try:
            pieces = list(self._pieces(tensors))
            autograd.split = len(pieces) > 1
            rows = [self._replay(i, piece, grads, tensors) for i, piece in enumerate(pieces)]
        finally:
            autograd.outer_task, autograd.split = -1, False
            autograd.engine.leave(chunk.spec.index)
        chunk.num_pending_backwards -= 1
        if chunk.num_pending_backwards <= 0:
            autograd.gradients.complete(chunk.spec.index)
        return rows[0] if len(rows) == 1 else _join_rows(rows, tensors)

    def _replay(
        self,
        number: int,
        piece: list[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        tensors: Sequence[torch.Tensor],
    ) -> list[torch.Tensor | None]:
        inputs = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(piece, self._requires_grad, strict=True)
        ]
        with torch.enable_grad(), self._states[number].restored():
            outputs = self._flat_forward(inputs)
        outputs = outputs + [inputs[position] for position in self._extra]
        if len(self._states) > 1:
            num_rows, size = tensors[0].shape[0], self.block.micro_batch or 1
            start = number * size
            grads = [None if g is None else _rows(g, num_rows, start, size) for g in grads]
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
        ]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return [
            tensor.grad if needed else None
            for tensor, needed in zip(inputs, self._requires_grad, strict=True)
        ]


_TENSOR = object()  # marks the place of a tensor among a block's output leaves


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _BlockCall, anchor: torch.Tensor, *tensors: torch.Tensor) -> Any:
        outputs = call.forward(tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return (None, None, *ctx.call.backward(ctx.saved_tensors, grads))


def _rows(tensor: torch.Tensor, num_rows: int, start: int, size: int) -> torch.Tensor:
    if tensor.dim() > 1 and tensor.shape[0] == num_rows:
        return tensor[start : start + size]
    return tensor


def _concatenate(parts: list[list[torch.Tensor]], num_rows: int) -> list[torch.Tensor]:
    """Put the micro-batches' outputs together; what has no batch dimension is the same in all."""
    whole = []
    for row in zip(*parts, strict=True):
        stacked = row[0].dim() > 1 and sum(part.shape[0] for part in row) == num_rows
        whole.append(torch.cat(row) if stacked else row[0])
    return whole


def _join_rows(
    rows: list[list[torch.Tensor | None]], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Put input gradients together: split inputs side by side, shared ones added in micro-batch
    order.
    """
    num_rows = tensors[0].shape[0]
    joined: list[torch.Tensor | None] = []
    for position, tensor in enumerate(tensors):
        parts = [row[position] for row in rows]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            joined.append(None if not present else sum(present[1:], start=present[0]))
        elif tensor.dim() > 1 and tensor.shape[0] == num_rows:
            joined.append(torch.cat(present))
        else:
            joined.append(sum(present[1:], start=present[0]))
    return joined


class _RandomState:
    """The random state and autocast mode of one moment, to run something again as it ran then."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        ]

    def _set(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    @staticmethod
    @contextlib.contextmanager
    def preserved() -> Iterator[None]:
        """Random state afterwards is as before."""
        now = _RandomState()
        try:
            yield
        finally:
            now._set()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run with this state, and go back to the present one afterwards."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_RandomState.preserved())
            for kind, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            self._set()
            yield
