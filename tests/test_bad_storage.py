"""Storage that is missing, held, full or read-only: one clear error at start, and no file stays
behind.
"""

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drives import loop_drive
from parity import Recipe, assert_same, make_policy, run_plain, train
from refusals import refused, works
from torch import nn
from zoo import ZOO

import offload

LLAMA = ZOO["llama"]
pytestmark = pytest.mark.usefixtures("nothing_left")


def test_path_that_does_not_exist_is_made(nvme_dir: Path) -> None:
    works(make_policy(nvme_dir / "a" / "b"))


def test_path_below_a_file(nvme_dir: Path) -> None:
    (nvme_dir / "file").write_text("x")
    error = refused(make_policy(nvme_dir / "file" / "swap"), offload.StorageError, "file/swap")
    assert error.errno in (errno.ENOTDIR, errno.EEXIST)


def test_second_engine_in_the_same_process(nvme_dir: Path) -> None:
    """The first engine is not disturbed by the refusal of the second."""
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        refused(make_policy(nvme_dir), offload.StateError, "in use")
        got = train(engine, LLAMA, Recipe(steps=1), "exact").record
    assert_same(got, run_plain(LLAMA, Recipe(steps=1), "exact").record)


def test_second_engine_on_the_same_model(nvme_dir: Path) -> None:
    model = LLAMA.make_model()
    refusal = pytest.raises(offload.StateError)
    with offload.offload(model, make_policy(nvme_dir / "first")), refusal:
        offload.offload(model, make_policy(nvme_dir / "second"))


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from parity import make_policy
from zoo import ZOO
import offload
with offload.offload(ZOO["branch"].make_model(), make_policy(Path(sys.argv[2]))):
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_second_engine_in_another_process(nvme_dir: Path) -> None:
    """The message names the process that holds the folder; when it ends, the folder is free."""
    command = [sys.executable, "-c", HOLDER, str(Path(__file__).parent), str(nvme_dir)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
            refused(make_policy(nvme_dir), offload.StateError, str(holder.pid))
        finally:
            holder.communicate("\n", timeout=120)
    works(make_policy(nvme_dir))


def test_tmpfs_works_with_a_warning(tmpfs_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """tmpfs is RAM: allowed, and said."""
    works(make_policy(tmpfs_dir))
    assert any(
        "tmpfs" in record.message or "direct I/O" in record.message for record in caplog.records
    )


@pytest.fixture
def small_ext4(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 6 MiB on a loop device."""
    with loop_drive(tmp_path / "small.img", tmp_path / "mount", nbytes=6 << 20) as mount:
        yield mount


@pytest.mark.root
def test_full_path(small_ext4: Path) -> None:
    """A full disk is an error at start, with the bytes needed and the bytes free."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))  # 12 MiB of state
    error = refused(make_policy(small_ext4), offload.StorageError, r"needs \d+ bytes", model)
    assert error.errno == errno.ENOSPC
    assert [path.name for path in small_ext4.iterdir() if path.is_file()] == []
    works(make_policy(small_ext4))


@pytest.mark.root
def test_read_only_path(small_ext4: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_ext4)], check=True)
    error = refused(make_policy(small_ext4), offload.StorageError, "writable")
    assert error.errno == errno.EROFS


def test_unwritable_folder(nvme_dir: Path) -> None:
    import os

    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    nvme_dir.chmod(0o555)
    refused(make_policy(nvme_dir), offload.StorageError, "access")


def test_second_path_bad_leaves_the_first_clean(nvme_dir: Path) -> None:
    (nvme_dir / "file").write_text("x")
    paths = [str(nvme_dir / "good"), str(nvme_dir / "file" / "bad")]
    refused(make_policy(nvme_dir, tiers__nvme__paths=paths), offload.StorageError, "bad")
    assert [path.name for path in nvme_dir.iterdir()] == ["file"]
