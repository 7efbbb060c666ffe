"""The recorder and its crash simulator: right protocols survive every crash, wrong ones do not."""

import hashlib
import itertools
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorder import (
    Call,
    CrashModel,
    Recording,
    Seeded,
    check_order,
    read_log,
    record,
    replay,
    snapshot,
)

NUM_STEPS = 3
DANCE = """
    import json, os, sys
    from pathlib import Path

    folder, order = Path(sys.argv[1]), sys.argv[2]
    swap = os.open(folder / "swap", os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(swap, 0, 8192)

    def sync_folder():
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)

    def publish(step):
        fd = os.open(folder / "manifest.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(fd, json.dumps({"step": step}).encode())
        if order != "manifest unsynced":
            os.fsync(fd)
        os.close(fd)
        os.replace(folder / "manifest.new", folder / "manifest")
        if order != "folder unsynced":
            sync_folder()

    if order != "folder unsynced":
        sync_folder()
    for step in range(1, 4):  # two extents: a step writes the older one
        os.pwrite(swap, bytes([step]) * 4096, 4096 * (step % 2))
        if order == "rename first":
            publish(step)
        if order != "data unsynced":
            os.fdatasync(swap)
        if order != "rename first":
            publish(step)
        if order != "folder unsynced":
            print(step, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def run(folder: Path, code: str, *arguments: str) -> Recording:
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder), *arguments]
    recording, done = record(folder, command, folder.parent)
    assert done.returncode == 0, done.stderr
    return recording


def crash_states(recording: Recording, target: Path) -> Iterator[int]:
    """Make every crash state in turn, undecided operations absent, there, or at random."""
    model = CrashModel(recording)
    for k in range(recording.num_states):
        for choose in ("none", "all", *(Seeded(seed, 512) for seed in range(4))):
            model.replay(k, target, choose)
            yield k


def what_is_wrong(target: Path) -> str:
    """What a reader of the dance's folder would find wrong."""
    manifest = target / "manifest"
    if not manifest.exists():
        return ""
    text = manifest.read_text()
    if text not in {f'{{"step": {step}}}' for step in range(1, NUM_STEPS + 1)}:
        return f"torn manifest {text!r}"
    step = int(text.removeprefix('{"step": ').removesuffix("}"))
    swap = target / "swap"
    data = swap.read_bytes() if swap.exists() else b""
    extent = data[4096 * (step % 2) :][:4096]
    return "" if extent == bytes([step]) * 4096 else f"manifest says {step}, its data is older"


# The log


def test_all_calls_are_there_in_order(folder: Path) -> None:
    recording = run(folder, DANCE, "right")
    names = [call.name for call in recording.calls]
    start = ["open", "posix_fallocate", "open", "fsync", "close"]
    publish = ["open", "write", "fsync", "close", "rename", "open", "fsync", "close"]
    assert names == start + ["pwrite", "fdatasync", *publish] * NUM_STEPS
    assert [event.call.begin for event in recording.events if not event.is_end] == [
        place for place, event in enumerate(recording.events) if not event.is_end
    ]
    for call in recording.calls:
        assert call.end is not None and call.begin < call.end and call.succeeded
    write = recording.calls[len(start)]
    assert (write.path, write.offset, write.data) == ("swap", 4096, b"\1" * 4096)
    rename = next(call for call in recording.calls if call.kind == "rename")
    assert (rename.path, rename.path2) == ("manifest.new", "manifest")


