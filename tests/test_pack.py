"""Packing: the same bytes in every instruction set as in its twin, and nothing lost on the way."""

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twins_pack import GROUP_NUMEL, pack_twin

from offload import _native

ISAS = _native.pack_isas()
SLACK_NBYTES = 512
BLOCK_NBYTES = 65536
every_isa = pytest.mark.parametrize("isa", ISAS)
every_item = pytest.mark.parametrize("dtype", [np.uint16, np.uint32], ids=["bf16", "fp32"])


def pack(items: np.ndarray, isa: str = "auto") -> bytes | None:
    """The packed bytes; None where they would not be fewer."""
    out = np.full(items.nbytes + SLACK_NBYTES, 0xAB, np.uint8)
    length = _native.pack_block(
        items.itemsize, items.ctypes.data, items.nbytes, out.ctypes.data, out.nbytes, isa
    )
    return out[:length].tobytes() if length else None


def unpack(packed: bytes, like: np.ndarray, isa: str = "auto") -> np.ndarray | None:
    """The items again; None where these bytes are not what was packed."""
    source = np.frombuffer(packed + bytes(64), np.uint8)
    out = np.empty_like(like)
    is_right = _native.unpack_block(
        like.itemsize, source.ctypes.data, len(packed), out.ctypes.data, out.nbytes, isa
    )
    return out if is_right else None


def as_items(values: np.ndarray, dtype: type) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return bits if dtype is np.uint32 else (bits >> 16).astype(np.uint16)


def groups(rng: np.random.Generator, dtype: type) -> dict[str, np.ndarray]:
    """Kinds of 256 items."""
    size = 4 * GROUP_NUMEL
    normal, mixed = rng.normal(0, 0.02, size), rng.normal(0, 0.02, size)
    mixed[rng.random(size) < 0.5] = 0
    limits = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-40, 3e38, 1.0, 2.0**-126])
    return {
        "normal": as_items(normal, dtype),
        "squares": as_items(normal**2, dtype),
        "wide": as_items(normal * 2.0 ** rng.integers(-120, 120, size), dtype),
        "zeros": np.zeros(size, dtype),
        "minus zeros": as_items(np.full(size, -0.0), dtype),
        "half zeros": as_items(mixed, dtype),
        "tiny": as_items(rng.normal(0, 1e-41, size), dtype),
        "limits": as_items(rng.choice(limits, size), dtype),
        "any bits": rng.integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True),
    }


@every_isa
@every_item
@pytest.mark.parametrize("kind", groups(np.random.default_rng(0), np.uint32))
def test_all_instruction_sets_are_the_twin(isa: str, dtype: type, kind: str) -> None:
    for seed in range(8):
        items = groups(np.random.default_rng(seed), dtype)[kind]
        want = pack_twin(items)
        packed = pack(items, isa)
        if len(want) >= items.nbytes:
            assert packed is None
            continue
        assert packed == want
        np.testing.assert_array_equal(unpack(packed, items, isa), items)


