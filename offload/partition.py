"""How a model is cut into chunks: one per block, one per larger module outside of blocks, one for
all little tensors.

[Note: small chunk] Outside of blocks, norms, biases and the like share one chunk. All its planes
stay in RAM, its parameters stay bound between uses, and step() updates it in place: thousands of
tiny transfers are saved for a few megabytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from offload.blocks import find_blocks
from offload.chunk import ChunkSpec, make_spec
from offload.errors import PolicyError, StateError
from offload.formats import is_supported_dtype, state_format
from offload.plan import Plan, make_plan
from offload.policy import OffloadPolicy, OptimizerPolicy
from offload.scale import LAST, MOMENTUM, SCALE_OPTIONS, PlainScale, check_options
from offload.torchstate import defaults_of, freeze, optimizer_class

SMALL_NUMEL = (
    65536  # outside of blocks, a tensor below this lives in the one chunk that stays in RAM
)


@dataclasses.dataclass(slots=True)
class Partition:
    """The chunks of a model, and which module needs which of them. Indices are into `specs`."""

    specs: list[ChunkSpec]
    params: list[list[nn.Parameter]]
    blocks: list[tuple[nn.Module, int]]
    owners: list[tuple[nn.Module, tuple[int, ...]]]


def partition(model: nn.Module, optimizer: OptimizerPolicy | None = None) -> Partition:
    """Cut a model; every parameter lands in exactly one chunk, however often it is tied. A torch
    `optimizer` gets room for what it keeps.

    Raises PolicyError for a dtype that the tiers cannot hold, or for options that the optimizer
    refuses, StateError for a model without parameters, or one without elements.
    """
    _check_params(model)
    builder = _Builder()
    blocks = {id(block): name for name, block in find_blocks(model)}
    for name, module in _walk(model, blocks):
        if id(module) in blocks:
            builder.add_block(name, module)
        else:
            builder.add_owner(name, module)
    parts = builder.finish()
    if optimizer is not None:
        parts.specs = with_state(parts.specs, optimizer)
    return parts


def with_state(specs: list[ChunkSpec], optimizer: OptimizerPolicy) -> list[ChunkSpec]:
    """The same chunks with room for what the policy's optimizer keeps by parameter."""
    if optimizer.kind == "adafactor":
        return [spec.with_factors() for spec in specs]
    if optimizer.kind == "scale":
        return with_last_layer(specs, optimizer.options)
    return with_torch_state(specs, optimizer) if optimizer.kind == "torch" else specs


def with_last_layer(specs: list[ChunkSpec], options: Mapping[str, object]) -> list[ChunkSpec]:
    """The same chunks with room for what SCALE keeps: a moment of the last layer, in a chunk that
    is stepped in torch, and of the others' vectors.
    """
    unknown = sorted(set(options) - set(SCALE_OPTIONS))
    if unknown:
        raise PolicyError(
            f"optimizer.options: SCALE has no {', '.join(unknown)}; it has "
            f"{', '.join(SCALE_OPTIONS)}."
        )
    try:
        check_options(options)
    except ValueError as error:
        raise PolicyError(f"optimizer.options: {error}") from error
    last = options.get("last", LAST) if options.get("momentum", MOMENTUM) else None
    shapes = {param.name: param.shape for spec in specs for param in spec.params}
    if last is not None and len(shapes.get(str(last), (0, 0))) < 2:
        raise PolicyError(
            f"optimizer.options: SCALE has no momentum for {last}, which is a vector. Set last to "
            "the matrix of the last layer, or to null for no momentum."
        )
    if last is not None and last not in shapes:
        raise PolicyError(
            f"optimizer.options: SCALE looks for the last layer in {last}, and the model has no "
            "parameter of that name. Set last to the one that it has (of a tied head its "
            "embedding), or to null for no momentum."
        )
    in_torch = freeze({"last": last})
    return [
        spec.with_torch_state(PlainScale, in_torch)
        if any(param.name == last for param in spec.params)
        else spec.with_vectors()
        for spec in specs
    ]


