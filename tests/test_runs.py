"""`offload clean`: it lists what lies there, and removes what nobody needs and nothing else."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import small_units
from test_checkpoint import finished_run, hashes
from test_cli import invoke
from test_durability import policy_of, start, train
from zoo import ZOO

import offload
from offload import runs, swapfile
from offload.runs import RunKind
from offload.swapfile import LOCK_NAME, MANIFEST_NAME, MEMBER_NAME, SWAP_NAME

ENTRY = ZOO["llama"]


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_units(1024):
        yield


def orphan(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / SWAP_NAME).write_bytes(bytes(8192))
    (folder / LOCK_NAME).write_text("1\n")
    return folder


def kinds(folder: Path) -> dict[str, RunKind]:
    return {info.folder.name: info.kind for info in runs.find_runs(folder)}


@pytest.fixture
def zoo_of_runs(nvme_dir: Path) -> Path:
    """An orphan, a committed run of two paths, its checkpoint; and things of other programs."""
    paths = finished_run(nvme_dir / "run", 2)
    from offload.offline import copy_run

    copy_run(paths, nvme_dir / "saved")
    orphan(nvme_dir / "dead")
    (nvme_dir / "web").mkdir()
    (nvme_dir / "web" / MANIFEST_NAME).write_text('{"name": "an extension"}')
    (nvme_dir / "mixed").mkdir()
    orphan(nvme_dir / "mixed" / "below")
    (nvme_dir / "mixed" / "below" / MANIFEST_NAME).write_text("{}")
    (nvme_dir / "mixed" / "below" / "notes.txt").write_text("mine")
    outside = orphan(nvme_dir.parent / "outside")
    (nvme_dir / "link").symlink_to(outside)
    (nvme_dir / "linked").mkdir()
    (nvme_dir / "linked" / SWAP_NAME).symlink_to(outside / SWAP_NAME)
    return nvme_dir


KINDS = {
    "drive0": RunKind.COMMITTED,
    "drive1": RunKind.MEMBER,
    "saved": RunKind.CHECKPOINT,
    "dead": RunKind.ORPHAN,
    "below": RunKind.ORPHAN,
}


def test_every_kind_is_listed_and_nothing_changes(zoo_of_runs: Path) -> None:
    before = hashes(zoo_of_runs)
    assert kinds(zoo_of_runs) == KINDS
    result = invoke("clean", str(zoo_of_runs))
    assert result.exit_code == 0, result.output
    assert result.output.count("kept") == len(KINDS) and "removed" not in result.output
    assert "step 3, format exact" in result.output
    assert hashes(zoo_of_runs) == before


@pytest.mark.parametrize("committed", [False, True])
def test_what_goes_and_what_stays(zoo_of_runs: Path, committed: bool) -> None:
    outside = zoo_of_runs.parent / "outside"
    before, kept = hashes(outside), hashes(zoo_of_runs / "saved", zoo_of_runs / "web")
    options = ["--remove", "--committed"] if committed else ["--remove"]
    result = invoke("clean", str(zoo_of_runs), *options)
    assert result.exit_code == 0, result.output
    gone = {"dead", "below"} | ({"drive0", "drive1"} if committed else set())
    assert kinds(zoo_of_runs) == {name: kind for name, kind in KINDS.items() if name not in gone}
    assert result.output.count("removed") == len(gone)
    assert hashes(zoo_of_runs / "saved", zoo_of_runs / "web") == kept
    below = zoo_of_runs / "mixed" / "below"
    assert sorted(path.name for path in below.iterdir()) == [MANIFEST_NAME, "notes.txt"]
    assert (zoo_of_runs / "linked" / SWAP_NAME).is_symlink() and hashes(outside) == before


def test_a_live_run_is_never_touched(nvme_dir: Path) -> None:
    with start(ENTRY, policy_of(nvme_dir / "run", ENTRY, "nvme")) as engine:
        train(engine, ENTRY, until=2)
        engine.flush()
        before = hashes(nvme_dir)
        result = invoke("clean", str(nvme_dir), "--remove", "--committed")
        assert result.exit_code == 0 and f"in use by pid {os.getpid()}" in result.output
        with pytest.raises(offload.StateError, match=f"pid {os.getpid()}"):
            runs.remove([nvme_dir / "run"], committed=True)
        assert hashes(nvme_dir) == before
        train(engine, ENTRY, until=3)


def test_a_committed_run_is_removed_only_when_meant(nvme_dir: Path) -> None:
    paths = finished_run(nvme_dir / "run", 2)
    before = hashes(*paths)
    for meant in (paths, paths[:1], paths[1:]):
        with pytest.raises(offload.StateError, match="holds a committed run"):
            runs.remove(meant, committed=False)
    assert hashes(*paths) == before  # not even a lock file is new
    runs.remove([*paths, nvme_dir / "no such"], committed=True)
    assert hashes(*paths) == {} and not (nvme_dir / "no such").exists()


@pytest.mark.parametrize("name", [SWAP_NAME, MEMBER_NAME])
def test_what_a_run_does_not_make_is_not_removed(nvme_dir: Path, name: str) -> None:
    orphan(nvme_dir / "run")
    (nvme_dir / "run" / SWAP_NAME).unlink()
    (nvme_dir / "run" / name).mkdir()
    with pytest.raises(offload.StateError, match="no regular file"):
        runs.remove([nvme_dir / "run"], committed=True)
    assert [path.name for path in (nvme_dir / "run").iterdir()] == [name]


def test_folders_that_are_not_there_are_named(nvme_dir: Path) -> None:
    result = invoke("clean", str(nvme_dir / "typo"))
    assert result.exit_code == 1 and "no such folder" in result.stderr
    assert "no runs here" in invoke("clean", str(nvme_dir)).output


def test_looking_does_not_keep_a_run_from_starting(nvme_dir: Path) -> None:
    """Who looks holds the lock for a moment; who starts tries again."""
    orphan(nvme_dir / "run")
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            runs.inspect(nvme_dir / "run")

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(100):
            swapfile.unlock(swapfile.lock(nvme_dir / "run"), nvme_dir / "run")
    finally:
        ended.set()
        looking.join()


# The command line of copies and exports


def test_checkpoint_and_export_from_the_command_line(nvme_dir: Path) -> None:
    paths = finished_run(nvme_dir / "run", 2)
    names = [str(path) for path in paths]
    copied = invoke("checkpoint", *names, str(nvme_dir / "copy"), "--rate", "1GiB")
    assert copied.exit_code == 0, copied.output
    assert kinds(nvme_dir / "copy") == {"copy": RunKind.CHECKPOINT}
    exported = invoke("export", str(nvme_dir / "copy"), str(nvme_dir / "out"))
    assert exported.exit_code == 0, exported.output
    assert (nvme_dir / "out" / "model.safetensors").exists()
    assert invoke("checkpoint", str(nvme_dir)).exit_code == 2
    again = invoke("checkpoint", *names, str(nvme_dir / "copy"))
    assert again.exit_code == 1 and "holds a committed run or a checkpoint" in again.stderr
    part = invoke("export", names[0], str(nvme_dir / "part"))
    assert part.exit_code == 1 and "lies on 2 paths" in part.stderr
