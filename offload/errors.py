"""Errors are part of the interface: each says what failed, which object, and what to do about it.

Operating errors (disk, memory, numbers) are for the user to act on. StateError means that the
program asked for something in an order that cannot be right.
"""

from __future__ import annotations

import contextlib
import errno as errno_names
import os
from collections.abc import Iterator


class OffloadError(Exception):
    """Base of every error that offload raises on purpose."""


class PolicyError(OffloadError, ValueError):
    """A key or value of the YAML is unknown or impossible; the text names the key's path."""


class BudgetError(OffloadError):
    """The model does not fit the stated budgets; the text has the sum and the nearest setting that
    fits.
    """


class StateError(OffloadError, RuntimeError):
    """An operation that the present state does not allow, such as a second engine on one model."""


class NumericsError(OffloadError, ArithmeticError):
    """A gradient is NaN or Inf, or code read a weight that was not in memory."""


class StorageError(OffloadError, OSError):
    """An I/O operation failed. Carries errno, path, offset (bytes), chunk name, and a remedy in the
    text.
    """

    def __init__(
        self,
        code: int,
        action: str,
        *,
        path: str,
        offset: int = -1,
        chunk: str = "",
        remedy: str = "",
    ) -> None:
        self.path = path
        self.offset = offset
        self.chunk = chunk
        where = f" at offset {offset}" if offset >= 0 else ""
        whose = f" (chunk {chunk})" if chunk else ""
        name = errno_names.errorcode.get(code, str(code))
        text = f"{action} {path}{where}{whose} failed: {name}, {_meaning(code)}. "
        super().__init__(code, text + (remedy or _remedy(code)))

    def __str__(self) -> str:
        return str(self.args[1])


@contextlib.contextmanager
def storage_errors(action: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise every OSError of the block as the StorageError of `action` on `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno or errno_names.EIO, action, path=str(path)) from error


def _meaning(code: int) -> str:
    if code == errno_names.EBADMSG:  # a block's checksum; the system's words are "Bad message"
        return "the drive gave back other bytes than were written"
    return os.strerror(code)


def _remedy(code: int) -> str:
    return {
        errno_names.ENOSPC: "Free space on this drive, or name another path in tiers.nvme.paths.",
        errno_names.EROFS: "Name a writable path in tiers.nvme.paths.",
        errno_names.EACCES: "Give this user write access, or name another path in the policy.",
        errno_names.ENOENT: "Create the folder, or name an existing one in tiers.nvme.paths.",
        errno_names.ENODATA: "The swap file is shorter than it was made: something cut it.",
        errno_names.EIO: "The drive reports a failure; check `dmesg`, or use another drive.",
        errno_names.EINVAL: "Direct I/O was refused; run `offload doctor` on the path.",
        errno_names.ELOOP: "A symbolic link stands in the place of the run's own file. Remove the "
        "link, and name the folder that it leads to in tiers.nvme.paths.",
        errno_names.ENOLCK: "This file system cannot lock files, so a second run could begin here "
        "unseen. Name a folder on a local drive in tiers.nvme.paths.",
        errno_names.EBADMSG: "They were not used. Start again from a checkpoint, and check the "
        "drive's health (`smartctl -a`, `dmesg`) or use another drive.",
    }.get(code, "Check the drive and the file system, then start the run again.")
