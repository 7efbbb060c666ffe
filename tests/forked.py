"""Run code in a forked child, and end the child where it hangs."""

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

LIMIT_S = 20.0


@dataclass
class Ended:
    """How a child ended: what it said, its exit code, or the signal that ended it."""

    said: str
    code: int
    signal: int


def run_forked(action: Callable[[], object]) -> Ended:
    """What `action` returns, or the exception that it raises, is what the child says. It ends as a
    Python program does, by way of sys.exit and its atexit handlers.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            said = str(action())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        os.write(writer, said.encode())
        sys.exit(7)
    os.close(writer)
    ended, _, _ = select.select([watch := os.pidfd_open(pid)], [], [], LIMIT_S)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(watch)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Ended(said, os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1, by)
