"""The recorder's log: making it with shim.c, and reading it into calls and events."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SHIM = Path(__file__).with_name("shim.c")
KINDS = (
    "", "open", "write", "truncate", "fallocate", "sync", "rename", "link", "unlink", "mkdir",
    "close", "unsupported",
)  # fmt: skip
HEADER = struct.Struct("=QQIIiiqqqiIIIQ")  # struct Record of shim.c
Tree = dict[str, bytes | None]  # content of each file by its path in the directory; None: a folder


@dataclass(eq=False)
class Call:
    """One system call. `begin` and `end` are places in the recording's events; `end` is None where
    the process died inside the call.
    """

    kind: str
    name: str  # of the function: pwrite, ficlone, fdatasync, ...
    begin: int
    tid: int
    fd: int = -1
    path: str = ""  # in the directory; "" is the directory itself. Calls on an fd have its path
    path2: str = ""  # where a rename or link goes
    flags: int = 0  # of open
    offset: int = 0  # of a write; the new size of truncate and fallocate
    data: bytes = b""
    end: int | None = None
    result: int = 0
    error: int = 0

    @property
    def succeeded(self) -> bool:
        return self.end is not None and self.error == 0 and self.result >= 0

    def __str__(self) -> str:
        place = f" at {self.offset}, {len(self.data)} bytes" if self.kind == "write" else ""
        to = f" to {self.path2}" if self.path2 else ""
        return f"{self.name} {self.path or '.'}{to}{place}"


@dataclass(frozen=True)
class Event:
    """A call begins or ends."""

    call: Call
    is_end: bool

    def __str__(self) -> str:
        return f"{'end' if self.is_end else 'begin'} {self.call}"


@dataclass
class Recording:
    """What was there at first, and all that happened after, in order."""

    base: Tree
    events: list[Event] = field(default_factory=list)

    @property
    def calls(self) -> list[Call]:
        return [event.call for event in self.events if not event.is_end]

    @property
    def num_states(self) -> int:
        """Crash states: before anything, and after each event."""
        return len(self.events) + 1


def snapshot(directory: Path) -> Tree:
    """The files and folders under a directory."""
    found = sorted(directory.rglob("*"))
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in found
    }


@functools.cache
def build_shim() -> Path:
    """Compile shim.c with the compiler that the extension needs anyway."""
    folder = tempfile.mkdtemp(prefix="offload-recorder-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / "shim.so"
    command = [os.environ.get("CXX", "g++"), "-x", "c", "-O2", "-g0", "-Wall", "-Wextra", "-Werror"]
    command += ["-shared", "-fPIC", "-fvisibility=hidden", "-o", str(target), str(SHIM)]
    subprocess.run([*command, "-ldl", "-pthread"], check=True, timeout=120)
    return target


def record(
    directory: Path,
    command: Sequence[str],
    scratch: Path,
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120.0,
) -> tuple[Recording, subprocess.CompletedProcess[str]]:
    """Run a command and record what it does under `directory`; the log lies in `scratch`.

    The command may fail or be killed: what it had done until then is the recording.
    """
    log = scratch / "recorder.log"
    log.unlink(missing_ok=True)
    recording = Recording(snapshot(directory))
    variables = {
        "LD_PRELOAD": str(build_shim()),
        "RECORDER_DIRECTORY": str(directory.resolve()),
        "RECORDER_LOG": str(log.resolve()),
    }
    done = subprocess.run(
        list(command),
        env={**(os.environ if env is None else env), **variables},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    recording.events = read_log(log.read_bytes(), directory.resolve())
    return recording, done


def read_log(log: bytes, directory: Path) -> list[Event]:
    """The events of a log in their order. A record that was cut by the process's death is left out.

    Raises ValueError for calls that cannot be replayed.
    """
    rows = sorted(_rows(log), key=lambda row: row[0][0])
    calls: dict[int, Call] = {}
    paths: dict[int, str] = {}  # of open descriptors
    events: list[Event] = []
    for head, texts, data in rows:
        _, number, kind, is_end, tid, fd, a, b, result, error, *_ = head
        if is_end:
            call = calls[number]
            call.end, call.result, call.error = len(events), result, error
            if call.kind == "open" and call.succeeded:
                paths[result] = call.path
        else:
            name, path, path2 = texts
            inside, inside2 = (_relative(text, directory) for text in (path, path2))
            call = Call(KINDS[kind], name, len(events), tid, fd, inside, inside2, data=data)
            if call.kind == "open":
                call.flags = a
            call.offset = a
            if fd >= 0:
                call.path = paths[fd]
            if call.kind == "unsupported":
                raise ValueError(f"{call} cannot be replayed")
            if call.kind == "close":
                del paths[fd]
            calls[number] = call
        events.append(Event(call, bool(is_end)))
    return events


Row = tuple[tuple[int, ...], tuple[str, ...], bytes]


def _rows(log: bytes) -> list[Row]:
    rows: list[Row] = []
    place = 0
    while place + HEADER.size <= len(log):
        head = HEADER.unpack_from(log, place)
        place += HEADER.size
        texts = []
        for nbytes in head[10:13]:
            texts.append(os.fsdecode(log[place : place + nbytes]))
            place += nbytes
        data = log[place : place + head[13]]
        place += head[13]
        if place <= len(log):
            rows.append((head, tuple(texts), data))
    return rows


def _relative(path: str, directory: Path) -> str:
    if not path or not path.startswith(str(directory)):
        return path
    return path[len(str(directory)) :].lstrip("/")
