"""What this process holds: its threads, its open files, its locks."""

import os
import threading


def native_threads() -> set[int]:
    """Kernel ids of this process's threads, those of the extension included; not tqdm's."""
    monitors = {t.native_id for t in threading.enumerate() if t.name == "tqdm_monitor"}
    return {int(name) for name in os.listdir("/proc/self/task")} - monitors


def open_files() -> set[str]:
    """What the file descriptors of this process point at, as descriptor:target."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            continue  # the descriptor of this very listing
    return found


def num_locks() -> int:
    """How many file locks (flock and fcntl) this process took and still holds."""
    with open("/proc/locks") as file:
        return sum(str(os.getpid()) in line.split() for line in file)
