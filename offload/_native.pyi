"""The native module: files, bytes and kernels. Addresses are ints, sizes are in bytes.

Memory named by an address belongs to the caller and must stay valid until the work that uses it
has completed. Functions that wait or compute release the GIL. Nothing here knows about torch.
"""

from collections.abc import Sequence
from typing import Final, TypeAlias, final

OP_READ: Final = 0
OP_WRITE: Final = 1
PRIORITY_DEMAND: Final = 0
PRIORITY_PREFETCH: Final = 1
PRIORITY_WRITE_BACK: Final = 2

@final
class IoQueue:
    """Asynchronous file transfers with priorities; every transfer completes exactly once.

    A transfer is cut into blocks of at most `block_nbytes` (a multiple of 4096), at most `depth`
    of them in flight. `num_threads` counts for the backend "threads" only. Every method may be
    called from any thread.

    Raises OSError with the kernel's errno where the backend cannot start: EPERM, ENOSYS or ENOMEM
    mean that io_uring is not to be had here and "threads" is the way. Raises ValueError for a
    limit out of range: depth 1 to 4096, block_nbytes 4096 to 2**30, num_threads 1 to 256.

    Checksums are for blocks of `checksum_nbytes` (a multiple of 4096 up to 2**30), counted from the
    start of a piece, which is what lies together in one file; its last one may be shorter. A
    transfer's blocks are then whole checksum blocks, even one that is larger than `block_nbytes`.

    With `pack_stride` runs can be packed (see csrc/pack.h): so many entries behind the checksum of
    a block, which is of at most 65536 bytes then, is the length of the block as it is packed.
    """

    def __new__(
        cls,
        backend: str,
        depth: int,
        block_nbytes: int,
        num_threads: int,
        checksum_nbytes: int = 0,
        pack_stride: int = 0,
    ) -> IoQueue: ...
    def backend(self) -> str:
        """Return "uring", "threads", or in tests "faults"."""

    def submit(
        self,
        op: int,
        tag: int,
        priority: int,
        segments: Sequence[
            tuple[int, int, int, int]
            | tuple[int, int, int, int, int]
            | tuple[int, int, int, int, int, int]
        ],
    ) -> None:
        """Queue one transfer of all segments (fd, offset, address, nbytes); never blocks.

        A fifth field is the address of the uint32 with the CRC32C of the segment's first checksum
        block, or 0. The segment then begins where such a block does, and ends where one does or at
        the end of its piece. A write stores the checksums before it starts; a read compares them,
        and fails with EBADMSG and the offset of a checksum block whose bytes have another. The
        table belongs to the caller: it must outlive the transfer, and no two transfers in flight
        may have an entry in common.

        A sixth field is the size of an item (2 or 4) where the segment is a run, which moves as one
        block: a read takes its packed bytes and unpacks them in place, a write keeps them plain.

        Lower priority values run first, equal ones in order of submission. `tag` is any value of
        0 to 2**64 - 1 and comes back with the completion. Raises RuntimeError after close().
        """

    def poll(self) -> list[tuple[int, int, int, int, float]]:
        """Take the completions (tag, result, fd, offset, seconds) that are there.

        `result` is the number of bytes moved in all segments, fd is -1 and offset 0; or it is
        -errno of the first block that failed, with that block's fd and offset. After a failure
        the other blocks may or may not have moved; none is moving any more. Reading past the end
        of a file fails with ENODATA. `seconds` runs from submit to completion.
        """

    def wait(self, timeout_s: float) -> list[tuple[int, int, int, int, float]]:
        """Like poll(), but sleep until there is a completion; [] on timeout or when closed.

        Returns at once on a completion; signal handlers (Ctrl-C) run within 0.2 s.
        """

    def stats(self) -> dict[str, int]:
        """Return totals: read_bytes, write_bytes, num_short (blocks continued after a short
        transfer), num_retries (after EINTR or EAGAIN); and num_in_flight, the transfers that are
        submitted and not completed."""

    def close(self) -> None:
        """Finish everything submitted, join the threads, discard completions. Idempotent.

        Dropping the last reference does the same.
        """

