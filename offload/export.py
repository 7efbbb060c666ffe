"""Trained weights as safetensors, streamed out of the tiers one chunk at a time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.chunk import Chunk

logger = logging.getLogger("offload")
SHARD_NBYTES = 512 << 20
ReadWeights = Callable[[Chunk], dict[str, torch.Tensor]]


def export_model(
    model: nn.Module,
    chunks: list[Chunk],
    read: ReadWeights,
    folder: Path,
    *,
    shard_nbytes: int = SHARD_NBYTES,
) -> Path:
    """Write `folder` so that transformers' from_pretrained loads it: shards, index, config.

    `read(chunk)` gives a chunk's parameters by name, each a CPU tensor. Peak memory: one shard, or
    one chunk where that is larger. Files appear under their final names only when they are whole.
    """
    write_tensors(_tensors_of(model, chunks, read), folder, shard_nbytes=shard_nbytes)
    _write_config(model, folder)
    return folder


def write_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *, shard_nbytes: int = SHARD_NBYTES
) -> None:
    """Write safetensors in shards, with their index. Peak memory: one shard, or one tensor."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    files: list[tuple[Path, list[str]]] = []
    total = 0
    try:
        for number, shard in enumerate(_shards(tensors, shard_nbytes)):
            path = folder / f".shard-{number}.tmp"
            files.append((path, list(shard)))
            save_file(shard, path, metadata={"format": "pt"})
            total += sum(tensor.nbytes for tensor in shard.values())
    except BaseException:
        for path, _ in files:
            path.unlink(missing_ok=True)
        raise
    for old in folder.glob("model*.safetensors*"):
        old.unlink()  # a reader would prefer a single file of an earlier export to these shards
    for number, (path, names) in enumerate(files):
        final = _shard_name(number, len(files))
        os.replace(path, folder / final)
        weight_map.update(dict.fromkeys(names, final))
    _write_index(folder, weight_map, total, sharded=len(files) > 1)


def _shard_name(number: int, count: int) -> str:
    return (
        "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    )


def _write_index(folder: Path, weight_map: dict[str, str], total: int, *, sharded: bool) -> None:
    index = folder / "model.safetensors.index.json"
    if sharded:
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=1, sort_keys=True))


def _write_config(model: nn.Module, folder: Path) -> None:
    for attribute in ("config", "generation_config"):
        config: Any = getattr(model, attribute, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)


def _tensors_of(
    model: nn.Module, chunks: list[Chunk], read: ReadWeights
) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, and the persistent buffers last."""
    for chunk in chunks:
        yield from read(chunk).items()
    yield from _persistent_buffers(model).items()


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], shard_nbytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors in groups of at most shard_nbytes."""
    shard: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_nbytes:
            yield shard
            shard = {}
        shard[name] = tensor.contiguous()
    if shard:
        yield shard


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    buffers: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                buffers[f"{prefix}.{key}" if prefix else key] = buffer.detach().cpu().clone()
    return buffers
