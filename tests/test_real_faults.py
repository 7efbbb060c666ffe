"""Drives that really fail under a training run: what the user sees, and what is left behind.

Each trial runs in a child of fault_box.py. Its answer becomes a row of the table that is printed at
the end, and that docs/faults.md keeps.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from drives import call, fill, fuse_drive, loop_drive, mounted

from offload._native import uring_probe

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
SWAP = "offload.swap"
needs_uring = pytest.mark.skipif(uring_probe() != 0, reason="io_uring is refused here")
both_backends = pytest.mark.parametrize("io", [pytest.param("uring", marks=needs_uring), "threads"])
linux_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 call numbers")
CHUNK = "layers.2"
Answer = dict[str, Any]


# The child, and the table


class Box:
    """fault_box.py, running."""

    def __init__(self, stderr: Path) -> None:
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._stderr = stderr
        with stderr.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "fault_box.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **threads, "PYTHONPATH": str(HERE.parent)},
            )

    def try_out(self, paths: list[Path], healthy: Path, **request: Any) -> Answer:
        """Run one trial. Fails where the child dies, or hangs and is ended by its watchdog."""
        pipes = self.process.stdin, self.process.stdout
        assert pipes[0] is not None and pipes[1] is not None
        defaults = {"io": "threads", "update": "deferred"}
        line = {"paths": [str(path) for path in paths], "healthy": str(healthy)}
        pipes[0].write(json.dumps({**defaults, **line, **request}) + "\n")
        pipes[0].flush()
        reply = pipes[1].readline()
        answer = json.loads(reply) if reply else {"died": "with the box"}
        assert "died" not in answer, f"{answer}\n{self._stderr.read_text()}"
        return answer


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    running = Box(tmp_path_factory.mktemp("box") / "stderr")
    yield running
    running.process.communicate(timeout=30)


class Row(NamedTuple):
    fault: str
    where: str
    sees: str
    left: str


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """Collects the outcomes, and prints them when the module is done."""
    rows: list[Row] = []
    yield rows
    plugins = request.config.pluginmanager
    terminal, capture = (
        plugins.get_plugin(name) for name in ("terminalreporter", "capturemanager")
    )
    if terminal is None or capture is None or not rows:
        return
    heading = Row("fault", "where", "what the user sees", "what is left")
    with capture.global_and_fixture_disabled():
        terminal.write_line("")
        for row in dict.fromkeys([heading, *rows]):
            terminal.write_line("| " + " | ".join(row) + " |")


def sees(answer: Answer) -> str:
    """The outcome in a few words."""
    error = answer["error"]
    if error is not None:
        code = errno.errorcode.get(error["errno"] or 0, "")
        return f"{error['type']} {code} ({'in training' if answer['later'] else 'at start'})"
    num_lines = len(answer["log"])
    said = f"{num_lines} warning{'s' * (num_lines > 1)}" if num_lines else "nothing"
    return f"{said}; same hashes"


def left(answer: Answer) -> str:
    files = ", ".join(dict.fromkeys(answer["files"])) or "no file"
    return f"model: {answer['model']}; drive: {files}"


# What must hold


def nothing_held(answer: Answer) -> None:
    """No thread, descriptor or lock, and the next engine in the same process works."""
    assert (answer["threads"], answer["fds"], answer["locks"]) == (0, [], 0)
    assert answer["healthy"]


def stopped(answer: Answer, code: int, path: Path) -> Answer:
    """Training ended with one StorageError that says all; return it."""
    nothing_held(answer)
    error = answer["error"]
    assert error is not None, "the run survived"
    assert (error["type"], error["errno"]) == ("StorageError", code), error
    assert error["path"] == str(path / SWAP) and error["offset"] >= 0 and error["chunk"], error
    for part in (errno.errorcode[code], error["path"], str(error["offset"]), error["chunk"]):
        assert part in error["text"]
    assert error["text"].rstrip().endswith(".") and error["text"].count(". ") >= 1  # a remedy
    return error


def stopped_in_training(answer: Answer, code: int, path: Path, *, is_gone: bool = False) -> Answer:
    """The engine stays stopped, and says what it could not take with it."""
    error = stopped(answer, code, path)
    assert answer["later"]["type"] == "StateError", answer["later"]
    assert error["text"] in answer["later"]["text"]
    assert answer["model"] == "placeholders"  # a weight that may be half written is not given back
    said_once(answer, "not given back", *(["swap stays behind", "lock stays behind"] * is_gone))
    return error


def survived(answer: Answer) -> None:
    nothing_held(answer)
    assert answer["error"] is None, answer["error"]
    assert answer["same"], "the hashes differ from a run in RAM"
    assert answer["model"] == "trained weights" and answer["files"] == []


def said_once(answer: Answer, *parts: str) -> None:
    """The log has these lines, each with a part, and no other; but two drives are too small here
    to be measured, and that is said, too.
    """
    lines = [line for line in answer["log"] if "share planes equally" not in line]
    assert len(lines) == len(parts), lines
    for part, line in zip(parts, lines, strict=True):
        assert part in line


# A drive that dies


@pytest.mark.root
@both_backends
@pytest.mark.parametrize(
    ("update", "when"),
    [("deferred", [1, "forward"]), ("eager", [1, "backward"])],
    ids=["in-forward", "in-backward"],
)
def test_drive_dies(
    io: str, update: str, when: list[Any], tmp_path: Path, box: Box, table: list[Row]
) -> None:
    with loop_drive(tmp_path / "image", tmp_path / "drive") as drive:
        fault = {"kind": "shut_down", "point": str(drive)}
        answer = box.try_out(
            [drive / "run"], tmp_path / "healthy", io=io, update=update, when=when, fault=fault
        )
        stopped_in_training(answer, errno.EIO, drive / "run", is_gone=True)
    table.append(Row("drive dies", f"step {when[0]}, {when[1]}", sees(answer), left(answer)))


@pytest.mark.root
@both_backends
@pytest.mark.parametrize("lost", [0, 1])
def test_one_drive_of_two_dies(
    io: str, lost: int, tmp_path: Path, box: Box, table: list[Row]
) -> None:
    """The error names the lost drive's path, and the other drive is left clean."""
    with (
        loop_drive(tmp_path / "image0", tmp_path / "drive0") as first,
        loop_drive(tmp_path / "image1", tmp_path / "drive1") as second,
    ):
        paths = [first / "run", second / "run"]
        fault = {"kind": "shut_down", "point": str((first, second)[lost])}
        answer = box.try_out(paths, tmp_path / "healthy", io=io, when=[1, "backward"], fault=fault)
        stopped_in_training(answer, errno.EIO, paths[lost], is_gone=True)
        assert list(paths[1 - lost].iterdir()) == []
    table.append(Row("one drive of two dies", "step 1, backward", sees(answer), left(answer)))