def uring_probe() -> int:
    """Return 0 where io_uring can be used, else -errno (-EPERM in many containers)."""

# For tests. The backend "faults" is "threads" with a FaultPlan of the whole process in between;
# nothing else looks at it.

def set_fault_plan(rules: Sequence[tuple[str, int, float]], seed: int, delay_s: float) -> None:
    """Replace the plan and start counting anew. A rule is (kind, at, rate).

    It strikes operation number `at` (from 1, over all queues), or with `at` 0 each one with
    probability `rate`, drawn from `seed`. It counts only operations that its kind can befall:
    latency (up to `delay_s` late), reorder (until up to three others have ended, or `delay_s`),
    eio, eintr, eagain: all; short: those of more than a page; flip_read: reads; enospc,
    flip_write, misplace, drop: writes. Raises ValueError for what is not a plan.
    """

def clear_fault_plan() -> None:
    """Disturb nothing more; the counts stay."""

def fault_counts() -> dict[str, int]:
    """Return what has happened under the plan: reads, writes, and the faults of each kind."""

# A plane for UpdatePipeline.submit: (address, read segments, write segments); a segment here is
# (fd, offset, nbytes) of a piece, in the order of the plane's bytes, and the address of the piece's
# checksums or nothing.
_Extents: TypeAlias = Sequence[tuple[int, int, int] | tuple[int, int, int, int]] | None
_Plane: TypeAlias = tuple[int, _Extents, _Extents] | None

UpdateRow = tuple[
    int, int, int, int, int, int, float, float, tuple[tuple[int, int], ...]
]  # the last: bytes written by fd

@final
class UpdatePipeline:
    """Native worker that runs optimizer updates tile by tile: read, kernel, write.

    The `buffer_nbytes` at `buffer_address` hold the tiles, at least
    update_buffer_nbytes(num_tiles, tile_numel) of them; `tile_numel` is a multiple of 4096;
    `isa` is "auto", "portable", "avx2" or "avx512". Transfers go through `queue` with
    PRIORITY_WRITE_BACK, and their completions do not show there. `checksum_nbytes` is as in
    IoQueue; tiles and pieces with checksums begin on borders of checksum blocks, in every plane.
    Raises OSError where no thread can start, ValueError for an argument out of range. Close it
    before its queue: what a closed queue refuses fails with ECANCELED.
    """

    def __new__(
        cls,
        queue: IoQueue,
        num_tiles: int,
        tile_numel: int,
        buffer_address: int,
        buffer_nbytes: int,
        isa: str,
        checksum_nbytes: int = 0,
    ) -> UpdatePipeline: ...
    def submit(
        self,
        tag: int,
        format: int,
        numel: int,
        planes: Sequence[_Plane],
        ops: bytes,
        write_all: bool = False,
    ) -> None:
        """Queue one job; never blocks.

        `format` is 0 for fp32, 1 for exact, 2 for bf16 and 3 for int8; `numel` is a multiple of
        4096, in int8 of 65536, as the tiles then must be. `planes` are weight, residue, exp_avg,
        exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad and grad_lo, None where the format, the
        rule or the job has none. A plane with an address lies there whole, read segments are
        read into it first and write segments written from it after; without one (0) it goes
        through the tiles.
        `ops` is a packed array of records '<qqiiddddddQq': begin, end (elements; in int8 it begins
        at a multiple of 32), rule (0 is AdamW, 1 SGD, 2 Lion), flags (1 is maximize, 2 nesterov),
        lr, beta1 (SGD: momentum), beta2 (SGD: dampening), eps, weight_decay, grad_scale, seed of
        stochastic rounding, step. Elements that no record covers keep their state.
        Without `write_all` a tile that no record touches is not written; with it, the write
        segments are another version and get every tile.
        """

    def poll(self) -> list[UpdateRow]:
        """Take the completions that are there: (tag, result, fd, offset, read_bytes,
        write_bytes, seconds, kernel_seconds, written); result is 0 or -errno with fd and offset.

        -EBADMSG has the offset of a checksum block that is not what was written. Nothing of its
        tile was written, no entry of the tile's checksums has changed, and nothing was computed
        from the block; other tiles may have been written. kernel_seconds has the checksums' time.
        """

    def wait(self, timeout_s: float) -> list[UpdateRow]:
        """Like poll(), but sleep until there is a completion; [] on timeout or when closed."""

    def close(self) -> None:
        """Finish the submitted jobs and join the threads. Idempotent."""

