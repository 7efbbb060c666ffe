"""The manifest: what a committed step is, in one file. Pure: bytes in, Manifest out, and back.

A manifest is data of unknown origin. Everything in it is checked before anything is believed: its
own checksum, its version, every extent against its file and against every other. It names no paths:
files are numbered, and who opens a run says where they are.
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import math
import zlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic_core
import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from offload.errors import StateError, StorageError
from offload.extents import PACK_BLOCK_NBYTES_MAX, Extent, PlaneExtents
from offload.formats import FORMATS, STATE_BY_PARAM, STATE_PLANES, Plane
from offload.swapfile import ALIGN_NBYTES, MANIFEST_MAGIC

VERSION = 1
MANIFEST_NBYTES_MAX = 256 << 20
_NUM_LISTS_MAX = 2 << 20  # brackets: parsed, two bytes become a hundred
_NUM_VALUES_MAX = 16 << 20  # commas and colons: what is parsed takes a gigabyte at most
_HEAD_NBYTES_MAX = 128

Count = Annotated[int, Field(ge=0, le=2**53)]
Name = Annotated[str, Field(max_length=4096)]
Piece = tuple[Annotated[int, Field(ge=0, lt=64)], Count, Count]  # file, offset, nbytes


class _Record(BaseModel):
    # NaN and Inf as json.dumps has them: a loss among a user's progress may be one;
    # and no input in error texts: the text of a million lists takes gigabytes.
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="constants", hide_input_in_errors=True
    )


class PlaneRecord(_Record):
    """The extents of one plane, and which of them is committed."""

    extents: tuple[tuple[Piece, ...], ...] = Field(min_length=1, max_length=2)
    committed: Annotated[int, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _names_an_extent(self) -> PlaneRecord:
        if self.committed >= len(self.extents):
            raise ValueError("the committed extent does not exist")
        return self

    def restored(self) -> PlaneExtents:
        """The mutable form, as of the commit."""
        return PlaneExtents([Extent(pieces) for pieces in self.extents], self.committed)


class ParamRecord(_Record):
    """One parameter's place in its chunk; offset and numel in elements."""

    name: Name
    shape: tuple[Count, ...] = Field(max_length=64)
    offset: Count
    numel: Count
    trainable: bool
    state: tuple[Annotated[str, Field(max_length=256)], ...] = ()  # what a torch optimizer keeps


class ChunkRecord(_Record):
    """One chunk: its layout, its planes, and the optimizer steps that its parameters have taken."""

    name: Name
    numel: Annotated[int, Field(ge=1, le=2**50)]
    params: Annotated[tuple[ParamRecord, ...], FailFast()]
    num_steps: Annotated[tuple[Count, ...], FailFast()]
    planes: dict[str, PlaneRecord]


class TensorRecord(_Record):
    """A small tensor of the model itself, such as a batch norm's statistics."""

    dtype: Annotated[str, Field(max_length=32)]
    shape: tuple[Count, ...] = Field(max_length=64)
    data: str  # base64 of the bytes


class ChecksumsRecord(_Record):
    """The file that has the checksums of the committed extents, in the manifest's order; and
    behind all of them, where runs of `run_numel` elements may be packed, their blocks' lengths.
    """

    slot: Annotated[int, Field(ge=0, le=1)]  # two files take turns: never the committed one
    block_nbytes: Annotated[int, Field(ge=ALIGN_NBYTES, le=2**20, multiple_of=ALIGN_NBYTES)]
    nbytes: Count
    crc32: Annotated[int, Field(ge=0, lt=2**32)]
    run_numel: Annotated[int, Field(ge=0, le=2**31, multiple_of=ALIGN_NBYTES)] = 0


class WearRecord(_Record):
    """What the run has written by drive: in all, and in the hours of its last day."""

    total: tuple[Count, ...] = Field(default=(), max_length=64)
    hours: tuple[tuple[Count, tuple[Count, ...]], ...] = Field(default=(), max_length=64)


