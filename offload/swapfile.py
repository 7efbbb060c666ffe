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
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from offload import machine
from offload.errors import StateError, StorageError, storage_errors

logger = logging.getLogger("offload")
ALIGN_NBYTES = 4096
SWAP_NAME = "offload.swap"
LOCK_NAME = "offload.lock"
MANIFEST_NAME = "manifest.json"
MANIFEST_MAGIC = b"offload-manifest"  # its first bytes: other programs have a manifest.json, too
CHECKSUM_NAMES = ("offload.checksums.0", "offload.checksums.1")  # in turns, see [Note: commit]
MEMBER_NAME = "offload.member"  # on the other paths of a committed run, beside its swap file
LOOK_S = 0.3  # a look at a run, which holds its lock, is over long before
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


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


def make_folders(path: Path) -> list[Path]:
    """Make a folder and those above it; return the ones that were made, the outermost first."""
    made: list[Path] = []
    try:
        with storage_errors("making the run directory", path):
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            for folder in reversed(missing):
                with contextlib.suppress(FileExistsError):  # another run was faster
                    folder.mkdir()
                    made.append(folder)
            path.mkdir(exist_ok=True)  # an error where it is no folder
            return made
    except BaseException:
        remove_folders(made)
        raise


def remove_folders(made: Sequence[Path]) -> None:
    """Undo make_folders, as far as nothing has come into them."""
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()


def lock(path: Path) -> int:
    """Take the path's lock; a missing folder is made. It dies with the process: a stale one never
    stands in the way.

    Raises StateError where another run holds it, StorageError for the rest.
    """
    made = make_folders(path)
    try:
        with storage_errors("locking", path / LOCK_NAME):
            while (fd := _lock_once(path)) < 0:
                continue
            return fd
    except BaseException:
        remove_folders(made)
        raise


def _lock_once(path: Path) -> int:
    """A descriptor that holds the lock, or -1 where its last holder removed the file meanwhile."""
    name = path / LOCK_NAME
    fd = os.open(name, os.O_RDWR | os.O_CREAT | _FLAGS | os.O_NONBLOCK, 0o600)
    try:
        _flock(fd, path)
        if not is_same_file(fd, name):
            os.close(fd)
            return -1
        _check_own(os.fstat(fd), name, writes=True)
        _make_private(fd, name)
    except BaseException:
        close(fd)
        raise
    with contextlib.suppress(OSError):  # only a message needs it; a full drive is refused below
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _flock(fd: int, path: Path) -> None:
    """Who looks whether a run lives holds the lock, too, for a moment: try again for a while."""
    deadline = time.monotonic() + LOOK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                who = _holder(fd, path / LOCK_NAME)
                raise StateError(f"{path} is {who or _UNSEEN}") from error
        time.sleep(0.001)


_UNSEEN = (
    "locked by a process that is not visible from here, in another container or of another user. "
    "Wait for it to end, or name another folder in tiers.nvme.paths."
)


def _holder(fd: int, name: Path) -> str:
    """Who holds the lock, and what to do; empty where nobody is seen to."""
    pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
    if not pid.isdigit() or machine.is_alive(int(pid)):
        return (
            f"in use by another run (pid {pid or 'unknown'}). Wait for it to end, or name another "
            "folder in tiers.nvme.paths."
        )
    left = machine.flock_holders(name)
    if not left:
        return ""
    pids = " ".join(str(number) for number in left)
    return (
        f"still locked: its run (pid {pid}) is dead, but a process that it forked lives and has "
        f"kept the lock (pid {pids}). End that process (kill {pids}), or name another folder in "
        "tiers.nvme.paths."
    )


