"""Moves between tiers as values, and the compute devices they go to. Only this file touches streams
and events.

[Note: stand-in device]
A machine without a GPU runs the same transfer code over StandinDevice: its memory is ordinary host
memory that only its copy threads write, in order per stream, with events. Chaos tests delay every
copy at random, so that a missing wait shows as a wrong hash here, long before a real GPU would show
it once in a thousand steps.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from offload.errors import PolicyError, StateError
from offload.slots import Slab
from offload.tier import DeviceEvent, Link


@dataclasses.dataclass(eq=False, slots=True)
class Transfer:
    """An in-flight move. Holds what must stay alive, and what to do once it is done.

    `finish(result, fd, offset)` runs in the engine's poll, never in a native thread. `event` is set
    for device copies, whose end is asked for; NVMe moves and updates end with a completion of their
    tag.
    """

    tag: int
    link: Link
    chunk: str
    nbytes: int
    start: float
    finish: Callable[[int, int, int], None]
    event: DeviceEvent | None = None
    keep: tuple[object, ...] = ()
    written: tuple[int, ...] = ()  # bytes by drive, where it is a write


class Device(Protocol):
    """What the engine asks of the place where compute happens."""

    torch_device: torch.device
    is_host: bool
    pci_address: str | None  # such as 0000:3b:00.0, for where its memory is near

    def register(self, slab: Slab) -> None:
        """Make the slab fit for asynchronous copies."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 buffer on the device."""

    def h2d(
        self, target: torch.Tensor, source: torch.Tensor, after: DeviceEvent | None
    ) -> DeviceEvent:
        """Copy into the device once `after` is reached; returns at once."""

    def d2h(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        """Copy out of the device after the compute submitted so far; returns at once."""

    def compute_event(self) -> DeviceEvent | None:
        """The point behind all compute submitted so far."""

    def compute_waits(self, event: DeviceEvent) -> None:
        """Make compute submitted from now on wait for `event`."""

    def close(self) -> None:
        """Finish all copies and give everything back. Idempotent."""


class HostDevice:
    """Compute on the CPU: weights are used where they lie, so nothing is ever copied."""

    torch_device = torch.device("cpu")
    pci_address: str | None = None
    is_host = True

    def register(self, slab: Slab) -> None:
        """Nothing to do: no copy engine reads the slab."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        raise StateError("the CPU as compute device has no memory of its own.")

    def h2d(
        self, target: torch.Tensor, source: torch.Tensor, after: DeviceEvent | None
    ) -> DeviceEvent:
        raise StateError("the CPU as compute device copies nothing.")

    def d2h(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        raise StateError("the CPU as compute device copies nothing.")

    def compute_event(self) -> DeviceEvent | None:
        return None

    def compute_waits(self, event: DeviceEvent) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to give back."""


def _pci_address(properties: Any) -> str | None:
    """Where a CUDA device is on the bus; releases of torch that do not say give None."""
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    parts = [getattr(properties, name, None) for name in names]
    if None in parts:
        return None
    domain, bus, device = parts
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


class CudaDevice:
    """A CUDA device: one stream per direction beside compute; the slab is registered once."""

    is_host = False

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        cuda: Any = torch.cuda  # untyped in part
        self._cuda = cuda
        self.pci_address = _pci_address(cuda.get_device_properties(index))
        self._h2d_stream = cuda.Stream(self.torch_device)
        self._d2h_stream = cuda.Stream(self.torch_device)
        self._registered: int | None = None

    def register(self, slab: Slab) -> None:
        # cudaHostRegister on our own mapping: torch's pinned allocator rounds up to powers of two.
        code = self._cuda.cudart().cudaHostRegister(slab.address, slab.nbytes, 0)
        if int(code) != 0:
            raise PolicyError(
                f"CUDA refuses to pin {slab.nbytes} bytes of host memory (error {int(code)}); "
                "lower tiers.cpu.budget, raise `ulimit -l`, or set tiers.cpu.pin: false for fewer "
                "pinned planes."
            )
        self._registered = slab.address

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def h2d(
        self, target: torch.Tensor, source: torch.Tensor, after: DeviceEvent | None
    ) -> DeviceEvent:
        with torch.cuda.stream(self._h2d_stream):
            if after is not None:
                self._h2d_stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event: DeviceEvent = self._h2d_stream.record_event()
            return event

    def d2h(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        self._d2h_stream.wait_stream(self._cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._d2h_stream):
            target.copy_(source, non_blocking=True)
            source.record_stream(self._d2h_stream)
            event: DeviceEvent = self._d2h_stream.record_event()
            return event

    def compute_event(self) -> DeviceEvent | None:
        event: DeviceEvent = self._cuda.current_stream(self.torch_device).record_event()
        return event

    def compute_waits(self, event: DeviceEvent) -> None:
        self._cuda.current_stream(self.torch_device).wait_event(event)

    def close(self) -> None:
        self._h2d_stream.synchronize()
        self._d2h_stream.synchronize()
        if self._registered is not None:
            self._cuda.synchronize(self.torch_device)
            self._cuda.cudart().cudaHostUnregister(self._registered)
            self._registered = None


class _StandinStream:
    """A thread that runs copies in order."""

    def __init__(self, name: str, delay: Callable[[], float] | None) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], None], StandinEvent] | None] = (
            queue.SimpleQueue()
        )
        self._delay = delay
        self._thread = threading.Thread(target=self._run, name=f"offload-{name}", daemon=True)
        self._thread.start()

    def enqueue(self, action: Callable[[], None]) -> StandinEvent:
        event = StandinEvent()
        self._work.put((action, event))
        return event

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            action, event = item
            if self._delay is not None:
                time.sleep(self._delay())
            action()
            event.set()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()


