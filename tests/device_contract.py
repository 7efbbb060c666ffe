"""What every compute device with a memory of its own must do; run for the stand-in and for CUDA."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from parity import bits
from torch import Tensor

from offload.slots import Region, Slab
from offload.tier import DeviceEvent
from offload.transfer import Device

NBYTES = 1 << 16


def pattern(seed: int, nbytes: int = NBYTES) -> Tensor:
    """Random bytes (nbytes,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


class DeviceContract:
    """Subclasses say how to make the device, and how to make an event that is late."""

    def make(self) -> Device:
        raise NotImplementedError

    def late_event(self, device: Device) -> tuple[DeviceEvent, Callable[[], None]]:
        """An event that has not happened, and what makes it happen soon."""
        raise NotImplementedError

    def busy(self, device: Device) -> None:
        """Give compute something to do that takes long, where compute is asynchronous."""

    @pytest.fixture
    def device(self) -> Iterator[Device]:
        device = self.make()
        yield device
        device.close()

    @pytest.fixture
    def regions(self, device: Device) -> Iterator[list[Region]]:
        """Eight host buffers in a slab that the device knows."""
        slab = Slab(8 * NBYTES)
        device.register(slab)
        yield [slab.carve("buffers", NBYTES) for _ in range(8)]
        device.close()
        slab.close()

    def test_round_trip(self, device: Device, regions: list[Region]) -> None:
        want = pattern(1)
        there, here = device.allocate(NBYTES), regions[1].tensor
        regions[0].tensor.copy_(want)
        up = device.h2d(there, regions[0].tensor, None)
        up.synchronize()
        assert up.query()
        down = device.d2h(here, there)
        down.synchronize()
        assert down.query() and bits(here) == bits(want)

    def test_copy_up_waits_for_its_event(self, device: Device, regions: list[Region]) -> None:
        """Compute may still read the slot's last bytes: no copy starts before it has finished."""
        there = device.allocate(NBYTES)
        regions[0].tensor.copy_(pattern(2))
        after, release = self.late_event(device)
        event = device.h2d(there, regions[0].tensor, after)
        early = event.query() and not after.query()
        release()
        event.synchronize()
        assert not early and after.query()
        device.compute_waits(event)
        assert bits(there) == bits(pattern(2))

    def test_copies_up_keep_their_order(self, device: Device, regions: list[Region]) -> None:
        there = device.allocate(NBYTES)
        for index, region in enumerate(regions):
            region.tensor.copy_(pattern(index))
        events = [device.h2d(there, region.tensor, None) for region in regions]
        events[-1].synchronize()
        assert all(event.query() for event in events)
        assert bits(there) == bits(pattern(len(regions) - 1))

    def test_compute_waits_for_the_copy(self, device: Device, regions: list[Region]) -> None:
        """Without the host waiting for anything."""
        there = device.allocate(NBYTES)
        regions[0].tensor.copy_(pattern(3))
        device.compute_waits(device.h2d(there, regions[0].tensor, None))
        assert bits(there.clone()) == bits(pattern(3))

    def test_copy_down_waits_for_compute(self, device: Device, regions: list[Region]) -> None:
        there = device.allocate(NBYTES)
        self.busy(device)
        there.fill_(7)
        device.d2h(regions[0].tensor, there).synchronize()
        assert bool((regions[0].tensor == 7).all())

    def test_source_of_a_copy_down_may_be_dropped(
        self, device: Device, regions: list[Region]
    ) -> None:
        """A gradient is released right after it was told to leave; its memory is reused at once."""
        self.busy(device)
        events = []
        for region in regions:
            source = device.allocate(NBYTES).fill_(9)
            events.append(device.d2h(region.tensor, source))
            del source
            device.allocate(NBYTES).fill_(1)
        for event in events:
            event.synchronize()
        assert all(bool((region.tensor == 9).all()) for region in regions)

    def test_both_directions_at_random(self, device: Device, regions: list[Region]) -> None:
        """Slots on the device are refilled and read back in a random order, events only."""
        dice = random.Random(5)
        slots = [device.allocate(NBYTES) for _ in range(3)]
        holds: list[int | None] = [None] * 3
        free: list[DeviceEvent | None] = [None] * 3
        downs: list[tuple[DeviceEvent, int, int]] = []
        sources, targets = regions[:4], regions[4:]
        for index, region in enumerate(sources):
            region.tensor.copy_(pattern(index))
        for _ in range(60):
            slot, source = dice.randrange(3), dice.randrange(4)
            device.compute_waits(device.h2d(slots[slot], sources[source].tensor, free[slot]))
            holds[slot] = source
            other = dice.randrange(3)
            content = holds[other]
            if content is not None:
                target = dice.randrange(4)
                event = device.d2h(targets[target].tensor, slots[other])
                event.synchronize()  # before the target is written by the next copy
                downs.append((event, target, content))
                assert bits(targets[target].tensor) == bits(pattern(content))
            free[slot] = device.compute_event()
        assert downs

    def test_close_finishes_what_was_started(self, device: Device, regions: list[Region]) -> None:
        there = [device.allocate(NBYTES) for _ in regions]
        for index, region in enumerate(regions):
            region.tensor.copy_(pattern(index))
        events = [
            device.h2d(target, region.tensor, None)
            for target, region in zip(there, regions, strict=True)
        ]
        device.close()
        device.close()
        assert all(event.query() for event in events)
        assert [bits(t) for t in there] == [bits(pattern(i)) for i in range(len(regions))]
