"""Checkpoints beside training: their failures stay their own, and what they share stays whole."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import small_units
from drives import loop_drive
from leaks import open_files
from safetensors.torch import load_file
from test_durability import (
    NUM_STEPS,
    continue_from,
    policy_of,
    record_of,
    start,
    train,
    undisturbed,
)
from zoo import ZOO

import offload
from offload import checkpointfile, swapfile
from offload.offline import copy_run, export_step
from offload.runfiles import read_manifest
from offload.swapfile import LOCK_NAME, MANIFEST_NAME, SWAP_NAME

ENTRY = ZOO["llama"]


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_units(1024):
        yield


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hashes(*folders: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# What fails in a checkpoint


@pytest.mark.parametrize("place", ["writing", "flushing", "manifest", "cleaning up"])
def test_a_failed_checkpoint_is_told_and_training_goes_on(
    nvme_dir: Path, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where nobody waits for it, and where what is left cannot be removed."""
    want = undisturbed(ENTRY, nvme_dir / "plain")
    policy = policy_of(nvme_dir / "run", ENTRY, "nvme", durability="off")
    saved = nvme_dir / "saved"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    held = open_files()
    torch.manual_seed(5)
    with start(ENTRY, policy) as engine:
        train(engine, ENTRY, until=2)
        names = {"writing": "pwrite", "manifest": "rename"}
        with monkeypatch.context() as patch:
            patch.setattr(os, names.get(place, "fsync"), full)
            if place == "cleaning up":
                patch.setattr(Path, "unlink", full)
            with contextlib.suppress(offload.StorageError):  # a plane in RAM fails at once
                copy = engine.checkpoint(saved, wait=False)
                with pytest.raises(offload.StorageError, match="ENOSPC"):
                    copy.wait()
                assert copy.is_done
        train(engine, ENTRY, until=NUM_STEPS)
        assert record_of(engine) == want
    assert open_files() == held
    if place != "cleaning up":
        assert files_in(saved) == []
        assert str(saved) in caplog.text or place == "writing"


