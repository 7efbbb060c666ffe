"""Run code in a forked child, and end the child where it hangs."""

import atexit
import gc
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass

LIMIT_S = 20.0
ENDED = 7  # the exit code of a child that came to its end


@dataclass
class Ended:
    """How a child ended: what it said, its exit code, or the signal that ended it."""

    said: str
    code: int
    signal: int


def run_forked(action: Callable[[], object]) -> Ended:
    """What `action` returns, or the exception that it raises, is what the child says. It then runs
    its atexit handlers, as a program does that ends.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(action())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        try:
            atexit._run_exitfuncs()
            gc.collect()
            os.write(writer, said.encode())
            os._exit(ENDED)
        finally:
            os._exit(1)
    os.close(writer)
    watch = os.pidfd_open(pid)
    ended, _, _ = select.select([watch], [], [], LIMIT_S)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(watch)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Ended(said, os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1, by)


def wait_until_gone(pid: int) -> None:
    """Wait for a process that is not ours to wait for: a grandchild whose parent has died."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([watch], [], [], LIMIT_S)
    os.close(watch)
