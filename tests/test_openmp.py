"""One parked thread keeps OpenMP from spinning: it lives as long as the engine, and no longer."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from parity import make_policy
from torch import nn

import offload
from offload import machine
from offload.openmp import Calm


def calm_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "offload-calm"]


@pytest.fixture
def may_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch ran on several threads that spin. The tests' torch has one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(machine, "openmp_may_spin", lambda: True)


@pytest.mark.usefixtures("may_spin", "nothing_left")
def test_the_thread_ends_with_close() -> None:
    calm = Calm()
    assert calm_threads() == ["offload-calm"]
    calm.close()
    calm.close()
    assert calm_threads() == []


@pytest.mark.usefixtures("may_spin")
def test_the_thread_does_not_keep_the_process(nvme_dir: Path) -> None:
    calm = Calm()
    assert all(t.daemon for t in threading.enumerate() if t.name == "offload-calm")
    calm.close()


@pytest.mark.usefixtures("may_spin", "nothing_left")
@pytest.mark.parametrize("ending", ["close", "exception", "bad start"])
def test_it_lives_as_long_as_the_engine(
    ending: str, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(nvme_dir)
    if ending == "bad start":
        monkeypatch.setattr(offload.Session, "_attach", None)
        with pytest.raises(TypeError):
            offload.offload(nn.Linear(4, 4), policy)
    else:
        with pytest.raises(KeyError if ending == "exception" else SystemExit):  # noqa: SIM117
            with offload.offload(nn.Linear(4, 4), policy):
                assert calm_threads() == ["offload-calm"]
                if ending == "exception":
                    raise KeyError
            else_closed()
    assert calm_threads() == []


def else_closed() -> None:
    raise SystemExit


@pytest.mark.usefixtures("may_spin", "nothing_left")
def test_compute_on_a_device_needs_no_calm(nvme_dir: Path) -> None:
    policy = make_policy(nvme_dir, tiers__gpu__device="standin")
    with offload.offload(nn.Linear(4, 4), policy):
        assert calm_threads() == []


@pytest.mark.parametrize(("num_threads", "spins"), [(1, True), (4, False)])
def test_nothing_is_parked_where_nothing_spins(
    num_threads: int, spins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(machine, "openmp_may_spin", lambda: spins)
    calm = Calm()
    assert calm_threads() == []
    calm.close()


# Real OpenMP threads, in a process of their own. Prints the number of kernel threads: with the main
# team, with the parked one beside it, and after close.
SCRIPT = """
import os, torch
from offload.openmp import Calm
torch.set_num_threads(2)
def count():
    return len(os.listdir("/proc/self/task"))
torch.ones(1 << 20).add_(1.0)
before = count()
calm = Calm()
during = count()
torch.ones(1 << 20).add_(1.0)
again = count()
calm.close()
print(before, during, again, count())
"""


def count_threads(environment: dict[str, str]) -> list[int]:
    command = [sys.executable, "-c", SCRIPT]
    root = Path(offload.__file__).parent.parent
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_the_parked_thread_has_a_team_that_stays() -> None:
    """libgomp counts them as threads in use, and that is what keeps all others from spinning."""
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("this torch does not use libgomp")
    before, during, again, after = count_threads({})
    assert during == before + 2  # the parked thread, and the second thread of its team
    assert again == during and after < during
