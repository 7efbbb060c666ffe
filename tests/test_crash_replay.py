"""Every crash that the recorded system calls of a run allow: the last committed step is there.

A run on the thread backend is recorded. For every prefix of its calls, with what was not flushed
lost, kept, or torn, the folder is rebuilt as a crash could have left it, and everything that its
manifest names is compared by hash with the step that it claims to be.
"""

import copy
import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import small_units
from recorder import Call, CrashModel, Recording, Seeded, check_order, record
from test_durability import policy_of, record_of, start, train
from zoo import ZOO

from offload.errors import StorageError
from offload.runfiles import read_manifest
from offload.stepreader import StepReader
from offload.swapfile import LOCK_NAME, MANIFEST_NAME, SWAP_NAME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the recorder needs g++"),
]
NUM_STEPS = 4
ENTRY = ZOO["llama"]
SEEDS = range(3)
RUN = """
import json, sys, torch
sys.path[:0] = {paths!r}
from test_durability import start, train
from chaos import small_units
from zoo import ZOO
torch.manual_seed(5)
with small_units(1024):
    engine = start(ZOO["llama"], json.loads({policy!r}))
    train(engine, ZOO["llama"], until={steps})
    engine.close(give_back=False)
"""


def committed_hashes(folder: Path) -> dict[str, str]:
    """Hash of every committed plane in a folder, unpacked; every block is verified."""
    manifest = read_manifest(folder)
    hashes = {"progress": json.dumps(manifest.progress)}
    try:
        with StepReader(manifest, [folder]) as step:
            for index, plane, _ in manifest.planes():
                digest = hashlib.sha256()
                for _, part in step.parts(index, plane):
                    digest.update(part.numpy())
                hashes[f"{index}.{plane.value}"] = digest.hexdigest()
    except StorageError as error:
        return {"error": str(error)}
    return hashes


@dataclass
class Recorded:
    """A recorded run, and what each of its steps came to."""

    recording: Recording
    hashes: dict[int, dict[str, str]]

    def commits_ended(self, num_events: int) -> int:
        """How many renames of the manifest were followed by an ended sync of the folder by then."""
        done, renamed = 0, 0
        for event in self.recording.events[:num_events]:
            call = event.call
            if event.is_end and call.kind == "rename" and call.path2 == MANIFEST_NAME:
                renamed += 1
            if event.is_end and call.kind == "sync" and call.path == "":
                done = renamed
        return done


@pytest.fixture(scope="module", params=["nvme", "mixed"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    base = tmp_path_factory.mktemp("recorded")
    folder = base / "run"
    folder.mkdir()
    policy = policy_of(folder, ENTRY, request.param, tiers__nvme__io="threads")
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    code = RUN.format(paths=paths, policy=json.dumps(policy), steps=NUM_STEPS)
    recording, done = record(folder, [sys.executable, "-c", code], base)
    assert done.returncode == 0, done.stderr
    return Recorded(recording, hashes_by_step(base / "again", request.param))


def hashes_by_step(folder: Path, placement: str) -> dict[int, dict[str, str]]:
    """What each step of the same run commits, when every commit is waited for."""
    hashes: dict[int, dict[str, str]] = {}

    def note(step: int, engine: Any) -> None:
        engine.flush()
        hashes[step + 1] = committed_hashes(folder)

    torch.manual_seed(5)
    with small_units(1024), start(ENTRY, policy_of(folder, ENTRY, placement)) as engine:
        train(engine, ENTRY, until=NUM_STEPS, after_step=note)
    return hashes


def is_commit(call: Call) -> bool:
    return call.kind == "rename" and call.path2 == MANIFEST_NAME


def test_the_order_of_calls_is_the_protocol(recorded: Recorded) -> None:
    """Data is flushed before the manifest that names it is renamed, and each rename is safe before
    the next. The lock's pid and the names of temporary files need no flush.
    """

    def belongs(call: Call, commit: Call) -> bool:
        return call.kind == "write" and call.path != LOCK_NAME

    assert list(check_order(recorded.recording, is_commit, belongs=belongs)) == []
    assert sum(map(is_commit, recorded.recording.calls)) == NUM_STEPS


def crash_points(recording: Recording) -> Iterator[int]:
    """Every event around a commit, and every 7th elsewhere: writes of planes are many alike."""
    near = {
        index + shift
        for index, event in enumerate(recording.events)
        if event.call.kind in ("rename", "sync", "open", "truncate", "fallocate")
        for shift in range(-1, 3)
    }
    last = recording.num_states - 1
    yield from sorted({min(max(k, 0), last) for k in near | set(range(0, last + 1, 7))})


def test_every_crash_leaves_the_last_committed_step(recorded: Recorded, tmp_path: Path) -> None:
    model, target = CrashModel(recorded.recording), tmp_path / "crashed"
    num_states, steps_seen = 0, set()
    for k in crash_points(recorded.recording):
        for choose in ("none", "all", *(Seeded(1000 * seed + k) for seed in SEEDS)):
            model.replay(k, target, choose)
            least = recorded.commits_ended(k)
            num_states += 1
            if not (target / MANIFEST_NAME).exists():
                assert least == 0, f"event {k}: step {least} was committed and is gone"
                continue
            step = read_manifest(target).step
            assert least <= step <= least + 1, f"event {k}"
            assert committed_hashes(target) == recorded.hashes[step], f"event {k}, {choose}"
            steps_seen.add(step)
    assert steps_seen == set(range(1, NUM_STEPS + 1))
    print(f"{num_states} crash states, {len(recorded.recording.events)} events")


def test_crashed_runs_go_on_to_the_same_bits(recorded: Recorded, tmp_path: Path) -> None:
    """End to end for a few of them: resume, train to the end, compare all planes."""
    model = CrashModel(recorded.recording)
    torch.manual_seed(5)
    with small_units(1024), start(ENTRY, policy_of(tmp_path / "plain", ENTRY, "nvme")) as engine:
        train(engine, ENTRY, until=NUM_STEPS + 1)
        want = record_of(engine)
    renames = [i for i, e in enumerate(recorded.recording.events) if is_commit(e.call)]
    for index, k in enumerate(renames):
        folder = tmp_path / f"crashed{index}"
        model.replay(k + 1, folder, Seeded(k))
        policy = policy_of(folder, ENTRY, "mixed" if index % 2 else "nvme")
        if not (folder / MANIFEST_NAME).exists():
            continue
        with small_units(1024), start(ENTRY, policy, "resume") as engine:
            train(engine, ENTRY, until=NUM_STEPS + 1)
            assert record_of(engine) == want


def test_a_wrong_protocol_would_be_seen(recorded: Recorded, tmp_path: Path) -> None:
    """The checks above fail on the same run with its flushes of the swap file taken out."""
    recording = copy.deepcopy(recorded.recording)
    for call in recording.calls:
        if call.kind == "sync" and call.path == SWAP_NAME:
            call.error = errno.EIO  # a flush that failed has made nothing safe
    problems = list(check_order(recording, is_commit))
    assert any("is not safe when" in problem for problem in problems)
    model, wrong = CrashModel(recording), 0
    for k in crash_points(recording):
        model.replay(k, tmp_path / "crashed", "none")
        if (tmp_path / "crashed" / MANIFEST_NAME).exists():
            step = read_manifest(tmp_path / "crashed").step
            wrong += committed_hashes(tmp_path / "crashed") != recorded.hashes[step]
    assert wrong > 0