def is_same_file(fd: int, path: Path) -> bool:
    """Whether a name still means the open file. Raises OSError where the drive does not say."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def unlock(fd: int, path: Path) -> None:
    """Give a lock back, and remove its file."""
    remove_own(fd, path / LOCK_NAME)
    close(fd)


@contextlib.contextmanager
def locked(paths: Sequence[Path]) -> Iterator[None]:
    """Hold the locks of folders that exist. Raises StateError where a run uses one of them."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            if not path.is_dir():
                raise StorageError(
                    errno.ENOENT, "opening", path=str(path), remedy="There is no such folder."
                )
            stack.callback(unlock, lock(path), path)
        yield


def free_nbytes(folder: Path) -> int:
    """Free bytes of a folder's drive, for messages: 0 where it does not say."""
    try:
        return machine.free_nbytes(folder)
    except OSError:
        return 0


def open_own(path: Path, flags: int) -> int:
    """Open a file of the run: no link, no pipe; to write it, the run's alone: no second name, and
    readable by nobody else from now on. Changes nothing in it. Raises OSError.
    """
    # To open a pipe would block. Afterwards reads and writes are to wait as ever.
    fd = os.open(path, flags | _FLAGS | os.O_NONBLOCK, 0o600)
    try:
        writes = bool(flags & (os.O_RDWR | os.O_WRONLY))
        _check_own(os.fstat(fd), path, writes=writes)
        os.set_blocking(fd, True)
        if writes:
            _make_private(fd, path)
    except BaseException:
        close(fd)
        raise
    return fd


def _check_own(status: os.stat_result, path: Path, *, writes: bool) -> None:
    """Raise StorageError for a file that may be somebody else's under our name."""
    if stat.S_ISLNK(status.st_mode):
        raise StorageError(errno.ELOOP, "opening", path=str(path))
    if not stat.S_ISREG(status.st_mode):
        remedy = "It is not a regular file. Move it away, or name another folder in the policy."
        raise StorageError(errno.EINVAL, "opening", path=str(path), remedy=remedy)
    if writes and status.st_nlink != 1:
        remedy = (
            "The file has a second name (a hard link), and what is written here would change it "
            "there. Remove one of the names, or put a copy (cp) in the place of this one."
        )
        raise StorageError(errno.EMLINK, "opening", path=str(path), remedy=remedy)


def _make_private(fd: int, path: Path) -> None:
    """Swapped state is the user's alone, whoever made the file before."""
    status = os.fstat(fd)
    if stat.S_IMODE(status.st_mode) == 0o600:
        return
    try:
        os.fchmod(fd, 0o600)
    except OSError as error:
        if status.st_uid == os.geteuid():  # a file system without modes
            logger.warning("%s: others may read it: %s", path, error.strerror)
            return
        raise StorageError(
            error.errno or errno.EPERM, "taking over", path=str(path),
            remedy="The file belongs to another user. Name a folder of your own in "
            "tiers.nvme.paths.",
        ) from error  # fmt: skip


def open_swap(folder: Path, nbytes: int, header: bytes | None, *, used_nbytes: int) -> int:
    """Return a descriptor of the folder's swap file, `nbytes` long or longer, and all of it
    allocated. Whoever
    calls holds the folder's lock.

    A new file gets `header` as its first page. An old one, of which `used_nbytes` above 0 are in
    use, must begin with it.
    """
    path = folder / SWAP_NAME
    if used_nbytes == 0:
        with _new_swap(path, nbytes) as fd:
            _preallocate(fd, path, nbytes)
            if header is not None:
                _write_page(fd, header)
            return fd
    fd = -1
    try:
        fd = _open_direct(path, os.O_RDWR)
        if header is not None:
            _check_old(fd, path, header, used_nbytes)
        _preallocate(fd, path, nbytes)
    except BaseException as error:
        close(fd)
        if isinstance(error, StorageError) or not isinstance(error, OSError):
            raise
        raise _opening_error(error, path, nbytes) from error
    return fd


def create(folder: Path, header: bytes) -> int:
    """A new swap file that holds its header, and grows as it is written."""
    with _new_swap(folder / SWAP_NAME, ALIGN_NBYTES) as fd:
        _write_page(fd, header)
        return fd


