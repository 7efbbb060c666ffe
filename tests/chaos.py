"""What disturbs a run without changing a number: delays, other orders and poison, and units scaled
down to tiny models.
"""

import importlib
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import offload


@contextmanager
def patched(owner: Any, **changes: Any) -> Iterator[None]:
    """Replace attributes of a class or module for a while."""
    before = {name: owner.__dict__[name] for name in changes}
    try:
        for name, value in changes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def small_units(small_numel: int) -> Iterator[None]:
    """Scale what suits large models down to tiny ones: the planner counts in 4 KiB pages, and
    embeddings and heads are no longer among the little tensors that always stay in RAM.
    """
    partition = importlib.import_module("offload.partition")
    with (
        patched(offload.plan, HUGE_PAGE_NBYTES=4096),
        patched(partition, SMALL_NUMEL=small_numel),
    ):
        yield


@contextmanager
def chaos(enabled: bool, seed: int = 0) -> Iterator[None]:
    """Delay and reorder every completion and copy, and poison every buffer that is given back."""
    if not enabled:
        yield
        return
    dice = random.Random(seed)
    with (
        scrambled(offload.io.IoQueue, dice),
        scrambled(offload.update.UpdatePipeline, dice),
        poisoned(offload.slots.SlotPool),
        delayed(offload.transfer.StandinDevice, dice),
    ):
        yield


def scrambled(owner: type, dice: random.Random) -> Any:
    """Hand completions out late and in random order. Works on IoQueue and UpdatePipeline alike."""
    submit, poll, wait = (owner.__dict__[name] for name in ("submit", "poll", "wait"))

    def held(queue: Any) -> list[Any]:
        return queue.__dict__.setdefault("_held", [])

    def release(queue: Any, at_least: int) -> list[Any]:
        waiting = held(queue)
        dice.shuffle(waiting)
        count = min(len(waiting), max(at_least, dice.randint(0, 2)))
        out = waiting[:count]
        del waiting[:count]
        return out

    def late_submit(queue: Any, *args: Any, **kwargs: Any) -> None:
        if dice.random() < 0.2:
            time.sleep(dice.random() * 1e-3)
        submit(queue, *args, **kwargs)

    def late_poll(queue: Any) -> list[Any]:
        held(queue).extend(poll(queue))
        return release(queue, 0)

    def late_wait(queue: Any, timeout_s: float) -> list[Any]:
        waiting = held(queue)
        waiting.extend(poll(queue) if waiting else wait(queue, timeout_s))
        return release(queue, 1)

    return patched(owner, submit=late_submit, poll=late_poll, wait=late_wait)


def poisoned(pool: type) -> Any:
    """Make every slot pool fill what it takes back with NaN."""
    make = pool.__init__

    def poisoning(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "poison": True})

    return patched(pool, __init__=poisoning)


def delayed(device: type, dice: random.Random) -> Any:
    """Make the stand-in device sleep before each copy."""
    make = device.__init__

    def slow(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, lambda: dice.random() * 2e-3)

    return patched(device, __init__=slow)
