"""Drives to break, each for one test: loop devices, small tmpfs, ramfs, FUSE; and ways to break
them. Imports no torch.
"""

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXT4_IOC_SHUTDOWN = 0x8004587D
EXT4_GOING_FLAGS_NOLOGFLUSH = 2
UNMOUNT_TRIES = 50


def call(*command: str | Path) -> str:
    """Run a command and return what it prints; skip the test where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"`{' '.join(map(str, command))}` fails here: {done.stderr.strip()}")
    return done.stdout.strip()


def unmount(point: Path) -> None:
    """A ring that has just closed keeps its mount busy for a moment."""
    for _ in range(UNMOUNT_TRIES):
        if subprocess.run(["umount", str(point)], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{point} stays busy")


@contextlib.contextmanager
def mounted(point: Path, *arguments: str | Path) -> Iterator[Path]:
    """`mount ARGUMENTS POINT`, undone at the end."""
    point.mkdir(parents=True)
    call("mount", *arguments, point)
    try:
        yield point
    finally:
        unmount(point)


@contextlib.contextmanager
def loop_drive(
    image: Path,
    point: Path,
    *,
    nbytes: int = 32 << 20,
    sector_nbytes: int = 512,
    file_system: str = "ext4",
) -> Iterator[Path]:
    """A new file system on a loop device over a sparse image."""
    with image.open("wb") as file:
        file.truncate(nbytes)
    options = {
        "ext4": ["-F", "-b", "4096", "-O", "^has_journal"],
        "xfs": ["-f", "-m", "reflink=1"],
        "btrfs": ["-f"],
    }
    make = shutil.which(f"mkfs.{file_system}", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if make is None:
        pytest.skip(f"no mkfs.{file_system} here")
    call(make, "-q", *options.get(file_system, ["-F", "-b", "4096"]), image)
    sectors = ["-b", str(sector_nbytes)]
    device = call("losetup", "-f", "--show", "--direct-io=on", *sectors, image)
    try:
        with mounted(point, device):
            yield point
    finally:
        subprocess.run(["losetup", "-d", device], check=False)


@contextlib.contextmanager
def fuse_drive(folder: Path, point: Path, rules: Path) -> Iterator[Path]:
    """`folder` seen through fuse_drive.py, which obeys the file `rules`."""
    try:
        importlib.import_module("mfusepy")
    except (ImportError, OSError) as error:  # OSError: the library itself is missing
        pytest.skip(f"no FUSE here (needs mfusepy and libfuse3): {error}")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no FUSE here: /dev/fuse cannot be opened")
    for path in (folder, point):
        path.mkdir(parents=True)
    set_rules(rules, [])
    command = [sys.executable, str(Path(__file__).with_name("fuse_drive.py"))]
    command += [str(path) for path in (folder, point, rules)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        if server.stdout is None or server.stderr is None or server.stdout.readline() != "ready\n":
            server.kill()
            pytest.skip(f"FUSE does not mount here: {server.communicate()[1][-500:]}")
        try:
            yield point
        finally:
            unmount(point)
            server.communicate(timeout=30)


# Ways to break a drive


def shut_down(point: Path) -> None:
    """Every later read and write of this ext4 is EIO, as of a drive that fell off its bus."""
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", EXT4_GOING_FLAGS_NOLOGFLUSH))
    finally:
        os.close(fd)


def fill(folder: Path) -> None:
    """Leave no byte free: writes into holes of its files are ENOSPC."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def set_rules(path: Path, rules: list[dict[str, Any]]) -> None:
    """Give a FUSE drive other rules, all at once."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rules))
    new.rename(path)


def num_hits(path: Path) -> int:
    """How often the rules of a FUSE drive have applied."""
    hits = path.with_suffix(".hits")
    return hits.stat().st_size if hits.exists() else 0
