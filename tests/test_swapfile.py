"""The files of a run are its own: what is in the way, what others do to them, what is left."""

import errno
import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import wait_until_gone
from leaks import num_locks, open_files
from test_store import files_of, hold_in_child, make_paths

from offload import machine, runs, swapfile
from offload.errors import StateError, StorageError
from offload.store import ChunkStore
from offload.swapfile import (
    CHECKSUM_NAMES,
    LOCK_NAME,
    MANIFEST_NAME,
    MEMBER_NAME,
    SWAP_NAME,
    RunFiles,
)

RUN = "0123456789abcdef" * 2
NAMES = [LOCK_NAME, SWAP_NAME]


def make_store(*paths: Path, run: RunFiles | None = None) -> ChunkStore:
    files = ChunkStore(paths, run=run)
    files.allocate(64 << 10)
    return files


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    """No descriptor and no lock is left, whatever was refused."""
    files, locks = open_files(), num_locks()
    yield
    assert (open_files(), num_locks()) == (files, locks)


# What is in the way


@pytest.mark.parametrize("name", NAMES)
def test_a_symbolic_link_is_not_followed(name: str, nvme_dir: Path) -> None:
    victim = nvme_dir / "victim"
    victim.write_text("precious")
    folder = nvme_dir / "run"
    folder.mkdir()
    (folder / name).symlink_to(victim)
    with pytest.raises(StorageError, match="ELOOP.*Remove the link.*tiers.nvme.paths") as refused:
        make_store(folder).open(None)
    assert refused.value.path == str(folder / name)
    assert victim.read_text() == "precious" and os.readlink(folder / name) == str(victim)


@pytest.mark.parametrize("name", NAMES)
def test_a_hard_link_is_not_written_through(name: str, nvme_dir: Path) -> None:
    victim = nvme_dir / "victim"
    victim.write_text("precious")
    folder = nvme_dir / "run"
    folder.mkdir()
    os.link(victim, folder / name)
    with pytest.raises(StorageError, match="EMLINK.*second name"):
        make_store(folder).open(None)
    assert victim.read_text() == "precious" and victim.stat().st_nlink == 2


def test_a_resumed_swap_file_has_one_name(nvme_dir: Path) -> None:
    run = RunFiles(RUN)
    files = make_store(nvme_dir, run=run)
    files.open(None)
    files.close(keep=True)
    os.link(nvme_dir / SWAP_NAME, nvme_dir / "backup")
    before = (nvme_dir / "backup").read_bytes()
    with pytest.raises(StorageError, match="EMLINK"):
        ChunkStore([nvme_dir], run=RunFiles(RUN, (68 << 10,))).open(None)
    assert (nvme_dir / "backup").read_bytes() == before
    fd = swapfile.open_to_read(nvme_dir, run.header(0))  # to read it, that does not matter
    os.close(fd)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_at_once(name: str, kind: str, nvme_dir: Path) -> None:
    path = nvme_dir / name
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(StorageError) as refused:
        make_store(nvme_dir).open(None)
    assert refused.value.path == str(path)
    assert stat.S_ISFIFO(path.lstat().st_mode) == (kind == "pipe") and path.exists()


def test_a_pipe_in_place_of_a_swap_file_to_read(nvme_dir: Path) -> None:
    os.mkfifo(nvme_dir / SWAP_NAME)
    with pytest.raises(StorageError, match="not a regular file"):
        swapfile.open_to_read(nvme_dir, RunFiles(RUN).header(0))


def test_what_others_could_read_becomes_private(nvme_dir: Path) -> None:
    for name in NAMES:
        (nvme_dir / name).write_bytes(b"left behind")
        (nvme_dir / name).chmod(0o666)
    files = make_store(nvme_dir)
    files.open(None)
    modes = [stat.S_IMODE((nvme_dir / name).stat().st_mode) for name in NAMES]
    assert modes == [0o600, 0o600]
    files.close()


def test_a_resumed_swap_file_becomes_private(nvme_dir: Path) -> None:
    files = make_store(nvme_dir, run=RunFiles(RUN))
    files.open(None)
    files.close(keep=True)
    (nvme_dir / SWAP_NAME).chmod(0o644)
    again = ChunkStore([nvme_dir], run=RunFiles(RUN, (68 << 10,)))
    again.open(None)
    assert stat.S_IMODE((nvme_dir / SWAP_NAME).stat().st_mode) == 0o600
    again.close()


