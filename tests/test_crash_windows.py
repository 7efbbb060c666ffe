"""What lies between two files of a run, two processes, two moments: nothing is lost or locked."""

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from chaos import small_units
from test_durability import in_child, policy_of, record_of, start, train
from zoo import ZOO

import offload
from offload import runfolder, swapfile
from offload.runfiles import read_manifest
from offload.swapfile import MANIFEST_NAME, SWAP_NAME


def paths_policy(folder: Path, num_paths: int = 2) -> tuple[dict[str, Any], list[Path]]:
    policy = policy_of(folder, ZOO["llama"], "nvme")
    paths = [folder / f"drive{index}" for index in range(num_paths)]
    policy["tiers"]["nvme"]["paths"] = [str(path) for path in paths]
    return policy, paths


@pytest.mark.parametrize("when", ["before the manifest", "removing"])
def test_a_crash_between_two_folders_does_not_lock_the_next_run_out(
    nvme_dir: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second path says whose member it is, and the first has no manifest yet, or no longer."""
    entry = ZOO["llama"]
    policy, paths = paths_policy(nvme_dir)

    def crash() -> None:
        def die(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if when == "before the manifest":
            monkeypatch.setattr("offload.manifest.encode", die)
        with small_units(1024):
            engine = start(entry, policy)
            train(engine, entry, until=2)
            monkeypatch.setattr(runfolder, "remove_small_files", die)
            engine.close(discard=True)

    in_child(crash)
    assert (paths[1] / swapfile.MEMBER_NAME).exists()
    assert not (paths[0] / MANIFEST_NAME).exists()
    with small_units(1024), start(entry, policy) as engine:
        train(engine, entry, until=1)


def test_a_member_without_its_first_drive_is_never_wiped(nvme_dir: Path) -> None:
    """An empty first folder is what a drive leaves that is not mounted."""
    entry = ZOO["llama"]
    policy, paths = paths_policy(nvme_dir)
    with small_units(1024):
        with start(entry, policy) as engine:
            train(engine, entry, until=1)
        paths[0].rename(nvme_dir / "away")
        before = (paths[1] / SWAP_NAME).read_bytes()
        with pytest.raises(offload.StateError, match="holds a committed run"):
            start(entry, policy)
        assert (paths[1] / SWAP_NAME).read_bytes() == before
        assert not paths[0].exists()  # a start that fails leaves no folder behind
        (nvme_dir / "away").rename(paths[0])
        with start(entry, policy, "resume") as engine:
            train(engine, entry, until=2)


def test_a_manifest_of_another_program_is_left_alone(nvme_dir: Path) -> None:
    entry = ZOO["llama"]
    (nvme_dir / MANIFEST_NAME).write_text('{"name": "an extension"}')
    with small_units(1024), pytest.raises(offload.StateError, match="no manifest of a run"):
        start(entry, policy_of(nvme_dir, entry, "nvme"))
    assert [path.name for path in nvme_dir.iterdir()] == [MANIFEST_NAME]


def test_a_commit_behind_the_reading_of_the_manifest_is_noticed(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old process commits its last step between our reading and our lock."""
    entry = ZOO["llama"]
    policy = policy_of(nvme_dir, entry, "nvme")
    with small_units(1024):
        with start(entry, policy) as engine:
            train(engine, entry, until=1)
        old = read_manifest(nvme_dir)
        with start(entry, policy, "resume") as engine:
            train(engine, entry, until=3)
        answers = iter([old, old, read_manifest(nvme_dir)])  # for the plan, and to resume
        monkeypatch.setattr("offload.opening.read_manifest", lambda folder: next(answers))
        before = (nvme_dir / SWAP_NAME).read_bytes()
        with pytest.raises(offload.StateError, match="in use a moment ago"):
            start(entry, policy, "resume")
        monkeypatch.undo()
        assert (nvme_dir / SWAP_NAME).read_bytes() == before
        with start(entry, policy, "resume") as engine:
            assert engine.recovered.step == 3


def test_weights_written_outside_of_a_step_are_committed(nvme_dir: Path) -> None:
    entry = ZOO["llama"]
    policy = policy_of(nvme_dir, entry, "mixed")
    with small_units(1024):
        with start(entry, policy) as engine:
            train(engine, entry, until=1)
            engine.flush()
            with engine.gathered(engine.model):
                for param in engine.model.parameters():
                    param.data.fill_(0.5)
            engine.run.progress = {"edited": True}
            engine.commit()
            want = record_of(engine)
            in_use = read_manifest(nvme_dir).progress
        with start(entry, policy, "resume") as engine:
            assert record_of(engine) == want
    assert in_use == {"edited": True}


def test_a_commit_that_nobody_collected_counts(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first commit is durable, and the run ends by an error before anybody asks."""
    entry = ZOO["llama"]
    policy = policy_of(nvme_dir, entry, "nvme")
    with small_units(1024):
        engine, failed = start(entry, policy), threading.Event()
        sync = engine._engine.store.sync
        monkeypatch.setattr(engine._engine.store, "sync", lambda: (failed.wait(), sync()))
        train(engine, entry, until=1)
        engine._engine.flush()
        while engine.run._commits._future is None:
            engine._engine.poll()
        engine._engine.fail(RuntimeError("elsewhere"))
        failed.set()
        engine._abort()
        with start(entry, policy, "resume") as engine:
            assert engine.recovered.step == 1


def test_a_lock_that_cannot_be_had_is_no_other_run(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(swapfile.fcntl, "flock", none)
    with pytest.raises(offload.StorageError, match="locking .*ENOLCK"):
        swapfile.lock(nvme_dir)


@pytest.mark.parametrize("name", [MANIFEST_NAME, swapfile.CHECKSUM_NAMES[0]])
def test_a_pipe_in_place_of_a_small_file_does_not_hang(nvme_dir: Path, name: str) -> None:
    entry = ZOO["llama"]
    policy = policy_of(nvme_dir, entry, "nvme")
    with small_units(1024):
        with start(entry, policy) as engine:
            train(engine, entry, until=1)
        (nvme_dir / name).unlink()
        os.mkfifo(nvme_dir / name)
        with pytest.raises(offload.StorageError, match="EINVAL"):
            start(entry, policy, "resume")
