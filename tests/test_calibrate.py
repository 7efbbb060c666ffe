"""Calibration: the choice from measurements, what a measurement leaves behind, and the cache."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload import calibrate, machine
from offload.calibrate import CANDIDATES, DriveProfile, Speeds
from offload.errors import StorageError
from offload.io import Limits, choose_backend

pytestmark = pytest.mark.usefixtures("nothing_left")
GB = 1e9
SMALL, MIDDLE, LARGE = Limits(8, 1 << 18), Limits(32, 1 << 18), Limits(32, 1 << 19)
PROFILE = DriveProfile(
    read_bandwidth=2.5e9,
    write_bandwidth=3.0e9,
    mixed_bandwidth=2.75e9,
    block_nbytes=512 << 10,
    depth=64,
    backend="uring",
    is_direct=True,
    measured="2026-01-31",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and runs so short that their figures mean nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "WRITE_S", 0.05)
    monkeypatch.setattr(calibrate, "MEASURE_S", 0.1)
    monkeypatch.setattr(calibrate, "SCRATCH_NBYTES", (64 << 20,))
    return tmp_path / "cache" / "offload" / "drives.json"


# The choice


def even(rate: float) -> Speeds:
    return Speeds(rate, rate, rate)


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ({SMALL: even(1.0), MIDDLE: even(1.5), LARGE: even(2.0)}, LARGE),
        ({SMALL: even(1.0), MIDDLE: even(1.97), LARGE: even(2.0)}, MIDDLE),
        ({SMALL: even(1.0), MIDDLE: even(1.95), LARGE: even(2.0)}, LARGE),
        ({LARGE: even(2.0), MIDDLE: even(2.0), SMALL: even(1.99)}, SMALL),
        ({SMALL: Speeds(2.0, 1.0, 1.0), LARGE: Speeds(1.0, 1.0, 1.0)}, SMALL),
        ({SMALL: Speeds(9.0, 1.0, 1.0), LARGE: Speeds(8.0, 3.0, 3.0)}, LARGE),
        ({Limits(16, 1 << 20): even(1.0), Limits(32, 1 << 19): even(1.0)}, Limits(32, 1 << 19)),
        ({LARGE: even(0.0)}, LARGE),
    ],
)
def test_choice(measured: dict[Limits, Speeds], chosen: Limits) -> None:
    assert calibrate.choose(measured) == chosen


RATES = st.floats(1e6, 1e11)
MEASURED = st.dictionaries(
    st.sampled_from(CANDIDATES["uring"]), st.builds(Speeds, RATES, RATES, RATES), min_size=1
)


@given(MEASURED, st.floats(0.01, 100))
def test_choice_is_near_the_best_and_has_no_scale(
    measured: dict[Limits, Speeds], scale: float
) -> None:
    """Nothing measured beats the choice by more than 2 % in every test."""
    chosen = calibrate.choose(measured)
    for speeds in measured.values():
        pairs = zip(dataclasses.astuple(speeds), dataclasses.astuple(measured[chosen]), strict=True)
        assert min(rate / own for rate, own in pairs) <= 1 / calibrate.NEAR_BEST + 1e-9
    smallest = min(measured, key=lambda c: (c.depth * c.block_nbytes, c.block_nbytes))
    assert calibrate.choose({**measured, smallest: even(2e11)}) == smallest


def test_slow_drives_get_short_queues() -> None:
    for backend, known in CANDIDATES.items():
        assert calibrate.candidates(backend, 10 * GB) == known
        (only,) = calibrate.candidates(backend, 1e6)
        assert only.depth * only.block_nbytes <= 2 << 20
    for limits in calibrate.candidates("uring", 0.2 * GB):
        assert limits.depth * limits.block_nbytes <= 0.02 * GB


# The measurement


@pytest.mark.parametrize("backend", ["uring", "threads"])
def test_measures_and_leaves_nothing(nvme_dir: Path, backend: str) -> None:
    if backend == "uring" and choose_backend("auto")[0] != "uring":
        pytest.skip("io_uring is refused here")
    assert calibrate.cached_profile(nvme_dir / "new", backend) is None
    before = machine.io_counters()
    profile = calibrate.calibrate(nvme_dir / "new", backend)
    after = machine.io_counters()
    assert list((nvme_dir / "new").iterdir()) == []
    rates = (profile.read_bandwidth, profile.write_bandwidth, profile.mixed_bandwidth)
    assert all(1e6 < rate < 1e12 for rate in rates)
    assert profile.limits in CANDIDATES[backend] and profile.backend == backend
    if profile.is_direct and not machine.is_tmpfs(nvme_dir):
        assert after.read_bytes > before.read_bytes and after.write_bytes > before.write_bytes
    assert calibrate.cached_profile(nvme_dir, backend) == profile
    other = {"uring": "threads", "threads": "uring"}[backend]
    assert calibrate.cached_profile(nvme_dir, other) is None


def test_known_drives_are_not_measured_again(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate.profile_of(nvme_dir, "threads")

    def refuse(path: Path, backend: str) -> DriveProfile:
        raise AssertionError("measured again")

    monkeypatch.setattr(calibrate, "calibrate", refuse)
    assert calibrate.profile_of(nvme_dir, "threads") == first


def test_memory_posing_as_a_drive(tmpfs_dir: Path) -> None:
    assert calibrate.calibrate(tmpfs_dir, "threads").read_bandwidth > 0
    assert list(tmpfs_dir.iterdir()) == []


def test_without_direct_io(nvme_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that makes the file and then refuses works through the page cache."""
    true_open = os.open

    def refusing_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = true_open(path, flags & ~os.O_DIRECT, *args, **kwargs)
        if flags & os.O_DIRECT:
            os.close(fd)
            raise OSError(errno.EINVAL, "no direct I/O")
        return fd

    monkeypatch.setattr(os, "open", refusing_open)
    profile = calibrate.calibrate(nvme_dir, "threads")
    assert not profile.is_direct and profile.write_bandwidth > 0
    assert list(nvme_dir.iterdir()) == []