# A disk that is full although the file has its space


@pytest.mark.root
@both_backends
@pytest.mark.parametrize("when", ["start", [0, "backward"]], ids=["moving-in", "training"])
def test_thin_disk_fills(io: str, when: Any, tmp_path: Path, box: Box, table: list[Row]) -> None:
    """A sparse image on a tmpfs that fills up, as a thin volume: fallocate has succeeded."""
    small = mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=16m", "tmpfs")
    with small as backing, loop_drive(backing / "image", tmp_path / "drive") as drive:
        fault = {"kind": "fill", "folder": str(backing)}
        answer = box.try_out([drive], tmp_path / "healthy", io=io, when=when, fault=fault)
        if when == "start":
            stopped(answer, errno.ENOSPC, drive)
            assert answer["model"] == "its own weights"  # all of it is still there to go back
        else:
            stopped_in_training(answer, errno.ENOSPC, drive)
    moment = "while the model moves in" if when == "start" else "step 0, gradients are spilled"
    table.append(Row("thin disk fills up", moment, sees(answer), left(answer)))


@pytest.mark.root
def test_not_a_byte_is_free(tmp_path: Path, box: Box, table: list[Row]) -> None:
    """The start says how much is needed and free, although not even the lock's pid fits."""
    with loop_drive(tmp_path / "image", tmp_path / "drive", nbytes=2 << 20) as drive:
        fill(drive)
        answer = box.try_out([drive], tmp_path / "healthy")
        nothing_held(answer)
        error = answer["error"]
        assert (error["type"], error["errno"]) == ("StorageError", errno.ENOSPC), error
        assert error["path"] == str(drive / SWAP) and "and 0 are free" in error["text"]
        assert answer["model"] == "its own weights" and answer["files"] == ["filler"]
    table.append(Row("full drive", "at start", sees(answer), left(answer)))


