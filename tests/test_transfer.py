"""Compute devices: the stand-in keeps the contract of a real one however late its copies are."""

import itertools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device_contract import DeviceContract
from parity import bits
from rig import make_rig
from torch import Tensor

from offload.errors import PolicyError, StateError
from offload.slots import Slab
from offload.tier import DeviceEvent, Residency
from offload.transfer import Device, HostDevice, StandinDevice, StandinEvent, make_device


class TestStandin(DeviceContract):
    def make(self) -> Device:
        return StandinDevice()

    def late_event(self, device: Device) -> tuple[DeviceEvent, Callable[[], None]]:
        event = StandinEvent()
        return event, event.set

    def test_h2d_returns_at_once(self, device: Device) -> None:
        """It could not otherwise: the event that it waits for is set by this very thread."""
        there, source = device.allocate(64), torch.full((64,), 5, dtype=torch.uint8)
        after = StandinEvent()
        event = device.h2d(there, source, after)
        assert not event.query() and bool((there == 0xFF).all())
        after.set()
        event.synchronize()
        assert bool((there == 5).all())


class TestDelayedStandin(TestStandin):
    def make(self) -> Device:
        dice = random.Random(11)
        return StandinDevice(delay=lambda: dice.random() * 2e-3)


def test_directions_do_not_wait_for_each_other() -> None:
    device = StandinDevice()
    gate = StandinEvent()
    up = device.h2d(device.allocate(8), torch.zeros(8, dtype=torch.uint8), gate)
    device.d2h(torch.zeros(8, dtype=torch.uint8), device.allocate(8)).synchronize()
    assert not up.query()
    gate.set()
    device.close()
    assert up.query()


def test_fresh_device_memory_is_no_number() -> None:
    device = StandinDevice()
    assert bool(device.allocate(64).view(torch.bfloat16).isnan().all())
    device.close()


def test_copy_threads_end() -> None:
    before = threading.active_count()
    device = StandinDevice()
    assert threading.active_count() == before + 2
    device.close()
    assert threading.active_count() == before


# The engine on a device whose compute is late


class LateCompute(StandinDevice):
    """Compute that ends a while after it was submitted, and reads its weights until then.

    `damage` counts the slots whose bytes changed while compute could still have read them.
    """

    def __init__(self, compute_s: float) -> None:
        super().__init__(delay=lambda: 5e-4)
        self.compute_s = compute_s
        self.slots: list[Tensor] = []
        self.damage = 0
        self.num_checked = 0
        self._threads: list[threading.Thread] = []

    def allocate(self, nbytes: int) -> Tensor:
        self.slots.append(super().allocate(nbytes))
        return self.slots[-1]

    def compute_event(self) -> DeviceEvent | None:
        event = StandinEvent()
        thread = threading.Thread(target=self._compute, args=(event, *self._read))
        self._threads.append(thread)
        thread.start()
        return event

    def reading(self, slot: Tensor) -> None:
        """The compute that is submitted next reads this slot."""
        self._read = slot, slot.clone()

    def _compute(self, event: StandinEvent, slot: Tensor, before: Tensor) -> None:
        time.sleep(self.compute_s)
        self.num_checked += 1
        self.damage += not torch.equal(slot, before)
        event.set()

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        super().close()


def use_chunks(device: LateCompute, directory: Path, order: list[int]) -> None:
    """Enter and leave chunks as training would, all through one slot on the device."""
    with make_rig(directory, device=device, num_gpu_slots=1) as rig:
        assert len(device.slots) == 1
        for index in order:
            chunk = rig.chunks[index]
            rig.engine.enter(index, record=True)
            assert chunk.residency is Residency.GPU and chunk.gpu_slot is not None
            seen = [param.detach().clone() for param in chunk.params]
            for param, master in zip(seen, rig.masters[index], strict=True):
                torch.testing.assert_close(param.float(), master, rtol=2**-8, atol=0)
            device.reading(chunk.gpu_slot.tensor)
            rig.engine.leave(index)


