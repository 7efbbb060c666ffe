"""How weights get into the tiers: from a model in RAM, from its modules' own initialisers, or from
safetensors.

All three fill one chunk at a time straight into its planes, so a model need never be whole in RAM.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload import io
from offload.chunk import Chunk, ParamSpec
from offload.engine import Engine
from offload.errors import StateError
from offload.formats import Plane, split_master
from offload.slots import Slot

logger = logging.getLogger("offload")
WeightSource = Callable[
    [ParamSpec], torch.Tensor
]  # the values in the parameter's shape: fp32, contiguous, in RAM; see as_master


def check_source(model: nn.Module, weights: str | Path | None) -> None:
    """Raise StateError for a model on meta without a source of weights."""
    on_meta = [name for name, param in model.named_parameters() if param.is_meta]
    if on_meta and weights is None:
        raise StateError(
            f"parameter {on_meta[0]} (and {len(on_meta) - 1} more) is on meta and no source of "
            "weights is given. "
            "Pass weights='init' for the modules' own initialisers, or weights=<folder of "
            "safetensors>."
        )


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move every buffer of a model to `device`."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def fill_chunk(engine: Engine, chunk: Chunk, source: WeightSource) -> None:
    """Fill the weight and residue planes of a chunk from `source`, and zero its moments.

    What `source` gives is only read, and let go of before the next: it may be the values' own
    memory. Extra memory: one parameter in fp32 where they are in another dtype, else none.
    """
    planes, staged = _stage(engine, chunk)
    weight, residue = planes[Plane.WEIGHT], planes.get(Plane.RESIDUE)
    try:
        for plane in planes.values():
            plane.zero_()
        for param in chunk.spec.params:
            _store(param, source(param).view(-1), weight, residue)
        for slot, which in staged:
            engine.move_plane(io.WRITE, chunk, which, slot.region.address)
    finally:
        for slot, _ in staged:
            slot.pool.release(slot)
    chunk.unsaved.update(chunk.pinned)
    chunk.filled = True


def _stage(
    engine: Engine, chunk: Chunk
) -> tuple[dict[Plane, torch.Tensor], list[tuple[Slot, Plane]]]:
    """Flat tensors to fill: pinned planes in place, the others in borrowed slots that are written
    after.
    """
    planes: dict[Plane, torch.Tensor] = {}
    staged: list[tuple[Slot, Plane]] = []
    for plane in (Plane.WEIGHT, Plane.RESIDUE):
        if plane not in chunk.spec.state_planes(engine.plan.fmt):
            continue
        dtype, numel = engine.plan.fmt.dtypes[plane], chunk.spec.numel
        if plane in chunk.pinned:
            planes[plane] = chunk.pinned[plane].view(dtype, numel)
        else:
            slot = engine.residence.borrow(chunk)
            staged.append((slot, plane))
            planes[plane] = slot.region.view(dtype, numel)
    return planes, staged


def _store(
    param: ParamSpec, master: torch.Tensor, weight: torch.Tensor, residue: torch.Tensor | None
) -> None:
    place = slice(param.offset, param.offset + param.numel)
    if weight.dtype is torch.float32:
        weight[place].copy_(master)
    else:
        low = (
            residue[place] if residue is not None else torch.empty(param.numel, dtype=torch.uint16)
        )
        split_master(master, weight[place], low)


def as_master(values: torch.Tensor) -> torch.Tensor:
    """`values` as fp32, contiguous and in RAM; the same memory where they are that already."""
    layout = torch.contiguous_format  # with a new dtype, one copy does both
    return values.detach().to("cpu", torch.float32, memory_format=layout).contiguous()


# ---- a model in RAM ----


def from_memory(engine: Engine) -> None:
    """Move the parameters' own values into the tiers, chunk by chunk; their storage is freed as it
    goes.
    """
    for chunk in engine.chunks:
        fill_chunk(engine, chunk, _values_of(chunk))
        chunk.unbind()


def _values_of(chunk: Chunk) -> WeightSource:
    """The parameters keep their values, the only ones there are if the chunk cannot be filled."""
    params = {spec: param for param, spec in _pairs(chunk)}
    return lambda spec: as_master(params[spec])


# ---- a model on meta ----


def make_real(chunk: Chunk) -> None:
    """Turn meta parameters into real ones that hold placeholders; the Parameter objects stay the
    same.
    """
    for position, param in enumerate(chunk.params):
        if param.is_meta:
            real = nn.Parameter(chunk.placeholder(position), requires_grad=param.requires_grad)
            swap: Any = torch.utils.swap_tensors  # untyped
            swap(param, real)
    chunk.unbind()


def from_initialisers(engine: Engine, model: nn.Module) -> None:
    """Run the modules' own initialisers, chunk by chunk: `_init_weights` of Hugging Face, else
    reset_parameters.

    All parameters of a chunk are real while its initialisers run, because one may set what another
    module owns. Extra memory: one chunk in fp32.
    """
    owners = _owners(model)
    for chunk in engine.chunks:
        make_real(chunk)
    for chunk in engine.chunks:
        for param, spec in _pairs(chunk):
            param.data = torch.empty(spec.shape, dtype=torch.float32)
        for name, module in _modules_of(chunk, owners):
            with _rest_real(module):
                _initialise(model, name, module)
        fill_chunk(engine, chunk, _taken_from(chunk))
        chunk.unbind()
    materialise_buffers(model)


def _taken_from(chunk: Chunk) -> WeightSource:
    """The parameters give up their values, so that each is gone once it has been stored."""
    places = {spec: position for position, spec in enumerate(chunk.spec.params)}

    def take(spec: ParamSpec) -> torch.Tensor:
        param = chunk.params[places[spec]]
        values, param.data = param.data, chunk.placeholder(places[spec])
        if values.shape != spec.shape:
            raise StateError(
                f"the initialiser of parameter {spec.name} has left it in shape "
                f"{tuple(values.shape)}, and it had {spec.shape}; build the model in RAM."
            )
        return as_master(values)

    return take


@contextlib.contextmanager
def _rest_real(module: nn.Module) -> Iterator[None]:
    """An initialiser sets all parameters of its module; those of other chunks get memory for it."""
    absent = [p for p in module.parameters() if p.numel() > 1 and p.untyped_storage().nbytes() < 16]
    before = [param.data for param in absent]
    for param in absent:
        param.data = torch.empty(param.shape, dtype=torch.float32)
    try:
        yield
    finally:
        for param, data in zip(absent, before, strict=True):
            param.data = data


def _pairs(chunk: Chunk) -> list[tuple[nn.Parameter, ParamSpec]]:
    return list(zip(chunk.params, chunk.spec.params, strict=True))


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules that directly own each parameter, by id."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for param in module._parameters.values():
            if param is not None:
                owners.setdefault(id(param), []).append((name, module))
    return owners


def _modules_of(
    chunk: Chunk, owners: dict[int, list[tuple[str, nn.Module]]]
) -> Iterable[tuple[str, nn.Module]]:
    seen: dict[int, tuple[str, nn.Module]] = {}
    for param in chunk.params:
        name, module = owners[id(param)][0]  # a tied weight is initialised by its first owner
        seen[id(module)] = (name, module)
    return seen.values()


def _initialise(model: nn.Module, name: str, module: nn.Module) -> None:
    init_weights = getattr(model, "_init_weights", None)
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    with torch.no_grad():
        if callable(init_weights):
            init_weights(module)
        elif callable(reset):
            reset()
        else:
            raise StateError(
                f"module {name} ({type(module).__name__}) has no reset_parameters(); "
                "build the model in RAM, or give offload(weights=...) a folder of safetensors."
            )


def materialise_buffers(model: nn.Module) -> None:
    """Give buffers on meta their values again, by their module's own initialiser."""
    for name, module in model.named_modules():
        buffers = {k: b for k, b in module._buffers.items() if b is not None and b.is_meta}
        if not buffers:
            continue
        for key, buffer in buffers.items():
            module._buffers[key] = torch.full_like(
                buffer, float("nan") if buffer.is_floating_point() else 0, device="cpu"
            )
        _initialise(model, name, module)
        for key in buffers:
            buffer = module._buffers[key]
            if buffer is not None and buffer.is_floating_point() and bool(buffer.isnan().any()):
                raise StateError(
                    f"buffer {name}.{key} is on meta, and its module does not initialise it; build "
                    "the model with real buffers (torch.device('meta') only around parameters)."
                )


