"""What an NVMe drive says of its own wear: its SMART log, where this process may read it.

Nothing here raises: a drive that cannot be asked gives None, and why.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

SYS = Path("/sys")
DEV = Path("/dev")
LOG_NBYTES = 512
UNIT_NBYTES = 1000 * 512  # of "data units", as the NVMe specification has it
_PERCENTAGE_MIN = 5  # the log has whole percents: below, what they stand for is a guess
_PERCENTAGE_MAX = 254  # 255 is all that is above
_ADMIN_COMMAND = 0xC0484E41  # NVME_IOCTL_ADMIN_CMD of linux/nvme_ioctl.h
_GET_LOG_PAGE = 0x02
_SMART_LOG = 0x02
_ALL_NAMESPACES = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SmartLog:
    """What a drive has been written in its life, and how much of its rated life it says is used."""

    written_nbytes: int
    percentage_used: int

    @property
    def rated_nbytes(self) -> int | None:
        """What the drive seems to be rated for; None where its percentage is too coarse to say."""
        if not _PERCENTAGE_MIN <= self.percentage_used <= _PERCENTAGE_MAX:
            return None
        return self.written_nbytes * 100 // self.percentage_used


class SmartReading(NamedTuple):
    """The log of the drive below a path, or None and why there is none."""

    log: SmartLog | None
    detail: str  # the device, or the reason


def parse_log(page: bytes) -> SmartLog:
    """The fields of the log page "SMART / Health Information", 512 bytes."""
    low, high = struct.unpack_from("<QQ", page, 48)
    return SmartLog(written_nbytes=(high << 64 | low) * UNIT_NBYTES, percentage_used=page[5])


def read_smart(path: Path, sys: Path = SYS, dev: Path = DEV) -> SmartReading:
    """Ask the NVMe drive that a path, which may not exist yet, lies on. Does no I/O to data."""
    try:
        disk = disk_of(path, sys)
        if not re.fullmatch(r"nvme\d+n\d+", disk):
            return SmartReading(None, f"{dev / disk} is no NVMe drive")
        return SmartReading(parse_log(_log_page(dev / disk)), str(dev / disk))
    except OSError as error:
        hint = " (reading it needs root)" if error.errno in (errno.EACCES, errno.EPERM) else ""
        return SmartReading(None, f"{error.strerror or error}{hint}")


def disk_of(path: Path, sys: Path = SYS) -> str:
    """The name of the whole disk below a path, such as nvme0n1.

    Raises OSError where that is no block device, or more than one.
    """
    existing = Path(os.path.realpath(path))
    while not existing.exists():
        existing = existing.parent
    number = os.stat(existing).st_dev
    device = sys / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
    if not device.exists():
        raise OSError(errno.ENODEV, f"{existing} lies on no block device of its own")
    return _whole_disk(Path(os.path.realpath(device)))


def _whole_disk(device: Path) -> str:
    """Through partitions, encryption and volumes, as far as there is one way."""
    if (device / "partition").exists():
        return _whole_disk(device.parent)
    slaves = sorted((device / "slaves").glob("*"))
    if len(slaves) > 1:
        names = ", ".join(slave.name for slave in slaves)
        raise OSError(errno.ENODEV, f"{device.name} lies on several drives: {names}")
    return _whole_disk(Path(os.path.realpath(slaves[0]))) if slaves else device.name


class _AdminCommand(ctypes.Structure):
    """struct nvme_passthru_cmd."""

    _fields_ = (
        ("opcode", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("_reserved", ctypes.c_uint16),
        ("nsid", ctypes.c_uint32),
        ("cdw2", ctypes.c_uint32),
        ("cdw3", ctypes.c_uint32),
        ("metadata", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
        ("metadata_len", ctypes.c_uint32),
        ("data_len", ctypes.c_uint32),
        ("cdw10", ctypes.c_uint32),
        ("cdw11_to_15", ctypes.c_uint32 * 5),
        ("timeout_ms", ctypes.c_uint32),
        ("result", ctypes.c_uint32),
    )


def _log_page(node: Path) -> bytes:
    """The drive's SMART log page. Raises OSError."""
    page = ctypes.create_string_buffer(LOG_NBYTES)
    command = _AdminCommand(
        opcode=_GET_LOG_PAGE,
        nsid=_ALL_NAMESPACES,
        addr=ctypes.addressof(page),
        data_len=LOG_NBYTES,
        cdw10=(LOG_NBYTES // 4 - 1) << 16 | _SMART_LOG,
    )
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = fcntl.ioctl(fd, _ADMIN_COMMAND, command)
    finally:
        os.close(fd)
    if status != 0:
        raise OSError(errno.EIO, f"{node} refuses its SMART log (NVMe status {status:#x})")
    return page.raw
