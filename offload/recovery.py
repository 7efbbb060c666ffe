"""Going on with a committed run: its extents are adopted as they are, nothing large is copied."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offload import io, materialise
from offload.chunk import ChunkSpec
from offload.commit import param_records_of
from offload.engine import Engine
from offload.errors import StateError
from offload.extents import PlaneExtents
from offload.formats import StateFormat
from offload.homes import PlaneKey
from offload.manifest import ChunkRecord, Manifest, ParamRecord, pack_tensor, unpack_tensor
from offload.plan import Plan
from offload.runfiles import read_tables
from offload.store import ChunkStore


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Where a run goes on: behind `step` optimizer steps, with what the user noted at the last."""

    step: int
    progress: dict[str, Any]


def check_same_model(
    manifest: Manifest, specs: Sequence[ChunkSpec], fmt: StateFormat, where: str
) -> None:
    """Raise StateError where the manifest is of another model or format; names what differs."""
    if manifest.state_format != fmt.name:
        raise StateError(
            f"{where} was written in format {manifest.state_format}, the policy says {fmt.name}. "
            "Set state.format to the run's."
        )
    if len(manifest.chunks) != len(specs):
        raise StateError(
            f"{where} has {len(manifest.chunks)} chunks, this model has {len(specs)}: it is "
            "another model. Build the one that the run began with."
        )
    for record, spec in zip(manifest.chunks, specs, strict=True):
        difference = _difference(record, spec, fmt)
        if difference:
            raise StateError(
                f"{where}: {difference}. Build the model, and freeze its parameters, as the run "
                "began."
            )


def _difference(record: ChunkRecord, spec: ChunkSpec, fmt: StateFormat) -> str:
    planes = {plane.value for plane in spec.state_planes(fmt)}
    if set(record.planes) != planes:
        return (
            f"chunk {record.name} has the planes {sorted(record.planes)}, this run wants "
            f"{sorted(planes)} (see optimizer.kind)"
        )
    if (record.name, record.numel) != (spec.name, spec.numel):
        return f"chunk {record.name} of {record.numel} elements is {spec.name} of {spec.numel} here"
    for old, new in zip(record.params, param_records_of(spec), strict=False):
        if old.state != new.state:
            return f"of {old.name} the optimizer keeps {_kept(old)}, and would keep {_kept(new)}"
        if old != new:
            return f"parameter {old.name} {old.shape} is {new.name} {new.shape} here"
    if len(record.params) != len(spec.params):
        return f"chunk {record.name} has {len(record.params)} parameters, here {len(spec.params)}"
    planes = {plane.value for plane in spec.state_planes(fmt)}
    for plane in spec.state_planes(fmt):
        for pieces in record.planes[plane.value].extents if plane.value in record.planes else ():
            if sum(nbytes for _, _, nbytes in pieces) != spec.nbytes(plane, fmt):
                return f"plane {plane.value} of chunk {record.name} has another size here"
    if set(record.planes) != planes:
        return f"chunk {record.name} has the planes {sorted(record.planes)}, not {sorted(planes)}"
    return ""


def _kept(record: ParamRecord) -> str:
    return f"[{'; '.join(record.state)}]"


def check_homes(manifest: Manifest, plan: Plan, where: str) -> None:
    """Raise StateError where a run's files cannot be gone on with as they are under this plan."""
    if manifest.kind != "run":
        raise StateError(
            f"{where} is a checkpoint, and going on in it would write over it. Pass its folder as "
            "weights=, and name another in tiers.nvme.paths."
        )
    record = manifest.checksums
    if plan.checksum_nbytes and (record is None or record.block_nbytes != plan.checksum_nbytes):
        was = "without checksums" if record is None else f"in blocks of {record.block_nbytes}"
        raise StateError(
            f"{where} was written {was}, this policy wants blocks of {plan.checksum_nbytes}. Put "
            "tiers.nvme.checksum, optimizer.tile_numel and tiers.cpu.budget back, or start from a "
            "checkpoint of it (`offload checkpoint`)."
        )
    if record is not None and record.run_numel not in (0, plan.tile_numel if plan.packs else 0):
        raise StateError(
            f"{where} is packed in runs of {record.run_numel} elements, and this policy "
            + (f"has room for tiles of {plan.tile_numel}. " if plan.packs else "does not pack. ")
            + "Set tiers.nvme.pack: true and as much tiers.cpu.budget as the run had, or start "
            "from a checkpoint of it (`offload checkpoint`)."
        )
    for index, plane, planes in manifest.planes():
        spec = plan.specs[index]
        if len(planes.extents) != plan.num_extents(spec, plane):
            raise StateError(
                f"{where} has {len(planes.extents)} versions of chunk {spec.name}, this run keeps "
                f"{plan.num_extents(spec, plane)}. Freeze its parameters as the run began, or "
                "start from a checkpoint of it (`offload checkpoint`)."
            )


