"""Machine: what this machine really offers this process, from the kernel's own files.

psutil reports the whole machine inside a container; these functions apply control group limits.
Every function reads anew and keeps nothing. `proc` and `cgroup` exist so that tests can pass trees
of their own. Sizes are in bytes. A missing control group file means no limit; a missing file of
/proc raises OSError.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
SYS = Path("/sys")


class IoCounters(NamedTuple):
    """What this process has moved to and from block devices: exact for direct I/O and io_uring."""

    read_bytes: int
    write_bytes: int


def memory_limit(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Return the most memory that this process may use: RAM, or the tightest group above it."""
    limits = [_read_kib(proc / "meminfo", "MemTotal")]
    limits += [limit for limit, _ in _memory_groups(proc, cgroup)]
    return min(limits)


def memory_available(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Return how much more memory this process can take before it swaps or is killed."""
    available = [_read_kib(proc / "meminfo", "MemAvailable")]
    available += [max(0, limit - used) for limit, used in _memory_groups(proc, cgroup)]
    return min(available)


def rss(proc: Path = PROC) -> int:
    """Return the memory that this process has resident now."""
    return _read_kib(proc / "self/status", "VmRSS")


def peak_rss(proc: Path = PROC) -> int:
    """Return the most memory that this process ever had resident."""
    return _read_kib(proc / "self/status", "VmHWM")


def usable_cpu_count(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Return how many CPUs this process can keep busy: its affinity or its quota, rounded up."""
    counts = [float(len(os.sched_getaffinity(0)))]
    for folder in _cgroup_folders("cpu", proc, cgroup):
        quota = _read_words(folder / "cpu.max")  # v2: "max 100000" or "150000 100000"
        if not quota:  # v1: one number per file, quota -1 for none
            quota = _read_words(folder / "cpu.cfs_quota_us")
            quota += _read_words(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
            counts.append(int(quota[0]) / int(quota[1]))
    return max(1, math.ceil(min(counts)))


def io_counters(proc: Path = PROC) -> IoCounters:
    """Return the bytes that this process has read from and written to block devices so far."""
    fields = _read_fields(proc / "self/io")
    return IoCounters(int(fields["read_bytes"]), int(fields["write_bytes"]))


def file_system_type(path: str | Path, proc: Path = PROC) -> str:
    """Return ext4, xfs, tmpfs, ... for a path, which need not exist yet; "unknown" if not found."""
    existing = _existing(path)
    kind, longest = "unknown", 0
    for line in _read_text(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        # The last of several mounts on one folder is the one in sight.
        if existing.is_relative_to(mount) and len(mount) >= longest:
            kind, longest = after.split()[0], len(mount)
    return kind


def is_tmpfs(path: str | Path, proc: Path = PROC) -> bool:
    """Return whether files at this path live in memory, so that swapping to them saves nothing."""
    return file_system_type(path, proc) in {"tmpfs", "ramfs", "devtmpfs"}


def free_nbytes(path: str | Path) -> int:
    """Return what an unprivileged user may still write at a path, which need not exist yet."""
    space = os.statvfs(_existing(path))
    return space.f_bavail * space.f_frsize


def cache_folder() -> Path:
    """Return where things are kept between runs: offload in $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "offload"


def drive_identity(path: str | Path, sys: Path = SYS, proc: Path = PROC) -> str:
    """Return what tells the drive under a path from others: its number, model, serial and size.

    A file system without a drive of its own (tmpfs, overlay, a network's) has a number that means
    something else after a reboot, so the boot is part of its identity.
    """
    number = os.stat(_existing(path)).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    device = sys / "dev/block" / name
    if not device.exists():
        boot = _read_words(proc / "sys/kernel/random/boot_id")
        return " ".join([name, *boot])
    device = device.resolve()
    whole = device.parent if (device / "partition").exists() else device
    facts = [_read_words(device / "size")]
    facts += [_read_words(whole / fact) for fact in _DRIVE_FACTS]
    return " ".join([name, *("_".join(words) for words in facts if words)])


_DRIVE_FACTS = ("serial", "wwid", "device/model", "device/serial", "loop/backing_file")


def is_alive(pid: int) -> bool:
    """Return whether a process of this number runs, as far as this container sees."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def flock_holders(path: str | Path, proc: Path = PROC) -> list[int]:
    """Return the processes with a descriptor that holds a flock on a file, as far as this user may
    look: those that took it, and the children that have inherited it.
    """
    real = os.path.realpath(path)
    pids = sorted(int(entry) for entry in os.listdir(proc) if entry.isdigit())
    return [pid for pid in pids if _holds_flock(proc / str(pid), real)]


def _holds_flock(process: Path, real: str) -> bool:
    try:
        return any(
            os.readlink(fd) == real and "FLOCK" in _read_text(process / "fdinfo" / fd.name)
            for fd in (process / "fd").iterdir()
        )
    except OSError:  # it has ended, or is somebody else's
        return False


def openmp_may_spin(proc: Path = PROC) -> bool:
    """Return whether idle OpenMP threads of libgomp burn CPU that our own threads could use.

    libgomp reads its variables when it is loaded, so what counts is the environment with which the
    process started; os.environ shows later changes too. GOMP_SPINCOUNT overrides OMP_WAIT_POLICY.
    """
    started = _read_text(proc / "self/environ").split("\0")
    environment = dict(entry.split("=", 1) for entry in started if "=" in entry)
    spin_count = environment.get("GOMP_SPINCOUNT", "").strip().lower()
    if re.fullmatch(r"[0-9]+\s*[kmgt]?|infinit[ey]", spin_count):  # libgomp ignores all else
        return re.fullmatch(r"0+\s*[kmgt]?", spin_count) is None
    return environment.get("OMP_WAIT_POLICY", "").strip().lower() != "passive"


def dioalign(path: str | Path) -> tuple[int, int] | None:
    """Return the (memory, offset) alignments in bytes that direct I/O on an existing file needs.

    (0, 0) means that the file refuses direct I/O; None that the kernel or file system does not say.
    Raises OSError where the path cannot be read. Uses the raw statx call: old C libraries lack it.
    """
    number = _STATX_NUMBERS.get(platform.machine())
    if number is None:
        return None
    answer = _Statx()
    arguments = (_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, ctypes.byref(answer))
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    syscall.argtypes = [
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Statx),
    ]
    if syscall(number, *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    if not answer.mask & _STATX_DIOALIGN:
        return None
    return answer.dio_mem_align, answer.dio_offset_align


_STATX_NUMBERS = {"x86_64": 332, "aarch64": 291, "riscv64": 291}
_STATX_DIOALIGN = 0x2000  # Linux 6.1
_AT_FDCWD = -100


class _Statx(ctypes.Structure):
    """struct statx of linux/stat.h: 256 bytes, of which three fields matter here."""

    mask: int
    dio_mem_align: int
    dio_offset_align: int
    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("_before", ctypes.c_uint8 * 148),
        ("dio_mem_align", ctypes.c_uint32),
        ("dio_offset_align", ctypes.c_uint32),
        ("_after", ctypes.c_uint8 * 96),
    )


def _cgroup_folders(controller: str, proc: Path, cgroup: Path) -> Iterator[Path]:
    """Yield the folders that may limit this process: its control group and all groups above it.

    /proc/self/cgroup has a line "number:controllers:path" per hierarchy; v2 names no controllers.
    A container may see a path of its host there. The folders that do not exist read as no limit,
    and the walk ends at the mount, which then is the container's own group.
    """
    for line in _read_text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [cgroup / controller] if controllers else [cgroup, cgroup / "unified"]
        for mount in mounts:
            folder = mount / path.lstrip("/")
            yield folder
            while folder != mount:
                folder = folder.parent
                yield folder


def _memory_groups(proc: Path, cgroup: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use) for each limited memory group around this process.

    File pages not in active use are charged to a group but leave before anything is killed, so they
    do not count as in use.
    """
    for folder in _cgroup_folders("memory", proc, cgroup):
        for limit_file, usage_file, cache_field in _MEMORY_FILES:
            limit = _read_words(folder / limit_file)
            usage = _read_words(folder / usage_file)
            if limit and usage and limit[0].isdigit():  # v2 writes max for none, v1 a huge number
                stat = folder / "memory.stat"
                cache = _read_fields(stat).get(cache_field, "0") if stat.exists() else "0"
                yield int(limit[0]), int(usage[0]) - int(cache)


_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),  # v2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # v1
)


def _existing(path: str | Path) -> Path:
    """Return the real path, or its nearest parent that exists."""
    existing = Path(os.path.realpath(path))
    while not existing.exists():
        existing = existing.parent
    return existing


def _read_kib(file: Path, field: str) -> int:
    return int(_read_fields(file)[field].removesuffix("kB")) * 1024


def _read_fields(file: Path) -> dict[str, str]:
    """Return the fields of lines such as "VmRSS:   1024 kB" or "inactive_file 4096"."""
    lines = (line.split(None, 1) for line in _read_text(file).splitlines())
    return {words[0].rstrip(":"): words[1].strip() for words in lines if len(words) == 2}


def _read_text(file: Path) -> str:
    return os.fsdecode(file.read_bytes())  # process names and paths may be any bytes


def _read_words(file: Path) -> list[str]:
    """Return the words of a control group file, none where it does not exist."""
    try:
        return _read_text(file).split()
    except OSError:
        return []
