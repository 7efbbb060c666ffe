"""A committed run goes on bit for bit where it ended, whatever ended it and wherever planes lie."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import small_units
from drives import fill, loop_drive, mounted
from parity import (
    COMPUTE_DTYPE,
    Recipe,
    make_policy,
    mixed_budget,
    prepare,
    record_rest,
    record_state,
)
from zoo import ZOO, ZooModel

import offload
from offload.runfiles import read_manifest
from offload.swapfile import LOCK_NAME, MANIFEST_NAME, SWAP_NAME

NUM_STEPS = 6
AfterStep = Callable[[int, Any], None]


def policy_of(folder: Path, entry: ZooModel, placement: str, **changes: Any) -> dict[str, Any]:
    changes = {"durability": "step", **changes}
    fmt = changes.get("format", "exact")
    policy = make_policy(folder, **changes)
    if placement == "ram":
        policy["tiers"]["cpu"] = {"budget": "256MiB"}
    elif placement == "mixed":
        policy["tiers"]["cpu"]["pin"] = "auto"
        policy["tiers"]["cpu"]["budget"] = mixed_budget(entry.name, fmt, "cpu")
    return policy


def train(
    engine: Any, entry: ZooModel, *, until: int, clip: float | None = None,
    after_step: AfterStep | None = None,
) -> None:  # fmt: skip
    """Train from where the engine is. Batches follow from the step; dropout from torch's state."""
    model = engine.model
    optimizer = offload.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(engine.run.num_steps, until):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.9**step
        loss = entry.loss(model, entry.make_batch(step, COMPUTE_DTYPE[engine.plan.fmt.name]))
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        engine.run.progress = {"next": step + 1}
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step, engine)


def record_of(engine: Any) -> dict[str, str]:
    engine.flush()
    record: dict[str, str] = {}
    record_state(record, engine)
    record_rest(record, engine.model)
    return record


def start(entry: ZooModel, policy: dict[str, Any], weights: str | None = None) -> Any:
    return offload.offload(prepare(entry.make_model(), Recipe(), "exact"), policy, weights=weights)


def undisturbed(entry: ZooModel, folder: Path, clip: float | None = None) -> dict[str, str]:
    """What the run comes to without durability, without an end in between."""
    torch.manual_seed(5)
    with small_units(1024), start(entry, make_policy(folder)) as engine:
        train(engine, entry, until=NUM_STEPS, clip=clip)
        return record_of(engine)


@pytest.mark.parametrize("placement", ["nvme", "mixed", "ram"])
@pytest.mark.parametrize("update", ["eager", "deferred"])
@pytest.mark.parametrize("durability", ["step", "every 2 steps"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "convnet"])
def test_a_run_in_pieces_is_the_run(
    nvme_dir: Path, name: str, placement: str, update: str, durability: str
) -> None:
    """Closed after 1 and after 4 steps, and gone on with each time by a new model object."""
    entry = ZOO[name]
    want = undisturbed(entry, nvme_dir / "plain")
    policy = policy_of(
        nvme_dir / "run", entry, placement, optimizer__update=update, durability=durability
    )
    torch.manual_seed(5)
    with small_units(1024):
        for until, weights in ((1, None), (4, "resume"), (NUM_STEPS, "resume")):
            torch_state = torch.get_rng_state()
            with start(entry, policy, weights) as engine:
                assert engine.run.progress == ({"next": engine.run.num_steps} if weights else {})
                train(engine, entry, until=until)
                got = record_of(engine)
            if weights is None:
                assert not torch.equal(torch_state, torch.get_rng_state()) or name != "gpt2"
            torch.manual_seed(99)  # what the next process happens to have
    assert got == want


@pytest.mark.parametrize("placement", ["nvme", "mixed", "ram"])
@pytest.mark.parametrize("moment", ["forward", "backward", "step"])
def test_a_crash_costs_at_most_the_step_in_flight(
    nvme_dir: Path, placement: str, moment: str
) -> None:
    """The process is killed in step 4; what is left on the drive goes on from step 2 or later."""
    entry = ZOO["llama"]
    want = undisturbed(entry, nvme_dir / "plain", clip=1.0)
    policy = policy_of(nvme_dir / "run", entry, placement)
    in_child(lambda: crash(entry, policy, moment))
    assert (nvme_dir / "run" / MANIFEST_NAME).exists()
    with small_units(1024), start(entry, policy, "resume") as engine:
        assert 2 <= engine.recovered.step <= 4
        train(engine, entry, until=NUM_STEPS, clip=1.0)
        assert record_of(engine) == want


