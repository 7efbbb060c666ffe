"""The campaign of test_fault_campaign.py over optimizers of torch, whose steps read whole planes,
wait and write them back; and over runs with durability, whose committed step outlives each fault.
"""

import errno
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos import small_units
from conftest import native_threads, open_files
from fault_campaign import (
    ALL_MODES,
    MODEL,
    RECIPE,
    RUN_SECONDS_MAX,
    TORCH_MODES,
    Campaign,
    Row,
    audited,
    bounded,
    campaign,
    is_refused,
    judge_of,
    survives,
    table,
)
from fault_plans import (
    DELAYS,
    ERRORS,
    LIES,
    TRANSIENT,
    Rule,
    fault_backend,
    faults,
    num_injected,
    rate,
)
from parity import Record, assert_same, record_rest, record_state, run_plain
from steps import one_step
from torch_rig import STATE, Plain

import offload
from offload.runfiles import read_manifest
from offload.swapfile import MANIFEST_NAME

pytestmark = pytest.mark.usefixtures("nothing_left")
STRIDE = 89  # operations; a run has between one and four hundred
STRIDE_OF_WRITES = 31  # a fault that only writes meet counts those alone
CASES = list(zip(TRANSIENT + DELAYS, itertools.cycle(TORCH_MODES), strict=False))
CASES += list(itertools.product(ERRORS, ("RMSprop", "Adafactor int8")))
WRITE_LIES = LIES[1:]  # what they break is broken on the drive
ON_WRITES = ("enospc", *WRITE_LIES)
every_mode = pytest.mark.parametrize("mode", TORCH_MODES)


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[str, Row]]]:
    """Gathers the counts of this module's campaigns, and prints them at its end."""
    found: list[tuple[str, Row]] = []
    yield found
    print("\n" + table(found))


def stride_of(kind: str) -> int:
    return STRIDE_OF_WRITES if kind in ON_WRITES else STRIDE


@every_mode
def test_the_undisturbed_run_is_right(mode: str, nvme_dir: Path) -> None:
    runs, how = Campaign(nvme_dir, mode), TORCH_MODES[mode]
    assert runs.strike([]) is None and num_injected() == 0
    want = run_plain(MODEL, RECIPE, how.format, make=lambda *args: Plain(*args, case=how.case))
    assert_same(
        runs.reference.record, want.record, only=lambda key: not key.startswith(("grad[", STATE))
    )


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_one_fault(kind: str, mode: str, nvme_dir: Path, rows: list[tuple[str, Row]]) -> None:
    row = campaign(Campaign(nvme_dir, mode), kind, stride=stride_of(kind), judge=judge_of(kind))
    assert row.injected > 1
    rows.append((mode, row))


@pytest.mark.parametrize(
    ("kind", "mode"),
    list(zip(LIES, itertools.cycle(("RMSprop int8", "Adafactor")), strict=False)),
)
def test_corruption_is_found(
    kind: str, mode: str, nvme_dir: Path, rows: list[tuple[str, Row]]
) -> None:
    """A lie that somebody reads is an error; one that nobody reads changes nothing."""
    runs = Campaign(nvme_dir, mode, checksum=True)
    assert runs.strike(rate(0.2, kind), seed=1) is not None
    rows.append((mode, campaign(runs, kind, stride=stride_of(kind), judge=lambda error: None)))


@every_mode
def test_many_faults_at_once(mode: str, nvme_dir: Path) -> None:
    """What can be overcome, all the time; then errors without end, and a drive that is well."""
    runs = Campaign(nvme_dir, mode)
    assert runs.strike(rate(0.1, *TRANSIENT, *DELAYS)) is None
    assert num_injected() > 50
    is_refused("eio")(runs.strike(rate(0.02, "eio"), seed=1))
    assert runs.strike([]) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *itertools.product(ERRORS, ("RMSprop", "Adafactor int8")),
        *zip(LIES, itertools.cycle(("RMSprop int8", "Adafactor")), strict=False),
    ],
)
def test_every_operation_fails(
    kind: str, mode: str, nvme_dir: Path, rows: list[tuple[str, Row]]
) -> None:
    judge = judge_of(kind) if kind in ERRORS else lambda error: None
    row = campaign(Campaign(nvme_dir, mode, checksum=True), kind, stride=1, judge=judge)
    assert row.injected > 40 and row.refused > row.survived
    rows.append((mode, row))


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("kind", ("short", "latency"))
def test_every_operation_stumbles(
    kind: str, mode: str, nvme_dir: Path, rows: list[tuple[str, Row]]
) -> None:
    row = campaign(Campaign(nvme_dir, mode), kind, stride=3, judge=survives)
    assert row.injected > 20
    rows.append((mode, row))


