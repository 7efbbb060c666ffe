"""Fixtures for every test: fixed torch threads, folders on a real drive, and checks that nothing is
left behind.
"""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # zoo, parity and twins are modules beside the tests
from leaks import native_threads, open_files  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TMPFS = Path("/dev/shm")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; left out by -m 'not slow'")
    config.addinivalue_line(
        "markers", "root: mounts file systems or writes cgroups; skips without root"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root: mounts file systems or writes cgroups")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Bits of a matrix product may depend on the number of threads, so all tests use one."""
    torch.set_num_threads(1)


@pytest.fixture
def nvme_dir(tmp_path: Path) -> Path:
    """An empty folder for swap files, on the drive that holds pytest's temporary folder."""
    path = tmp_path / "nvme"
    path.mkdir()
    return path


@pytest.fixture
def tmpfs_dir(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in /dev/shm, where direct I/O has no alignment rules."""
    if not TMPFS.is_dir() or not os.access(TMPFS, os.W_OK):
        pytest.skip("no writable /dev/shm")
    path = TMPFS / f"offload-test-{os.getpid()}-{tmp_path.name}"
    path.mkdir()
    yield path
    for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    path.rmdir()


@pytest.fixture
def tiny_units() -> Iterator[None]:
    """Let embeddings and heads of tiny models leave RAM; see parity.small_units."""
    import parity

    with parity.small_units(1024):
        yield


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail when the test leaves a thread or an open file behind."""
    threads, files = native_threads(), open_files()
    yield
    deadline = time.monotonic() + 3.0
    while (native_threads() - threads or open_files() - files) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    left_threads = native_threads() - threads
    names = [thread.name for thread in threading.enumerate()]
    assert not left_threads, f"{len(left_threads)} threads left; Python knows {names}"
    assert not (open_files() - files), f"files left open: {open_files() - files}"
