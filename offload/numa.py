"""NUMA: on which CPUs the threads that move bytes should run. Reads the kernel's files, and
chooses; changes nothing. On a machine of one node the answer is always: anywhere.

A thread that reads a drive on the other socket sends every byte over the link between them twice.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from offload.machine import SYS


def nodes(sys: Path = SYS) -> dict[int, frozenset[int]]:
    """The CPUs of every node that has some; empty where the kernel does not say."""
    found: dict[int, frozenset[int]] = {}
    for folder in sorted((sys / "devices/system/node").glob("node[0-9]*")):
        cpus = parse_cpu_list(_read(folder / "cpulist"))
        if cpus and folder.name[4:].isdigit():
            found[int(folder.name[4:])] = cpus
    return found


def parse_cpu_list(text: str) -> frozenset[int]:
    """The CPUs of a list such as 0-3,8,10-11."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus.update(range(int(first), int(last if last.isdigit() else first) + 1))
    return frozenset(cpus)


def node_of_path(path: Path, sys: Path = SYS) -> int | None:
    """The node of the drive under an existing path; None where it has none, or several."""
    number = os.stat(path).st_dev
    return node_of_block_device(f"{os.major(number)}:{os.minor(number)}", sys)


def node_of_block_device(number: str, sys: Path = SYS) -> int | None:
    """The node of a drive by its numbers, such as 259:0. A device over others (a RAID, an encrypted
    one) has theirs, if they agree.
    """
    link = sys / "dev/block" / number
    return _node_of_device(link.resolve(), sys) if link.exists() else None


def node_of_pci(address: str, sys: Path = SYS) -> int | None:
    """The node of a PCI device by its address, such as 0000:3b:00.0."""
    return _number(sys / "bus/pci/devices" / address / "numa_node")


def choose_cpus(
    nodes: Mapping[int, frozenset[int]],
    allowed: Collection[int],
    drives: Sequence[int | None],
    gpu: int | None,
) -> frozenset[int] | None:
    """The CPUs for I/O and updates, or None for anywhere; pure.

    `nodes` are the machine's, `allowed` this process's CPUs, `drives` and `gpu` the nodes of what
    the bytes move between. Most of the drives decide; where they tie or say nothing, the GPU, to
    which every byte goes on. Fewer than two CPUs there are too few: the update worker needs one.
    """
    if len(nodes) < 2:
        return None
    votes = Counter(node for node in drives if node is not None and node in nodes)
    most = max(votes.values(), default=0)
    best = [node for node, count in votes.items() if count == most]
    if gpu is not None and gpu in nodes and (not best or gpu in best):
        best = [gpu]
    if len(best) != 1:
        return None
    cpus = nodes[best[0]] & frozenset(allowed)
    return cpus if len(cpus) > 1 and cpus != frozenset(allowed) else None


def worker_cpus(paths: Iterable[Path], gpu: str | None, sys: Path = SYS) -> frozenset[int] | None:
    """The same for the drives under existing paths and the GPU at a PCI address."""
    found = nodes(sys)
    if len(found) < 2:
        return None
    drives = [node_of_path(path, sys) for path in paths]
    return choose_cpus(
        found, os.sched_getaffinity(0), drives, None if gpu is None else node_of_pci(gpu, sys)
    )


def _node_of_device(device: Path, sys: Path) -> int | None:
    root = sys.resolve()
    for folder in (device, *device.parents):
        node = _number(folder / "numa_node")
        if node is not None:
            return node
        if folder == root:
            break
    below = [_node_of_device(link.resolve(), sys) for link in (device / "slaves").glob("*")]
    return below[0] if below and len(set(below)) == 1 else None


def _number(file: Path) -> int | None:
    """The node in a file; the kernel writes -1 where it does not know."""
    text = _read(file).strip()
    return int(text) if text.isdigit() else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