def test_what_is_outside_is_not_recorded(folder: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        folder = Path(sys.argv[1])
        (folder.parent / "other").write_bytes(b"x")
        (folder.parent / "running").mkdir()
        (folder.parent / "running" / "file").write_bytes(b"x")  # the same prefix, another folder
        os.symlink(folder, folder.parent / "link")
        (folder.parent / "link" / "inside").write_bytes(b"y")
        os.chdir(folder)
        Path("relative").write_bytes(b"z")
        os.close(os.open("late", os.O_CREAT | os.O_WRONLY, dir_fd=os.open(".", os.O_RDONLY)))
    """
    recording = run(folder, code)
    opened = [call.path for call in recording.calls if call.kind == "open"]
    assert opened == ["inside", "relative", "", "late"]


def test_threads_share_one_order(folder: Path) -> None:
    """Each write is inside the span in which its thread says that it ran; none is lost."""
    code = """
        import os, sys, threading
        from pathlib import Path
        fd = os.open(Path(sys.argv[1]) / "swap", os.O_RDWR | os.O_CREAT)
        def work(lane):
            for turn in range(50):
                os.pwrite(fd, bytes([lane]) * 512, 512 * (8 * turn + lane))
        threads = [threading.Thread(target=work, args=(lane,)) for lane in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os.fdatasync(fd)
    """
    recording = run(folder, code)
    writes = [call for call in recording.calls if call.kind == "write"]
    sync = next(call for call in recording.calls if call.kind == "sync")
    assert len(writes) == 400 and len({call.tid for call in writes}) == 8
    assert all(call.end is not None and call.end < sync.begin for call in writes)
    for _, group in itertools.groupby(sorted(writes, key=lambda c: c.tid), lambda c: c.tid):
        offsets = [call.offset for call in sorted(group, key=lambda c: c.begin)]
        assert offsets == sorted(offsets)


@pytest.mark.parametrize(
    "call",
    ["os.writev(fd, [b'x'])", "os.dup(fd)", "mmap.mmap(fd, 4096)", "os.rename(path, path + '/..')"],
)
def test_what_cannot_be_replayed_is_refused(call: str, folder: Path) -> None:
    code = f"""
        import mmap, os, sys
        path = sys.argv[1] + "/file"
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 4096)
        {call.replace("path + '/..'", "sys.argv[1] + '.out'")}
    """
    with pytest.raises(ValueError, match="cannot be replayed"):
        run(folder, code)


def test_a_killed_process_leaves_its_log(folder: Path, tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        fd = os.open(sys.argv[1] + "/file", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"x" * 4096, 0)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    recording, done = record(folder, command, folder.parent)
    assert done.returncode == -9
    assert [call.name for call in recording.calls] == ["open", "pwrite"]
    log = (tmp_path / "recorder.log").read_bytes()
    for cut in range(0, len(log), 97):  # died inside a record, or inside a call
        events = read_log(log[:cut], folder)
        CrashModel(Recording({}, events)).replay(len(events), tmp_path / "crash", "all")


# The simulator


@pytest.mark.parametrize("name", ["right", "folder unsynced"])
def test_the_end_is_what_was_there(name: str, folder: Path, tmp_path: Path) -> None:
    """With everything chosen, the last state is the directory itself, bit for bit."""
    recording = run(folder, DANCE, name)
    replay(recording, len(recording.events), tmp_path / "crash", "all")
    assert snapshot(tmp_path / "crash") == snapshot(folder)


def test_every_kind_of_call_is_replayed(folder: Path, tmp_path: Path) -> None:
    code = """
        import fcntl, os, shutil, sys
        from pathlib import Path
        folder = Path(sys.argv[1])
        with open(folder / "log", "ab") as file:
            file.write(b"two")
        with open(folder / "old", "r+b") as file:
            file.truncate(2)
            file.truncate(6)
        (folder / "gone").unlink()
        (folder / "new").mkdir()
        (folder / "new" / "deep").write_bytes(b"deep" * 3000)
        os.rename(folder / "new", folder / "named")
        os.link(folder / "named" / "deep", folder / "second")
        shutil.copyfile(folder / "second", folder / "copy")
        with open(folder / "second", "rb") as source, open(folder / "range", "wb") as target:
            os.copy_file_range(source.fileno(), target.fileno(), 1000, 50)
        with open(folder / "second", "rb") as source, open(folder / "clone", "wb") as target:
            try:
                fcntl.ioctl(target, 0x40049409, source.fileno())  # FICLONE
            except OSError:
                pass  # few file systems can
        (folder / "tree" / "leaf").parent.mkdir()
        (folder / "tree" / "leaf").touch()
        shutil.rmtree(folder / "tree")
    """
    (folder / "log").write_bytes(b"one")
    (folder / "old").write_bytes(b"old content")
    (folder / "gone").write_bytes(b"gone")
    before = snapshot(folder)
    recording = run(folder, code)
    model = CrashModel(recording)
    model.replay(len(recording.events), tmp_path / "crash", "all")
    assert snapshot(tmp_path / "crash") == snapshot(folder)
    assert (folder / "range").stat().st_size == 1000  # the copy did run
    model.replay(len(recording.events), tmp_path / "crash", "none")
    assert snapshot(tmp_path / "crash") == before


def test_the_right_order_survives_every_crash(folder: Path, tmp_path: Path) -> None:
    """And a step that was reported as committed is never lost."""
    recording = run(folder, DANCE, "right")
    synced = [c.end for c in recording.calls if c.kind == "sync" and c.path == ""][1:]
    assert len(synced) == NUM_STEPS
    target, seen = tmp_path / "crash", set()
    for k in crash_states(recording, target):
        assert what_is_wrong(target) == ""
        manifest = target / "manifest"
        step = int(manifest.read_text().strip('{"step: }')) if manifest.exists() else 0
        assert step >= sum(end is not None and end < k for end in synced)
        seen.add(step)
    assert seen == set(range(NUM_STEPS + 1))


@pytest.mark.parametrize(
    ("order", "wrong"),
    [
        ("rename first", "its data is older"),
        ("data unsynced", "its data is older"),
        ("manifest unsynced", "torn manifest"),
    ],
)
def test_a_wrong_order_is_exposed(order: str, wrong: str, folder: Path, tmp_path: Path) -> None:
    recording = run(folder, DANCE, order)
    found = {what_is_wrong(tmp_path / "crash") for _ in crash_states(recording, tmp_path / "crash")}
    assert any(wrong in text for text in found), found


def test_a_rename_without_its_folder_may_be_lost(folder: Path, tmp_path: Path) -> None:
    recording = run(folder, DANCE, "folder unsynced")
    replay(recording, len(recording.events), tmp_path / "crash", "none")
    assert snapshot(tmp_path / "crash") == {}


def test_a_write_may_be_torn(folder: Path, tmp_path: Path) -> None:
    """In prefixes of whole units of the drive, which lie where the drive has them."""
    code = """
        import os, sys
        fd = os.open(sys.argv[1] + "/file", os.O_RDWR)
        os.pwrite(fd, b"n" * 16384, 1024)
    """
    (folder / "file").write_bytes(b"o" * 20480)
    recording = run(folder, code)
    for unit in (512, 4096):
        lengths = set()
        for seed in range(200):
            replay(recording, len(recording.events), tmp_path / "crash", Seeded(seed, unit))
            data = (tmp_path / "crash" / "file").read_bytes()
            length = data.count(b"n")
            assert data == b"o" * 1024 + b"n" * length + b"o" * (20480 - 1024 - length)
            lengths.add(length)
        assert {0, 16384} < lengths
        assert all((1024 + length) % unit == 0 for length in lengths - {0, 16384})


def test_dsync_needs_no_sync(folder: Path, tmp_path: Path) -> None:
    code = """
        import os, sys
        for name, flags in (("safe", os.O_DSYNC), ("direct", os.O_DIRECT)):
            fd = os.open(sys.argv[1] + "/" + name, os.O_RDWR | flags)
            import mmap
            page = mmap.mmap(-1, 4096)
            page.write(b"n" * 4096)
            os.pwrite(fd, page, 0)
    """
    for name in ("safe", "direct"):
        (folder / name).write_bytes(b"o" * 4096)
    recording = run(folder, code)
    replay(recording, len(recording.events), tmp_path / "crash", "none")
    assert (tmp_path / "crash" / "safe").read_bytes() == b"n" * 4096
    assert (tmp_path / "crash" / "direct").read_bytes() == b"o" * 4096


def test_a_sync_covers_what_had_ended_before_it(tmp_path: Path) -> None:
    """A write that runs beside a sync is not covered by it; a sync that fails covers nothing."""
    for overlaps, error in itertools.product((False, True), (0, 5)):
        opened = Call("open", "open", 0, 1, path="f", flags=os.O_RDWR, end=1, result=3)
        order = [2, 4, 3, 5] if overlaps else [2, 3, 4, 5]
        write = Call("write", "pwrite", order[0], 1, 3, "f", data=b"n", end=order[1], result=1)
        sync = Call("sync", "fsync", order[2], 2, 3, "f", end=order[3], error=error)
        sync.result = -1 if error else 0
        recording = recording_of({"f": b"o"}, opened, write, sync)
        replay(recording, 6, tmp_path / "crash", "none")
        survives = not overlaps and error == 0
        assert (tmp_path / "crash" / "f").read_bytes() == (b"n" if survives else b"o")


def recording_of(base: dict[str, bytes | None], *calls: Call) -> Recording:
    from recorder import Event

    begins = [(call.begin, Event(call, False)) for call in calls]
    ends = [(call.end or 0, Event(call, True)) for call in calls]
    return Recording(base, [event for _, event in sorted(begins + ends, key=lambda row: row[0])])


def test_copies_inside_the_kernel(tmp_path: Path) -> None:
    """A clone answers 0 and moves all; a copy answers what it has moved."""
    opened = Call("open", "open", 0, 1, path="f", flags=os.O_RDWR, end=1, result=3)
    for name, result, want in (("ficlone", 0, b"new"), ("copy_file_range", 2, b"nex")):
        call = Call("write", name, 2, 1, 3, "f", data=b"new", end=3, result=result)
        replay(recording_of({"f": b"xxx"}, opened, call), 4, tmp_path / "crash", "all")
        assert (tmp_path / "crash" / "f").read_bytes() == want


# The engine under the recorder


ENGINE = """
    import hashlib, sys
    from pathlib import Path
    import torch
    from parity import Recipe, make_policy, train
    from zoo import ZOO
    import offload

    folder, entry = Path(sys.argv[1]), ZOO["linear_list"]
    policy = make_policy(folder, tiers__nvme__io="threads")
    with offload.offload(entry.make_model(), policy) as engine:
        train(engine, entry, Recipe(steps=2), "exact")
        print(hashlib.sha256((folder / "offload.swap").read_bytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_engine_is_seen(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that training writes is in the recording: replayed, it is the swap file bit for bit."""
    here = Path(__file__).resolve().parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}")
    command = [sys.executable, "-c", textwrap.dedent(ENGINE), str(folder)]
    recording, done = record(folder, command, tmp_path)
    assert done.returncode == 0, done.stderr
    unlink = next(c for c in recording.calls if c.kind == "unlink" and "swap" in c.path)
    writes = [c for c in recording.calls if c.kind == "write" and c.path == unlink.path]
    assert len(writes) > 20 and len({call.tid for call in writes}) > 1
    replay(recording, unlink.begin, tmp_path / "crash", "all")
    data = (tmp_path / "crash" / unlink.path).read_bytes()
    assert hashlib.sha256(data).hexdigest() == done.stdout.strip()
    assert snapshot(folder) == {}


# Rules of order


def is_manifest(call: Call) -> bool:
    return call.kind == "rename" and call.path2 == "manifest"


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ("right", ""),
        ("rename first", "pwrite swap at 4096, 4096 bytes is not safe when"),
        ("data unsynced", "pwrite swap at 4096, 4096 bytes is not safe when"),
        ("manifest unsynced", "write manifest.new at 0"),
        ("folder unsynced", "rename manifest.new to manifest"),
    ],
)
def test_the_order_is_checked(order: str, problem: str, folder: Path) -> None:
    problems = list(check_order(run(folder, DANCE, order), is_manifest, belongs=not_scratch))
    assert bool(problems) == bool(problem), problems
    assert not problem or any(problem in found for found in problems), problems


def not_scratch(call: Call, commit: Call) -> bool:
    """The temporary manifest's own name need not survive a crash: the rename carries the file."""
    return not (call.kind == "open" and call.path == "manifest.new")