def check_rest(manifest: Manifest, model: nn.Module, where: str) -> None:
    """Raise StateError where the buffers or random states of a step cannot be this model's."""
    buffers = dict(model.named_buffers())
    for name, packed in manifest.buffers.items():
        if name not in buffers or tuple(buffers[name].shape) != packed.shape:
            has = f"of shape {tuple(buffers[name].shape)}" if name in buffers else "of that name"
            raise StateError(
                f"{where} has a buffer {name} of shape {packed.shape}, this model has none {has}. "
                "Build the model as the run began."
            )
        unpack_tensor(packed, name)
    for name, text in manifest.rng.items():
        _random_state(name, text)


def homes_of(manifest: Manifest) -> dict[PlaneKey, PlaneExtents]:
    """The extents of all planes, as of the commit."""
    return {(index, plane): record.restored() for index, plane, record in manifest.planes()}


def load_checksums(store: ChunkStore, manifest: Manifest) -> None:
    """Give the committed extents the checksums, and packed lengths, that they were committed with.
    Raises StorageError.
    """
    if not store.checksum_nbytes:
        return
    tables = read_tables(store.paths[0], manifest)
    for index, plane, planes in manifest.planes():
        committed, table = tables[index, plane], store.table(planes.restored().newest)
        table.checksums[:] = committed.checksums
        table.lengths[:] = committed.lengths


def adopt(engine: Engine, model: nn.Module, manifest: Manifest) -> Recovered:
    """Bring the pinned planes back into RAM, and the step counts, buffers and random states. Where
    that fails, the model's parameters are what they were.
    """
    if engine.store is not None:
        load_checksums(engine.store, manifest)
    for chunk in engine.chunks:
        for plane, region in chunk.pinned.items():
            engine.move_plane(io.READ, chunk, plane, region.address)
    recovered = adopt_rest(engine, model, manifest)
    for chunk in engine.chunks:
        materialise.make_real(chunk)
        chunk.filled = True
    return recovered


def adopt_rest(engine: Engine, model: nn.Module, manifest: Manifest) -> Recovered:
    """All of a committed step but its planes."""
    for chunk, record in zip(engine.chunks, manifest.chunks, strict=True):
        chunk.num_steps = list(record.num_steps)
    materialise.materialise_buffers(model)
    buffers = dict(model.named_buffers())
    for name, packed in manifest.buffers.items():
        with torch.no_grad():
            buffers[name].copy_(unpack_tensor(packed, name))
    set_random_states(manifest.rng)
    return Recovered(step=manifest.step, progress=manifest.progress)


def random_states(device: torch.device) -> dict[str, str]:
    """The states of torch's generators: the CPU's, and the compute device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(s.numpy().tobytes()).decode() for name, s in states.items()}


def set_random_states(states: dict[str, str]) -> None:
    """Undo random_states; a device that is not here is left out. Raises StateError for what is no
    state.
    """
    for name, text in states.items():
        state = _random_state(name, text)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


def _random_state(name: str, text: str) -> torch.Tensor:
    """One of random_states. Raises StateError where no generator takes it."""
    try:
        state = torch.frombuffer(
            bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8
        )
        if name == "cpu" or (name == "cuda" and torch.cuda.is_available()):
            torch.Generator(name).set_state(state)
        return state
    except (ValueError, RuntimeError) as error:
        raise StateError(
            f"the manifest's random state of {name} is none that torch knows: {error} Use the "
            "release of torch that wrote it, or start from a checkpoint."
        ) from error


def persistent_buffers(model: nn.Module) -> dict[str, Any]:
    """What state_dict() would have of buffers, packed: statistics, not what __init__ computes."""
    return {
        (f"{prefix}.{name}" if prefix else name): pack_tensor(buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
