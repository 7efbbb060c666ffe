"""One parked thread keeps OpenMP from spinning: it lives as long as the engine, and no longer."""

import contextlib
import threading
from pathlib import Path

import pytest
import torch
from conftest import native_threads
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


@pytest.mark.usefixtures("may_spin", "nothing_left")
@pytest.mark.parametrize("error", [None, KeyError])
def test_it_lives_as_long_as_the_engine(error: type[Exception] | None, nvme_dir: Path) -> None:
    expected = contextlib.nullcontext() if error is None else pytest.raises(error)
    with expected, offload.offload(nn.Linear(4, 4), make_policy(nvme_dir)):
        assert calm_threads() == ["offload-calm"]
        if error is not None:
            raise error
    assert calm_threads() == []


@pytest.mark.usefixtures("may_spin", "nothing_left")
def test_it_ends_where_the_engine_does_not_start(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.Session, "_attach", None)  # called after the thread was started
    with pytest.raises(TypeError):
        offload.offload(nn.Linear(4, 4), make_policy(nvme_dir))
    assert calm_threads() == []


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


@pytest.mark.usefixtures("nothing_left")
def test_the_parked_thread_has_a_team_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """libgomp counts its threads, and more of them than cores is what keeps all from spinning."""
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("this torch does not use libgomp")
    monkeypatch.setattr(machine, "openmp_may_spin", lambda: True)
    before = native_threads()
    torch.set_num_threads(2)
    try:
        calm = Calm()
        assert len(native_threads() - before) == 2  # the parked one, and the second of its team
        calm.close()
    finally:
        torch.set_num_threads(1)
