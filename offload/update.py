"""Typed face of the native update worker, and the records that tell it what to do.

The worker streams a chunk's planes tile by tile (read, kernel, write) on its own thread without the
GIL.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

from offload import _native
from offload.io import IoQueue, on_cpus
from offload.slots import Region

NUM_TILES = 12  # one computed, the others keep the drive busy both ways
_OP = struct.Struct("<qqiiddddddQq")
_FACTORS = struct.Struct("<QQ")
RULE_ADAMW, RULE_SGD, RULE_LION, RULE_FACTORED, RULE_SCALED = range(5)
FLAG_MAXIMIZE, FLAG_NESTEROV, FLAG_DIRECT = 1, 2, 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One optimizer step on the elements [begin, end) of a chunk, as captured at step().

    The subclasses add their hyperparameters. `seed` is for stochastic rounding; with the same
    seed, step and element its random bits are the same.
    """

    begin: int
    end: int
    step: int
    lr: float
    weight_decay: float
    maximize: bool = False
    grad_scale: float = 1.0  # multiplies every gradient (clipping)
    seed: int = 0

    def pack(self) -> bytes:
        """The native form."""
        raise NotImplementedError

    def _pack(
        self, rule: int, beta1: float, beta2: float, eps: float = 0.0, flags: int = 0
    ) -> bytes:
        flags |= FLAG_MAXIMIZE if self.maximize else 0
        hyper = (self.lr, beta1, beta2, eps, self.weight_decay, self.grad_scale)
        return _OP.pack(self.begin, self.end, rule, flags, *hyper, self.seed, self.step)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdamWOp(Op):
    """AdamW."""

    beta1: float
    beta2: float
    eps: float

    def pack(self) -> bytes:
        return self._pack(RULE_ADAMW, self.beta1, self.beta2, self.eps)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SGDOp(Op):
    """SGD; its momentum buffer is the plane exp_avg."""

    momentum: float
    dampening: float
    nesterov: bool

    def pack(self) -> bytes:
        flags = FLAG_NESTEROV if self.nesterov else 0
        return self._pack(RULE_SGD, self.momentum, self.dampening, flags=flags)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LionOp(Op):
    """Lion."""

    beta1: float
    beta2: float

    def pack(self) -> bytes:
        return self._pack(RULE_LION, self.beta1, self.beta2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FactoredOp(Op):
    """A step on whole matrices of num_rows x num_cols, with its factors in fp32: `rows` and `cols`
    of all matrices. With beta1 Adafactor's; without SCALE's, and `is_direct` says that the factors
    are the step. See [Note: factored] in csrc/kernels.h.
    """

    beta1: float | None
    eps: float
    is_direct: bool = False
    num_rows: int
    num_cols: int
    rows: bytes = b""
    cols: bytes = b""

    def pack(self) -> bytes:
        rule = RULE_SCALED if self.beta1 is None else RULE_FACTORED
        flags = FLAG_DIRECT if self.is_direct else 0
        record = self._pack(rule, self.beta1 or 0.0, 0.0, self.eps, flags)
        return record + _FACTORS.pack(self.num_rows, self.num_cols) + self.rows + self.cols


def pack_ops(ops: Sequence[Op]) -> bytes:
    """The native form of the ops."""
    return b"".join(op.pack() for op in ops)


# fd, offset, nbytes of a piece, and where checksums are kept, the address of its first block's.
PlaneSegment = tuple[int, int, int] | tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class PlaneArgument:
    """How the worker reaches one plane: RAM address (0: through its tiles), and extents to read and
    write.
    """

    address: int
    read: Sequence[PlaneSegment] | None = None
    write: Sequence[PlaneSegment] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateCompletion:
    """What became of one update: `result` is 0 or -errno with the fd and offset that failed.
    `written` is write_nbytes by fd.
    """

    tag: int
    result: int
    fd: int
    offset: int
    read_nbytes: int
    write_nbytes: int
    seconds: float
    kernel_seconds: float
    written: tuple[tuple[int, int], ...]


def tile_buffer_nbytes(tile_numel: int) -> int:
    """Bytes of slab that the worker's tile buffers need."""
    return int(_native.update_buffer_nbytes(NUM_TILES, tile_numel))


def apply_in_ram(fmt_code: int, numel: int, addresses: Sequence[int], ops: bytes) -> None:
    """Run an update here and now on planes that all lie in RAM (address 0: the plane is absent)."""
    _native.apply_ops(fmt_code, numel, tuple(addresses), ops)


class UpdatePipeline:
    """Queue of update jobs, run in order by a native thread. Its transfers share `queue`, where
    reads that compute waits for overtake them; close it first.

    Pieces with checksums are verified as they are read and get new ones as they are written, a
    uint32 for every `checksum_nbytes`, of which every tile of every plane has to be a multiple.
    """

    def __init__(
        self, queue: IoQueue, tile_numel: int, buffer: Region, *, checksum_nbytes: int = 0
    ) -> None:
        self.tile_numel = tile_numel
        memory = buffer.address, buffer.nbytes
        with on_cpus(queue.cpus):
            self._pipeline = _native.UpdatePipeline(
                queue.native, NUM_TILES, tile_numel, *memory, "auto", checksum_nbytes
            )

    def submit(
        self,
        tag: int,
        fmt_code: int,
        numel: int,
        planes: Sequence[PlaneArgument | None],
        ops: bytes,
        *,
        write_all: bool = False,
    ) -> None:
        """Start one job; it completes exactly once. All memory and files must outlive it.

        With `write_all` the write segments are another version of the planes, and get all of them;
        else only what the ops change is written.
        """
        rows = tuple(None if p is None else (p.address, p.read, p.write) for p in planes)
        self._pipeline.submit(tag, fmt_code, numel, rows, ops, write_all)

    def poll(self) -> list[UpdateCompletion]:
        return [UpdateCompletion(*row) for row in self._pipeline.poll()]

    def wait(self, timeout_s: float) -> list[UpdateCompletion]:
        """Block without the GIL until a job completes or the time is up."""
        return [UpdateCompletion(*row) for row in self._pipeline.wait(timeout_s)]

    def close(self) -> None:
        """Finish what was submitted and stop the thread. Idempotent."""
        self._pipeline.close()
