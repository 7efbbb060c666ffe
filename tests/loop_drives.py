"""Several drives of known speed on one machine: ext4 on loop devices over memory, throttled.

Needs root, loop devices, mkfs.ext4 and the block controller of control groups v1. Unavailable is
raised where something of it is missing.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLKIO = Path("/sys/fs/cgroup/blkio")
SECTOR_NBYTES = 512  # of /sys/block/*/stat, whatever the drive's own are
UMOUNT_TRIES = 50  # a ring that has just closed keeps a mount busy for a moment


class Unavailable(Exception):
    """This machine cannot make such drives; the text says what is missing."""


@dataclass(frozen=True)
class LoopDrive:
    """One mounted drive; `name` as in /sys/block."""

    folder: Path
    name: str

    @property
    def number(self) -> str:
        """Return major:minor."""
        return Path(f"/sys/block/{self.name}/dev").read_text().strip()

    def moved_nbytes(self) -> tuple[int, int]:
        """Return the bytes read from and written to the device so far."""
        fields = Path(f"/sys/block/{self.name}/stat").read_text().split()
        return int(fields[2]) * SECTOR_NBYTES, int(fields[6]) * SECTOR_NBYTES


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(command[:2])}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def loop_drives(folder: Path, num_drives: int, nbytes: int) -> Iterator[list[LoopDrive]]:
    """Make drives of `nbytes` each over images in `folder`, which is best on tmpfs."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(_loop_drive(folder / f"image{index}", nbytes))
            for index in range(num_drives)
        ]


@contextlib.contextmanager
def _loop_drive(image: Path, nbytes: int) -> Iterator[LoopDrive]:
    mount = image.with_suffix(".mount")
    with contextlib.ExitStack() as stack:
        stack.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            file.truncate(nbytes)
        eager = "lazy_itable_init=0"  # else the kernel goes on making it behind our back
        _run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", eager, "-m", "0", str(image))
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
        stack.callback(_run, "losetup", "--detach", device)
        mount.mkdir()
        stack.callback(mount.rmdir)
        _run("mount", "-o", "noatime", device, str(mount))
        stack.callback(_unmount, mount)
        yield LoopDrive(mount, Path(device).name)


def _unmount(mount: Path) -> None:
    for left in reversed(range(UMOUNT_TRIES)):
        try:
            _run("umount", str(mount))
            return
        except Unavailable:
            if not left:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def throttled(drives: Sequence[LoopDrive], rates: Sequence[int]) -> Iterator[None]:
    """Let this process move at most `rates` bytes per second from and to each drive, both ways."""
    home = next(
        (line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
         if "blkio" in line.split(":", 2)[1].split(",")), None
    )  # fmt: skip
    if home is None or not (BLKIO / "cgroup.procs").exists():
        raise Unavailable("no block controller of control groups v1")
    group = BLKIO / f"offload-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Unavailable(f"{group}: {error.strerror}") from error
    try:
        for drive, rate in zip(drives, rates, strict=True):
            for way in ("read", "write"):
                limit = group / f"blkio.throttle.{way}_bps_device"
                limit.write_text(f"{drive.number} {rate}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (BLKIO / home.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
