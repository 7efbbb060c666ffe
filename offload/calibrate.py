"""Measures a drive as runs use it, once: bandwidths, and the block size and depth that suit it.

What is written where:

- In the folder under test, one file of at most 1 GiB: preallocated, written, then read and
  overwritten for about two seconds. It loses its name as soon as it is open, so nothing stays
  behind even after a kill.
- In the user's cache folder ($XDG_CACHE_HOME or ~/.cache), `offload/drives.json`: one profile for
  each drive and backend, by what identifies the drive. A file that cannot be read, or of another
  version, counts as empty: the drive is measured again and the file written anew.

On a machine where other work uses the drive at the time, the profile says what was left of it;
`calibrate` measures again at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offload import io, machine
from offload.errors import StorageError
from offload.io import IoQueue, Limits
from offload.slots import Slab

KIB, MIB = 1 << 10, 1 << 20
CANDIDATES = {
    "uring": tuple(
        Limits(depth=depth, block_nbytes=block_nbytes)
        for block_nbytes, depth in (
            (256 * KIB, 8),
            (256 * KIB, 64),
            (512 * KIB, 32),
            (512 * KIB, 64),
            (MIB, 16),
            (MIB, 32),
        )
    ),
    "threads": tuple(
        Limits(depth=io.NUM_THREADS, block_nbytes=block_nbytes)
        for block_nbytes in (512 * KIB, 2 * MIB, 4 * MIB)
    ),
}
NEAR_BEST = 0.98  # as good as the best: what is faster by less is chance
SCRATCH_NBYTES = (512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB)  # the largest that takes half the room
WRITE_S = 0.6  # for the first pass over the file; a slow drive is measured on what it covers
MEASURE_S = 1.5  # for all candidates together
NUM_ROUNDS = 2  # candidates take turns, because drives change their speed from second to second
IN_FLIGHT_S = 0.1  # a queue that takes a drive longer than this is too long for it
WAIT_S = 1.0
BUFFER_NBYTES = 64 * MIB  # enough that data passes through memory, not through some cache
CACHE_VERSION = 1
TESTS = {"read": (io.READ, io.READ), "write": (io.WRITE, io.WRITE), "mixed": (io.READ, io.WRITE)}

logger = logging.getLogger("offload")


@dataclasses.dataclass(frozen=True, slots=True)
class DriveProfile:
    """What a drive does under `limits`, in bytes per second; mixed is half reads, half writes."""

    read_bandwidth: float
    write_bandwidth: float
    mixed_bandwidth: float
    block_nbytes: int
    depth: int
    backend: str
    is_direct: bool  # False: through the page cache, because the file system has no direct I/O
    measured: str  # the day, as 2026-01-31

    @property
    def limits(self) -> Limits:
        """What to open an IoQueue with."""
        return Limits(depth=self.depth, block_nbytes=self.block_nbytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes per second of one candidate."""

    read: float
    write: float
    mixed: float


# The choice


def candidates(backend: str, bandwidth: float) -> tuple[Limits, ...]:
    """Return the limits worth trying on a drive that moves about `bandwidth` bytes per second."""
    longest = bandwidth * IN_FLIGHT_S
    fitting = [limits for limits in CANDIDATES[backend] if _in_flight(limits) <= longest]
    return tuple(fitting or [_shallowest(backend)])


def choose(measured: Mapping[Limits, Speeds]) -> Limits:
    """Return the limits with the fewest bytes in flight, then the smallest blocks, that are within
    2 % of the best.

    How good limits are is their mean share of the best speed seen in each test.
    """
    best = [max(row[i] for row in map(_rates, measured.values())) for i in range(len(TESTS))]
    scores = {
        limits: sum(rate / top for rate, top in zip(_rates(speeds), best, strict=True) if top > 0)
        for limits, speeds in measured.items()
    }
    enough = NEAR_BEST * max(scores.values())
    near = [limits for limits, score in scores.items() if score >= enough]
    return min(near, key=lambda limits: (_in_flight(limits), limits.block_nbytes))