# With durability


UNDISTURBED: dict[str, Record] = {}  # what a durable run comes to, by mode


@dataclass
class DurableCampaign(Campaign):
    """Runs with durability: step. Behind each error the run is gone on with from the step that is
    committed, on a drive that is well.
    """

    num_begun: int = 0  # steps that the present run has begun
    num_resumed: int = 0  # runs gone on with from a committed step

    def strike(self, rules: list[Rule], *, seed: int = 0) -> offload.StorageError | None:
        if self.mode not in UNDISTURBED:
            self._empty()
            with faults([]):
                UNDISTURBED[self.mode] = self._run(None)
        self._empty()
        error = None
        with bounded(RUN_SECONDS_MAX):
            threads, files = native_threads(), open_files()
            with faults(rules, seed=seed), audited():
                try:
                    record = self._run(None)
                except offload.StorageError as caught:
                    error = caught
            assert not open_files() - files, "files left open"
            counted = num_injected()
            if error is not None:
                self._check_clear(error)
                record = self._go_on(rules)
            assert not native_threads() - threads, "a thread is left"
        assert num_injected() == counted
        if record is not None:
            assert_same(record, UNDISTURBED[self.mode])
        return error

    def _go_on(self, rules: list[Rule]) -> Record | None:
        """What the rest of the run comes to; None where the committed step cannot be read because
        the drive had not written what it said.
        """
        manifest = self.paths[0] / MANIFEST_NAME
        committed = read_manifest(self.paths[0]).step if manifest.exists() else 0
        assert self.num_begun - 2 <= committed <= self.num_begun, "a committed step is lost"
        self.num_resumed += committed > 0
        try:
            return self._run("resume" if committed else None)
        except offload.StorageError as error:
            assert error.errno == errno.EBADMSG and rules[0][0] in WRITE_LIES, error
            return None

    def _run(self, weights: str | None) -> Record:
        record: Record = {}
        policy = self.policy() | {"durability": "step"}
        self.num_begun = 0
        with (
            small_units(1024),
            fault_backend(),
            offload.offload(MODEL.make_model(), policy, weights=weights) as engine,
        ):
            optimizer = self.make(engine.model.parameters(), lr=1e-2)
            for step in range(engine.run.num_steps, RECIPE.steps):
                self.num_begun = step + 1
                one_step(engine, optimizer, MODEL, step, self.how.format)
            engine.flush()
            record_state(record, engine)
            record_rest(record, engine.model)
        return record

    def _empty(self) -> None:
        for path in self.paths:
            shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize(
    ("kind", "mode"),
    list(
        zip(
            (*ERRORS, *LIES),
            itertools.cycle(("RMSprop", "Adafactor int8", "RMSprop int8")),
            strict=False,
        )
    ),
)
def test_the_committed_step_outlives_a_fault(kind: str, mode: str, nvme_dir: Path) -> None:
    outlives(DurableCampaign(nvme_dir, mode, checksum=True), kind, stride=stride_of(kind))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("kind", (*ERRORS, *LIES))
def test_the_committed_step_outlives_every_fault(kind: str, mode: str, nvme_dir: Path) -> None:
    outlives(DurableCampaign(nvme_dir, mode, checksum=True), kind, stride=11)


def outlives(runs: DurableCampaign, kind: str, *, stride: int) -> None:
    judge = judge_of(kind) if kind in ERRORS else lambda error: None
    row = campaign(runs, kind, stride=stride, judge=judge)
    assert row.injected > 1 and (runs.num_resumed > 0 or kind in WRITE_LIES)
