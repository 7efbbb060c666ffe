"""A file system in user space that passes a folder through and misbehaves where its rules say.

Run as a program: fuse_drive.py FOLDER MOUNTPOINT RULES. It prints "ready" once it is mounted.

RULES is a JSON file with a list of rules, read again whenever another file takes its place. A rule
applies to reads or writes ("op") of files named "name" that touch bytes [begin, end), at most
`times` times: it makes them sleep `delay_s`, fail with `errno`, or move `short` bytes at most. Each
application adds a byte to RULES.hits, so that a test can tell that it happened.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mfusepy as fuse


class Rules:
    """The rules in force. FUSE calls from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp = 0
        self._rules: list[dict[str, Any]] = []

    def match(self, op: str, path: str, begin: int, end: int) -> dict[str, Any]:
        """The first rule for this call, with one of its times used up; {} for none."""
        with self._lock:
            stamp = self._path.stat().st_ino
            if stamp != self._stamp:
                self._stamp, self._rules = stamp, json.loads(self._path.read_text())
            for rule in self._rules:
                touches = begin < rule["end"] and rule["begin"] < end
                if rule["op"] == op and touches and path.endswith(rule["name"]) and rule["times"]:
                    rule["times"] -= 1
                    with self._path.with_suffix(".hits").open("ab") as hits:
                        hits.write(b".")
                    return rule
        return {}


class Drive(fuse.Operations):
    """Loopback; `rules` decides what goes wrong."""

    use_ns = True

    def __init__(self, folder: Path, rules: Rules) -> None:
        self._folder = folder
        self._rules = rules

    def _at(self, path: str) -> str:
        return f"{self._folder}{path}"

    def _obey(self, op: str, path: str, offset: int, nbytes: int) -> int:
        """Sleep or fail as the rules say; return how many bytes may move."""
        rule = self._rules.match(op, path, offset, offset + nbytes)
        time.sleep(rule.get("delay_s", 0.0))
        if "errno" in rule:
            raise fuse.FuseOSError(rule["errno"])
        return min(nbytes, rule.get("short", nbytes))

    def init(self, path: str) -> None:
        print("ready", flush=True)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        status = os.lstat(self._at(path))
        names = ("mode", "size", "nlink", "uid", "gid", "blocks", "ino")
        found = {f"st_{name}": getattr(status, f"st_{name}") for name in names}
        return found | {f"st_{x}time": getattr(status, f"st_{x}time_ns") for x in "amc"}

    def readdir(self, path: str, fh: int) -> Any:
        return [".", "..", *os.listdir(self._at(path))]

    def statfs(self, path: str) -> dict[str, int]:
        space = os.statvfs(self._at(path))
        names = ("bavail", "bfree", "blocks", "bsize", "frsize", "namemax")
        return {f"f_{name}": getattr(space, f"f_{name}") for name in names}

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._at(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._at(path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._at(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._at(old), self._at(new))
        return 0

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._at(path), length)
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT, mode)

    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags & ~os.O_DIRECT)

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        if mode:
            raise fuse.FuseOSError(95)  # EOPNOTSUPP: holes and their like are not passed through
        os.posix_fallocate(fh, offset, size)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, self._obey("read", path, offset, size), offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data[: self._obey("write", path, offset, len(data))], offset)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0


def main() -> None:
    folder, point, rules = (Path(word) for word in sys.argv[1:4])
    drive = Drive(folder, Rules(rules))
    # hard_remove: else an unlinked file that is still open stays as .fuse_hidden.
    # direct_io: else the kernel takes a short read for the file's end.
    options = {"foreground": True, "hard_remove": True, "use_ino": True, "direct_io": True}
    fuse.FUSE(drive, str(point), **options)


if __name__ == "__main__":
    main()