def test_the_scratch_file_has_no_name(nvme_dir: Path) -> None:
    with calibrate._scratch(nvme_dir) as (fd, nbytes, _):
        assert list(nvme_dir.iterdir()) == []
        status = os.fstat(fd)
        assert status.st_size == nbytes == status.st_blocks * 512


def test_too_little_room(nvme_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_nbytes", lambda path: 100 << 20)
    with pytest.raises(StorageError, match=f"{128 << 20} bytes of room") as caught:
        calibrate.calibrate(nvme_dir, "threads")
    assert caught.value.errno == errno.ENOSPC
    assert list(nvme_dir.iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file/below"):
        calibrate.calibrate(tmp_path / "file" / "below", "threads")


@pytest.mark.parametrize("backend", ["uring", "threads"])
def test_a_drive_that_fails(nvme_dir: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "uring" and choose_backend("auto")[0] != "uring":
        pytest.skip("io_uring is refused here")
    monkeypatch.setattr(calibrate, "_preallocate", lambda fd, nbytes: None)
    monkeypatch.setattr(calibrate, "_open_unnamed", lambda file: (os.open("/dev/full", 2), False))
    with pytest.raises(StorageError, match="measuring") as caught:
        calibrate.calibrate(nvme_dir, backend)
    assert caught.value.errno == errno.ENOSPC
    assert calibrate.cached_profile(nvme_dir, backend) is None


# The cache


def kept(path: Path, cache: Path, text: str) -> DriveProfile | None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(text)
    return calibrate.cached_profile(path, "uring")


def text_of(path: Path, version: int = calibrate.CACHE_VERSION, **changes: Any) -> str:
    row = dataclasses.asdict(PROFILE) | changes
    return json.dumps({"version": version, "drives": {calibrate._key(path, "uring"): row}})


def test_cache_gives_back_what_was_kept(nvme_dir: Path, cache: Path) -> None:
    assert kept(nvme_dir, cache, text_of(nvme_dir)) == PROFILE
    calibrate._keep("another drive", dataclasses.replace(PROFILE, depth=32))
    assert calibrate.cached_profile(nvme_dir, "uring") == PROFILE
    assert [path.name for path in cache.parent.iterdir()] == ["drives.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 0},
        {"depth": 3},
        {"depth": "64"},
        {"depth": True},
        {"block_nbytes": 1},
        {"backend": "magic"},
        {"is_direct": 1},
        {"read_bandwidth": 0.0},
        {"write_bandwidth": -1.0},
        {"mixed_bandwidth": float("nan")},
        {"read_bandwidth": float("inf")},
        {"colour": "red"},
    ],
    ids=str,
)
def test_odd_profiles_are_not_believed(nvme_dir: Path, cache: Path, changes: Any) -> None:
    assert kept(nvme_dir, cache, text_of(nvme_dir)) is not None
    assert kept(nvme_dir, cache, text_of(nvme_dir, **changes)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', '{"drives": 7}', "\0"])
def test_corrupt_caches_are_written_anew(nvme_dir: Path, cache: Path, text: str) -> None:
    assert kept(nvme_dir, cache, text) is None
    profile = calibrate.calibrate(nvme_dir, "threads")
    assert calibrate.cached_profile(nvme_dir, "threads") == profile


def test_a_cache_that_cannot_be_written(
    nvme_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert calibrate.calibrate(nvme_dir, "threads").depth > 0
    assert calibrate.cached_profile(nvme_dir, "threads") is None


# What tells drives apart


def test_identity_of_a_partition_is_that_of_its_drive(tmp_path: Path) -> None:
    number = os.stat(tmp_path).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    part = tmp_path / "devices" / "nvme0n1" / "nvme0n1p1"
    (part.parent / "device").mkdir(parents=True)
    (part.parent / "device" / "model").write_text("Fast Drive 9\n")
    (part.parent / "device" / "serial").write_text("S1\n")
    part.mkdir()
    (part / "partition").write_text("1\n")
    (part / "size").write_text("1000\n")
    links = tmp_path / "dev" / "block"
    links.mkdir(parents=True)
    (links / name).symlink_to(part)
    identity = machine.drive_identity(tmp_path / "not" / "there", sys=tmp_path)
    assert identity == f"{name} 1000 Fast_Drive_9 S1"


def test_identity_without_a_drive_ends_with_the_boot(tmp_path: Path) -> None:
    boot = tmp_path / "sys" / "kernel" / "random"
    boot.mkdir(parents=True)
    found = []
    for boot_id in ("one", "two"):
        (boot / "boot_id").write_text(f"{boot_id}\n")
        found.append(machine.drive_identity(tmp_path, sys=tmp_path / "none", proc=tmp_path))
    assert found[0] != found[1] and found[0].endswith(" one")
