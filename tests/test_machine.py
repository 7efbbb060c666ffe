"""Machine: limits of fake trees in both control group versions, and sense on the real machine."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload import machine

MIB = 1024**2
GIB = 1024**3
UNLIMITED_V1 = 9223372036854771712


class Tree:
    """A fake /proc and /sys/fs/cgroup with 16 GiB of RAM, 12 GiB of it available."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.cgroup = root / "cgroup"
        self.write("proc/meminfo", f"MemTotal: {16 * MIB} kB\nMemAvailable:  {12 * MIB} kB\n")
        self.write("proc/self/cgroup", "")

    def write(self, name: str, text: object) -> None:
        file = self.proc.parent / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(text))

    def limit_v1(self, group: str, limit: int, usage: int = 0, cache: int = 0) -> None:
        self.write(f"cgroup/memory{group}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"cgroup/memory{group}/memory.usage_in_bytes", f"{usage}\n")
        stat = f"inactive_file 1\ntotal_inactive_file {cache}\n"
        self.write(f"cgroup/memory{group}/memory.stat", stat)

    def limit_v2(self, group: str, limit: object, usage: int = 0, cache: int = 0) -> None:
        self.write(f"cgroup{group}/memory.max", f"{limit}\n")
        self.write(f"cgroup{group}/memory.current", f"{usage}\n")
        self.write(f"cgroup{group}/memory.stat", f"anon 5\ninactive_file {cache}\n")

    def memory(self) -> tuple[int, int]:
        roots = self.proc, self.cgroup
        return machine.memory_limit(*roots), machine.memory_available(*roots)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_groups_memory_is_the_machines(tree: Tree) -> None:
    assert tree.memory() == (16 * GIB, 12 * GIB)


def test_v1_group_limits_memory(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "9:cpu,cpuacct:/other\n4:memory:/a/b\n0::/\n")
    tree.limit_v1("/a/b", 2 * GIB, usage=GIB, cache=256 * MIB)
    assert tree.memory() == (2 * GIB, GIB + 256 * MIB)


def test_v1_unlimited_group_is_no_limit(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/a\n")
    tree.limit_v1("/a", UNLIMITED_V1, usage=GIB)
    assert tree.memory() == (16 * GIB, 12 * GIB)


def test_v2_group_limits_memory(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/user/me\n")
    tree.limit_v2("/user/me", 4 * GIB, usage=GIB, cache=512 * MIB)
    assert tree.memory() == (4 * GIB, 3 * GIB + 512 * MIB)


def test_v2_max_is_no_limit(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/user\n")
    tree.limit_v2("/user", "max", usage=GIB)
    assert tree.memory() == (16 * GIB, 12 * GIB)


def test_the_tightest_group_above_counts(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/outer/inner\n")
    tree.limit_v2("/outer/inner", 8 * GIB, usage=0)
    tree.limit_v2("/outer", 3 * GIB, usage=2 * GIB)
    assert tree.memory() == (3 * GIB, GIB)


def test_a_sibling_group_does_not_count(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/mine\n")
    tree.limit_v1("/mine", 8 * GIB)
    tree.limit_v1("/other", GIB)
    assert tree.memory() == (8 * GIB, 8 * GIB)


def test_v2_beside_v1_is_found_under_unified(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "1:cpu:/\n0::/mine\n")
    tree.limit_v2("/unified/mine", 5 * GIB)
    assert tree.memory() == (5 * GIB, 5 * GIB)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_container_that_sees_a_path_of_its_host_gets_its_own_root(
    tree: Tree, version: str
) -> None:
    if version == "v1":
        tree.write("proc/self/cgroup", "4:memory:/docker/0123\n")
        tree.limit_v1("", 6 * GIB)
    else:
        tree.write("proc/self/cgroup", "0::/../../docker/0123\n")
        tree.limit_v2("", 6 * GIB)
    assert tree.memory() == (6 * GIB, 6 * GIB)


def test_an_overdrawn_group_has_nothing_available(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/a\n")
    tree.limit_v2("/a", GIB, usage=2 * GIB)
    assert tree.memory() == (GIB, 0)


def cpu_count(tree: Tree, monkeypatch: pytest.MonkeyPatch, affinity: int = 8) -> int:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    return machine.usable_cpu_count(tree.proc, tree.cgroup)


def test_affinity_limits_cpus(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_count(tree, monkeypatch, affinity=3) == 3


@pytest.mark.parametrize(
    ("quota", "count"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)],
)
def test_v2_quota_limits_cpus(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, quota: str, count: int
) -> None:
    tree.write("proc/self/cgroup", "0::/a/b\n")
    tree.write("cgroup/a/cpu.max", quota)
    assert cpu_count(tree, monkeypatch) == count


@pytest.mark.parametrize(("quota", "count"), [(-1, 8), (400000, 4), (2000000, 8)])
def test_v1_quota_limits_cpus(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, quota: int, count: int
) -> None:
    tree.write("proc/self/cgroup", "2:cpu,cpuacct:/a\n")
    tree.write("cgroup/cpu/a/cpu.cfs_quota_us", quota)
    tree.write("cgroup/cpu/a/cpu.cfs_period_us", 100000)
    assert cpu_count(tree, monkeypatch) == count


def test_rss_and_peak_come_from_status(tree: Tree) -> None:
    tree.write("proc/self/status", "Name:\tpy\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert machine.rss(tree.proc) == MIB
    assert machine.peak_rss(tree.proc) == 2 * MIB


def test_rss_follows_what_the_process_touches() -> None:
    before = machine.rss()
    block = mmap.mmap(-1, 64 * MIB)  # malloc could give memory that is resident already
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    during = machine.rss()
    assert 60 * MIB < during - before < 80 * MIB
    assert machine.peak_rss() >= during
    block.close()


def test_io_counters_come_from_io(tree: Tree) -> None:
    tree.write("proc/self/io", "rchar: 9\nread_bytes: 4096\nwrite_bytes: 8192\n")
    assert machine.io_counters(tree.proc) == machine.IoCounters(4096, 8192)


def test_io_counters_count_a_flushed_write(tmp_path: Path) -> None:
    if machine.is_tmpfs(tmp_path):
        pytest.skip("the temporary folder is a tmpfs, which does no block I/O")
    before = machine.io_counters()
    with (tmp_path / "data").open("wb") as file:
        file.write(b"x" * MIB)
        file.flush()
        os.fsync(file.fileno())
    assert machine.io_counters().write_bytes - before.write_bytes >= MIB


MOUNTS = r"""22 27 0:21 / /proc rw - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 27 0:27 / {root} rw - xfs /dev/nvme0n1 rw
31 27 0:27 / {root}/with\040space rw - tmpfs tmpfs rw
32 27 0:28 / {root}/stacked rw - tmpfs tmpfs rw
33 27 0:29 / {root}/stacked rw - btrfs /dev/nvme1n1 rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("plain/not/made/yet", "xfs"),
        ("with space/file", "tmpfs"),
        ("with spaceship", "xfs"),
        ("stacked", "btrfs"),
        ("../elsewhere", "ext4"),
    ],
)
def test_file_system_is_that_of_the_nearest_mount(tree: Tree, path: str, kind: str) -> None:
    root = tree.proc.parent / "disk"
    for folder in ("with space", "stacked", "with spaceship"):
        (root / folder).mkdir(parents=True)
    tree.write("proc/self/mountinfo", MOUNTS.format(root=root))
    assert machine.file_system_type(root / path, tree.proc) == kind
    assert machine.is_tmpfs(root / path, tree.proc) == (kind == "tmpfs")


def test_file_system_follows_links(tree: Tree) -> None:
    root = tree.proc.parent / "disk"
    (root / "with space").mkdir(parents=True)
    (root / "link").symlink_to("with space")
    tree.write("proc/self/mountinfo", MOUNTS.format(root=root))
    assert machine.is_tmpfs(root / "link", tree.proc)


def test_the_real_shared_memory_folder_is_a_tmpfs() -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no /dev/shm here")
    assert machine.is_tmpfs("/dev/shm/not/made/yet")
    assert not machine.is_tmpfs("/proc")


def test_free_bytes_are_those_of_the_file_system(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    free = machine.free_nbytes(tmp_path / "not" / "made")
    assert abs(free - space.f_bavail * space.f_frsize) < GIB
    assert 0 <= free <= space.f_blocks * space.f_frsize


def test_dioalign_gives_alignments_that_work(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 65536)
    align = machine.dioalign(path)
    if align is None or align == (0, 0):
        pytest.skip("this kernel or file system does not say what direct I/O needs")
    memory, offset = align
    assert memory & (memory - 1) == 0 and 1 <= memory <= 4096
    assert offset & (offset - 1) == 0 and 512 <= offset <= 65536
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 65536) as buffer:
            assert os.preadv(file, [buffer], 0) == 65536
            assert os.preadv(file, [memoryview(buffer)[:offset]], offset) == offset
    finally:
        os.close(file)


def test_dioalign_of_a_folder_is_unknown(tmp_path: Path) -> None:
    assert machine.dioalign(tmp_path) is None


def test_dioalign_of_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        machine.dioalign(tmp_path / "none")
    assert caught.value.filename == str(tmp_path / "none")


@pytest.mark.parametrize(
    ("environment", "spins"),
    [
        ({}, True),
        ({"OMP_WAIT_POLICY": "passive"}, False),
        ({"OMP_WAIT_POLICY": " PASSIVE "}, False),
        ({"OMP_WAIT_POLICY": "active"}, True),
        ({"GOMP_SPINCOUNT": "0"}, False),
        ({"GOMP_SPINCOUNT": "100"}, True),
        ({"GOMP_SPINCOUNT": "infinity", "OMP_WAIT_POLICY": "passive"}, True),
        ({"GOMP_SPINCOUNT": "10k", "OMP_WAIT_POLICY": "passive"}, True),
        ({"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "active"}, False),
        ({"GOMP_SPINCOUNT": "many", "OMP_WAIT_POLICY": "passive"}, False),
        ({"GOMP_SPINCOUNT": "many"}, True),
    ],
)
def test_openmp_may_spin(tree: Tree, environment: dict[str, str], spins: bool) -> None:
    entries = {"SHELL": "sh", **environment, "EQUALS": "a=b"}
    tree.write("proc/self/environ", "".join(f"{k}={v}\0" for k, v in entries.items()))
    assert machine.openmp_may_spin(tree.proc) == spins


@pytest.mark.parametrize(("started", "changed"), [("passive", "active"), ("active", "passive")])
def test_openmp_policy_is_that_of_the_start(started: str, changed: str) -> None:
    script = (
        f"import os; os.environ['OMP_WAIT_POLICY'] = {changed!r}\n"
        f"import runpy; print(runpy.run_path({machine.__file__!r})['openmp_may_spin']())"
    )
    environment = {**os.environ, "OMP_WAIT_POLICY": started}
    environment.pop("GOMP_SPINCOUNT", None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(started == "active")


def test_real_limits_make_sense() -> None:
    assert 0 < machine.memory_available() <= machine.memory_limit()
    assert machine.rss() <= machine.peak_rss() <= machine.memory_limit()
    assert 1 <= machine.usable_cpu_count() <= len(os.sched_getaffinity(0))