def with_torch_state(specs: Sequence[ChunkSpec], optimizer: OptimizerPolicy) -> list[ChunkSpec]:
    """The same chunks with room for the state of the policy's torch optimizer."""
    cls = optimizer_class(str(optimizer.name))
    options = defaults_of(cls, optimizer.options)
    return [spec.with_torch_state(cls, freeze(options)) for spec in specs]


def _check_params(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if not is_supported_dtype(param.dtype):
            raise PolicyError(
                f"parameter {name} is {param.dtype}; the tiers hold float32, bfloat16 and float16 "
                "weights. "
                "Convert it with .to(torch.float32), or keep it out of model.parameters() as a "
                "buffer."
            )
        if isinstance(param, nn.UninitializedParameter):
            raise StateError(f"parameter {name} is lazy; run one forward before offload.offload().")
        if not param.numel():
            raise StateError(
                f"parameter {name} has no elements (its shape is {tuple(param.shape)}): there is "
                "nothing to move or to train. Remove it from the model, or make it a buffer."
            )
    if next(model.parameters(), None) is None:
        raise StateError("the model has no parameters; there is nothing to offload.")


def _walk(model: nn.Module, blocks: dict[int, str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules in registration order; nothing inside a block or an attention that reads its
    children's weights.
    """

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield name, module
        if id(module) in blocks or _reads_children(module):
            return
        for key, child in module.named_children():
            yield from visit(f"{name}.{key}" if name else key, child)

    yield from visit("", model)


def _reads_children(module: nn.Module) -> bool:
    """torch's attention passes out_proj.weight to a function without calling out_proj."""
    return isinstance(module, nn.MultiheadAttention)


class _Builder:
    def __init__(self) -> None:
        self._rows: list[tuple[str, list[tuple[str, nn.Parameter]], bool]] = []
        self._small: list[tuple[str, nn.Parameter]] = []
        self._home: dict[int, int] = {}  # id(param) -> row, or -1 for the small chunk
        self._blocks: list[tuple[nn.Module, int]] = []
        self._owners: list[tuple[nn.Module, list[int]]] = []

    def add_block(self, name: str, module: nn.Module) -> None:
        self._blocks.append((module, len(self._rows)))
        self._add_row(
            name, [(f"{name}.{key}", p) for key, p in module.named_parameters()], is_block=True
        )

    def add_owner(self, name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        found = module.named_parameters(recurse=_reads_children(module))
        params = [(prefix + key, param) for key, param in found]
        if not params:
            return
        fresh = [(key, p) for key, p in params if id(p) not in self._home]
        large = [(key, p) for key, p in fresh if p.numel() >= SMALL_NUMEL]
        for key, param in fresh:
            if param.numel() < SMALL_NUMEL:
                self._small.append((key, param))
                self._home[id(param)] = -1
        if large:
            self._add_row(name or type(module).__name__, large, is_block=False)
        self._owners.append((module, [self._home[id(p)] for _, p in params]))

    def _add_row(
        self, name: str, params: list[tuple[str, nn.Parameter]], *, is_block: bool
    ) -> None:
        for _, param in params:
            self._home[id(param)] = len(self._rows)
        self._rows.append((name, params, is_block))

    def finish(self) -> Partition:
        rows = [(name, params, is_block, False) for name, params, is_block in self._rows]
        if self._small:
            rows.append(("small tensors", self._small, False, True))
        specs = [
            make_spec(
                index,
                name,
                [(key, torch.Size(p.shape), p.requires_grad) for key, p in params],
                is_block=is_block,
                is_small=is_small,
            )
            for index, (name, params, is_block, is_small) in enumerate(rows)
        ]
        last = len(specs) - 1
        owners = [
            (module, tuple(sorted({last if home == -1 else home for home in homes})))
            for module, homes in self._owners
        ]
        return Partition(specs, [[p for _, p in row[1]] for row in rows], self._blocks, owners)


def plan_for(model: nn.Module, policy: OffloadPolicy) -> Plan:
    """The plan for a model (it may be on meta) without taking any memory or file.

    Raises BudgetError where it does not fit, PolicyError for dtypes that the tiers cannot hold.
    """
    device = policy.tiers.gpu.device
    host = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    fmt = state_format(policy.state.format, policy.optimizer.kind)
    specs = partition(model, policy.optimizer).specs
    return make_plan(specs, fmt, policy, host_compute=host)