def _rates(speeds: Speeds) -> tuple[float, float, float]:
    return speeds.read, speeds.write, speeds.mixed


def _shallowest(backend: str) -> Limits:
    return min(CANDIDATES[backend], key=_in_flight)


def _in_flight(limits: Limits) -> int:
    return limits.depth * limits.block_nbytes


# The measurement


def calibrate(path: Path, backend: str) -> DriveProfile:
    """Measure the drive under a folder, which is made if need be, and keep the result.

    Takes about 3 s and 64 MiB of memory. Raises StorageError where the folder cannot be written or
    has less than twice 64 MiB of room.
    """
    with _scratch(path) as (fd, nbytes, is_direct), _buffers() as slab:
        bench = _Bench(fd, slab.address, backend, path)
        measured = bench.measure(candidates(backend, bench.fill(nbytes)))
        chosen = choose(measured)
    speeds = measured[chosen]
    profile = DriveProfile(
        read_bandwidth=speeds.read,
        write_bandwidth=speeds.write,
        mixed_bandwidth=speeds.mixed,
        block_nbytes=chosen.block_nbytes,
        depth=chosen.depth,
        backend=backend,
        is_direct=is_direct,
        measured=time.strftime("%Y-%m-%d"),
    )
    _keep(_key(path, backend), profile)
    return profile


def profile_of(path: Path, backend: str) -> DriveProfile:
    """Return what is known of the drive under a folder, or measure it now."""
    return cached_profile(path, backend) or calibrate(path, backend)