# A backing file that is cut


@pytest.mark.root
@both_backends
def test_backing_file_is_cut(io: str, tmp_path: Path, box: Box, table: list[Row]) -> None:
    image = tmp_path / "image"
    with loop_drive(image, tmp_path / "drive") as drive:
        fault = {"kind": "truncate", "image": str(image), "nbytes": 4096, "settled": True}
        answer = box.try_out([drive], tmp_path / "healthy", io=io, when=[1, "forward"], fault=fault)
        stopped_in_training(answer, errno.EIO, drive)
    table.append(Row("blocks cannot be read", "step 1, forward", sees(answer), left(answer)))


# Chosen bytes: a file system in user space


def obey(
    tmp_path: Path, box: Box, io: str, rules: list[dict[str, Any]], when: Any = (0, "backward")
) -> tuple[Answer, Path]:
    rules_path = tmp_path / "rules"
    with fuse_drive(tmp_path / "behind", tmp_path / "drive", rules_path) as drive:
        fault = {"kind": "rules", "path": str(rules_path), "rules": rules}
        answer = box.try_out([drive], tmp_path / "healthy", io=io, when=list(when), fault=fault)
    assert answer["hits"] > 0, "the rules never applied"
    return answer, drive


@pytest.mark.root
@both_backends
@pytest.mark.parametrize(
    ("op", "plane", "code"),
    [
        ("read", "weight", errno.EIO),
        ("write", "weight", errno.EIO),
        ("write", "grad", errno.EIO),
        ("read", "grad", errno.EIO),
        ("write", "exp_avg", errno.ENOSPC),
        ("write", "residue", errno.EROFS),
        ("read", "exp_avg_sq", errno.EIO),
    ],
)
def test_bad_blocks(
    io: str, op: str, plane: str, code: int, tmp_path: Path, box: Box, table: list[Row]
) -> None:
    """One plane of one chunk fails: the error names that chunk, and an offset inside the plane."""
    rule = {"op": op, "chunk": CHUNK, "plane": plane, "errno": code}
    answer, drive = obey(tmp_path, box, io, [rule])
    error = stopped_in_training(answer, code, drive)
    assert error["chunk"] == CHUNK
    assert answer["files"] == []
    name = errno.errorcode[code]
    table.append(Row(f"{name} on a {op}", f"{plane} of one chunk", sees(answer), left(answer)))


@pytest.mark.root
@both_backends
@pytest.mark.parametrize("nbytes", [512, 4096, 1000])
def test_short_reads_go_on(
    io: str, nbytes: int, tmp_path: Path, box: Box, table: list[Row]
) -> None:
    """Of reads only: the kernel makes an EIO of a short direct write to FUSE."""
    answer, _ = obey(tmp_path, box, io, [{"op": "read", "short": nbytes}])
    survived(answer)
    said_once(answer)
    table.append(Row("short reads", "every read", sees(answer), left(answer)))


@pytest.mark.root
@both_backends
def test_slow_drive(io: str, tmp_path: Path, box: Box, table: list[Row]) -> None:
    rules = [{"op": op, "delay_s": 0.1, "times": 5} for op in ("read", "write")]
    answer, _ = obey(tmp_path, box, io, rules)
    survived(answer)
    assert answer["hits"] == 10
    said_once(answer)
    table.append(Row("100 ms latency", "ten transfers", sees(answer), left(answer)))


