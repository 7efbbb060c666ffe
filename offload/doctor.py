"""What this machine offers a run: cores, memory, devices, and drives measured as runs use them."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from offload import io, machine, numa
from offload.calibrate import calibrate, profile_of
from offload.errors import OffloadError
from offload.openmp import num_threads_advice
from offload.policy import short_nbytes
from offload.progress import Reporter
from offload.smart import read_smart
from offload.wear import decimal_nbytes


def examine(paths: Sequence[Path], reporter: Reporter, *, again: bool = False) -> None:
    """Say what was found; raises nothing for a bad path, but says what is wrong with it.

    Drives that were measured before are not measured again, unless `again` asks for it.
    """
    reporter.say("python", f"{platform.python_version()}, torch {torch.__version__}")
    reporter.say("cores", _cores())
    reporter.say("memory", _memory())
    reporter.say("device", _device())
    reporter.say("openmp", _openmp())
    backend, reason = io.choose_backend("auto")
    reporter.say("io", f"{backend}: {reason}")
    for path in paths:
        reporter.say("path", f"{path}\n" + "\n".join(_path_facts(path, backend, again)))


def _cores() -> str:
    num_cpus, num_threads = machine.usable_cpu_count(), torch.get_num_threads()
    advice = num_threads_advice(num_threads, num_cpus) or f"torch computes with {num_threads}"
    found = numa.nodes()
    where = f", on {len(found)} NUMA nodes" if len(found) > 1 else ""
    return f"{num_cpus} usable (affinity and control groups counted){where}; {advice}"


def _memory() -> str:
    limit, available = machine.memory_limit(), machine.memory_available()
    return (
        f"{short_nbytes(limit)} for this process (control groups counted), "
        f"{short_nbytes(available)} available"
    )


def _device() -> str:
    if not torch.cuda.is_available():
        return "no CUDA: compute runs on the CPU, and the GPU tier is empty"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "\n".join(f"{i}: {p.name}, {short_nbytes(p.total_memory)}" for i, p in enumerate(found))


def _openmp() -> str:
    if machine.openmp_may_spin():
        return (
            "idle OpenMP threads spin, which can slow a run down 4-6 times beside its I/O threads. "
            "The command offload sets OMP_WAIT_POLICY=passive for itself, and an open engine stops "
            "them; in other programs set it yourself."
        )
    return "idle OpenMP threads sleep, as they should"


def _path_facts(path: Path, backend: str, again: bool) -> list[str]:
    if not path.is_dir():
        return ["is no folder; name an existing one"]
    facts = [f"{machine.file_system_type(path)}, {short_nbytes(machine.free_nbytes(path))} free"]
    if machine.is_tmpfs(path):
        facts.append("WARNING: files here live in memory, so swapping to them saves nothing")
    try:
        facts += [_direct_io(path), _speed(path, backend, again)]
    except (OffloadError, OSError) as error:
        facts.append(f"cannot be used: {error}")
    return [*facts, f"wear: {_wear(path)}"]


def _wear(path: Path) -> str:
    log, detail = read_smart(path)
    if log is None:
        return f"not known, because {detail}"
    written, used = decimal_nbytes(log.written_nbytes), log.percentage_used
    return f"{written} written in the drive's life, {used} % of it used ({detail})"


def _direct_io(path: Path) -> str:
    with tempfile.NamedTemporaryFile(dir=path) as file:
        alignment = machine.dioalign(file.name)
    if alignment is None:
        return "direct I/O: the kernel does not say which alignment it needs; 4096 bytes are used"
    if alignment == (0, 0):
        return "direct I/O: refused; transfers go through the page cache, outside the budget"
    return f"direct I/O: memory at {alignment[0]}, offsets at {alignment[1]} bytes; 4096 are used"


def _speed(path: Path, backend: str, again: bool) -> str:
    """What is known of the drive; it is measured where nothing is, or where `again` asks for it."""
    profile = calibrate(path, backend) if again else profile_of(path, backend)
    rates = ", ".join(
        f"{name} {rate / 1e9:.2f}"
        for name, rate in (
            ("read", profile.read_bandwidth),
            ("write", profile.write_bandwidth),
            ("half and half", profile.mixed_bandwidth),
        )
    )
    return (
        f"{rates} GB/s, with {profile.depth} blocks of {short_nbytes(profile.block_nbytes)} in "
        f"flight (measured {profile.measured}; --calibrate measures again)"
    )
