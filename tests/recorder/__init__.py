"""Record what a process does to a directory, and rebuild what a crash could leave of it.

    recording = record(directory, [sys.executable, "-c", code], scratch)
    problems = check_order(recording, is_commit)
    for k in range(recording.num_states):
        replay(recording, k, target, "all")

The I/O must go through libc (the engine's thread backend): io_uring is not seen.
"""

from recorder.crash import Choose, CrashModel, Seeded, replay
from recorder.log import Call, Event, Recording, read_log, record, snapshot
from recorder.order import check_order, unsynced

__all__ = [
    "Call",
    "Choose",
    "CrashModel",
    "Event",
    "Recording",
    "Seeded",
    "check_order",
    "read_log",
    "record",
    "replay",
    "snapshot",
    "unsynced",
]