# ---- safetensors ----


class SafetensorsFolder:
    """A Hugging Face folder of safetensors, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, str] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._files = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").exists():
            with self._opened("model.safetensors") as shard:
                self._files = dict.fromkeys(shard.keys(), "model.safetensors")
        else:
            raise StateError(
                f"{folder} holds no model.safetensors and no model.safetensors.index.json; "
                "save the model with save_pretrained() first."
            )

    def _opened(self, file: str) -> Any:
        """Open a shard anew for every tensor: its mapped pages count as ours until it is closed."""
        from safetensors import safe_open

        return safe_open(self.folder / file, framework="pt")

    def find(self, names: Sequence[str]) -> str:
        """The first of a parameter's names that the folder has."""
        for name in names:
            if name in self._files:
                return name
        raise StateError(
            f"{self.folder} has no tensor for parameter {names[0]} (tried {', '.join(names)}). "
            "The checkpoint is of another architecture, or stores experts singly: load it in "
            "transformers, save_pretrained() it in the present layout, or wrap the model from RAM."
        )

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor, which has to have this shape, in its own dtype; a mapping of the file, whose
        pages count as ours until it is let go of.
        """
        with self._opened(self._files[name]) as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        if tensor.shape != shape:
            raise StateError(
                f"{self.folder}: tensor {name} has shape {tuple(tensor.shape)}, the model wants "
                f"{shape}."
            )
        return tensor


def from_folder(engine: Engine, model: nn.Module, folder: Path) -> None:
    """Read weights from a Hugging Face folder straight into the tiers."""
    source = SafetensorsFolder(folder)
    names = _all_names(model)
    aliases = {id(p): names[id(p)] for chunk in engine.chunks for p in chunk.params}
    for chunk in engine.chunks:
        keys = {spec: source.find(aliases[id(param)]) for param, spec in _pairs(chunk)}
        make_real(chunk)
        fill_chunk(engine, chunk, _read_from(source, keys))
    materialise_buffers(model)


def _read_from(source: SafetensorsFolder, keys: dict[ParamSpec, str]) -> WeightSource:
    return lambda spec: as_master(source.read(keys[spec], spec.shape))


def _all_names(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter; a checkpoint may leave out the base model's prefix."""
    names: dict[int, list[str]] = {}
    prefix = getattr(model, "base_model_prefix", "") or ""
    for name, param in model.named_parameters(remove_duplicate=False):
        row = names.setdefault(id(param), [])
        row.append(name)
        if prefix and name.startswith(f"{prefix}."):
            row.append(name[len(prefix) + 1 :])
    return names