class Manifest(_Record):
    """A committed step. `rng` has torch's state in base64 by device, `progress` is the user's."""

    run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    step: Count
    state_format: Annotated[str, Field(max_length=32)]
    file_nbytes: tuple[Count, ...] = Field(min_length=1, max_length=64)
    checksums: ChecksumsRecord | None
    chunks: Annotated[tuple[ChunkRecord, ...], FailFast()]  # a million errors are one, too
    buffers: dict[str, TensorRecord]
    rng: dict[str, str]
    progress: dict[str, Any]
    kind: Literal["run", "checkpoint"] = "run"
    wear: WearRecord = WearRecord()

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        for chunk in self.chunks:
            _check_chunk(chunk, self.state_format)
        _check_names(self)
        _check_apart(self)
        if {len(nbytes) for _, nbytes in self.wear.hours} - {len(self.wear.total)}:
            raise ValueError("the wear of different hours is of different drives")
        _check_blocks(self)
        return self

    def planes(self) -> Iterator[tuple[int, Plane, PlaneRecord]]:
        """(chunk index, plane, record) of everything committed, in the order of the checksums."""
        for index, chunk in enumerate(self.chunks):
            for plane in STATE_PLANES:
                if plane.value in chunk.planes:
                    yield index, plane, chunk.planes[plane.value]

    def used_nbytes(self) -> tuple[int, ...]:
        """How far the extents reach in each file."""
        ends = [ALIGN_NBYTES] * len(self.file_nbytes)
        for _, _, record in self.planes():
            for pieces in record.extents:
                for file, offset, nbytes in pieces:
                    ends[file] = max(ends[file], offset + nbytes)
        return tuple(ends)


def _check_chunk(chunk: ChunkRecord, state_format: str) -> None:
    fmt = FORMATS.get(state_format)
    if fmt is None:
        raise ValueError(f"state format {state_format!r} is unknown")
    if len(chunk.num_steps) != len(chunk.params):
        raise ValueError(f"chunk {chunk.name}: step counts and parameters differ in number")
    for param in chunk.params:
        if param.offset + param.numel > chunk.numel:
            raise ValueError(f"chunk {chunk.name}: parameter {param.name} reaches beyond it")
        if math.prod(param.shape) != param.numel:
            raise ValueError(f"chunk {chunk.name}: parameter {param.name} has another size")
    known = {plane.value: plane for plane in (*fmt.state_planes, *STATE_BY_PARAM)}
    if not set(chunk.planes) <= set(known) or Plane.WEIGHT.value not in chunk.planes:
        raise ValueError(f"chunk {chunk.name}: planes {sorted(chunk.planes)} are not {fmt.name}'s")
    for name, record in chunk.planes.items():
        for pieces in record.extents:
            if known[name] in STATE_BY_PARAM:
                continue  # who goes on with the run says what size it has: see recovery.py
            if sum(nbytes for _, _, nbytes in pieces) != fmt.nbytes(known[name], chunk.numel):
                raise ValueError(f"chunk {chunk.name}: plane {name} has another size")


def _check_names(manifest: Manifest) -> None:
    """A name stands for one chunk, or one parameter."""
    chunks = [chunk.name for chunk in manifest.chunks]
    params = [param.name for chunk in manifest.chunks for param in chunk.params]
    if len(set(chunks)) != len(chunks) or len(set(params)) != len(params):
        raise ValueError("a name stands for two chunks or two parameters")


