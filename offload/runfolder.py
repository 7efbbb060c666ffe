"""What lies in a run's folders: whose it is, what a new run must not touch, and how it goes."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from offload import swapfile
from offload.errors import StateError, StorageError, storage_errors
from offload.swapfile import CHECKSUM_NAMES, MANIFEST_MAGIC, MANIFEST_NAME, MEMBER_NAME, SWAP_NAME

logger = logging.getLogger("offload")
_START_NBYTES = 128  # a header or a mark is shorter
_NOT_OURS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO)


def refuse_committed(paths: Sequence[Path]) -> None:
    """Raise StateError where a run or a checkpoint lies in one of these folders: it is never wiped
    unasked. Their locks are held.
    """
    for path in paths:
        if is_manifest(path / MANIFEST_NAME):
            raise _is_committed(path)
    begun = {owner_of(path) for path in paths}
    for path in paths:
        if lies_there(path / MEMBER_NAME) and _member_of(path) not in begun:
            raise _is_committed(path)


def refuse_foreign(paths: Sequence[Path]) -> None:
    """Raise StateError where another program's file has the name of our manifest."""
    for path in paths:
        if lies_there(path / MANIFEST_NAME) and not is_manifest(path / MANIFEST_NAME):
            raise StateError(
                f"{path / MANIFEST_NAME} is no manifest of a run, and a run would put its own "
                "there. Name a folder that nothing else uses."
            )


def _is_committed(path: Path) -> StateError:
    return StateError(
        f"{path} holds a committed run or a checkpoint. Go on with a run by weights='resume', name "
        "another folder, or remove a run with `offload clean`."
    )


def lies_there(path: Path) -> bool:
    """Whether there is anything of this name. Raises StorageError where the drive does not say: a
    run that cannot be read is not an absent one.
    """
    with storage_errors("looking for", path):
        try:
            os.lstat(path)
        except FileNotFoundError:
            return False
    return True


def read_start(path: Path, nbytes: int) -> bytes:
    """The first bytes of a regular file; nothing where there is none. Follows no symbolic link.
    Raises StorageError where there may be one that cannot be read.
    """
    with storage_errors("reading", path):
        try:
            with open(swapfile.open_own(path, os.O_RDONLY), "rb") as file:
                return file.read(nbytes)
        except OSError as error:
            if error.errno in _NOT_OURS:
                return b""
            raise


def is_manifest(path: Path) -> bool:
    """Whether a file begins as a manifest of ours does. Raises StorageError."""
    return read_start(path, len(MANIFEST_MAGIC)) == MANIFEST_MAGIC


def owner_of(path: Path) -> str:
    """The run whose first swap file lies in a folder, by its header; empty where none is seen."""
    try:
        fields = read_start(path / SWAP_NAME, _START_NBYTES).split(b"\n")[0].split(b" ")
    except StorageError:  # nobody's: whatever claims to be a part of it is refused
        return ""
    is_first = len(fields) == 4 and fields[:2] == [b"offload-swap", b"1"] and fields[3] == b"0"
    return fields[2].decode(errors="replace") if is_first else ""


def member_content(run: str, index: int) -> bytes:
    """What MEMBER_NAME holds on path `index` of a run."""
    return f"{run} {index}\n".encode()


def _member_of(path: Path) -> str:
    """The run that a folder is a part of."""
    words = read_start(path / MEMBER_NAME, _START_NBYTES).split(b" ")
    return words[0].decode(errors="replace") or "?"


def remove_run(paths: Sequence[Path]) -> None:
    """Remove what a run leaves in its folders, but for their locks.

    [Note: members] The manifests go first: without one the rest is of no run. The first path's swap
    file goes last, and comes first when a run begins: whoever finds it without a manifest knows
    that the other folders, which say whose members they are, belong to a run that never was or is
    no more. Without it they may be parts of a run whose first drive is not mounted.
    """
    remove_marks(paths)
    for path in reversed(paths):
        swapfile.remove(path / SWAP_NAME)


def remove_marks(paths: Sequence[Path]) -> None:
    """Remove what makes these folders those of a run: the manifests, then what lies beside them. A
    manifest that is not ours, or cannot be read, stays.
    """
    for path in paths:
        try:
            if is_manifest(path / MANIFEST_NAME):
                swapfile.remove(path / MANIFEST_NAME)
        except StorageError as error:
            logger.warning("%s stays behind: %s", path / MANIFEST_NAME, error)
    remove_small_files(paths)


def remove_small_files(paths: Sequence[Path]) -> None:
    """Remove what lies beside a manifest and a swap file."""
    names = (MEMBER_NAME, *CHECKSUM_NAMES)
    for path in paths:
        for name in (f"{MANIFEST_NAME}.new", *names, *(f"{name}.new" for name in names)):
            if os.path.lexists(path / name):
                swapfile.remove(path / name)