class StandinEvent(threading.Event):
    """DeviceEvent over a thread's progress."""

    def query(self) -> bool:
        return self.is_set()

    def synchronize(self) -> None:
        self.wait()


class StandinDevice:
    """Host memory behind real asynchronous copy threads. See [Note: stand-in device].

    `delay` gives seconds to sleep before each copy.
    """

    torch_device = torch.device("cpu")
    pci_address: str | None = None
    is_host = False

    def __init__(self, delay: Callable[[], float] | None = None) -> None:
        self._h2d_stream = _StandinStream("h2d", delay)
        self._d2h_stream = _StandinStream("d2h", delay)
        self._closed = False

    def register(self, slab: Slab) -> None:
        """Host memory needs no registration."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def h2d(
        self, target: torch.Tensor, source: torch.Tensor, after: DeviceEvent | None
    ) -> DeviceEvent:
        def copy() -> None:
            if after is not None:
                after.synchronize()
            target.copy_(source)

        return self._h2d_stream.enqueue(copy)

    def d2h(self, target: torch.Tensor, source: torch.Tensor) -> DeviceEvent:
        def copy() -> None:
            target.copy_(source)

        return self._d2h_stream.enqueue(copy)

    def compute_event(self) -> DeviceEvent | None:
        event = StandinEvent()  # compute is synchronous here: what was submitted is done
        event.set()
        return event

    def compute_waits(self, event: DeviceEvent) -> None:
        event.synchronize()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._h2d_stream.close()
            self._d2h_stream.close()


def make_device(requested: str) -> Device:
    """The compute device that tiers.gpu.device names; `auto` is CUDA if there is one, else the CPU.

    Raises PolicyError where a named CUDA device does not exist.
    """
    if requested == "standin":
        return StandinDevice()
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return HostDevice()
    index = int(requested.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise PolicyError(
            f"tiers.gpu.device is {requested}, but torch sees {torch.cuda.device_count()} CUDA "
            "devices. "
            "Set it to auto to compute on the CPU."
        )
    return CudaDevice(index)