@pytest.mark.root
@both_backends
def test_busy_drive(io: str, tmp_path: Path, box: Box, table: list[Row]) -> None:
    rules = [
        {"op": op, "errno": code, "times": 10}
        for op in ("read", "write")
        for code in (errno.EAGAIN, errno.EINTR)
    ]
    answer, _ = obey(tmp_path, box, io, rules)
    survived(answer)
    assert answer["hits"] == 40
    said_once(answer)
    table.append(Row("EAGAIN and EINTR", "ten transfers each", sees(answer), left(answer)))


@pytest.mark.root
@both_backends
def test_swap_file_ends_early(io: str, tmp_path: Path, box: Box, table: list[Row]) -> None:
    """A read that finds nothing where bytes were written: never zeros, never a wait for more."""
    rule = {"op": "read", "chunk": CHUNK, "plane": "weight", "short": 0}
    answer, drive = obey(tmp_path, box, io, [rule])
    error = stopped_in_training(answer, errno.ENODATA, drive)
    assert error["chunk"] == CHUNK and "cut" in error["text"]
    table.append(Row("file ends early", "weight of one chunk", sees(answer), left(answer)))


# A system that refuses


@linux_x86
@needs_uring
def test_io_uring_denied(tmp_path: Path, box: Box, table: list[Row]) -> None:
    """`auto` trains on threads and says so once; `uring` is refused before anything is touched."""
    become = "without io_uring"
    answer = box.try_out([tmp_path / "run"], tmp_path / "healthy", io="auto", become=become)
    survived(answer)
    said_once(answer, "EPERM")
    table.append(Row("io_uring denied", "seccomp", sees(answer), left(answer)))


@pytest.mark.root
@needs_uring
@pytest.mark.parametrize("io", ["uring", "auto", "threads"])
def test_little_locked_memory(io: str, box: Box, table: list[Row]) -> None:
    """An ordinary user under the usual limit of 64 KiB trains, with io_uring where allowed."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))  # pytest's own lets only root in
    try:
        folder.chmod(0o777)
        become = "a user with 64 KiB of locked memory"
        answer = box.try_out([folder / "run"], folder / "healthy", io=io, become=become)
    finally:
        shutil.rmtree(folder)
    survived(answer)
    said_once(answer)
    table.append(Row("64 KiB of locked memory, not root", io, sees(answer), left(answer)))


# Unusual drives


@pytest.mark.root
@both_backends
@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_memory_as_drive(io: str, kind: str, tmp_path: Path, box: Box, table: list[Row]) -> None:
    """tmpfs is RAM; ramfs has no direct I/O and cannot preallocate: both train, and say so once."""
    with mounted(tmp_path / "drive", "-t", kind, kind) as drive:
        answer = box.try_out([drive], tmp_path / "healthy", io=io)
    survived(answer)
    said_once(answer, *(["tmpfs"] if kind == "tmpfs" else ["no direct I/O", "cannot preallocate"]))
    table.append(Row(f"{kind} as the drive", "whole run", sees(answer), left(answer)))


@pytest.mark.root
@both_backends
@pytest.mark.parametrize("file_system", ["ext2", "ext4"])
def test_drive_with_4k_sectors(
    io: str, file_system: str, tmp_path: Path, box: Box, table: list[Row]
) -> None:
    """ext2 cannot preallocate; what is aligned to 512 bytes only is refused by such a drive."""
    drive = loop_drive(
        tmp_path / "image", tmp_path / "drive", sector_nbytes=4096, file_system=file_system
    )
    with drive as point:
        assert call("blockdev", "--getss", call("findmnt", "-no", "SOURCE", point)) == "4096"
        answer = box.try_out([point], tmp_path / "healthy", io=io)
    survived(answer)
    said_once(answer, *(["cannot preallocate"] if file_system == "ext2" else []))
    row = Row(f"4096-byte sectors, {file_system}", "whole run", sees(answer), left(answer))
    table.append(row)
