"""The slab and its slots: every byte is in one region, and slots go round without allocating."""

import mmap
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload import machine, slots
from offload.errors import BudgetError, StateError
from offload.slots import HUGE_PAGE_NBYTES, POISON, Region, Slab, SlotPool, round_up

PAGE = mmap.PAGESIZE


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 24))
def test_round_up(nbytes: int, multiple: int) -> None:
    rounded = round_up(nbytes, multiple)
    assert rounded % multiple == 0 and 0 <= rounded - nbytes < multiple


def test_regions_follow_each_other() -> None:
    slab = Slab(3 << 20)
    assert slab.nbytes == 4 << 20 and slab.address % HUGE_PAGE_NBYTES == 0
    rows = [("a", 5 * PAGE), ("b", PAGE), ("a", 7 * PAGE), ("b", 0)]
    regions = [slab.carve(name, nbytes) for name, nbytes in rows]
    address = slab.address
    for region, (name, nbytes) in zip(regions, rows, strict=True):
        assert (region.name, region.address, region.nbytes) == (name, address, nbytes)
        assert nbytes == 0 or region.tensor.data_ptr() == address
        address += nbytes
    assert slab.memory() == {"a": 12 * PAGE, "b": PAGE, "unused": (4 << 20) - 13 * PAGE}
    slab.close()


def test_regions_do_not_share_bytes() -> None:
    slab = Slab(16 * PAGE)
    regions = [slab.carve(str(index), 2 * PAGE) for index in range(8)]
    for index, region in enumerate(regions):
        region.tensor.fill_(index)
    assert [region.tensor.unique().tolist() for region in regions] == [[i] for i in range(8)]
    slab.close()


def test_carving_too_much_is_refused_and_takes_nothing() -> None:
    slab = Slab(HUGE_PAGE_NBYTES)
    slab.carve("first", PAGE)
    before = slab.memory()
    numbers = rf"second needs {HUGE_PAGE_NBYTES} .* {HUGE_PAGE_NBYTES - PAGE}"
    with pytest.raises(BudgetError, match=numbers):
        slab.carve("second", HUGE_PAGE_NBYTES)
    with pytest.raises(StateError, match="100 bytes is not a multiple"):
        slab.carve("third", 100)
    assert slab.memory() == before
    slab.carve("rest", HUGE_PAGE_NBYTES - PAGE)
    assert slab.memory()["unused"] == 0
    slab.close()


@pytest.mark.parametrize("advice", [slots._POPULATE_WRITE, 9999], ids=["madvise", "touch"])
def test_populate_makes_memory_resident_and_close_gives_it_back(
    advice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a kernel that does not know the advice."""
    monkeypatch.setattr(slots, "_POPULATE_WRITE", advice)
    nbytes, slack = 64 << 20, 8 << 20
    before = machine.rss()
    slab = Slab(nbytes)
    assert machine.rss() - before < slack
    slab.populate()
    assert machine.rss() - before > nbytes - slack
    slab.close()
    slab.close()
    assert machine.rss() - before < slack


def huge_pages_on_advice() -> bool:
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return mode.exists() and "[never]" not in mode.read_text()


def smaps_kib(address: int, field: str) -> int:
    """A field of the mapping around an address, in KiB."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


@pytest.mark.skipif(not huge_pages_on_advice(), reason="this kernel gives no huge pages on advice")
def test_the_slab_lies_on_huge_pages() -> None:
    """The drive's requests are then not split at every 4 KiB page; see the module's first lines."""
    slab = Slab(32 << 20)
    slab.populate()
    huge = smaps_kib(slab.address, "AnonHugePages")
    slab.close()
    assert huge >= 16 << 10  # half: the kernel may be short of them


def test_tensors_outlive_the_slab_as_zeros() -> None:
    slab = Slab(PAGE)
    kept = slab.carve("a", PAGE).view(torch.float32, 8)
    kept.fill_(3.0)
    slab.close()
    del slab
    assert kept.tolist() == [0.0] * 8


def test_view_counts_in_elements() -> None:
    slab = Slab(PAGE)
    region = slab.carve("a", PAGE)
    region.view(torch.float32, PAGE // 4).copy_(torch.arange(PAGE // 4))
    assert region.view(torch.float32, 3, start=5).tolist() == [5.0, 6.0, 7.0]
    view = region.view(torch.bfloat16, 2, start=7)
    assert view.data_ptr() == region.address + 14
    slab.close()


def make_pool(num: int, *, poison: bool = False) -> SlotPool:
    tensors = [torch.zeros(64, dtype=torch.uint8) for _ in range(num)]
    regions = [Region("pool", t.data_ptr(), t.nbytes, t) for t in tensors]
    return SlotPool("pool", regions, poison=poison)


@given(st.integers(0, 4), st.randoms(use_true_random=False))
def test_a_pool_hands_each_slot_to_one_owner(num: int, dice: random.Random) -> None:
    pool = make_pool(num)
    held = []
    for turn in range(30):
        if held and dice.random() < 0.5:
            pool.release(held.pop(dice.randrange(len(held))))
        else:
            slot = pool.acquire(f"owner {turn}")
            assert (slot is None) == (len(held) == num)
            if slot is not None:
                assert slot not in held and slot.owner == f"owner {turn}"
                held.append(slot)
        assert pool.num_free == num - len(held)


def test_a_slot_is_released_once_and_to_its_own_pool() -> None:
    pool, other = make_pool(2), make_pool(2)
    slot = pool.acquire("a")
    assert slot is not None
    with pytest.raises(StateError, match="released twice"):
        other.release(slot)
    pool.release(slot)
    with pytest.raises(StateError, match="slot 0 of pool pool was released twice"):
        pool.release(slot)
    assert (pool.num_free, other.num_free) == (2, 2)


@pytest.mark.parametrize("poison", [False, True])
def test_poison_fills_what_is_given_back(poison: bool) -> None:
    """Read as a number, freed memory is NaN in either weight dtype."""
    pool = make_pool(1, poison=poison)
    slot = pool.acquire("a")
    assert slot is not None
    slot.region.tensor.fill_(1)
    pool.release(slot)
    assert slot.region.tensor.unique().tolist() == [POISON if poison else 1]
    for dtype in (torch.bfloat16, torch.float32):
        assert bool(slot.region.tensor.view(dtype).isnan().all()) == poison