@contextlib.contextmanager
def _new_swap(path: Path, nbytes: int) -> Iterator[int]:
    """A new swap file, which goes again when the block fails. What an earlier run left under its
    name is removed, not written over: should somebody have it open, it stays what it was.
    """
    fd, is_ours = -1, False
    try:
        with contextlib.suppress(FileNotFoundError):
            _check_own(os.lstat(path), path, writes=True)
            path.unlink()
        is_ours = True  # from here on what has this name is of our making
        fd = _open_direct(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        yield fd
    except BaseException as error:
        close(fd)
        if is_ours:
            remove(path)
        if isinstance(error, StorageError) or not isinstance(error, OSError):
            raise
        raise _creation_error(error, path, nbytes) from error


def open_to_read(folder: Path, header: bytes) -> int:
    """A swap file that begins with `header`, for reading alone."""
    path, fd = folder / SWAP_NAME, -1
    try:
        fd = _open_direct(path, os.O_RDONLY)
        _check_old(fd, path, header, ALIGN_NBYTES)
    except BaseException as error:
        close(fd)
        if isinstance(error, StorageError) or not isinstance(error, OSError):
            raise
        raise _opening_error(error, path, 0) from error
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
        fd = open_own(path, flags | os.O_DIRECT)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        logger.warning(
            "%s: this file system has no direct I/O; transfers go through the page cache, which "
            "costs "
            "memory outside the budget and CPU time for the copies", path,
        )  # fmt: skip
        return open_own(path, flags & ~os.O_EXCL)  # some have made the file before they refuse
    try:
        _check_file_system(path)
    except BaseException:
        close(fd)
        raise
    return fd


def _check_file_system(path: Path) -> None:
    if machine.is_tmpfs(path.parent):
        logger.warning("%s lies on tmpfs: its bytes are RAM, outside tiers.cpu.budget", path)
    align = machine.dioalign(path)
    if align is not None and max(align) > ALIGN_NBYTES:
        raise OSError(errno.EINVAL, f"needs {max(align)}-byte alignment")


def _preallocate(fd: int, path: Path, nbytes: int) -> None:
    try:
        fallocate(fd, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        logger.warning("%s: this file system cannot preallocate, so a full disk shows late", path)
        if os.fstat(fd).st_size < nbytes:  # never cuts off what a committed run has there
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
    """Close a file on a drive that may be gone. -1 is none."""
    if fd < 0:
        return
    with contextlib.suppress(OSError):  # it reports what was written, and closes all the same
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file where its drive still lets go of it; say so where it does not."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s stays behind: %s. Remove it when its drive is back.", path, error)


def remove_own(fd: int, path: Path) -> None:
    """Remove a file if its name still means the one that `fd` has open. Somebody may have removed
    it, and another run may have made its own.
    """
    try:
        if is_same_file(fd, path):
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s stays behind: %s. Remove it when its drive is back.", path, error)


def _opening_error(error: OSError, path: Path, nbytes: int) -> StorageError:
    if error.errno != errno.ENOENT:
        return _creation_error(error, path, nbytes)
    remedy = (
        "The run's manifest is there, its swap file is not. Give tiers.nvme.paths in the order of "
        "the run, with its own drives mounted there, or start from a checkpoint."
    )
    return StorageError(errno.ENOENT, "opening", path=str(path), remedy=remedy)


def _creation_error(error: OSError, path: Path, nbytes: int) -> StorageError:
    code = error.errno or errno.EIO
    if code == errno.ENOSPC:
        free = free_nbytes(path.parent)
        remedy = (
            f"The run needs {nbytes} bytes there and {free} are free. Free space, name more or "
            "other "
            "paths in tiers.nvme.paths, or raise tiers.cpu.budget."
        )
        return StorageError(code, "preallocating", path=str(path), remedy=remedy)
    return StorageError(code, "making the swap file", path=str(path))
