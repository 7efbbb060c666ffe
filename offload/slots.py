"""One host allocation, carved into named arenas and fixed slots. Nothing else allocates host memory
on the hot path.

The slab is anonymous memory on 2 MiB pages: the drive's requests are then not split at every 4 KiB
page (2.4x reads and 2.5x writes on a virtio disk), and a CUDA device registers it once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap

import torch

from offload.errors import BudgetError, StateError

HUGE_PAGE_NBYTES = 2 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
# MADV_WIPEONFORK, Linux 4.14: a data loader's worker sees zeros. Otherwise every page that training
# writes while the worker lives would be there twice, which is in nobody's budget.
_WIPEONFORK = 18
POISON = 0xFF  # fills freed buffers in chaos tests; as bf16 and fp32 it reads as NaN


def round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A named byte range of the slab; `tensor` is a uint8 view of it."""

    name: str
    address: int
    nbytes: int
    tensor: torch.Tensor

    def view(self, dtype: torch.dtype, numel: int, start: int = 0) -> torch.Tensor:
        """A flat view of numel elements, from element `start`; shares memory."""
        offset = start * dtype.itemsize
        return self.tensor[offset : offset + numel * dtype.itemsize].view(dtype)


class Slab:
    """Owns the mapping. `carve` hands out regions in order and never takes one back."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = round_up(max(nbytes, HUGE_PAGE_NBYTES), HUGE_PAGE_NBYTES)
        self._used_nbytes = 0
        self.arenas: dict[str, int] = {}
        # Twice the page size more, so that the first region can start on a huge page.
        # Private: Python's default is shared memory, which gets no huge pages, is not given back.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._mapping = mmap.mmap(-1, self.nbytes + HUGE_PAGE_NBYTES, flags=flags)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._skip = -base % HUGE_PAGE_NBYTES
        self.address = base + self._skip
        _advise(self._mapping, mmap.MADV_HUGEPAGE)
        _advise(self._mapping, _WIPEONFORK)
        self.tensor = torch.frombuffer(
            self._mapping, dtype=torch.uint8, count=self.nbytes, offset=self._skip
        )

    def carve(self, name: str, nbytes: int) -> Region:
        """Take the next `nbytes`, which must start and end on a 4 KiB boundary, and book them to
        arena `name`.
        """
        if nbytes % mmap.PAGESIZE:
            raise StateError(f"arena {name}: {nbytes} bytes is not a multiple of {mmap.PAGESIZE}.")
        start = self._used_nbytes
        if start + nbytes > self.nbytes:
            raise BudgetError(
                f"arena {name} needs {nbytes} bytes but only {self.nbytes - start} of the slab's "
                f"{self.nbytes} are left; the plan's sum is wrong."
            )
        self._used_nbytes += nbytes
        self.arenas[name] = self.arenas.get(name, 0) + nbytes
        return Region(name, self.address + start, nbytes, self.tensor[start : start + nbytes])

    def populate(self) -> None:
        """Touch every page now: first touches are slow, and a machine short of memory should say so
        at start.
        """
        try:
            self._mapping.madvise(_POPULATE_WRITE)
        except (OSError, ValueError):
            self.tensor.zero_()

    def memory(self) -> dict[str, int]:
        """Bytes per arena; `unused` is what carve has not given out. The values sum to nbytes."""
        return {**self.arenas, "unused": self.nbytes - self._used_nbytes}

    def close(self) -> None:
        """Give the pages back. Tensors that still view the slab keep the mapping, but read zeros.
        Idempotent.
        """
        if self._mapping.closed:
            return
        _advise(self._mapping, mmap.MADV_DONTNEED)


def _advise(mapping: mmap.mmap, advice: int) -> None:
    try:
        mapping.madvise(advice)
    except OSError:
        return  # an advice: a kernel built without it (no THP) works with small pages


@dataclasses.dataclass(eq=False, slots=True)
class Slot:
    """One buffer of a pool; acquired by one owner at a time."""

    pool: SlotPool
    index: int
    region: Region
    owner: str = ""


class SlotPool:
    """A fixed number of equal slots. Sizes come from the plan; acquire never allocates."""

    def __init__(self, name: str, regions: list[Region], *, poison: bool = False) -> None:
        self.name = name
        self.slots = [Slot(self, index, region) for index, region in enumerate(regions)]
        self._free = list(reversed(self.slots))
        self._poison = poison

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self, owner: str) -> Slot | None:
        """Take a free slot, or None where there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        slot.owner = owner
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back; its bytes mean nothing from here on."""
        if slot.pool is not self or not slot.owner:
            raise StateError(f"slot {slot.index} of pool {slot.pool.name} was released twice.")
        slot.owner = ""
        if self._poison:
            slot.region.tensor.fill_(POISON)
        self._free.append(slot)