class _Bench:
    """Moves pieces of the scratch file, of which `_nbytes` have been written."""

    def __init__(self, fd: int, address: int, backend: str, path: Path) -> None:
        self._fd = fd
        self._address = address
        self._backend = backend
        self._path = path
        self._nbytes = 0

    def fill(self, nbytes: int) -> float:
        """Write the file once, or what WRITE_S is enough for; returns bytes per second."""
        self._nbytes = nbytes
        self._nbytes, seconds = self._run(
            _shallowest(self._backend), TESTS["write"], WRITE_S, nbytes
        )
        return self._nbytes / seconds

    def measure(self, tried: Sequence[Limits]) -> dict[Limits, Speeds]:
        """Run every test under all limits, NUM_ROUNDS times in turns."""
        slice_s = MEASURE_S / (len(tried) * len(TESTS) * NUM_ROUNDS)
        moved = {(limits, test): (0, 0.0) for limits in tried for test in TESTS}
        for _ in range(NUM_ROUNDS):
            for test, directions in TESTS.items():
                for limits in tried:
                    nbytes, seconds = self._run(limits, directions, slice_s)
                    before = moved[limits, test]
                    moved[limits, test] = (before[0] + nbytes, before[1] + seconds)
        rates = {key: nbytes / seconds for key, (nbytes, seconds) in moved.items()}
        return {limits: Speeds(*(rates[limits, test] for test in TESTS)) for limits in tried}

    def _run(
        self,
        limits: Limits,
        directions: Sequence[int],
        seconds: float,
        end_nbytes: int | None = None,
    ) -> tuple[int, float]:
        """Move pieces from the start of the file, round and round, until the time is up or
        `end_nbytes` are moved, but at least one; returns bytes and seconds. Raises StorageError.
        """
        piece_nbytes = max(MIB, limits.block_nbytes)
        queue = IoQueue(self._backend, limits)
        start = time.perf_counter()
        num_started = num_done = 0
        try:
            while True:
                while (
                    (num_started - num_done) * piece_nbytes <= _in_flight(limits)
                    and num_started * piece_nbytes != end_nbytes
                    and (num_started == 0 or time.perf_counter() - start < seconds)
                ):
                    op = directions[num_started % 2]
                    queue.submit(op, num_started, [self._segment(num_started, piece_nbytes)])
                    num_started += 1
                if num_started == num_done:
                    return num_done * piece_nbytes, time.perf_counter() - start
                for done in queue.wait(WAIT_S):
                    self._check(done, piece_nbytes)
                    num_done += 1
        finally:
            queue.close()

    def _segment(self, index: int, nbytes: int) -> io.Segment:
        offset = index % max(1, self._nbytes // nbytes) * nbytes
        return self._fd, offset, self._address + index * nbytes % BUFFER_NBYTES, nbytes

    def _check(self, done: io.IoCompletion, nbytes: int) -> None:
        if done.result != nbytes:
            code = -done.result if done.result < 0 else errno.EIO
            raise StorageError(code, "measuring", path=str(self._path), offset=done.offset)


@contextlib.contextmanager
def _buffers() -> Iterator[Slab]:
    slab = Slab(BUFFER_NBYTES)
    try:
        slab.tensor.random_()  # some drives compress
        yield slab
    finally:
        slab.close()


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[tuple[int, int, bool]]:
    """Hold a preallocated file without a name; yields (fd, nbytes, whether I/O on it is direct)."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        room = machine.free_nbytes(path)
        nbytes = next((size for size in SCRATCH_NBYTES if 2 * size <= room), 0)
        if not nbytes:
            raise StorageError(
                errno.ENOSPC,
                "measuring",
                path=str(path),
                remedy=f"It takes {2 * SCRATCH_NBYTES[-1]} bytes of room and {room} are free. "
                "Free space, or name another path.",
            )
        fd, is_direct = _open_unnamed(path / f".offload-calibrate-{os.getpid()}")
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno or errno.EIO, "measuring", path=str(path)) from error
    try:
        _preallocate(fd, nbytes)
        yield fd, nbytes, is_direct
    finally:
        os.close(fd)


def _open_unnamed(file: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    file.unlink(missing_ok=True)  # of a process that had our number and was killed in between
    try:
        fd, is_direct = os.open(file, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        file.unlink(missing_ok=True)  # some file systems refuse after they have made it
        fd, is_direct = os.open(file, flags, 0o600), False
    file.unlink()
    return fd, is_direct


def _preallocate(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(fd, nbytes)


# The cache


def cached_profile(path: Path, backend: str | None = None) -> DriveProfile | None:
    """Return what is known of the drive under a folder, which need not exist yet; never measures.

    `backend` is the one that `auto` would choose unless it is given.
    """
    chosen = backend or io.choose_backend("auto")[0]
    return _profile_from(_drives().get(_key(path, chosen)))


def cache_file() -> Path:
    """Return where profiles are kept."""
    return machine.cache_folder() / "drives.json"


def _key(path: Path, backend: str) -> str:
    return f"{machine.drive_identity(path)} {machine.file_system_type(path)} {backend}"


def _drives() -> dict[str, Any]:
    try:
        kept = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict) or kept.get("version") != CACHE_VERSION:
        return {}
    drives = kept.get("drives")
    return drives if isinstance(drives, dict) else {}


def _profile_from(row: Any) -> DriveProfile | None:
    """Return the profile that a row of the cache holds, or None where anything about it is odd."""
    fields = {field.name: field.type for field in dataclasses.fields(DriveProfile)}
    if not isinstance(row, dict) or row.keys() != fields.keys():
        return None
    if any(type(row[name]).__name__ != kind for name, kind in fields.items()):
        return None
    profile = DriveProfile(**row)
    bandwidths = (profile.read_bandwidth, profile.write_bandwidth, profile.mixed_bandwidth)
    if profile.limits not in CANDIDATES.get(profile.backend, ()) or not all(
        0 < rate < math.inf for rate in bandwidths
    ):
        return None
    return profile


def _keep(key: str, profile: DriveProfile) -> None:
    """Add a profile to the cache; a folder that cannot be written only means measuring again."""
    file = cache_file()
    drives = _drives() | {key: dataclasses.asdict(profile)}
    text = json.dumps({"version": CACHE_VERSION, "drives": drives}, indent=2) + "\n"
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        beside.replace(file)
    except OSError as error:
        logger.info("the profile of the drive is not kept: %s", error)
