"""SMART: the log page as the specification lays it out, and the drive that a path lies on."""

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload import doctor, smart
from offload.smart import LOG_NBYTES, SmartLog, SmartReading, disk_of, parse_log, read_smart


def page_of(data_units: int, percentage: int) -> bytes:
    """A log page whose other fields are not zero."""
    page = bytearray(b"\xa5" * LOG_NBYTES)
    page[5] = percentage
    page[48:64] = data_units.to_bytes(16, "little")
    return bytes(page)


@given(st.integers(0, 2**128 - 1), st.integers(0, 255))
def test_the_page_is_read_as_specified(data_units: int, percentage: int) -> None:
    log = parse_log(page_of(data_units, percentage))
    assert log == SmartLog(written_nbytes=data_units * 512_000, percentage_used=percentage)


@pytest.mark.parametrize(
    ("percentage", "rated"), [(0, None), (4, None), (5, 2000), (50, 200), (120, 83), (255, None)]
)
def test_the_rating_follows_from_a_percentage_that_says_enough(
    percentage: int, rated: int | None
) -> None:
    assert SmartLog(written_nbytes=100, percentage_used=percentage).rated_nbytes == rated


class Sys:
    """A /sys in which the device of `path` is what a test says."""

    def __init__(self, root: Path, path: Path) -> None:
        self.root = root
        number = os.stat(path).st_dev
        self._link = root / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
        self._link.parent.mkdir(parents=True)

    def device(self, name: str, *slaves: Path) -> Path:
        folder = self.root / "devices" / name
        folder.mkdir(parents=True)
        for slave in slaves:
            (folder / "slaves").mkdir(exist_ok=True)
            (folder / "slaves" / slave.name).symlink_to(slave)
        return folder

    def partition(self, disk: Path, name: str) -> Path:
        (disk / name).mkdir()
        (disk / name / "partition").write_text("1\n")
        return disk / name

    def mount(self, device: Path) -> None:
        self._link.symlink_to(device)


@pytest.fixture
def sys_tree(tmp_path: Path) -> Sys:
    return Sys(tmp_path / "sys", tmp_path)


def test_a_disk_itself_is_found_from_a_path_that_does_not_exist(
    sys_tree: Sys, tmp_path: Path
) -> None:
    sys_tree.mount(sys_tree.device("nvme3n1"))
    assert disk_of(tmp_path / "not" / "yet", sys_tree.root) == "nvme3n1"


def test_a_partition_below_encryption_is_found(sys_tree: Sys, tmp_path: Path) -> None:
    partition = sys_tree.partition(sys_tree.device("nvme0n1"), "nvme0n1p2")
    sys_tree.mount(sys_tree.device("dm-0", partition))
    assert disk_of(tmp_path, sys_tree.root) == "nvme0n1"


def test_an_array_of_drives_is_not_one_drive(sys_tree: Sys, tmp_path: Path) -> None:
    disks = [sys_tree.device(f"nvme{i}n1") for i in range(2)]
    sys_tree.mount(sys_tree.device("md0", *disks))
    reading = read_smart(tmp_path, sys_tree.root)
    assert reading == SmartReading(None, "md0 lies on several drives: nvme0n1, nvme1n1")


def test_what_is_no_nvme_drive_is_said(sys_tree: Sys, tmp_path: Path) -> None:
    assert "no block device" in read_smart(tmp_path, sys_tree.root).detail
    sys_tree.mount(sys_tree.device("vda"))
    assert read_smart(tmp_path, sys_tree.root).detail == "/dev/vda is no NVMe drive"


class Drive:
    """An NVMe device node whose ioctl a test answers."""

    def __init__(self, dev: Path, status: int = 0) -> None:
        self.status = status
        dev.mkdir()
        (dev / "nvme0n1").write_bytes(b"")

    def ioctl(self, fd: int, request: int, command: Any) -> int:
        """Check the command's bytes as the kernel has them, and answer it."""
        raw = bytes(command)
        assert len(raw) == 72 and request == 0xC0484E41  # _IOWR('N', 0x41, 72 bytes)
        assert (raw[0], raw[4:8]) == (2, b"\xff" * 4)  # Get Log Page, of the controller
        assert int.from_bytes(raw[36:40], "little") == 512
        assert int.from_bytes(raw[40:44], "little") == 127 << 16 | 2  # dwords - 1, and the log
        address = int.from_bytes(raw[24:32], "little")
        ctypes.memmove(address, page_of(3000, 7), 512)
        return self.status


@pytest.mark.parametrize("status", [0, 0x4002])
def test_the_drive_is_asked_as_linux_wants_it(
    sys_tree: Sys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    drive = Drive(tmp_path / "dev", status)
    sys_tree.mount(sys_tree.device("nvme0n1"))
    monkeypatch.setattr(smart.fcntl, "ioctl", drive.ioctl)
    log, detail = read_smart(tmp_path, sys_tree.root, tmp_path / "dev")
    if status == 0:
        assert log == SmartLog(written_nbytes=3000 * 512_000, percentage_used=7)
        assert detail == str(tmp_path / "dev" / "nvme0n1")
    else:
        assert log is None and "refuses its SMART log (NVMe status 0x4002)" in detail


def test_a_drive_that_may_not_be_asked_is_no_error(
    sys_tree: Sys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys_tree.mount(sys_tree.device("nvme0n1"))
    assert read_smart(tmp_path, sys_tree.root, tmp_path / "dev").detail == (
        "No such file or directory"
    )
    Drive(tmp_path / "dev")
    reading = read_smart(tmp_path, sys_tree.root, tmp_path / "dev")  # a file knows no such ioctl
    assert reading.log is None and reading.detail

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(smart.os, "open", refuse)
    reading = read_smart(tmp_path, sys_tree.root, tmp_path / "dev")
    assert reading == SmartReading(None, "Permission denied (reading it needs root)")


def test_this_machine_is_asked_without_an_error(tmp_path: Path) -> None:
    log, detail = read_smart(tmp_path)
    assert detail and (log is None or log.written_nbytes > 0)


def test_the_doctor_says_what_the_drive_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor._wear(tmp_path) == f"not known, because {read_smart(tmp_path).detail}"
    log = SmartLog(written_nbytes=43 * 10**12, percentage_used=7)
    monkeypatch.setattr(doctor, "read_smart", lambda path: SmartReading(log, "/dev/nvme0n1"))
    said = doctor._wear(tmp_path)
    assert said == "43 TB written in the drive's life, 7 % of it used (/dev/nvme0n1)"