@pytest.mark.root
def test_a_full_disk_costs_at_most_the_step_in_flight(tmp_path: Path) -> None:
    """A thin volume fills up behind a file that has its space. The run ends with an error, and goes
    on from what is committed as soon as there is room.
    """
    entry = ZOO["llama"]
    want = undisturbed(entry, tmp_path / "plain")
    small = mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=24m", "tmpfs")
    with small as backing, loop_drive(backing / "image", tmp_path / "drive") as drive:
        policy = policy_of(drive / "run", entry, "nvme")
        torch.manual_seed(5)
        refused = pytest.raises(offload.StorageError)
        with small_units(1024), refused as failed, start(entry, policy) as engine:
            train(engine, entry, until=1)
            engine.commit()
            fill(backing)
            train(engine, entry, until=NUM_STEPS)
        assert failed.value.errno in (errno.ENOSPC, errno.EIO), failed.value
        assert failed.value.path.startswith(str(drive / "run"))
        (backing / "filler").unlink()
        with small_units(1024), start(entry, policy, "resume") as engine:
            assert 1 <= engine.recovered.step < NUM_STEPS
            train(engine, entry, until=NUM_STEPS)
            assert record_of(engine) == want


def crash(entry: ZooModel, policy: dict[str, Any], moment: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after_step(step: int, engine: Any) -> None:
        if step == 3 and moment == "step":
            die()
        if step == 2 and moment == "forward":
            engine.model.model.layers[1].register_forward_hook(die)
        if step == 2 and moment == "backward":
            engine.model.model.embed_tokens.weight.register_hook(die)

    torch.manual_seed(5)
    with small_units(1024):
        engine = start(entry, policy)
        with engine:
            train(engine, entry, until=NUM_STEPS, clip=1.0, after_step=after_step)


def in_child(action: Callable[[], None]) -> None:
    """Run an action in a forked process that dies by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            action()
        finally:
            os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def test_a_committed_run_is_never_wiped(nvme_dir: Path) -> None:
    entry, folder = ZOO["llama"], nvme_dir / "run"
    policy = policy_of(folder, entry, "nvme")
    with small_units(1024):
        with start(entry, policy) as engine:
            train(engine, entry, until=1)
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(offload.StateError, match="holds a committed run.*offload clean"):
            start(entry, policy)
        with pytest.raises(offload.StateError, match="holds a committed run"):
            start(entry, make_policy(folder))
        after = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != LOCK_NAME}
    assert after == {name: data for name, data in before.items() if name != LOCK_NAME}


def test_another_model_is_refused_and_nothing_changes(nvme_dir: Path) -> None:
    entry, folder = ZOO["llama"], nvme_dir / "run"
    policy = policy_of(folder, entry, "nvme")
    with small_units(1024):
        with start(entry, policy) as engine:
            train(engine, entry, until=1)
        before = (folder / SWAP_NAME).read_bytes()
        with pytest.raises(offload.StateError, match=r"chunk|parameter"):
            start(ZOO["qwen3"], policy, "resume")
        other = policy_of(folder, entry, "nvme", format="fp32")
        with pytest.raises(offload.StateError, match="written in format exact"):
            start(entry, other, "resume")
        with pytest.raises(offload.PolicyError, match="durability: step"):
            start(entry, make_policy(folder), "resume")
    assert (folder / SWAP_NAME).read_bytes() == before


def test_discard_removes_everything(nvme_dir: Path) -> None:
    entry, folder = ZOO["llama"], nvme_dir / "run"
    with small_units(1024):
        engine = start(entry, policy_of(folder, entry, "nvme"))
        train(engine, entry, until=2)
        engine.close(discard=True)
    assert list(folder.iterdir()) == []


def test_progress_must_be_json(nvme_dir: Path) -> None:
    entry = ZOO["llama"]
    with small_units(1024), start(entry, policy_of(nvme_dir, entry, "nvme")) as engine:
        engine.run.progress = {"sampler": object()}
        with pytest.raises(offload.StateError, match="JSON"):
            engine.commit()
        engine.run.progress = {}


def test_a_swap_file_of_another_run_is_noticed(nvme_dir: Path) -> None:
    entry = ZOO["llama"]
    policies = [policy_of(nvme_dir / name, entry, "nvme") for name in "ab"]
    with small_units(1024):
        for policy in policies:
            with start(entry, policy) as engine:
                train(engine, entry, until=1)
        shutil.copy(nvme_dir / "a" / SWAP_NAME, nvme_dir / "b" / SWAP_NAME)
        with pytest.raises(offload.StorageError, match="not the one that the manifest"):
            start(entry, policies[1], "resume")


def test_the_manifest_says_what_is_committed(nvme_dir: Path) -> None:
    entry = ZOO["llama"]
    with small_units(1024), start(entry, policy_of(nvme_dir, entry, "nvme")) as engine:
        train(engine, entry, until=3)
        engine.flush()
        manifest = read_manifest(nvme_dir)
        assert (manifest.step, manifest.progress) == (3, {"next": 3})
        assert {c for chunk in manifest.chunks for c in chunk.num_steps} == {3}
        names = {param.name for chunk in manifest.chunks for param in chunk.params}
        assert names == {name for name, _ in engine.model.named_parameters()}
        assert json.loads(manifest.model_dump_json())["run"] == engine._engine.store.run.run


@pytest.mark.parametrize(
    ("text", "every"),
    [("off", 0), (False, 0), ("step", 1), ("every 1 step", 1), ("every 25 steps", 25)],
)
def test_durability_is_a_cadence(text: object, every: int, tmp_path: Path) -> None:
    assert offload.load_policy(make_policy(tmp_path, durability=text)).commit_every == every


@pytest.mark.parametrize("text", [True, "always", "every 0 steps", "every step", 3])
def test_other_cadences_are_refused(text: object, tmp_path: Path) -> None:
    with pytest.raises(offload.PolicyError, match="is not off, step, or every N steps"):
        offload.load_policy(make_policy(tmp_path, durability=text))


def test_durability_needs_a_drive(tmp_path: Path) -> None:
    policy = make_policy(tmp_path, durability="step")
    policy["tiers"]["nvme"] = None
    with pytest.raises(offload.PolicyError, match="durability: 'step' needs a drive"):
        offload.load_policy(policy)


# Checkpoints


def continue_from(entry: ZooModel, policy: dict[str, Any], folder: Path) -> dict[str, str]:
    torch.manual_seed(77)
    with start(entry, policy, str(folder)) as engine:
        assert engine.recovered.step == engine.run.num_steps
        train(engine, entry, until=NUM_STEPS)
        return record_of(engine)


@pytest.mark.parametrize("source", ["nvme", "mixed", "ram"])
@pytest.mark.parametrize("durability", ["off", "step"])
def test_a_checkpoint_restores_to_any_placement(
    nvme_dir: Path, source: str, durability: str
) -> None:
    """Taken while training goes on; restored to three NVMe paths, to RAM, to half of each."""
    entry = ZOO["gpt2"]
    want = undisturbed(entry, nvme_dir / "plain")
    policy = policy_of(nvme_dir / "run", entry, source, durability=durability)
    if source == "ram" and durability == "off":
        policy["tiers"]["nvme"] = None
    saved = nvme_dir / "saved"
    with small_units(1024):
        torch.manual_seed(5)
        with start(entry, policy) as engine:
            train(engine, entry, until=3)
            copy = engine.checkpoint(saved, wait=False, rate_nbytes=2 << 20)
            train(engine, entry, until=NUM_STEPS)
            assert record_of(engine) == want
            assert copy.wait() == saved
        manifest = read_manifest(saved)
        assert (manifest.kind, manifest.step) == ("checkpoint", 3)
        for index, placement in enumerate(["nvme", "mixed", "ram"]):
            other = policy_of(nvme_dir / f"other{index}", entry, placement, durability="off")
            if placement == "nvme":
                paths = [nvme_dir / f"drive{i}" for i in range(3)]
                other["tiers"]["nvme"]["paths"] = [str(path) for path in paths]
            assert continue_from(entry, other, saved) == want


def test_a_checkpoint_with_a_wrong_byte_is_refused(nvme_dir: Path) -> None:
    entry, saved = ZOO["llama"], nvme_dir / "saved"
    with small_units(1024):
        with start(entry, policy_of(nvme_dir / "run", entry, "nvme")) as engine:
            train(engine, entry, until=1)
            engine.checkpoint(saved)
        place = read_manifest(saved).chunks[1].planes["exp_avg"].extents[0][0][1] + 5000
        with open(saved / SWAP_NAME, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 4]))
        with pytest.raises(offload.StorageError, match=r"EBADMSG") as caught:
            start(entry, make_policy(nvme_dir / "other"), str(saved))
    assert caught.value.chunk and caught.value.offset <= place < caught.value.offset + (64 << 10)
    assert not (nvme_dir / "other").exists()  # made for a run that never began


def test_a_folder_with_something_in_it_is_no_place_for_a_checkpoint(nvme_dir: Path) -> None:
    entry = ZOO["llama"]
    with small_units(1024), start(entry, policy_of(nvme_dir / "run", entry, "nvme")) as engine:
        train(engine, entry, until=1)
        engine.checkpoint(nvme_dir / "saved")
        before = (nvme_dir / "saved" / SWAP_NAME).read_bytes()
        with pytest.raises(offload.StateError, match="holds a committed run"):
            engine.checkpoint(nvme_dir / "saved")
        assert (nvme_dir / "saved" / SWAP_NAME).read_bytes() == before
        train(engine, entry, until=2)


def test_a_flipped_bit_of_a_run_is_named_and_never_used(nvme_dir: Path) -> None:
    entry, folder = ZOO["llama"], nvme_dir / "run"
    policy = policy_of(folder, entry, "nvme")
    with small_units(1024):
        with start(entry, policy) as engine:
            train(engine, entry, until=1)
        record = read_manifest(folder).chunks[1]
        plane = record.planes["weight"]
        place = plane.extents[plane.committed][0][1] + 777
        with open(folder / SWAP_NAME, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        with (
            pytest.raises(offload.StorageError, match="EBADMSG") as caught,
            start(entry, policy, "resume") as engine,
        ):
            train(engine, entry, until=2)
    assert caught.value.chunk == record.name
    assert caught.value.offset <= place < caught.value.offset + (64 << 10)
    assert caught.value.path == str(folder / SWAP_NAME)
