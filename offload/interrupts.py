"""Ctrl-C, put off where it would break something.

[Note: interrupts] Python raises KeyboardInterrupt between any two operations. Between the call that
takes completions from the native code and the loop that acts on them, it would lose them: their
slots would never be free again, and whoever waits for them would wait forever. Ctrl-C is likely
just there, because that is where training waits.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # those that programs turn into exceptions


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Run a short block whole: a signal that comes in it is handled right behind it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread alone
        return
    came: list[tuple[Any, int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    python_handlers = {int(n): h for n, h in handlers.items() if callable(h)}

    def put_off(number: int, frame: FrameType | None) -> None:
        came.append((python_handlers[number], number, frame))

    for number in python_handlers:
        signal.signal(number, put_off)
    try:
        yield
    finally:
        for number, handler in python_handlers.items():
            signal.signal(number, handler)
        for handler, number, frame in came:
            handler(number, frame)
