"""One swap file and its folder: the lock, direct I/O, preallocation, and who it belongs to."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import logging
import mmap
import os
from pathlib import Path

from offload import machine
from offload.errors import StateError, StorageError

logger = logging.getLogger("offload")
ALIGN_NBYTES = 4096
SWAP_NAME = "offload.swap"
LOCK_NAME = "offload.lock"
MANIFEST_NAME = "manifest.json"
CHECKSUM_NAMES = ("checksums.0", "checksums.1")  # they take turns, see [Note: commit]
MEMBER_NAME = "offload.member"  # on the other paths of a committed run, beside its swap file


@dataclasses.dataclass(frozen=True, slots=True)
class RunFiles:
    """A run whose files outlive it. `used_nbytes` is what its manifest names in each file; empty
    for a run that begins.
    """

    run: str
    used_nbytes: tuple[int, ...] = ()

    def header(self, index: int) -> bytes:
        """The first page of the swap file on path `index`: a file of another run, or of another
        path, is noticed before anything is read from it.
        """
        return f"offload-swap 1 {self.run} {index}\n".encode().ljust(ALIGN_NBYTES, b"\0")


def lock(path: Path) -> int:
    """Take the path's lock. It dies with the process: a stale one never stands in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path / LOCK_NAME, flags, 0o600)
    except OSError as error:
        raise StorageError(
            error.errno or errno.EIO, "making the run directory", path=str(path)
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StateError(
            f"{path} is in use by another run (pid {holder}). "
            "Wait for it to end, or name another folder in tiers.nvme.paths."
        ) from error
    if not _is_same_file(fd, path / LOCK_NAME):  # its last holder removed it meanwhile
        os.close(fd)
        return lock(path)
    with contextlib.suppress(OSError):  # only a message needs it; a full drive is refused below
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def refuse_committed(path: Path) -> None:
    """Raise StateError where a run is committed in this folder: it is never wiped unasked."""
    if (path / MANIFEST_NAME).exists() or (path / MEMBER_NAME).exists():
        raise StateError(
            f"{path} holds a committed run. Pass weights='resume' to go on with it, name another "
            "folder in tiers.nvme.paths, or remove it with `offload clean`."
        )


def remove_run_files(path: Path) -> None:
    """Remove what a run leaves in a folder beside its swap file and lock. The manifest goes first:
    without it the rest is of no run.
    """
    for name in (MANIFEST_NAME, MEMBER_NAME, *CHECKSUM_NAMES):
        remove(path / name)
        remove(path / f"{name}.new")


def open_swap(folder: Path, nbytes: int, header: bytes | None, *, used_nbytes: int) -> int:
    """Return a descriptor of the folder's swap file, `nbytes` long and all of it allocated.

    A new file gets `header` as its first page. An old one, of which `used_nbytes` above 0 are in
    use, must begin with it.
    """
    is_old = used_nbytes > 0
    path = folder / SWAP_NAME
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = -1
    try:
        fd = _open_direct(path, flags | (0 if is_old else os.O_CREAT | os.O_TRUNC))
        if is_old and header is not None:
            _check_old(fd, path, header, used_nbytes)
        _preallocate(fd, path, nbytes)
        if is_old:
            os.ftruncate(fd, nbytes)  # gradients of an earlier plan may have lain behind
        elif header is not None:
            _write_page(fd, header)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
            if not is_old:
                path.unlink(missing_ok=True)
        if isinstance(error, StorageError) or not isinstance(error, OSError):
            raise
        raise _creation_error(error, path, nbytes) from error
    return fd


def create(folder: Path, header: bytes) -> int:
    """A new swap file that holds its header, and grows as it is written."""
    path, fd = folder / SWAP_NAME, -1
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = _open_direct(path, flags)
        _write_page(fd, header)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise _creation_error(error, path, ALIGN_NBYTES) from error
    return fd


def open_to_read(folder: Path, header: bytes) -> int:
    """A swap file that begins with `header`, for reading alone."""
    path = folder / SWAP_NAME
    try:
        fd = _open_direct(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise StorageError(error.errno or errno.EIO, "opening", path=str(path)) from error
    try:
        _check_old(fd, path, header, ALIGN_NBYTES)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _page() -> mmap.mmap:
    return mmap.mmap(-1, ALIGN_NBYTES)  # aligned, as direct I/O wants it


def _write_page(fd: int, content: bytes) -> None:
    with _page() as page:
        page[:] = content
        if os.pwrite(fd, page, 0) != len(content):
            raise OSError(errno.EIO, "short write")


def _check_old(fd: int, path: Path, header: bytes, used_nbytes: int) -> None:
    if os.fstat(fd).st_size < used_nbytes:
        raise StorageError(errno.ENODATA, "opening", path=str(path), offset=used_nbytes)
    with _page() as page:
        num_read = os.preadv(fd, [page], 0)
        found = bytes(page[:num_read])
    if found != header:
        raise StorageError(
            errno.EBADMSG, "opening", path=str(path), offset=0,
            remedy="This file is not the one that the manifest was written with. Give the paths of "
            "tiers.nvme.paths in the order of the run, with its own drives mounted there.",
        )  # fmt: skip


def _open_direct(path: Path, flags: int) -> int:
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        logger.warning(
            "%s: this file system has no direct I/O; transfers go through the page cache, which "
            "costs "
            "memory outside the budget and CPU time for the copies", path,
        )  # fmt: skip
        return os.open(path, flags, 0o600)
    if machine.is_tmpfs(path.parent):
        logger.warning("%s lies on tmpfs: its bytes are RAM, outside tiers.cpu.budget", path)
    align = machine.dioalign(path)
    if align is not None and max(align) > ALIGN_NBYTES:
        os.close(fd)
        raise OSError(errno.EINVAL, f"needs {max(align)}-byte alignment")
    return fd


def _preallocate(fd: int, path: Path, nbytes: int) -> None:
    try:
        fallocate(fd, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        logger.warning("%s: this file system cannot preallocate, so a full disk shows late", path)
        os.ftruncate(fd, nbytes)


def fallocate(fd: int, nbytes: int) -> None:
    """The system call. posix_fallocate stands in for a file system that lacks it by writing a byte
    to every block, which direct I/O refuses with an EINVAL that says nothing.
    """
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(fd, 0, 0, nbytes) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def close(fd: int) -> None:
    """Close a file on a drive that may be gone."""
    with contextlib.suppress(OSError):  # it reports what was written, and closes all the same
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file where its drive still lets go of it; say so where it does not."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s stays behind: %s. Remove it when its drive is back.", path, error)


def _creation_error(error: OSError, path: Path, nbytes: int) -> StorageError:
    code = error.errno or errno.EIO
    if code == errno.ENOSPC:
        free = machine.free_nbytes(path.parent)
        remedy = (
            f"The run needs {nbytes} bytes there and {free} are free. Free space, name more or "
            "other "
            "paths in tiers.nvme.paths, or raise tiers.cpu.budget."
        )
        return StorageError(code, "preallocating", path=str(path), remedy=remedy)
    return StorageError(code, "making the swap file", path=str(path))
