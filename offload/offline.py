"""What can be done with a committed step without its model: copied elsewhere, exported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from offload.checkpointfile import CheckpointFile
from offload.errors import StateError
from offload.export import write_tensors
from offload.formats import FORMATS, Plane
from offload.manifest import unpack_tensor
from offload.stepreader import StepReader, open_step

Show = Callable[[int, int], None]  # bytes done, bytes in all


def _show_nothing(done: int, total: int) -> None:
    pass


def copy_run(
    folders: Sequence[Path],
    out: Path,
    *,
    rate_nbytes: int | None = None,
    show: Show = _show_nothing,
) -> int:
    """Copy the committed step of a run that is not live, or a checkpoint, to a folder of its own.

    Every block is verified by its checksum. Returns how many bytes the file system shares with the
    run instead of keeping them twice. Raises StateError where the run is live or `out` holds one,
    StorageError for the rest; `out` is as it was then. `rate_nbytes` is the most that is copied in
    a second.
    """
    if rate_nbytes is not None and rate_nbytes < 1:
        raise StateError(f"rate_nbytes {rate_nbytes}: name at least one byte a second, or None.")
    with open_step(folders) as step:
        manifest = step.manifest
        sizes = [
            ((index, plane), sum(nbytes for _, _, nbytes in record.extents[record.committed]))
            for index, plane, record in manifest.planes()
        ]
        total, done = sum(nbytes for _, nbytes in sizes), 0

        def pace(nbytes: int) -> None:
            if rate_nbytes is not None:
                time.sleep(nbytes / rate_nbytes)

        file = CheckpointFile(out, sizes, step.block_nbytes, step.run_numel)
        try:
            for (index, plane), nbytes in sizes:
                file.add_pieces(
                    (index, plane), step.pieces(index, plane), step.parts_of(index, plane),
                    error=step.error, pace=pace, verify_clones=step.block_nbytes > 0,
                )  # fmt: skip
                done += nbytes
                show(done, total)
            file.finish(manifest)
        except BaseException:
            file.close(keep=False)
            raise
        file.close(keep=True)
        return file.num_cloned


def export_step(folders: Sequence[Path], out: Path, *, show: Show = _show_nothing) -> Path:
    """Write the weights of a committed step, of a run that is not live or a checkpoint, as
    safetensors: those that compute uses, by their parameters' names, and persistent buffers.

    Every block is verified. The step knows neither config nor tokenizer, so the folder has none.
    Raises StateError where the run is live or `out` is not empty. Memory: a shard and a chunk.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StateError(f"{out} is not an empty folder. Name another.")
    with open_step(folders) as step:
        write_tensors(_weights(step, show), out)
    return out


def _weights(step: StepReader, show: Show) -> Iterator[tuple[str, torch.Tensor]]:
    manifest = step.manifest
    dtype = FORMATS[manifest.state_format].weight_dtype
    total, done = sum(chunk.numel for chunk in manifest.chunks) * dtype.itemsize, 0
    for index, chunk in enumerate(manifest.chunks):
        plane = torch.empty(chunk.numel * dtype.itemsize, dtype=torch.uint8)
        for begin, part in step.parts(index, Plane.WEIGHT):
            plane[begin : begin + len(part)] = part
        flat = plane.view(dtype)
        for param in chunk.params:
            yield param.name, flat[param.offset : param.offset + param.numel].view(param.shape)
        done += len(plane)
        show(done, total)
    for name, buffer in manifest.buffers.items():
        yield name, unpack_tensor(buffer, name)
