"""Runs as they lie on drives: which there are, whose they are, and removing what nobody needs."""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from offload import swapfile
from offload.commit import read_manifest
from offload.errors import OffloadError, StateError
from offload.swapfile import LOCK_NAME, MANIFEST_NAME, MEMBER_NAME, SWAP_NAME

_OUR_NAMES = {SWAP_NAME, LOCK_NAME, MANIFEST_NAME, MEMBER_NAME}


class RunKind(enum.Enum):
    """What a folder holds."""

    LIVE = "live"
    COMMITTED = "committed"
    ORPHAN = "orphan"  # a run that died without a commit: nothing can be got out of it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """One folder with files of a run. `nbytes` is what they take on the drive."""

    folder: Path
    kind: RunKind
    nbytes: int
    detail: str

    def __str__(self) -> str:
        return f"{self.kind.value:<10} {self.folder}: {self.detail}"


def find_runs(folder: Path) -> Iterator[RunInfo]:
    """The runs in a folder and below it. Follows no symbolic links, changes nothing."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        if _OUR_NAMES & set(names):
            yield inspect(Path(parent))


def inspect(folder: Path) -> RunInfo:
    """What a folder holds."""
    nbytes = sum(_nbytes_of(folder / name) for name in _present(folder) if name != LOCK_NAME)
    holder = _holder(folder)
    if holder:
        kind, detail = RunKind.LIVE, f"in use by pid {holder}"
    elif (folder / MANIFEST_NAME).exists():
        kind, detail = RunKind.COMMITTED, _describe(folder)
    elif (folder / MEMBER_NAME).exists():
        kind, detail = RunKind.COMMITTED, "part of a run whose manifest is on another path"
    else:
        kind, detail = RunKind.ORPHAN, "died without a commit"
    return RunInfo(folder=folder, kind=kind, nbytes=nbytes, detail=detail)


def _present(folder: Path) -> list[str]:
    names = (*_OUR_NAMES, *swapfile.CHECKSUM_NAMES)
    return [name for name in names if os.path.lexists(folder / name)]


def _nbytes_of(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:  # its run ended meanwhile
        return 0


def _describe(folder: Path) -> str:
    try:
        manifest = read_manifest(folder)
    except OffloadError as error:
        return f"unreadable: {error}"
    return f"{manifest.kind} at step {manifest.step}, format {manifest.state_format}"


def _holder(folder: Path) -> str:
    """The pid that holds the folder's lock, or an empty string."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except OSError:
        return os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(fd)


def remove(folder: Path, *, committed: bool) -> None:
    """Remove the files of a run that is not live; a committed one only with `committed`.

    Raises StateError for a run that is in use, or committed and not meant.
    """
    lock = swapfile.lock(folder)  # StateError where it is live; nobody can begin one meanwhile
    try:
        if not committed:
            swapfile.refuse_committed(folder)
        for name in _present(folder):
            if (folder / name).is_dir():
                raise StateError(f"{folder / name} is a folder, and no run of ours has one there.")
        swapfile.remove_run_files(folder)
        (folder / SWAP_NAME).unlink(missing_ok=True)
        (folder / LOCK_NAME).unlink(missing_ok=True)
    finally:
        os.close(lock)