def _check_blocks(manifest: Manifest) -> None:
    """The checksums are as many as the blocks of what is committed; a block lies in one piece."""
    record = manifest.checksums
    if record is None:
        return
    num_blocks, block = 0, record.block_nbytes
    if block & (block - 1):
        raise ValueError(f"blocks of {block} bytes are no power of two")
    for _, _, plane in manifest.planes():
        for pieces in plane.extents:
            if any(nbytes % block for _, _, nbytes in pieces[:-1]):
                raise ValueError("a block is cut in two")
        num_blocks += sum(-(-nbytes // block) for _, _, nbytes in plane.extents[plane.committed])
    entry_nbytes = 8 if record.run_numel else 4
    if record.nbytes != entry_nbytes * num_blocks:
        raise ValueError(f"{record.nbytes} bytes of checksums for {num_blocks} blocks")
    if record.run_numel and block > PACK_BLOCK_NBYTES_MAX:
        raise ValueError(f"blocks of {block} bytes cannot be packed")


def _check_apart(manifest: Manifest) -> None:
    """Every piece is aligned, inside its file, behind the header, and apart from all others."""
    ranges: list[tuple[int, int, int]] = []
    for _, _, record in manifest.planes():
        for pieces in record.extents:
            ranges += pieces
    end = (0, ALIGN_NBYTES)
    for file, offset, nbytes in sorted(ranges):
        if offset % ALIGN_NBYTES or nbytes % ALIGN_NBYTES or nbytes == 0:
            raise ValueError(f"extent at {offset} of file {file} is not aligned")
        if file >= len(manifest.file_nbytes) or offset + nbytes > manifest.file_nbytes[file]:
            raise ValueError(f"extent at {offset} lies outside of file {file}")
        if offset < ALIGN_NBYTES or (file == end[0] and offset < end[1]):
            raise ValueError(f"extent at {offset} of file {file} overlaps another")
        end = (file, offset + nbytes)


def encode(manifest: Manifest) -> bytes:
    """The file's bytes: one line with version, checksum and length, then JSON.

    Raises StateError where it would be larger than decode() reads.
    """
    body = manifest.model_dump_json().encode()
    head = b"%s %d %08x %d\n" % (MANIFEST_MAGIC, VERSION, zlib.crc32(body), len(body))
    if len(head) + len(body) > MANIFEST_NBYTES_MAX or _has_too_much(body):
        raise StateError(
            f"the manifest would take {len(body)} bytes, more or in more pieces than can be read "
            "back. Keep less in engine.run.progress; register large buffers of the model with "
            "persistent=False."
        )
    return head + body


def decode(content: bytes, path: str) -> Manifest:
    """The manifest of a file's bytes.

    Raises StateError for a version that this code does not know, StorageError (EBADMSG) for
    anything that encode() cannot have written; `path` is for the message.
    """
    body = _checked_body(content, path)
    if _has_too_much(body):
        raise _broken(path, "it has more in it than any run")
    try:
        return Manifest.model_validate(pydantic_core.from_json(body))
    except (ValidationError, ValueError, RecursionError) as error:
        raise _broken(path, f"{type(error).__name__}: {str(error)[:300]}") from error


def _has_too_much(body: bytes) -> bool:
    num_lists, num_values = (sum(map(body.count, signs)) for signs in ((b"[", b"{"), (b",", b":")))
    return num_lists > _NUM_LISTS_MAX or num_values > _NUM_VALUES_MAX


def pack_progress(progress: dict[str, Any]) -> dict[str, Any]:
    """A copy of what the user keeps with a commit. Raises StateError where a manifest would not
    give it back.
    """
    try:
        if not isinstance(progress, dict):
            raise TypeError(f"{type(progress).__name__} is no dict")
        text = json.dumps({"progress": progress})
        copy: dict[str, Any] = pydantic_core.from_json(text)["progress"]
        pydantic_core.to_json(copy, inf_nan_mode="constants")
        return copy
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(
            f"engine.run.progress cannot be kept with a commit: {error}. Use a dict of what JSON "
            "can hold."
        ) from error


def _checked_body(content: bytes, path: str) -> bytes:
    head, newline, body = content[:_HEAD_NBYTES_MAX].partition(b"\n")
    fields = head.split(b" ")
    if not newline or len(fields) != 4 or fields[0] != MANIFEST_MAGIC:
        raise _broken(path, "it does not begin like a manifest")
    if fields[1] != b"%d" % VERSION:
        raise StateError(
            f"{path} is of version {fields[1].decode(errors='replace')!r}, and this program reads "
            f"version {VERSION}. Use the release that wrote it."
        )
    if len(content) > MANIFEST_NBYTES_MAX:
        raise _broken(path, f"it is larger than {MANIFEST_NBYTES_MAX} bytes")
    body = content[len(head) + 1 :]
    if fields[3] != b"%d" % len(body) or fields[2] != b"%08x" % zlib.crc32(body):
        raise _broken(path, "its content does not match its checksum")
    return body


def _broken(path: str, why: str) -> StorageError:
    return StorageError(
        errno.EBADMSG, "reading the manifest", path=path,
        remedy=f"{why}. Nothing was read or written. Restore a checkpoint (weights=<its folder>), "
        "or remove the run with `offload clean`.",
    )  # fmt: skip


def pack_tensor(tensor: torch.Tensor) -> TensorRecord:
    """A copy of a small tensor, of any device."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return TensorRecord(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        data=base64.b64encode(flat.numpy().tobytes()).decode(),
    )


def unpack_tensor(record: TensorRecord, name: str) -> torch.Tensor:
    """The tensor again. Raises StateError where the record does not add up."""
    dtype = getattr(torch, record.dtype, None)
    try:
        content = bytearray(base64.b64decode(record.data, validate=True))
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {record.dtype}")
        if len(content) != math.prod(record.shape) * dtype.itemsize:
            raise ValueError(f"{len(content)} bytes for {dtype} {record.shape}")
        if not content:
            return torch.empty(record.shape, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).reshape(record.shape)
    except (ValueError, RuntimeError, OverflowError, binascii.Error) as error:
        raise StateError(f"the manifest's tensor {name} does not add up: {error}") from error
