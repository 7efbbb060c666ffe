"""Where the threads that move bytes run: fake trees of /sys, and the affinity of real threads."""

import os
from pathlib import Path

import pytest

from offload import doctor, io, numa, openmp
from offload.io import IoQueue, Limits
from offload.openmp import num_threads_advice

TWO = {0: frozenset({0, 1, 4, 5}), 1: frozenset({2, 3, 6, 7})}
ALL = frozenset(range(8))


class Tree:
    """A fake /sys."""

    def __init__(self, root: Path) -> None:
        self.sys = root / "sys"
        self.sys.mkdir()

    def node(self, number: int, cpulist: str) -> None:
        self.write(f"devices/system/node/node{number}/cpulist", f"{cpulist}\n")

    def write(self, name: str, text: object) -> Path:
        file = self.sys / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        return file

    def drive(self, number: str, name: str, node: int) -> Path:
        """An NVMe drive as the kernel shows it: a link to a device below its PCI function."""
        pci = f"devices/pci0000:00/0000:0{number[-1]}:00.0"
        self.write(f"{pci}/numa_node", node)
        device = self.sys / pci / "nvme/nvme0" / name
        device.mkdir(parents=True)
        self.link(number, device)
        return device

    def link(self, number: str, device: Path) -> None:
        link = self.sys / "dev/block" / number
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(device, link.parent))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("5", {5}), ("\n", set()), ("", set())],
)
def test_lists_of_cpus(text: str, cpus: set[int]) -> None:
    assert numa.parse_cpu_list(text) == cpus


def test_nodes_without_cpus_are_left_out(tree: Tree) -> None:
    tree.node(0, "0-1,4-5")
    tree.node(1, "2-3,6-7")
    tree.node(2, "")  # memory only
    assert numa.nodes(tree.sys) == TWO
    assert numa.nodes(tree.sys / "nothing") == {}


def test_a_drive_has_the_node_of_its_pci_function(tree: Tree) -> None:
    device = tree.drive("259:0", "nvme0n1", 1)
    partition = device / "nvme0n1p1"
    partition.mkdir()
    tree.link("259:1", partition)
    assert numa.node_of_block_device("259:0", tree.sys) == 1
    assert numa.node_of_block_device("259:1", tree.sys) == 1
    assert numa.node_of_block_device("8:0", tree.sys) is None


def test_a_node_that_the_kernel_does_not_know_is_none(tree: Tree) -> None:
    tree.drive("259:0", "nvme0n1", -1)
    assert numa.node_of_block_device("259:0", tree.sys) is None


@pytest.mark.parametrize(("other", "node"), [(1, 1), (0, None)])
def test_a_device_over_others_has_their_node_if_they_agree(
    other: int, node: int | None, tree: Tree
) -> None:
    below = [tree.drive("259:0", "nvme0n1", 1), tree.drive("259:1", "nvme1n1", other)]
    raid = tree.sys / "devices/virtual/block/md0"
    (raid / "slaves").mkdir(parents=True)
    for device in below:
        (raid / "slaves" / device.name).symlink_to(device)
    tree.link("9:0", raid)
    assert numa.node_of_block_device("9:0", tree.sys) == node


def test_a_gpu_has_the_node_of_its_address(tree: Tree) -> None:
    tree.write("bus/pci/devices/0000:3b:00.0/numa_node", 1)
    assert numa.node_of_pci("0000:3b:00.0", tree.sys) == 1
    assert numa.node_of_pci("0000:3c:00.0", tree.sys) is None


@pytest.mark.parametrize(
    ("drives", "gpu", "node"),
    [
        ([1], None, 1),
        ([1], 0, 1),  # the drive decides
        ([0, 1], 1, 1),  # a tie: the GPU
        ([0, 1], None, None),
        ([0, 1, 1], 0, 1),
        ([None], 1, 1),
        ([], 0, 0),
        ([None, None], None, None),
        ([7], None, None),  # no such node
    ],
)
def test_most_of_the_drives_decide_and_then_the_gpu(
    drives: list[int | None], gpu: int | None, node: int | None
) -> None:
    want = None if node is None else TWO[node]
    assert numa.choose_cpus(TWO, ALL, drives, gpu) == want


def test_on_one_node_nothing_happens() -> None:
    assert numa.choose_cpus({0: ALL}, ALL, [0], 0) is None
    assert numa.choose_cpus({}, ALL, [0], 0) is None


def test_only_cpus_that_this_process_may_use_are_chosen() -> None:
    assert numa.choose_cpus(TWO, {0, 2, 3}, [1], None) == {2, 3}
    assert numa.choose_cpus(TWO, {0, 2}, [1], None) is None  # one CPU is too few
    assert numa.choose_cpus(TWO, {0, 1}, [1], None) is None  # none there
    assert numa.choose_cpus(TWO, {2, 3}, [1], None) is None  # no others to keep away from


def test_on_this_machine_it_answers() -> None:
    chosen = numa.worker_cpus([Path("/")], "ffff:ff:1f.7")
    assert chosen is None or chosen < os.sched_getaffinity(0)


def affinities(name: str) -> list[set[int]]:
    """Of all threads of this process of that name."""
    tasks = Path("/proc/self/task").iterdir()
    return [
        os.sched_getaffinity(int(task.name))
        for task in tasks
        if (task / "comm").read_text().strip() == name
    ]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU is no choice")
def test_threads_run_where_their_limits_say_and_the_caller_where_it_was() -> None:
    before = os.sched_getaffinity(0)
    one = frozenset({max(before)})
    queue = IoQueue("threads", Limits(4, 1 << 20, cpus=one))
    try:
        assert affinities("offload-io") == [one] * io.NUM_THREADS
        assert os.sched_getaffinity(0) == before
    finally:
        queue.close()
    queue = IoQueue("threads", Limits(4, 1 << 20))
    try:
        assert affinities("offload-io") == [before] * io.NUM_THREADS
    finally:
        queue.close()


def test_cpus_that_cannot_be_had_are_no_error() -> None:
    before = os.sched_getaffinity(0)
    queue = IoQueue("threads", Limits(4, 1 << 20, cpus=frozenset({4000})))
    queue.close()
    assert os.sched_getaffinity(0) == before


def test_more_compute_threads_than_cpus_are_advised_against() -> None:
    assert num_threads_advice(8, 8) == "" and num_threads_advice(1, 2) == ""
    assert "8 threads, and this process can keep 3 busy" in num_threads_advice(8, 3)


def test_the_doctor_says_when_torch_computes_in_more_threads_than_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 64)
    assert "torch computes with 64 threads, and this process can keep" in doctor._cores()
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 1)
    assert doctor._cores().endswith("torch computes with 1")


def test_a_job_computes_in_no_more_threads_than_cpus_unless_the_user_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[int] = []
    monkeypatch.setattr(openmp.torch, "set_num_threads", said.append)
    monkeypatch.setattr(openmp.torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(openmp.machine, "usable_cpu_count", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    openmp.limit_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    openmp.limit_threads()
    assert said == [3]
