"""Where the bytes of a plane lie on the drives, and which version of it; pure.

[Note: two extents] Under durability a plane has two extents. What is committed is never written:
an update reads the newest version and writes the extent that is not committed. `PlaneExtents` is
that rule, and the only place that knows it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import numpy as np

from offload.errors import StateError
from offload.formats import Plane, StateFormat
from offload.slots import round_up
from offload.swapfile import ALIGN_NBYTES

PACK_BLOCK_NBYTES_MAX = 1 << 16  # checksum blocks where something is packed; as in csrc/pack.h
PlaneSegment = tuple[int, int, int, int]  # fd, offset, nbytes, address of its checksums or 0

STRIPE_NBYTES = 4 << 20  # of a plane on several drives: a tile or two of the update worker


def shares(nbytes: int, weights: Sequence[float], align: int) -> list[int]:
    """Split bytes over places in proportion to their weights; pure.

    Pieces are multiples of `align`, except that the last place with a weight takes the rest, and
    each is less than `align` away from its exact share. A place of weight 0 gets nothing. Raises
    StateError where no weight is above 0, or one is negative or not finite.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise StateError(f"weights {list(weights)} are not finite, from 0 up, and one above 0.")
    exact = [Fraction(weight) for weight in weights]  # so that no rounding depends on the order
    total = sum(exact)
    last = max(index for index, weight in enumerate(exact) if weight)
    ends = [int(nbytes * end / total) // align * align for end in itertools.accumulate(exact)]
    ends[last:] = [nbytes] * (len(ends) - last)
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def stripes(
    nbytes: int, weights: Sequence[float], align: int, stripe_nbytes: int
) -> list[tuple[int, int]]:
    """Lay bytes out over places in turns: pieces (place, nbytes) in the order of the bytes; pure.

    Every place gets its `shares` in as many pieces as there are stripes of `stripe_nbytes`, so any
    few stripes' worth of neighbouring bytes are spread over all places in proportion. One piece a
    place would have them on one drive, and whoever walks through a plane would use one at a time.
    """
    num_stripes = max(1, -(-nbytes // stripe_nbytes))
    by_place = [shares(share, [1] * num_stripes, align) for share in shares(nbytes, weights, align)]
    return [
        (place, pieces[stripe])
        for stripe in range(num_stripes)
        for place, pieces in enumerate(by_place)
        if pieces[stripe]
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """Where one plane lies: pieces (file index, offset, nbytes) in plane order."""

    pieces: tuple[tuple[int, int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(piece[2] for piece in self.pieces)


@dataclasses.dataclass(frozen=True, slots=True)
class Runs:
    """How a plane of floats is packed: items of so many bytes, in runs of at most `nbytes` plain.

    A run is what of the plane's bytes lies between two multiples of `nbytes`, and in one piece. It
    is read as a whole; see [Note: packed runs] in csrc/pack.h.
    """

    item_nbytes: int
    nbytes: int


def cut(
    pieces: Iterable[tuple[int, int, int]], part_nbytes: int, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, int, int, int]]:
    """Cut the bytes [begin, end) of pieces (place, offset, nbytes) at the multiples of part_nbytes
    that count from the first byte of all: yields (place, offset, nbytes, where in all it begins).
    """
    start = 0
    for place, offset, nbytes in pieces:
        stop = start + nbytes if end is None else min(start + nbytes, end)
        at = max(start, begin)
        while at < stop:
            part = min(stop, (at // part_nbytes + 1) * part_nbytes) - at
            yield place, offset + at - start, part, at
            at += part
        start += nbytes


def block_sizes(extent: Extent, block_nbytes: int) -> list[int]:
    """Bytes of the checksum blocks of an extent: the piece after a piece begins a new one."""
    return [
        min(block_nbytes, nbytes - start)
        for _, _, nbytes in extent.pieces
        for start in range(0, nbytes, block_nbytes)
    ]


def table_nbytes(
    plane_nbytes: Sequence[int], num_paths: int, checksum_nbytes: int, *, packs: bool = False
) -> int:
    """Bytes of checksums that extents of these sizes need at most, in whole pages; with `packs`,
    and of packed lengths. Only the last piece of a plane is no multiple of a block, so the pieces
    need no more than the whole.
    """
    if not checksum_nbytes:
        return 0
    blocks = sum(-(-nbytes // checksum_nbytes) + num_paths for nbytes in plane_nbytes)
    return round_up((8 if packs else 4) * blocks, ALIGN_NBYTES)


def runs_of(fmt: StateFormat, plane: Plane, run_numel: int) -> Runs | None:
    """How a plane is packed where runs have so many elements (0: nothing is)."""
    item_nbytes = fmt.packed_item_nbytes(plane) if run_numel else 0
    return Runs(item_nbytes, run_numel * item_nbytes) if item_nbytes else None


@dataclasses.dataclass(frozen=True, slots=True)
class BlockTable:
    """What is known of the checksum blocks of an extent, in plane order: their CRC32C, and their
    length as they lie there, packed or plain. Both uint32; empty where there are no checksums.
    """

    checksums: np.ndarray
    lengths: np.ndarray

    def __getitem__(self, blocks: slice) -> BlockTable:
        return BlockTable(self.checksums[blocks], self.lengths[blocks])


NO_TABLE = BlockTable(np.empty(0, np.uint32), np.empty(0, np.uint32))


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What can be read of a plane by itself: `nbytes` plain ones, from `begin` of the plane. With
    `item_nbytes` a run, whose packed bytes lie at `offset`.
    """

    fd: int
    offset: int
    nbytes: int
    begin: int
    table: BlockTable
    item_nbytes: int = 0

    @property
    def stored_nbytes(self) -> int:
        """Bytes that it takes where it lies, in whole pages."""
        if not self.item_nbytes:
            return self.nbytes
        return min(round_up(int(self.table.lengths.sum()), ALIGN_NBYTES), self.nbytes)


def parts_of(
    pieces: Iterable[tuple[int, int, int]], table: BlockTable, block_nbytes: int,
    runs: Runs | None, part_nbytes: int,
) -> Iterator[Part]:  # fmt: skip
    """Cut a plane into its runs, or else into parts of whole blocks of `part_nbytes`."""
    nbytes_max = runs.nbytes if runs is not None else part_nbytes
    item_nbytes = runs.item_nbytes if runs is not None else 0
    for fd, offset, nbytes, at in cut(pieces, nbytes_max):
        found = NO_TABLE
        if block_nbytes:
            found = table[at // block_nbytes : -(-(at + nbytes) // block_nbytes)]
        yield Part(fd, offset, nbytes, at, found, item_nbytes)


class PlaneExtents:
    """The versions of one plane on NVMe; see [Note: two extents]. `committed` indexes `extents`;
    None before the first commit.
    """

    __slots__ = ("_newest", "committed", "extents")

    def __init__(self, extents: Sequence[Extent], committed: int | None = None) -> None:
        self.extents = tuple(extents)
        self.committed = committed
        self._newest = committed or 0

    @property
    def newest(self) -> Extent:
        """What to read."""
        return self.extents[self._newest]

    @property
    def target(self) -> Extent:
        """What to write: never the committed version, where there are two."""
        return self.extents[self._target]

    @property
    def _target(self) -> int:
        if len(self.extents) == 1 or self.committed is None:
            return self._newest
        return 1 - self.committed

    def target_of(self, chunk: str) -> Extent:
        """The target, for code other than an update; StateError where that is the committed one."""
        if len(self.extents) == 1 and self.committed is not None:
            raise StateError(
                f"chunk {chunk} is frozen, and a commit names its only copy: writing it would "
                "break recovery. Set durability: off, or let it require gradients from the start."
            )
        return self.target

    def wrote(self) -> None:
        """The whole target has been written: it is the newest version now."""
        self._newest = self._target

    @property
    def newest_index(self) -> int:
        """Where in `extents` the newest version is."""
        return self._newest

    def commit(self) -> None:
        """A manifest that names the newest version is durable."""
        self.committed = self._newest
