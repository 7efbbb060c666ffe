"""Runs as they lie on drives: which there are, whose they are, and removing what nobody needs."""

from __future__ import annotations

import dataclasses
import enum
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from offload import runfolder, swapfile
from offload.errors import OffloadError, StateError, StorageError
from offload.runfiles import read_manifest
from offload.swapfile import LOCK_NAME, MANIFEST_NAME, MEMBER_NAME, SWAP_NAME

_OWN_NAMES = (SWAP_NAME, LOCK_NAME, MEMBER_NAME, *swapfile.CHECKSUM_NAMES)


class RunKind(enum.Enum):
    """What a folder holds."""

    LIVE = "live"
    COMMITTED = "committed"
    MEMBER = "member"  # a further path of a committed run
    CHECKPOINT = "checkpoint"
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
    """The runs in a folder and below it. Follows no symbolic links, changes nothing. Raises
    StorageError where there is no such folder.
    """
    if not folder.is_dir():
        raise StorageError(
            errno.ENOENT, "opening", path=str(folder), remedy="There is no such folder."
        )
    for parent, folders, _ in os.walk(folder, followlinks=False):
        folders.sort()
        if _present(Path(parent)):
            yield inspect(Path(parent))


def inspect(folder: Path) -> RunInfo:
    """What a folder holds."""
    present = _present(folder)
    holder = _holder(folder)
    if holder:
        kind, detail = RunKind.LIVE, f"in use by pid {holder}"
    elif MANIFEST_NAME in present:
        kind, detail = _describe(folder)
    elif (folder / MEMBER_NAME).exists():
        kind, detail = RunKind.MEMBER, "part of a run whose manifest is on another path"
    else:
        kind, detail = RunKind.ORPHAN, "died without a commit"
    nbytes = sum(status.st_blocks * 512 for status in present.values())
    return RunInfo(folder=folder, kind=kind, nbytes=nbytes, detail=detail)


def _present(folder: Path) -> dict[str, os.stat_result]:
    """The files of a run in a folder: regular ones, and a manifest only if it is one of ours. One
    that cannot be read is where other files say that a run lies here.
    """
    found: dict[str, os.stat_result] = {}
    for name in (*_OWN_NAMES, MANIFEST_NAME):
        try:
            status = (folder / name).lstat()
        except OSError:
            continue  # none, or gone since
        if stat.S_ISREG(status.st_mode):
            found[name] = status
    try:
        if MANIFEST_NAME in found and not runfolder.is_manifest(folder / MANIFEST_NAME):
            del found[MANIFEST_NAME]
    except StorageError:
        if len(found) == 1:
            found.clear()
    return found


def _describe(folder: Path) -> tuple[RunKind, str]:
    try:
        manifest = read_manifest(folder)
    except OffloadError as error:
        return RunKind.COMMITTED, f"unreadable: {error}"
    kind = RunKind.CHECKPOINT if manifest.kind == "checkpoint" else RunKind.COMMITTED
    return kind, f"step {manifest.step}, format {manifest.state_format}"


def _holder(folder: Path) -> str:
    """The pid that holds the folder's lock, or an empty string."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except PermissionError:
        return "unknown, of another user"
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except OSError:
        return os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(fd)


def remove(folders: Sequence[Path], *, committed: bool) -> None:
    """Remove the files of one run, which lies in these folders, and is not live; a committed one or
    a checkpoint only with `committed`. Nothing else in them is touched.

    Raises StateError for a run that is in use, or committed and not meant.
    """
    there = [folder for folder in folders if folder.is_dir()]
    with swapfile.locked(there):  # StateError where it is live; nobody can begin one meanwhile
        if not committed:
            runfolder.refuse_committed(there)
        for path in (folder / name for folder in there for name in _OWN_NAMES):
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
                raise StateError(
                    f"{path} is no regular file, and a run makes no other. Look at it."
                )
        runfolder.remove_run(there)