def test_a_full_drive_names_what_a_checkpoint_needs(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with start(ENTRY, policy_of(nvme_dir / "run", ENTRY, "nvme")) as engine:
        train(engine, ENTRY, until=1)
        with monkeypatch.context() as patch:
            patch.setattr(swapfile, "fallocate", full)
            with pytest.raises(offload.StorageError, match="The checkpoint takes .* are free"):
                engine.checkpoint(nvme_dir / "saved")
        train(engine, ENTRY, until=2)
        engine.checkpoint(nvme_dir / "saved")
    assert read_manifest(nvme_dir / "saved").step == 2


@pytest.mark.parametrize("durability", ["off", "step"])
def test_a_throttle_gives_way_to_training_and_to_the_end(nvme_dir: Path, durability: str) -> None:
    """At one byte a second a copy would take years; a step that needs a plane, and close(), do
    not wait for that.
    """
    want = undisturbed(ENTRY, nvme_dir / "plain")
    policy = policy_of(nvme_dir / "run", ENTRY, "nvme", durability=durability)
    torch.manual_seed(5)
    with start(ENTRY, policy) as engine:
        train(engine, ENTRY, until=3)
        copy = engine.checkpoint(nvme_dir / "saved", wait=False, rate_nbytes=1)
        train(engine, ENTRY, until=NUM_STEPS)
        assert record_of(engine) == want
    assert copy.wait() == nvme_dir / "saved"
    assert continue_from(ENTRY, policy_of(nvme_dir / "b", ENTRY, "ram"), copy.wait()) == want


def test_a_rate_of_nothing_is_refused(nvme_dir: Path) -> None:
    with start(ENTRY, policy_of(nvme_dir / "run", ENTRY, "nvme")) as engine:
        train(engine, ENTRY, until=1)
        with pytest.raises(offload.StateError, match="at least one byte a second"):
            engine.checkpoint(nvme_dir / "saved", rate_nbytes=0)
    assert not (nvme_dir / "saved").exists()


def test_the_run_is_no_place_for_its_checkpoint(nvme_dir: Path) -> None:
    with start(ENTRY, policy_of(nvme_dir / "run", ENTRY, "nvme")) as engine:
        train(engine, ENTRY, until=1)
        with pytest.raises(offload.StateError, match=f"in use by another run .pid {os.getpid()}"):
            engine.checkpoint(nvme_dir / "run")
        train(engine, ENTRY, until=2)


def test_a_checkpoint_of_ram_alone_has_checksums(nvme_dir: Path) -> None:
    policy = policy_of(nvme_dir, ENTRY, "ram", durability="off")
    policy["tiers"]["nvme"] = None
    saved = nvme_dir / "saved"
    with start(ENTRY, policy) as engine:
        train(engine, ENTRY, until=1)
        engine.checkpoint(saved)
    assert read_manifest(saved).checksums is not None
    content = bytearray((saved / SWAP_NAME).read_bytes())
    content[-9] ^= 1
    (saved / SWAP_NAME).write_bytes(content)
    with pytest.raises(offload.StorageError, match="EBADMSG"):
        start(ENTRY, policy, str(saved))


def test_training_in_a_checkpoint_is_refused(nvme_dir: Path) -> None:
    """It would write over the only copy."""
    saved = nvme_dir / "saved"
    with start(ENTRY, policy_of(nvme_dir / "run", ENTRY, "nvme")) as engine:
        train(engine, ENTRY, until=1)
        engine.checkpoint(saved)
    before = hashes(saved)
    with pytest.raises(offload.StateError, match="is a checkpoint"):
        start(ENTRY, policy_of(saved, ENTRY, "nvme"), "resume")
    assert hashes(saved) == before


def test_files_are_for_their_owner_alone(nvme_dir: Path) -> None:
    policy = policy_of(nvme_dir / "a", ENTRY, "nvme")
    policy["tiers"]["nvme"]["paths"] = [str(nvme_dir / name) for name in "ab"]
    with start(ENTRY, policy) as engine:
        train(engine, ENTRY, until=1)
        engine.flush()
        engine.checkpoint(nvme_dir / "saved")
        found = {path.name: path.stat().st_mode & 0o777 for path in nvme_dir.rglob("*.*")}
    assert set(found.values()) == {0o600}
    names = {SWAP_NAME, LOCK_NAME, MANIFEST_NAME, swapfile.MEMBER_NAME}
    assert names < set(found) and set(swapfile.CHECKSUM_NAMES) & set(found)


# Copies and exports without the model


def finished_run(folder: Path, num_paths: int = 1, **changes: Any) -> list[Path]:
    """The paths of a run that ended behind three steps."""
    policy = policy_of(folder, ENTRY, "mixed", **changes)
    paths = [folder / f"drive{index}" for index in range(num_paths)]
    policy["tiers"]["nvme"]["paths"] = [str(path) for path in paths]
    torch.manual_seed(5)
    with start(ENTRY, policy) as engine:
        train(engine, ENTRY, until=3)
    return paths


@pytest.mark.parametrize("num_paths", [1, 3])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_copied_run_goes_on_elsewhere(nvme_dir: Path, num_paths: int, checksum: bool) -> None:
    want = undisturbed(ENTRY, nvme_dir / "plain")
    paths = finished_run(nvme_dir / "run", num_paths, tiers__nvme__checksum=checksum)
    before, held = hashes(*paths), open_files()
    copy_run(paths, nvme_dir / "copy")
    copy_run([nvme_dir / "copy"], nvme_dir / "second")  # a checkpoint is copied as well
    assert hashes(*paths) == before and open_files() == held
    manifest = read_manifest(nvme_dir / "second")
    assert (manifest.kind, manifest.step) == ("checkpoint", 3)
    assert (manifest.checksums is not None) == checksum
    policy = policy_of(nvme_dir / "other", ENTRY, "nvme")
    assert continue_from(ENTRY, policy, nvme_dir / "second") == want


def test_a_run_of_one_path_can_be_started_from(nvme_dir: Path) -> None:
    """As from a checkpoint: it stays as it is."""
    want = undisturbed(ENTRY, nvme_dir / "plain")
    [path] = finished_run(nvme_dir / "run")
    before = hashes(path)
    assert continue_from(ENTRY, policy_of(nvme_dir / "other", ENTRY, "nvme"), path) == want
    assert hashes(path) == before


@pytest.mark.parametrize("action", [copy_run, export_step])
def test_a_live_run_is_neither_copied_nor_exported(nvme_dir: Path, action: Any) -> None:
    policy = policy_of(nvme_dir / "run", ENTRY, "nvme")
    with start(ENTRY, policy) as engine:
        train(engine, ENTRY, until=2)
        engine.flush()
        with pytest.raises(offload.StateError, match=f"pid {os.getpid()}"):
            action([nvme_dir / "run"], nvme_dir / "out")
        with pytest.raises(offload.StateError, match=f"pid {os.getpid()}"):
            start(ENTRY, policy_of(nvme_dir / "other", ENTRY, "ram"), str(nvme_dir / "run"))
        train(engine, ENTRY, until=3)
    assert not (nvme_dir / "out").exists()


@pytest.mark.parametrize("action", [copy_run, export_step])
def test_what_does_not_fit_together_is_refused(nvme_dir: Path, action: Any) -> None:
    paths, out = finished_run(nvme_dir / "run", 2), nvme_dir / "out"
    before = hashes(*paths)
    for wrong, match in [
        (paths[:1], "lies on 2 paths"),
        ([paths[0], nvme_dir / "no such"], "no such folder"),
        ([paths[1], paths[0]], "no committed run"),
        ([paths[0], paths[0]], "in use by another run"),
    ]:
        with pytest.raises(offload.OffloadError, match=match):
            action(wrong, out)
    (paths[1] / SWAP_NAME).rename(paths[1] / "kept")
    (paths[1] / SWAP_NAME).write_bytes((paths[0] / SWAP_NAME).read_bytes())
    with pytest.raises(offload.StorageError, match="not the one that the manifest"):
        action(paths, out)
    (paths[1] / "kept").rename(paths[1] / SWAP_NAME)
    assert not out.exists() and hashes(*paths) == before
    action(paths, out)
    with pytest.raises(offload.StateError, match="another folder|Name another"):
        action(paths, out)


@pytest.mark.parametrize("action", [copy_run, export_step])
def test_a_wrong_byte_is_not_passed_on(nvme_dir: Path, action: Any) -> None:
    [path] = finished_run(nvme_dir / "run")
    plane = read_manifest(path).chunks[1].planes["weight"]
    place = plane.extents[plane.committed][0][1] + 70
    content = bytearray((path / SWAP_NAME).read_bytes())
    content[place] ^= 8
    (path / SWAP_NAME).write_bytes(content)
    with pytest.raises(offload.StorageError, match="EBADMSG"):
        action([path], nvme_dir / "out")
    assert files_in(nvme_dir / "out") == []


def test_an_export_is_the_engines_export(nvme_dir: Path) -> None:
    policy = policy_of(nvme_dir / "run", ENTRY, "nvme")
    with start(ENTRY, policy) as engine:
        train(engine, ENTRY, until=2)
        engine.export(nvme_dir / "engine")
    export_step([nvme_dir / "run"], nvme_dir / "out")
    files = [folder / "model.safetensors" for folder in (nvme_dir / "engine", nvme_dir / "out")]
    want, got = [load_file(file) for file in files]
    assert list(want) == list(got)
    assert all(want[name].equal(got[name]) for name in want)


# File systems that share bytes


def io_written() -> int:
    """Bytes that this process has caused to be written to drives."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


@pytest.mark.root
@pytest.mark.parametrize("file_system", ["xfs", "btrfs"])
def test_a_checkpoint_shares_the_bytes_of_its_run(tmp_path: Path, file_system: str) -> None:
    """Nothing is copied, and training afterwards writes its own: the checkpoint stays."""
    image = tmp_path / "image"
    with loop_drive(image, tmp_path / "drive", nbytes=512 << 20, file_system=file_system) as drive:
        want = undisturbed(ENTRY, tmp_path / "plain")
        policy = policy_of(drive / "run", ENTRY, "mixed")
        torch.manual_seed(5)
        with start(ENTRY, policy) as engine:
            train(engine, ENTRY, until=3)
            engine.flush()
            before = io_written()
            copy = engine.checkpoint(drive / "saved")
            state_nbytes = read_manifest(drive / "saved").file_nbytes[0] - swapfile.ALIGN_NBYTES
            assert copy._file.num_cloned == copy.num_cloned == state_nbytes
            assert io_written() - before < state_nbytes // 8  # manifest and checksums
            saved = hashes(drive / "saved")
            train(engine, ENTRY, until=NUM_STEPS)
            assert record_of(engine) == want
        assert hashes(drive / "saved") == saved
        assert copy_run([drive / "run"], drive / "copy") == state_nbytes
        assert copy_run([drive / "saved"], tmp_path / "elsewhere") == 0  # across drives: copied
        for folder in (drive / "saved", tmp_path / "elsewhere"):
            other = policy_of(tmp_path / f"o-{folder.name}", ENTRY, "nvme", durability="off")
            assert continue_from(ENTRY, other, folder) == want


def test_shared_bytes_without_room_for_them_are_told(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with start(ENTRY, policy_of(nvme_dir / "run", ENTRY, "nvme")) as engine:
        train(engine, ENTRY, until=1)
        engine.checkpoint(nvme_dir / "first")
        assert "shares" not in caplog.text
        with monkeypatch.context() as patch:
            patch.setattr(checkpointfile.fcntl, "ioctl", lambda *_: None)
            patch.setattr(swapfile, "free_nbytes", lambda folder: 0)
            engine.checkpoint(nvme_dir / "second")
    assert "bytes with the run" in caplog.text and "0 are free" in caplog.text


def test_a_copy_says_nothing_of_sharing_where_there_is_none(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copying twin of the test above: the same bytes, none of them shared."""

    def no(fd: int, request: int, argument: bytes) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(checkpointfile.fcntl, "ioctl", no)
    [path] = finished_run(nvme_dir / "run")
    assert copy_run([path], nvme_dir / "copy", rate_nbytes=1 << 30) == 0
    assert read_manifest(nvme_dir / "copy").step == 3
