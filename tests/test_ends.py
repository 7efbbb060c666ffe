"""How a run ends when something is in the middle: a fork, an exception, a Ctrl-C, a commit that
fails. Nothing half done is committed, nothing hangs, nothing stays open.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import patched
from forked import ENDED, run_forked
from steps import one_step
from test_durability import NUM_STEPS, policy_of, record_of, start, train, undisturbed
from zoo import ZOO

import offload
from offload import commit, update
from offload.commit import Commits
from offload.engine import Engine
from offload.errors import StateError, StorageError
from offload.extents import PlaneExtents
from offload.factored import FactoredStep
from offload.inflight import InFlight
from offload.runfiles import read_manifest
from offload.slots import Slab
from offload.swapfile import CHECKSUM_NAMES, LOCK_NAME, MANIFEST_NAME, SWAP_NAME

ENTRY = ZOO["llama"]
pytestmark = pytest.mark.usefixtures("nothing_left", "tiny_units")


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the run comes to when nothing happens."""
    return undisturbed(ENTRY, tmp_path_factory.mktemp("plain"))


def begin(policy: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    return start(ENTRY, policy)


def check_resumes(policy: dict[str, Any], step: int, want: dict[str, str]) -> None:
    torch.manual_seed(99)
    with start(ENTRY, policy, "resume") as engine:
        assert engine.recovered.step == step
        train(engine, ENTRY, until=NUM_STEPS)
        assert record_of(engine) == want


# A forked child


def leaves(engine: Any) -> str:
    engine.__exit__(None, None, None)
    return "left"


def raises(engine: Any) -> str:
    engine.__exit__(ValueError, ValueError("x"), None)
    return "left"


def closes(engine: Any) -> str:
    engine.close()
    engine._engine.close()
    return "left"


def exits(engine: Any) -> str:
    return "left"


def uses(engine: Any) -> str:
    with torch.no_grad():
        ENTRY.loss(engine.model, ENTRY.make_batch(0, torch.bfloat16))
    return "left"


def flushes(engine: Any) -> str:
    engine.flush()
    return "left"


@pytest.mark.parametrize("io", ["threads", "auto"])
@pytest.mark.parametrize("durability", ["off", "step"])
@pytest.mark.parametrize("action", [leaves, raises, closes, exits, uses, flushes])
def test_a_forked_child_disturbs_nothing(
    action: Callable[[Any], str], durability: str, io: str, nvme_dir: Path, want: dict[str, str]
) -> None:
    """Forked with updates in flight, it ends by itself; the parent comes to the same bits."""
    policy = policy_of(nvme_dir, ENTRY, "nvme", durability=durability, tiers__nvme__io=io)
    with begin(policy) as engine:
        train(engine, ENTRY, until=2)
        files = sorted(nvme_dir.iterdir())
        child = run_forked(lambda: action(engine))
        assert (child.code, child.signal) == (ENDED, 0), child
        if action in (uses, flushes):
            assert "StateError: " in child.said and "forked child" in child.said
        else:
            assert child.said == "left"
        assert set(files) <= set(nvme_dir.iterdir())
        train(engine, ENTRY, until=NUM_STEPS)
        assert record_of(engine) == want


SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from chaos import small_units
from test_durability import policy_of, start, train
from zoo import ZOO
from pathlib import Path
entry, folder = ZOO["llama"], Path({folder!r})
with small_units(1024), start(entry, policy_of(folder, entry, "nvme")) as engine:
    train(engine, entry, until=2)
    pid = os.fork()
    if pid == 0:
        sys.exit(5)
    _, status = os.waitpid(pid, 0)
    print("child", os.waitstatus_to_exitcode(status))
    train(engine, entry, until=3)
    engine.flush()
    print("files", *sorted(path.name for path in folder.iterdir()))
"""


def test_a_forked_child_may_end_as_a_program_does(nvme_dir: Path) -> None:
    """By sys.exit inside the context, with all that Python takes apart at its end."""
    code = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(nvme_dir))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    names = sorted([*CHECKSUM_NAMES, MANIFEST_NAME, LOCK_NAME, SWAP_NAME])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child 5", f"files {' '.join(names)}"]


def test_a_child_has_no_copy_of_the_slab() -> None:
    slab = Slab(2 << 20)
    slab.tensor.fill_(7)
    assert run_forked(lambda: int(slab.tensor.sum())).said == "0"
    assert int(slab.tensor.sum()) == 7 * slab.nbytes
    slab.close()


# An exception in the middle


class Boom(Exception):
    pass


@pytest.mark.parametrize("placement", ["nvme", "mixed", "ram"])
@pytest.mark.parametrize("update_mode", ["eager", "deferred"])
@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_an_exception_in_a_step_commits_nothing_of_it(
    placement: str, update_mode: str, moment: str, nvme_dir: Path, want: dict[str, str]
) -> None:
    """In eager mode some chunks are a step ahead then. A run that is killed there resumes from the
    same step, test_durability.py has it; so does this one, and both come to the same bits.
    """
    policy = policy_of(nvme_dir, ENTRY, placement, optimizer__update=update_mode)

    with pytest.raises(Boom), begin(policy) as engine:
        train(engine, ENTRY, until=3)
        model = engine.model.model
        if moment == "forward":
            model.layers[1].register_forward_hook(boom)
        else:
            model.embed_tokens.weight.register_hook(boom)
        train(engine, ENTRY, until=4)
    assert read_manifest(nvme_dir).step == 3
    check_resumes(policy, 3, want)


@pytest.mark.parametrize("update_mode", ["eager", "deferred"])
def test_a_step_that_was_interrupted_is_not_committed(
    update_mode: str, nvme_dir: Path, want: dict[str, str]
) -> None:
    """Step 4 is interrupted when the small chunk has been updated; the user catches it and leaves
    as ever. Step 3 was not due, and is lost: it is no longer there.
    """
    policy = policy_of(
        nvme_dir, ENTRY, "nvme", optimizer__update=update_mode, durability="every 2 steps"
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with begin(policy) as engine:
        train(engine, ENTRY, until=3)
        with patched(Engine, set_updates=interrupt), pytest.raises(KeyboardInterrupt):
            train(engine, ENTRY, until=4)
        for call in (engine.commit, lambda: engine.checkpoint(nvme_dir / "saved")):
            with pytest.raises(StateError, match="between backward"):
                call()
    assert read_manifest(nvme_dir).step == 2
    check_resumes(policy, 2, want)


def test_a_failed_update_is_not_committed(nvme_dir: Path, want: dict[str, str]) -> None:
    """The last update of step 3 fails; whatever is called then, step 2 stays the committed one."""
    policy = policy_of(nvme_dir, ENTRY, "nvme", optimizer__update="deferred")
    with pytest.raises(StorageError, match="updating"), begin(policy) as engine:
        train(engine, ENTRY, until=2)
        engine.flush()
        with failing_last_update(engine), pytest.raises(StorageError) as failed:
            train(engine, ENTRY, until=3)
            engine.flush()
        for _ in range(3):  # as the user's code does on its way out of the modules
            engine._engine.drain()
            engine._engine.poll()
        with pytest.raises(StateError, match="stopped at an earlier error"):
            engine.run.settle()
        raise failed.value
    assert read_manifest(nvme_dir).step == 2
    check_resumes(policy, 2, want)


def failing_last_update(engine: Any) -> Any:
    """The last update that is under way is done, and reported as failed."""
    poll, wait = update.UpdatePipeline.poll, update.UpdatePipeline.wait

    def fail(rows: list[Any]) -> list[Any]:
        num_pending = sum(chunk.update is not None for chunk in engine._engine.chunks)
        if rows and len(rows) == num_pending:
            rows[-1] = dataclasses.replace(rows[-1], result=-errno.EIO)
        return rows

    return patched(
        update.UpdatePipeline,
        poll=lambda self: fail(poll(self)),
        wait=lambda self, timeout_s: fail(wait(self, timeout_s)),
    )


# A commit that fails


def refuse_rename(path: Path, content: bytes) -> None:
    raise StorageError(errno.ENOSPC, "committing", path=str(path))


@pytest.mark.parametrize("placement", ["nvme", "mixed", "ram"])
@pytest.mark.parametrize("where", ["step", "end"])
def test_a_commit_that_fails_is_told(
    where: str, placement: str, nvme_dir: Path, want: dict[str, str]
) -> None:
    policy = policy_of(nvme_dir, ENTRY, placement)
    with pytest.raises(StorageError, match="committing.*ENOSPC"), begin(policy) as engine:
        train(engine, ENTRY, until=2)
        engine.flush()
        with patched(commit, write_durably=refuse_rename):
            train(engine, ENTRY, until=3 if where == "end" else NUM_STEPS)
            engine.close()
    assert read_manifest(nvme_dir).step == 2
    check_resumes(policy, 2, want)


def test_a_last_commit_that_fails_behind_an_error_is_logged(
    nvme_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Boom), begin(policy_of(nvme_dir, ENTRY, "nvme")) as engine:
        train(engine, ENTRY, until=1)
        engine.flush()
        with patched(commit, write_durably=refuse_rename), patched(Commits, _finish=unfinished):
            train(engine, ENTRY, until=2)
            wait_for_thread(engine)
        engine._engine.fail(Boom("a drive"))
        raise Boom
    assert "the last commit failed" in caplog.text and "ENOSPC" in caplog.text


def unfinished(commits: Commits, future: object) -> None:
    """The thread is done, and the engine does not know it yet."""


def wait_for_thread(engine: Any) -> None:
    engine._engine.flush()
    while engine.run._commits._future is None:
        engine._engine.poll()
    concurrent.futures.wait([engine.run._commits._future])


def test_a_first_commit_counts_from_when_it_is_durable(
    nvme_dir: Path, want: dict[str, str]
) -> None:
    """The engine fails before it has heard of the commit: the files stay all the same."""
    policy = policy_of(nvme_dir, ENTRY, "nvme")
    with pytest.raises(Boom), begin(policy) as engine:
        with patched(Commits, _finish=unfinished):
            train(engine, ENTRY, until=1)
            wait_for_thread(engine)
        engine._engine.fail(Boom("a drive"))
        raise Boom
    check_resumes(policy, 1, want)


def test_discard_while_a_commit_is_under_way(nvme_dir: Path) -> None:
    engine = begin(policy_of(nvme_dir, ENTRY, "nvme"))
    with patched(Commits, _finish=unfinished):
        train(engine, ENTRY, until=1)
        wait_for_thread(engine)
    engine.close(discard=True)
    assert list(nvme_dir.iterdir()) == []


# Ctrl-C


def once(function: Callable[..., Any], *, at: int = 1) -> Callable[..., Any]:
    """Ctrl-C in call number `at`, instead of it."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


INTERRUPTED = {
    "wait": lambda: patched(commit.concurrent.futures, wait=once(concurrent.futures.wait)),
    "finish": lambda: patched(PlaneExtents, commit=once(PlaneExtents.commit, at=5)),
    "save": lambda: patched(Engine, start_plane=once(Engine.start_plane, at=2)),
    "update": lambda: patched(Engine, finish_update=once(Engine.finish_update, at=3)),
}


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("place", INTERRUPTED)
def test_ctrl_c_while_a_commit_is_settled(
    place: str, goes_on: bool, nvme_dir: Path, want: dict[str, str]
) -> None:
    """Whoever catches it goes on with the same bits; who does not resumes with them."""
    policy = policy_of(nvme_dir, ENTRY, "mixed", optimizer__update="deferred")

    def run() -> None:
        with begin(policy) as engine:
            train(engine, ENTRY, until=3)
            try:
                with INTERRUPTED[place]():
                    engine.flush()
            except KeyboardInterrupt:
                if not goes_on:
                    raise
                engine.flush()
                assert is_committed(engine)
            train(engine, ENTRY, until=NUM_STEPS)
            assert record_of(engine) == want

    if goes_on:
        run()
        check_resumes(policy, NUM_STEPS, want)
    else:
        with pytest.raises(KeyboardInterrupt):
            run()
        check_resumes(policy, 3, want)


def is_committed(engine: Any) -> bool:
    """Nothing that the manifest names may be the next update's target."""
    chunks = engine._engine.chunks
    planes = [(c, plane) for c in chunks for plane in c.spec.state_planes(engine.plan.fmt)]
    return all(c.extents[plane].committed == c.extents[plane].newest_index for c, plane in planes)


def test_ctrl_c_loses_no_completion(nvme_dir: Path, want: dict[str, str]) -> None:
    """It comes just when completions have been taken from the native code, again and again."""
    poll, wait = update.UpdatePipeline.poll, update.UpdatePipeline.wait
    came = []

    def with_ctrl_c(rows: list[Any]) -> list[Any]:
        if rows:
            came.append(rows)
            signal.raise_signal(signal.SIGINT)
        return rows

    with begin(policy_of(nvme_dir, ENTRY, "nvme", optimizer__update="deferred")) as engine:
        with patched(
            update.UpdatePipeline,
            poll=lambda self: with_ctrl_c(poll(self)),
            wait=lambda self, timeout_s: with_ctrl_c(wait(self, timeout_s)),
        ):
            step_through(engine)
        train(engine, ENTRY, until=NUM_STEPS)
        assert came and record_of(engine) == want


@contextlib.contextmanager
def factored_run(folder: Path) -> Iterator[tuple[Any, Callable[[int], None]]]:
    """An engine with Adafactor, its updates deferred, and the function that trains to a step."""
    policy = policy_of(folder, ENTRY, "nvme", optimizer__update="deferred", durability="off")
    policy["optimizer"]["kind"] = "adafactor"
    with begin(policy) as engine:
        optimizer = offload.Adafactor(engine.model.parameters(), lr=1e-3)

        def train_until(step: int) -> None:
            for number in range(engine.run.num_steps, step):
                torch.manual_seed(number)
                one_step(engine, optimizer, ENTRY, number)

        yield engine, train_until


@pytest.mark.parametrize("place", ["pack", "submit"])
def test_ctrl_c_while_an_update_starts(place: str, nvme_dir: Path) -> None:
    """The means of Adafactor have moved, its tiles have not: the update starts all the same."""

    def with_ctrl_c(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            result = function(*args, **kwargs)
            came.append(1)
            return result

        return call

    came: list[int] = []
    with factored_run(nvme_dir / "plain") as (engine, train_until):
        train_until(3)
        want = record_of(engine)
    owner, name = {"pack": (FactoredStep, "pack"), "submit": (InFlight, "start_update")}[place]
    with factored_run(nvme_dir / "disturbed") as (engine, train_until):
        train_until(1)
        with patched(owner, **{name: with_ctrl_c(getattr(owner, name))}):
            flush_through(engine)
        assert came
        train_until(3)
        assert record_of(engine) == want


@pytest.mark.parametrize("in_place", [True, False])
def test_an_update_that_fails_at_its_start_stops_the_engine(in_place: bool, nvme_dir: Path) -> None:
    """Every later call names the error, and nothing waits for what nobody does."""
    with pytest.raises(Boom), factored_run(nvme_dir) as (engine, train_until):
        train_until(1)
        if in_place:  # the next update is that of the small chunk, in step()
            engine.flush()
        with patched(FactoredStep, pack=boom), pytest.raises(Boom) as failed:
            train_until(2)
        for call in (engine.flush, lambda: engine.master("model.norm.weight")):
            with pytest.raises(StateError, match="stopped at an earlier error"):
                call()
        raise failed.value


def boom(*_: object) -> None:
    raise Boom


def step_through(engine: Any) -> None:
    """One step, and the promise of it kept, through every Ctrl-C."""
    with patched(update.UpdatePipeline, poll=lambda self: []):
        train(engine, ENTRY, until=1)
    flush_through(engine)


def flush_through(engine: Any) -> None:
    for _ in range(100):
        try:
            engine.flush()
            return
        except KeyboardInterrupt:
            continue


def test_a_second_ctrl_c_leaves_nothing_open(nvme_dir: Path, want: dict[str, str]) -> None:
    """The first ends training, the second comes while the commit's thread is waited for."""
    policy = policy_of(nvme_dir, ENTRY, "nvme")
    with (
        patched(Commits, close=twice(Commits.close)),
        pytest.raises(KeyboardInterrupt),
        begin(policy) as engine,
    ):
        train(engine, ENTRY, until=2)
        raise KeyboardInterrupt
    check_resumes(policy, 2, want)


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> None:
        function(*args)
        raise KeyboardInterrupt

    return call
