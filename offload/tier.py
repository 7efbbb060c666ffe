"""Where a chunk's live weight plane is, and the only moves that are allowed.

[Note: residency]
NVME --fetch--> READING --> CPU --h2d--> UPLOADING --> GPU
CPU or NVME --update--> UPDATING --> CPU or NVME
GPU --evict--> CPU, CPU --evict--> NVME: both are clean drops, because only an Update changes
weights, and an Update writes what it changes. A chunk whose weight plane is pinned in RAM rests in
CPU, never in NVME. On a machine without an accelerator compute reads the CPU copy, and UPLOADING
and GPU do not occur.
"""

from __future__ import annotations

import enum
from typing import Protocol


class Tier(enum.Enum):
    """A kind of memory, fastest first."""

    GPU = "gpu"
    CPU = "cpu"
    NVME = "nvme"


class Link(enum.Enum):
    """A direction between two tiers; each has one bandwidth."""

    READ = "nvme read"
    WRITE = "nvme write"
    H2D = "h2d"
    D2H = "d2h"


class Residency(enum.Enum):
    """State of a chunk's weight plane. See [Note: residency]."""

    NVME = "nvme"  # costs no memory
    READING = "reading"  # holds a host slot that the drive is filling
    CPU = "cpu"  # holds a host slot, or the pinned plane
    UPLOADING = "uploading"  # holds a host copy and a GPU slot
    GPU = "gpu"  # holds a GPU slot; the host slot may be gone
    UPDATING = "updating"  # the update worker owns the weight plane, in a host slot or on NVMe


TRANSITIONS: frozenset[tuple[Residency, Residency]] = frozenset(
    {
        (Residency.NVME, Residency.READING),
        (Residency.READING, Residency.CPU),
        (Residency.READING, Residency.NVME),  # the read failed
        (Residency.CPU, Residency.NVME),  # evict, clean
        (Residency.CPU, Residency.UPLOADING),
        (Residency.UPLOADING, Residency.GPU),
        (Residency.UPLOADING, Residency.CPU),  # the copy failed
        (Residency.GPU, Residency.CPU),  # evict; a host copy is still there
        (Residency.GPU, Residency.NVME),  # evict; the host slot was given up
        (Residency.CPU, Residency.UPDATING),
        (Residency.NVME, Residency.UPDATING),
        (Residency.UPDATING, Residency.CPU),
        (Residency.UPDATING, Residency.NVME),
    }
)


class DeviceEvent(Protocol):
    """A point in the order of a compute device's stream."""

    def query(self) -> bool:
        """Whether everything before it is done; never blocks."""

    def synchronize(self) -> None:
        """Block the calling thread until it is done."""