def update_buffer_nbytes(num_tiles: int, tile_numel: int) -> int:
    """Return the bytes of tile buffers that an UpdatePipeline needs."""

def crc32c(address: int, nbytes: int, isa: str = "auto") -> int:
    """Return the CRC32C (Castagnoli) of bytes in memory; `isa` is "auto" or of crc32c_isas()."""

def crc32c_blocks(address: int, nbytes: int, block_nbytes: int, out_address: int) -> None:
    """Store the CRC32C of every block, the last of which may be shorter, as uint32."""

def crc32c_isas() -> tuple[str, ...]:
    """Return what this CPU can compute checksums with, fastest first; "portable" is the last."""

def pack_block(
    item_nbytes: int,
    address: int,
    nbytes: int,
    out_address: int,
    out_nbytes: int,
    isa: str = "auto",
) -> int:
    """Pack floats of 2 (bf16) or 4 bytes, in whole groups of 64; return the bytes that takes, or 0
    where they would not be fewer. The output needs room for 512 bytes more than `nbytes`. `isa` is
    "auto" or of pack_isas()."""

def unpack_block(
    item_nbytes: int,
    address: int,
    packed_nbytes: int,
    out_address: int,
    nbytes: int,
    isa: str = "auto",
) -> bool:
    """Undo pack_block; False where that did not make it, and the output then holds anything. May
    read up to 64 bytes behind the packed ones."""

def unpack_run(
    item_nbytes: int, address: int, nbytes: int, block_nbytes: int, lengths: int
) -> bool:
    """Unpack the blocks of a run in place. Their lengths, uint32 at `lengths`, may not exceed those
    of plain blocks: ValueError. False where the bytes are not what was packed."""

def pack_isas() -> tuple[str, ...]:
    """Return what this CPU can pack with, fastest first; "portable" is the last."""

# `isa` below is "auto" or one of supported_isas(); the bits do not depend on it. ValueError
# where this CPU lacks it.

def split_fp32(
    src: int, weight: int, residue: int, numel: int, residue_nbytes: int, isa: str = "auto"
) -> None:
    """Split fp32 `src` into bf16 `weight` and `residue`: its 16 low bits (2 bytes), without loss,
    or 8 bits below the weight (1 byte), to which the value is rounded."""

def join_fp32(
    weight: int, residue: int, dst: int, numel: int, residue_nbytes: int, isa: str = "auto"
) -> None:
    """Undo split_fp32; an address of 0 for `residue` means low bits of zero."""

def grad_land(
    dst: int, dst_lo: int, src: int, numel: int, kind: int, mode: int, isa: str = "auto"
) -> float:
    """Put gradient `src` into `dst` (and its low half `dst_lo`, or 0 for none).

    `kind` 0 is bf16, 1 is fp32; `mode` 0 sets, 1 accumulates in fp32 (kind 0 needs `dst_lo`),
    2 accumulates in the plane's dtype. Returns the sum of squares of the resulting values in
    float64, the same on every machine.
    """

def factor_sums(
    src: int,
    src_lo: int,
    kind: int,
    num_rows: int,
    num_cols: int,
    numel: int,
    row_sums: int,
    col_sums: int,
    isa: str = "auto",
) -> None: ...
def sum_squares(src: int, src_lo: int, numel: int, kind: int, isa: str = "auto") -> float:
    """Return the sum of squares of a gradient plane in grad_land's fixed order."""

def apply_ops(
    format: int,
    numel: int,
    addresses: tuple[int, ...],
    ops: bytes,
    isa: str = "auto",
) -> None:
    """Run UpdatePipeline.submit's `ops` at once on planes in memory; `numel` may be anything."""

def isa() -> str:
    """Return the instruction set that "auto" stands for here."""

def supported_isas() -> tuple[str, ...]:
    """Return what this CPU can run of "avx512", "avx2" and "portable", fastest first."""
