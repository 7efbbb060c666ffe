"""Keep glibc's heap from holding the memory of large buffers that were freed.

[Note: heap] glibc gives a buffer above its mmap threshold a mapping of its own, which the kernel
gets back with free(). A smaller one comes from the heap, and where others in use lie behind it the
hole that it leaves stays resident. The threshold begins at 128 KiB but does not stay there: each
larger mapping that is freed raises it to its size, up to 32 MiB. A few weight gradients are enough,
and from then on those of all blocks come from the heap. The process then grows by holes that no
budget knows of.

So both thresholds are set, which also keeps them from moving. 16 MiB leaves the many buffers of a
step that come and go (activations) on the heap, where they need no new pages each time, and maps
what makes the large holes. The other threshold is how much free memory at the heap's end is kept;
more goes back to the kernel. Once one of the two is set it would stay where it is, at 128 KiB where
nothing large was freed yet, and nearly every free() at the end would then give back pages for the
next malloc() to fault in again. It becomes twice the mmap threshold, which is glibc's own rule when
it moves both: one buffer of the largest size that the heap serves is then never what tips it. The
price is at most 32 MiB, half of what glibc itself comes to.

It is a setting of the process, and stays when the engine closes. A user who has set any of the
variables that stop glibc from moving its threshold has chosen already, and keeps what he chose.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping

_MMAP_THRESHOLD_NBYTES = 16 << 20
_TRIM_THRESHOLD_NBYTES = 2 * _MMAP_THRESHOLD_NBYTES
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_SETTINGS = ("mmap_threshold", "trim_threshold", "top_pad", "mmap_max")  # each stops the moving


@functools.cache
def fix_thresholds() -> bool:
    """Have glibc map buffers of 16 MiB and more, and keep at most 32 MiB free at the heap's end.

    Once a process; returns whether it took that. Does nothing where the user has chosen, or where
    malloc is not glibc's.
    """
    if _user_has_chosen(os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    if not mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_NBYTES):  # more than a 32-bit heap can have
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_NBYTES))


def _user_has_chosen(environment: Mapping[str, str]) -> bool:
    tunables = environment.get("GLIBC_TUNABLES", "").split(":")
    names = {tunable.partition("=")[0] for tunable in tunables}
    return any(
        f"MALLOC_{setting.upper()}_" in environment or f"glibc.malloc.{setting}" in names
        for setting in _SETTINGS
    )
