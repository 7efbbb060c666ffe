"""glibc's thresholds are fixed once compute is on the host: large buffers are mapped, whatever was
freed before; and a user's own choice stays.

Each case is a process of its own, because the thresholds are those of a process.
"""

import ctypes
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from offload import heap

MIB = 1 << 20

MALLOC = """
import ctypes, json, runpy, sys
MIB = 1 << 20
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
name, field = ("mallinfo2", ctypes.c_size_t)
if not hasattr(libc, name):
    name, field = ("mallinfo", ctypes.c_int)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
class Info(ctypes.Structure):
    _fields_ = [(each, field) for each in names.split()]
mallinfo = getattr(libc, name)
mallinfo.restype = Info

def is_mapped(nbytes):  # at once, and not the heap's
    before = mallinfo().hblks
    address = libc.malloc(nbytes)
    mapped = mallinfo().hblks > before
    libc.free(address)
    return mapped

def kept(nbytes, count):  # free memory at the heap's end, after so many buffers there were freed
    addresses = [libc.malloc(nbytes) for _ in range(count)]
    for address in reversed(addresses):
        libc.free(address)
    return mallinfo().keepcost
"""

ALONE = """
fixed = runpy.run_path(sys.argv[1])["fix_thresholds"]() if len(sys.argv) > 1 else None
libc.free(libc.malloc(31 * MIB))  # here glibc moves its thresholds
kept = [kept(12 * MIB, count) for count in (1, 3)]
print(json.dumps([fixed, [is_mapped(n * MIB) for n in (1, 15, 17, 24)], kept]))
"""

OPENED = """
import torch
from torch import nn
import offload
mapped = []
for device in ("standin", "cpu"):
    policy = {"tiers": {"gpu": {"device": device}, "cpu": {"budget": "256MiB"}}}
    with offload.offload(nn.Sequential(nn.Linear(64, 64)), policy):
        torch.empty(31 * MIB, dtype=torch.uint8)
        before = mallinfo().hblks
        tensor = torch.empty(20 * MIB, dtype=torch.uint8)
        mapped.append(mallinfo().hblks > before)
print(json.dumps(mapped))
"""


@pytest.fixture(autouse=True)
def _glibc() -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library is not glibc")


def run(body: str, *arguments: str, **variables: str) -> Any:
    """What a process says that begins with these variables, and with none else of malloc's."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", MALLOC + body, *arguments]
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_large_buffers_are_mapped_whatever_was_freed_before() -> None:
    """And without it they are not: a buffer of 31 MiB has moved the threshold."""
    fixed, mapped, _ = run(ALONE)
    assert fixed is None and mapped == [False, False, False, False]
    fixed, mapped, _ = run(ALONE, heap.__file__)
    assert fixed is True and mapped == [False, False, True, True]


def test_the_heaps_end_is_kept_for_the_next_buffer_and_not_for_all() -> None:
    _, _, (one, three) = run(ALONE, heap.__file__)
    assert 12 * MIB <= one <= 32 * MIB and three < 12 * MIB
    _, _, (_, three) = run(ALONE)
    assert three > 32 * MIB


@pytest.mark.parametrize(
    ("variable", "value", "mapped"),
    [
        ("MALLOC_MMAP_THRESHOLD_", str(32 * MIB), [False, False, False, False]),
        ("MALLOC_MMAP_MAX_", "0", [False, False, False, False]),
        ("MALLOC_TRIM_THRESHOLD_", str(64 * MIB), [True, True, True, True]),  # from 128 KiB on
        ("MALLOC_TOP_PAD_", str(MIB), [True, True, True, True]),
        (
            "GLIBC_TUNABLES",
            f"glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold={32 * MIB}",
            [False, False, False, False],
        ),
        ("GLIBC_TUNABLES", f"glibc.malloc.trim_threshold={64 * MIB}", [True, True, True, True]),
    ],
)
def test_what_the_user_has_chosen_stays(variable: str, value: str, mapped: list[bool]) -> None:
    fixed, seen, _ = run(ALONE, heap.__file__, **{variable: value})
    assert fixed is False and seen == mapped


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")],
)
def test_other_settings_of_malloc_are_no_choice(variable: str, value: str) -> None:
    fixed, mapped, _ = run(ALONE, heap.__file__, **{variable: value})
    assert fixed is True and mapped == [False, False, True, True]


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("unset")
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert heap.fix_thresholds.__wrapped__() is False


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(("takes", "said"), [(0, [-3]), (1, [-3, -1])])
def test_a_refusal_ends_it(takes: int, said: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other threshold alone would stop the moving too, and leave mmap's at 128 KiB."""
    parameters: list[int] = []

    def mallopt(parameter: int, value: int) -> int:
        parameters.append(parameter)
        return takes

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert heap.fix_thresholds.__wrapped__() is bool(takes)
    assert parameters == said


def test_an_engine_that_computes_on_the_host_fixes_them() -> None:
    """Compute on another device leaves the process as it is: its large buffers are there."""
    assert run(OPENED) == [False, True]


def test_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    heap.fix_thresholds()
    monkeypatch.setattr(ctypes, "CDLL", None)  # not called again
    heap.fix_thresholds()
