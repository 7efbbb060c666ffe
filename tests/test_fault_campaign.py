"""A training run with one fault in it, for every place and every kind: it ends with the right bits
or with one clear error, never with neither.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_campaign import (
    MODEL,
    MODES,
    RECIPE,
    Campaign,
    Hang,
    Row,
    bounded,
    campaign,
    is_refused,
    judge_of,
    survives,
    table,
)
from fault_plans import DELAYS, ERRORS, LIES, TRANSIENT, at, num_injected, rate
from parity import assert_same, run_plain, without_grads

import offload
from offload import _native

pytestmark = pytest.mark.usefixtures("nothing_left")
STRIDE = 71  # operations; a run has a few hundred
PERIOD = 50
OPERATIONS_MAX = 1000
CASES = [
    *zip(TRANSIENT + DELAYS, ("eager", "deferred", "eager", "deferred", "eager"), strict=True),
    *itertools.product(ERRORS, MODES),
]


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[str, Row]]]:
    """Gathers the counts of this module's campaigns, and prints them at its end."""
    found: list[tuple[str, Row]] = []
    yield found
    print("\n" + table(found))


every_mode = pytest.mark.parametrize("mode", MODES)


@every_mode
def test_the_undisturbed_run_is_right(mode: str, nvme_dir: Path) -> None:
    runs = Campaign(nvme_dir, mode)
    assert runs.strike([]) is None
    assert _native.fault_counts()["writes"] > 100 and num_injected() == 0
    assert_same(runs.reference.record, run_plain(MODEL, RECIPE, "exact").record, only=without_grads)


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_one_fault(kind: str, mode: str, nvme_dir: Path, rows: list[tuple[str, Row]]) -> None:
    row = campaign(Campaign(nvme_dir, mode), kind, stride=STRIDE, judge=judge_of(kind))
    assert row.injected > 1
    rows.append((mode, row))


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("kind", ERRORS)
def test_every_operation_fails(
    kind: str, mode: str, nvme_dir: Path, rows: list[tuple[str, Row]]
) -> None:
    row = campaign(Campaign(nvme_dir, mode), kind, stride=1, judge=judge_of(kind))
    assert row.injected > 100
    rows.append((mode, row))


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("kinds", [("short",), ("eintr", "eagain", *DELAYS)], ids="+".join)
def test_every_operation_stumbles(
    kinds: tuple[str, ...], mode: str, nvme_dir: Path, rows: list[tuple[str, Row]]
) -> None:
    """What a run survives can strike it often: of every kind it gets a fault in each operation
    that leaves one remainder modulo PERIOD, another one for each kind; the runs have them all.
    """
    runs = Campaign(nvme_dir, mode)
    found = [Row(kind) for kind in kinds]
    for first in range(PERIOD):
        firsts = {kind: 1 + (first + shift) % PERIOD for shift, kind in enumerate(kinds)}
        numbers = {kind: range(n, OPERATIONS_MAX, PERIOD) for kind, n in firsts.items()}
        rules = [rule for kind in kinds for number in numbers[kind] for rule in at(kind, number)]
        survives(runs.strike(rules))
        counts = _native.fault_counts()
        num_operations = counts["reads"] + counts["writes"]
        assert num_operations < OPERATIONS_MAX
        for row in found:
            due = sum(number <= num_operations for number in numbers[row.kind])
            assert counts[row.kind] == due or (row.kind == "short" and 0 < counts["short"] <= due)
            row.injected += counts[row.kind]
            row.survived += counts[row.kind]
    rows += [(mode, row) for row in found]


@every_mode
@pytest.mark.parametrize("seed", range(2))
def test_many_faults_at_once(seed: int, mode: str, nvme_dir: Path) -> None:
    """Everything that can be overcome, all the time."""
    rules = rate(0.1, *TRANSIENT, *DELAYS)
    assert Campaign(nvme_dir, mode).strike(rules, seed=seed) is None
    assert num_injected() > 50


@every_mode
@pytest.mark.parametrize("kind", ERRORS)
def test_a_broken_drive(kind: str, mode: str, nvme_dir: Path) -> None:
    """Errors without end still make one error; and when the drive is well again, so is a run."""
    runs = Campaign(nvme_dir, mode)
    is_refused(kind)(runs.strike(rate(0.02, kind), seed=1))
    is_refused(kind)(runs.strike(rate(1.0, kind)))
    assert runs.strike([]) is None


@every_mode
@pytest.mark.parametrize("kind", LIES)
def test_corruption_is_found(
    kind: str, mode: str, nvme_dir: Path, rows: list[tuple[str, Row]]
) -> None:
    """A lie that somebody reads is an error; one that nobody reads changes nothing."""
    runs = Campaign(nvme_dir, mode, checksum=True)
    assert runs.strike(rate(0.2, kind), seed=1) is not None
    rows.append((mode, campaign(runs, kind, stride=STRIDE, judge=lambda error: None)))


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("kind", LIES)
def test_every_corruption_is_found(
    kind: str, mode: str, nvme_dir: Path, rows: list[tuple[str, Row]]
) -> None:
    runs = Campaign(nvme_dir, mode, checksum=True)
    row = campaign(runs, kind, stride=1, judge=lambda error: None)
    assert row.refused > row.survived
    rows.append((mode, row))


# The campaign sees what it should


@pytest.mark.parametrize("kind", LIES)
def test_without_checksums_lies_show_as_wrong_bits(kind: str, nvme_dir: Path) -> None:
    """The comparison finds a silent error, here one of so many that some must matter."""
    with pytest.raises((AssertionError, offload.NumericsError), match="differ|NaN|Inf"):
        Campaign(nvme_dir, "deferred", checksum=False).strike(rate(0.2, kind), seed=1)


def test_a_hang_ends() -> None:
    with pytest.raises(Hang), bounded(0.01):
        while True:
            pass
