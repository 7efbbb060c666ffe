"""kill -9 at random moments of the main job: started again, it ends with the same bits."""

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_finetune import job

from offload import finetune
from offload.errors import StateError
from offload.jobconfig import FinetuneConfig, changed_numbers, load_finetune, numbers_of
from offload.progress import Reporter
from offload.swapfile import MANIFEST_NAME

transformers = pytest.importorskip("transformers")
STEPS = 24


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def durable_job(folder: Path, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    sections: dict[str, Any] = {
        "train": {"steps": STEPS, "batch_size": 2, "eval_batches": 1, **changes},
        "output": {"overwrite": True},  # a job that ended before its kill is begun anew
    }
    return {**job(folder, **sections), "durability": "step"}


def fork_job(tree: dict[str, Any]) -> int:
    """Run a job in a forked process, which costs no import of torch; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        finetune.run_child = lambda *_: "not checked"
        with open(os.devnull, "w") as nowhere:
            finetune.run(load_finetune(tree), Reporter(Console(file=nowhere)))
        os._exit(0)
    finally:
        os._exit(3)


def wait(pid: int) -> int:
    """The signal that ended a process, 0 for a clean exit; anything else fails the test."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0
    return 0


def model_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest()


def campaign(folder: Path, num_kills: int, seed: int) -> int:
    """Kill a job until it has been killed so often, then let it end; return the kills that met a
    live process.
    """
    tree, dice, seconds = durable_job(folder), random.Random(seed), 4.0
    killed = 0
    for _ in range(20 * num_kills):
        if killed == num_kills:
            break
        start = time.monotonic()
        pid = fork_job(tree)
        time.sleep(dice.uniform(0.0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if wait(pid) == signal.SIGKILL:
            killed += 1
        else:  # it ended in time: the next moments lie earlier, in a run that begins anew
            seconds = time.monotonic() - start
            (folder / "out" / "model.safetensors").unlink()
    assert wait(fork_job(tree)) == 0
    return killed


@pytest.mark.parametrize("num_kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_job_ends_with_the_same_bits(tmp_path: Path, num_kills: int) -> None:
    assert wait(fork_job(durable_job(tmp_path / "plain"))) == 0
    assert campaign(tmp_path / "run", num_kills, seed=num_kills) == num_kills
    assert model_hash(tmp_path / "run") == model_hash(tmp_path / "plain")
    assert not any((tmp_path / "run" / "tiers").iterdir())  # the space is given back at the end


def test_changed_numbers_are_refused_by_name(tmp_path: Path) -> None:
    """Killed behind its first commit; then the rate changes."""
    pid = fork_job(durable_job(tmp_path / "run", steps=10_000))
    manifest = tmp_path / "run" / "tiers" / MANIFEST_NAME
    deadline = time.monotonic() + 60
    while not manifest.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    before = manifest.read_bytes()
    tree = durable_job(tmp_path / "run", steps=10_000, lr=1e-4)
    with open(os.devnull, "w") as nowhere, pytest.raises(StateError) as caught:
        finetune.run(load_finetune(tree), Reporter(Console(file=nowhere)))
    assert "train.lr was 0.003, is 0.0001" in str(caught.value)
    assert "train.steps" not in str(caught.value)
    assert manifest.read_bytes() == before


def test_another_optimizer_is_another_job(tmp_path: Path) -> None:
    """Also where its planes are the same, and as the manifest has it, in JSON."""

    def job_of(**optimizer: Any) -> FinetuneConfig:
        return load_finetune({**durable_job(tmp_path / "run"), "optimizer": optimizer})

    def changes(before: FinetuneConfig, now: FinetuneConfig) -> list[str]:
        return changed_numbers(json.loads(json.dumps(numbers_of(before))), now)

    slow = {"kind": "torch", "name": "RMSprop", "options": {"alpha": 0.9}}
    assert changes(job_of(**slow), job_of(**slow)) == []
    assert changes(job_of(kind="sgd"), job_of(kind="lion")) == [
        "optimizer.kind was 'sgd', is 'lion'"
    ]
    found = changes(job_of(**slow), job_of(**{**slow, "options": {"alpha": 0.99}}))
    assert found == ["optimizer.options was {'alpha': 0.9}, is {'alpha': 0.99}"]
