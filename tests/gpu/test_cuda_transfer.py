"""The CUDA device keeps the stand-in's contract, and the engine's slots are safe on a real one."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device_contract import NBYTES, DeviceContract, pattern
from parity import bits
from rig import make_rig

from offload.slots import Region, Slab
from offload.tier import DeviceEvent
from offload.transfer import CudaDevice, Device, make_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LONG_CYCLES = 200_000_000  # about 0.1 s of a GPU's clock


class TestCuda(DeviceContract):
    def make(self) -> Device:
        return CudaDevice(0)

    def late_event(self, device: Device) -> tuple[DeviceEvent, Callable[[], None]]:
        stream = torch.cuda.Stream(device.torch_device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG_CYCLES)
        return stream.record_event(), lambda: None

    def busy(self, device: Device) -> None:
        torch.cuda._sleep(LONG_CYCLES)

    def test_the_host_does_not_wait(self, device: Device, regions: list[Region]) -> None:
        """Copies return while compute is still busy with what was before them."""
        there = device.allocate(NBYTES)
        torch.cuda.synchronize()
        self.busy(device)
        submitted = device.compute_event()
        up = device.h2d(there, regions[0].tensor, submitted)
        down = device.d2h(regions[1].tensor, there)
        assert submitted is not None
        assert not (submitted.query() or up.query() or down.query())
        down.synchronize()

    def test_copies_up_pass_busy_compute(self, device: Device, regions: list[Region]) -> None:
        """A prefetch into a free slot does not queue up behind compute."""
        there = device.allocate(NBYTES)
        torch.cuda.synchronize()
        self.busy(device)
        submitted = device.compute_event()
        device.h2d(there, regions[0].tensor, None).synchronize()
        assert submitted is not None and not submitted.query()

    def test_the_slab_is_pinned_and_let_go(self, device: Device) -> None:
        """CUDA refuses memory that is registered already, so close must have unregistered it."""
        slab = Slab(NBYTES)
        device.register(slab)
        assert slab.tensor.is_pinned()
        device.close()
        assert not slab.tensor.is_pinned()
        again = CudaDevice(0)
        again.register(slab)
        again.close()
        slab.close()


def test_auto_is_the_first_cuda_device() -> None:
    device = make_device("auto")
    assert device.torch_device == torch.device("cuda", 0) and not device.is_host
    device.close()


def test_slots_are_not_refilled_while_compute_reads_them(nvme_dir: Path) -> None:
    """One slot on the device, and compute that reads it long after the engine has moved on."""
    dice = random.Random(4)
    with make_rig(nvme_dir, device=CudaDevice(0), num_gpu_slots=1) as rig:
        seen = []
        order = [dice.randrange(3) for _ in range(8)]
        for index in order:
            rig.engine.enter(index, record=True)
            torch.cuda._sleep(LONG_CYCLES // 4)
            seen.append([param.detach().clone() for param in rig.chunks[index].params])
            rig.engine.leave(index)
        for index, params in zip(order, seen, strict=True):
            for param, master in zip(params, rig.masters[index], strict=True):
                torch.testing.assert_close(param.cpu().float(), master, rtol=2**-8, atol=0)


def test_gradients_land_while_compute_goes_on(nvme_dir: Path) -> None:
    """They are made by compute that is still running when they are told to leave."""
    with make_rig(nvme_dir, device=CudaDevice(0), tiers__cpu__grad_slots=1) as rig:
        want = {}
        for task in range(3):
            for index in range(3):
                for position in range(3):
                    grad = rig.grad(100 * task + 10 * index + position, position)
                    before = want.get((index, position))
                    value = grad.float()
                    want[index, position] = value if before is None else before + value
                    torch.cuda._sleep(LONG_CYCLES // 100)
                    late = grad.cuda() + torch.zeros_like(grad, device="cuda")
                    rig.gradients.land(index, position, late, task, split=False)
                    del late
                rig.gradients.complete(index)
        for (index, position), total in want.items():
            assert bits(rig.gradients.grad(rig.chunks[index], position).float()) == bits(total)


def test_patterns_survive_many_slots() -> None:
    """A slab of many buffers, each copied up and down beside the others."""
    device, slab, dice = CudaDevice(0), Slab(64 * NBYTES), random.Random(6)
    device.register(slab)
    regions = [slab.carve("buffers", NBYTES) for _ in range(64)]
    slots = [device.allocate(NBYTES) for _ in range(32)]
    for index in range(32):
        regions[index].tensor.copy_(pattern(index))
    order = dice.sample(range(32), 32)
    ups = {index: device.h2d(slots[index], regions[index].tensor, None) for index in order}
    for index in dice.sample(range(32), 32):
        device.compute_waits(ups[index])
        device.d2h(regions[32 + index].tensor, slots[index])
    device.close()
    for index, region in enumerate(regions[32:]):
        assert bits(region.tensor) == bits(pattern(index)), index
    slab.close()