@every_item
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_the_bits_nothing_is_lost(dtype: type, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kinds = list(groups(rng, dtype).values())
    items = np.concatenate([kinds[i] for i in data.draw(st.lists(st.integers(0, 8), min_size=1))])
    packed = {pack(items, isa) for isa in ISAS}
    assert len(packed) == 1
    (one,) = packed
    if one is not None:
        assert len(one) < items.nbytes
        for isa in ISAS:
            np.testing.assert_array_equal(unpack(one, items, isa), items)


@every_isa
def test_every_bf16_among_others(isa: str) -> None:
    """The 65,536 patterns in order; and again, every 16th with an exponent 20 steps away."""
    items = np.tile(np.arange(65536, dtype=np.uint16), 2)
    items[65536::16] += np.uint16(20 << 7)
    packed = pack(items, isa)
    assert packed is not None
    np.testing.assert_array_equal(unpack(packed, items, isa), items)


def test_what_training_makes_takes_fewer_bytes() -> None:
    """By a sixth for fp32, by more than a quarter for bf16; what is noise is kept as it is."""
    values = np.random.default_rng(0).normal(0, 0.02, BLOCK_NBYTES // 4)
    for dtype, least, most in ((np.uint32, 0.84, 0.87), (np.uint16, 0.69, 0.73)):
        items = as_items(values, dtype)
        packed = pack(items)
        assert packed is not None and least < len(packed) / items.nbytes < most
    zeros = pack(np.zeros(BLOCK_NBYTES // 4, np.uint32))
    assert zeros == bytes(BLOCK_NBYTES // 4 // GROUP_NUMEL)
    noise = np.random.default_rng(0).integers(0, 2**32, BLOCK_NBYTES // 4, np.uint32)
    assert pack(noise) is None


@every_isa
@every_item
def test_what_was_not_packed_is_refused_or_some_items(isa: str, dtype: type) -> None:
    """Never a crash, whatever the drive gives: that the items are others is the checksum's job."""
    rng = np.random.default_rng(1)
    items = as_items(rng.normal(0, 0.02, 4096), dtype)
    packed = pack(items, isa)
    assert packed is not None
    for length in (0, 1, 100, len(packed) - 1):
        assert unpack(packed[:length], items, isa) is None
    assert unpack(packed + b"\1", items, isa) is None
    num_refused = 0
    for _ in range(300):
        broken = bytearray(packed)
        for at in rng.integers(0, len(broken), 3):
            broken[at] ^= int(rng.integers(1, 256))
        found = {None if u is None else u.tobytes() for u in [unpack(bytes(broken), items, isa)]}
        found |= {None if u is None else u.tobytes() for u in [unpack(bytes(broken), items)]}
        assert len(found) == 1  # the same in all instruction sets
        num_refused += None in found
    assert 0 < num_refused < 300


@every_item
@pytest.mark.parametrize("num_blocks", [1, 3, 16])
def test_a_run_is_unpacked_where_it_lies(dtype: type, num_blocks: int) -> None:
    """Blocks one behind the other, some of them plain, the last one short."""
    rng, block = np.random.default_rng(num_blocks), 4096
    numel = num_blocks * block // dtype().itemsize - GROUP_NUMEL
    items = as_items(rng.normal(0, 0.02, numel), dtype)
    noisy = slice(block // items.itemsize, 2 * block // items.itemsize)
    items[noisy] = rng.integers(0, np.iinfo(dtype).max, len(items[noisy]), dtype)
    memory, lengths, at = np.zeros(items.nbytes, np.uint8), [], 0
    raw = items.view(np.uint8)
    for begin in range(0, items.nbytes, block):
        part = raw[begin : begin + block].copy()
        packed = pack(part.view(dtype)) or part.tobytes()
        memory[at : at + len(packed)] = np.frombuffer(packed, np.uint8)
        lengths.append(len(packed))
        at += len(packed)
    table = np.array(lengths, np.uint32)
    assert (table[1] == block) if num_blocks > 1 else (table[0] < block)
    args = items.itemsize, memory.ctypes.data, items.nbytes, block, table.ctypes.data
    assert _native.unpack_run(*args)
    assert memory.tobytes() == raw.tobytes()


def test_bad_arguments_are_refused() -> None:
    buffer = ctypes.create_string_buffer(8192)
    at, lengths = ctypes.addressof(buffer), np.array([5000], np.uint32)
    with pytest.raises(ValueError, match="2 or 4 bytes"):
        _native.pack_block(3, at, 192, at, 8192)
    with pytest.raises(ValueError, match="groups of 64"):
        _native.pack_block(2, at, 130, at, 8192)
    with pytest.raises(ValueError, match="512 bytes more"):
        _native.pack_block(2, at, 4096, at, 4097)
    with pytest.raises(ValueError, match="pack_isas"):
        _native.pack_block(2, at, 128, at, 8192, "sse9")
    with pytest.raises(ValueError, match="longer than a plain one"):
        _native.unpack_run(2, at, 4096, 4096, lengths.ctypes.data)
    with pytest.raises(ValueError, match="1 to 65536"):
        _native.unpack_run(2, at, 4096, 1 << 17, lengths.ctypes.data)


def test_a_pipeline_packs_as_its_queue_does() -> None:
    queue = _native.IoQueue("threads", 4, 65536, 1, 4096, 100)
    buffer = mmap.mmap(-1, _native.update_buffer_nbytes(1, 4096))
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    try:
        with pytest.raises(ValueError, match="need the same checksum_nbytes"):
            _native.UpdatePipeline(queue, 1, 4096, address, len(buffer), "auto", 8192)
        with pytest.raises(ValueError, match="checksum_nbytes must be 4096 to 65536"):
            _native.IoQueue("threads", 4, 65536, 1, 0, 100)
        for item_nbytes, nbytes in ((3, 4096), (2, 4000), (4, 4096 + 128)):
            with pytest.raises(ValueError, match="a run needs"):
                queue.submit(0, 1, 0, [(0, 0, address, nbytes, address, item_nbytes)])
    finally:
        queue.close()