def test_a_slot_is_not_refilled_while_compute_reads_it(nvme_dir: Path) -> None:
    device = LateCompute(compute_s=0.01)
    use_chunks(device, nvme_dir, [0, 1, 2, 1, 0, 2, 0])
    assert device.num_checked == 7 and device.damage == 0


class Deaf(LateCompute):
    """Copies without waiting for the event: what LateCompute must catch."""

    def h2d(self, target: Tensor, source: Tensor, after: DeviceEvent | None) -> DeviceEvent:
        return super().h2d(target, source, None)


def test_a_device_that_does_not_wait_is_caught(nvme_dir: Path) -> None:
    device = Deaf(compute_s=0.1)
    use_chunks(device, nvme_dir, [0, 1, 2, 1, 0])
    assert device.damage > 0


def test_weights_in_use_equal_those_on_the_host(nvme_dir: Path) -> None:
    """Through random delays, few slots and poison, each use sees the same bits."""
    dice = random.Random(3)
    delayed = StandinDevice(delay=lambda: dice.random() * 2e-3)
    order = [dice.randrange(4) for _ in range(25)]
    records = []
    for device in (HostDevice(), delayed):
        with make_rig(nvme_dir, num_chunks=4, device=device, tiers__cpu__weight_slots=1) as rig:
            records.append([[bits(param) for param in rig.bound(index)] for index in order])
    assert records[0] == records[1]


class LateCopies(StandinDevice):
    """As on CUDA, the host does not wait where compute does; copies up begin when `gate` opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = StandinEvent()
        self.gate.set()

    def h2d(self, target: Tensor, source: Tensor, after: DeviceEvent | None) -> DeviceEvent:
        return super().h2d(target, source, self.gate)

    def compute_waits(self, event: DeviceEvent) -> None:
        """Nothing: compute is not asked for its results here."""


@pytest.mark.parametrize("pinned", [False, True])
def test_weights_are_not_updated_while_they_are_copied_up(pinned: bool, nvme_dir: Path) -> None:
    """An evaluation between backward and step: its copy of the weights is still under way when the
    update could begin to change them.
    """
    device = LateCopies()
    changes = {"tiers__cpu": {"budget": "256MiB"}, "tiers__nvme": None} if pinned else {}
    with make_rig(nvme_dir, device=device, **changes) as rig:
        chunk = rig.chunks[0]
        rig.land_all(0, seed=1)
        rig.gradients.settle()
        rig.engine.drain()
        device.gate = StandinEvent()
        rig.engine.enter(0, record=True)
        region, slot = chunk.host_weight(), chunk.gpu_slot
        assert region is not None and slot is not None
        before = region.tensor.clone()
        rig.engine.leave(0)
        opening = threading.Timer(0.1, device.gate.set)
        opening.start()
        rig.engine.set_updates({0: rig.ops(0)})
        rig.engine.flush()
        opening.join()
        rig.engine.drain()
        assert bits(slot.tensor[: before.numel()]) == bits(before)
        after = chunk.host_weight()
        assert after is None or bits(after.tensor) != bits(before)


# The other devices


def test_the_host_copies_nothing() -> None:
    host, buffer = HostDevice(), torch.zeros(8)
    host.register(Slab(4096))
    assert host.is_host and host.compute_event() is None
    for call in (
        lambda: host.allocate(8),
        lambda: host.h2d(buffer, buffer, None),
        lambda: host.d2h(buffer, buffer),
    ):
        with pytest.raises(StateError, match="CPU as compute device"):
            call()
    host.close()


@pytest.mark.parametrize(("requested", "kind"), [("cpu", HostDevice), ("standin", StandinDevice)])
def test_named_devices(requested: str, kind: type) -> None:
    device = make_device(requested)
    assert type(device) is kind and device.torch_device == torch.device("cpu")
    device.close()


@pytest.mark.parametrize("count", [0, 2])
def test_cuda_devices_that_are_not_there(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for requested in itertools.chain(["cuda:2", "cuda:7"], ["cuda"] if count == 0 else []):
        with pytest.raises(PolicyError, match=f"device is {requested}, but torch sees {count} "):
            make_device(requested)
    if count == 0:
        assert isinstance(make_device("auto"), HostDevice)