def test_a_manifest_that_cannot_be_looked_for_is_not_absent(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drive that fails must not make a committed run look like an empty folder."""
    (nvme_dir / MANIFEST_NAME).write_text("committed")
    lstat, original = os.lstat, os.stat

    def refuse(call: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def checked(path: object, *args: object, **kwargs: object) -> os.stat_result:
            if str(path).endswith(MANIFEST_NAME):
                raise OSError(errno.EACCES, "no")
            return call(path, *args, **kwargs)

        return checked

    monkeypatch.setattr(os, "lstat", refuse(lstat))
    monkeypatch.setattr(os, "stat", refuse(original))
    with pytest.raises((StorageError, StateError)):
        make_store(nvme_dir).open(None)
    monkeypatch.undo()
    assert (nvme_dir / MANIFEST_NAME).read_text() == "committed"


def test_a_dangling_link_as_manifest_is_not_replaced(nvme_dir: Path) -> None:
    """Its drive is not mounted, perhaps."""
    (nvme_dir / MANIFEST_NAME).symlink_to(nvme_dir / "absent")
    with pytest.raises(StateError, match="no manifest of a run"):
        make_store(nvme_dir).open(None)
    assert (nvme_dir / MANIFEST_NAME).is_symlink()


# A lock that somebody removed


def test_a_run_whose_lock_was_removed_spares_the_next(nvme_dir: Path) -> None:
    first, second = make_store(nvme_dir), make_store(nvme_dir)
    first.open(None)
    (nvme_dir / LOCK_NAME).unlink()
    second.open(None)
    assert not os.path.samestat(os.fstat(first._fds[0]), os.fstat(second._fds[0]))
    assert os.fstat(first._fds[0]).st_size == 64 << 10  # nor was its own file cut under it
    with pytest.raises(StorageError, match="ESTALE.*another run may have begun"):
        first.check_owned()
    first.close()
    assert files_of(nvme_dir) == NAMES
    second.check_owned()
    with pytest.raises(StateError, match="in use"):
        make_store(nvme_dir).open(None)
    second.close()
    assert files_of(nvme_dir) == []


def test_a_removed_lock_is_taken_again(nvme_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = make_store(nvme_dir)
    files.open(None)
    (nvme_dir / LOCK_NAME).unlink()
    files.check_owned()
    assert "locked again" in caplog.text
    with pytest.raises(StateError, match="in use"):
        make_store(nvme_dir).open(None)
    files.close()
    assert files_of(nvme_dir) == []


def test_a_removed_folder_stays_removed(nvme_dir: Path) -> None:
    folder = nvme_dir / "run"
    files = make_store(folder)
    files.open(None)
    for name in NAMES:
        (folder / name).unlink()
    folder.rmdir()
    files.close()
    assert not folder.exists()


# Who holds the lock


def test_a_dead_run_whose_child_keeps_the_lock_is_told(nvme_dir: Path) -> None:
    """By os.fork the child lets go; one that was made otherwise keeps the lock, and is named."""
    pid, child = leave_lock_with_a_child(nvme_dir, lets_go=False)
    try:
        with pytest.raises(StateError) as refused:
            make_store(nvme_dir).open(None)
        assert f"its run (pid {pid}) is dead" in str(refused.value)
        assert f"kill {child}" in str(refused.value)
    finally:
        os.kill(child, signal.SIGKILL)
        wait_until_gone(child)
    files = make_store(nvme_dir)
    files.open(None)
    files.close()


def test_a_forked_child_does_not_keep_the_lock(nvme_dir: Path) -> None:
    _, child = leave_lock_with_a_child(nvme_dir, lets_go=True)
    try:
        files = make_store(nvme_dir)
        files.open(None)
        files.close()
    finally:
        os.kill(child, signal.SIGKILL)
        wait_until_gone(child)


def leave_lock_with_a_child(folder: Path, *, lets_go: bool) -> tuple[int, int]:
    """A process opens a store, forks, and is killed; return its pid and its child's."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        files = make_store(folder)
        files.open(None)
        if not lets_go:
            files.let_go = lambda: None
        child = os.fork()
        if child == 0:
            os.write(writer, f"{os.getpid()}\n".encode())
        signal.pause()
        os._exit(1)
    os.close(writer)
    with open(reader) as pipe:
        child = int(pipe.readline())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return pid, child


def test_a_listing_in_between_does_not_refuse_a_start(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`offload clean` holds the lock for a moment, and the file names a run that died."""
    holder = hold_in_child(nvme_dir)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    looking = os.open(nvme_dir / LOCK_NAME, os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.close(looking))
    files = make_store(nvme_dir)
    files.open(None)
    files.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EINTR, errno.EIO])
def test_other_errors_of_the_lock_are_no_other_run(
    code: int, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError) as failed:
        make_store(nvme_dir).open(None)
    assert failed.value.errno == code and failed.value.path == str(nvme_dir / LOCK_NAME)
    assert "another run" not in str(failed.value)
    if code == errno.ENOLCK:
        assert "cannot lock files" in str(failed.value)


def test_a_lock_file_that_cannot_be_read_leaks_nothing(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_store(nvme_dir)
    files.open(None)

    def refuse(*args: object) -> bytes:
        raise OSError(errno.EIO, "no")

    for name in ("read", "pread"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises((StateError, StorageError)):
        make_store(nvme_dir).open(None)
    monkeypatch.undo()
    files.close()


# Starts that fail


def fails_with(error: BaseException) -> Callable[..., object]:
    def fail(*args: object, **kwargs: object) -> object:
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "call", ["machine.dioalign", "machine.is_tmpfs", "swapfile.fallocate", "swapfile._write_page"]
)
def test_a_start_that_fails_leaves_nothing(
    call: str, error: BaseException, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor, no file, and none of the folders that it made; others stay."""
    owner, name = call.split(".")
    (nvme_dir / "there").mkdir()
    files = make_store(nvme_dir / "there", nvme_dir / "a" / "b", run=RunFiles(RUN))
    monkeypatch.setattr({"machine": machine, "swapfile": swapfile}[owner], name, fails_with(error))
    with pytest.raises((StorageError, KeyboardInterrupt)):
        files.open(None)
    assert [p.name for p in nvme_dir.iterdir()] == ["there"]
    assert list((nvme_dir / "there").iterdir()) == []


def test_a_coarse_alignment_leaves_nothing(nvme_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "dioalign", lambda path: (8192, 8192))
    with pytest.raises(StorageError, match="EINVAL"):
        make_store(nvme_dir / "run").open(None)
    assert list(nvme_dir.iterdir()) == []


def test_a_folder_that_is_not_empty_stays(nvme_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        (nvme_dir / "run" / "mine").write_text("x")
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(swapfile, "fallocate", fail)
    with pytest.raises(StorageError, match="ENOSPC"):
        make_store(nvme_dir / "run").open(None)
    assert files_of(nvme_dir) == ["mine"]


def test_a_resume_without_its_swap_file_says_so(nvme_dir: Path) -> None:
    with pytest.raises(StorageError, match="swap file is not.*order of the run"):
        ChunkStore([nvme_dir], run=RunFiles(RUN, (8192,))).open(None)
    assert files_of(nvme_dir) == []


# A first commit that was not finished


def test_a_run_that_died_in_its_first_commit_begins_anew(nvme_dir: Path) -> None:
    """The other paths are marked before the manifest is written: killed in between, no step is
    committed, and nothing stands in the way. The mark of any other run does.
    """
    first, second = make_paths(nvme_dir, 2)
    files = make_store(first, second, run=RunFiles(RUN))
    files.open(None)
    files.close(keep=True)
    (second / MEMBER_NAME).write_text(f"{RUN} 1\n")
    (first / CHECKSUM_NAMES[0]).write_bytes(b"half")
    again = make_store(first, second, run=RunFiles("f" * 32))
    again.open(None)
    assert files_of(first) == files_of(second) == NAMES
    again.close(keep=True)
    (second / MEMBER_NAME).write_text(f"{RUN} 1\n")
    with pytest.raises(StateError, match="drive1 holds a committed run"):
        make_store(first, second).open(None)
    assert (second / MEMBER_NAME).exists()


# Listing


def test_a_listing_survives_a_run_that_ends_meanwhile(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nvme_dir / SWAP_NAME).write_bytes(bytes(8192))
    present = runs._present

    def ends(folder: Path) -> dict[str, os.stat_result]:
        names = present(folder)
        (folder / SWAP_NAME).unlink()
        return names

    monkeypatch.setattr(runs, "_present", ends)
    assert runs.inspect(nvme_dir).kind is runs.RunKind.ORPHAN
