"""Wear as arithmetic: a daily limit that holds in any 24 hours, and days that add up."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import PolicyError
from offload.policy import NvmePolicy, load_policy
from offload.wear import (
    DAY_S,
    HOUR_S,
    DriveWear,
    WearReport,
    Writes,
    check_daily_limit,
    decimal_nbytes,
    plan_lines,
)

GB, TB = 10**9, 10**12
START_S = 1_760_000_000.0


def run(
    steps: list[tuple[float, int]], limit: int, writes: Writes, now_s: float
) -> tuple[list[tuple[float, int]], Writes, float]:
    """Do (seconds, bytes) steps of one drive as a run does; returns when how much was written."""
    log, begin_s = [], -math.inf
    for seconds, nbytes in steps:
        while (pause_s := writes.pause_s([nbytes], limit, last_begin_s=begin_s, now_s=now_s)) > 0:
            assert pause_s <= 26 * HOUR_S
            now_s += max(pause_s, 1e-3)
        begin_s = now_s
        now_s += seconds
        log.append((now_s, nbytes))
        writes = writes.plus([nbytes], now_s)
    return log, writes, now_s


def most_in_a_day(log: list[tuple[float, int]]) -> int:
    return max(sum(n for at, n in log if end - DAY_S < at <= end) for end, _ in log)


Steps = st.lists(st.tuples(st.floats(0.1, 3e4), st.integers(0, 100)), min_size=1, max_size=60)


@settings(deadline=None)
@given(Steps, st.integers(100, 1000), st.floats(0, 1e5))
def test_no_24_hours_exceed_the_limit(
    steps: list[tuple[float, int]], limit: int, offset_s: float
) -> None:
    log, _, _ = run(steps, limit, Writes(), START_S + offset_s)
    assert most_in_a_day(log) <= limit


def test_a_long_run_keeps_close_to_the_limit_and_never_stands_still_for_long() -> None:
    """Full speed would be 86 times the limit. The day's first steps are the quickest."""
    limit, nbytes = 1000, 1
    log, _, end_s = run([(1.0, nbytes)] * 6000, limit, Writes(), START_S)
    days = (end_s - START_S) / DAY_S
    assert 0.9 * limit <= sum(n for _, n in log) / days <= 1.2 * limit
    assert most_in_a_day(log) <= limit
    gaps = [b - a for (a, _), (b, _) in zip(log, log[1:], strict=False)]
    assert max(gaps) < 3 * HOUR_S and min(gaps) < 10


def test_a_short_run_is_not_slowed_down() -> None:
    steps = [(10.0, 1)] * 300
    _, _, end_s = run(steps, 600, Writes(), START_S)  # half of what a day allows
    assert end_s - START_S == pytest.approx(3000)
    _, _, end_s = run(steps, 590, Writes(), START_S)
    assert end_s - START_S > 3100


def test_a_run_below_the_limit_is_never_slowed_down() -> None:
    """It begins at half of it, and goes on for days at nine tenths."""
    steps = [(96.0, 1)] * 4000
    _, _, end_s = run(steps, 1000, Writes(), START_S)
    assert end_s - START_S == pytest.approx(96 * 4000, rel=1e-6)


def test_a_run_that_begins_again_does_not_forget() -> None:
    """Cut anywhere, with only `Writes` kept, the windows hold all the same."""
    log: list[tuple[float, int]] = []
    writes, now_s = Writes(), START_S
    for _ in range(40):
        part, writes, now_s = run([(5.0, 30)] * 2, 500, writes, now_s)
        log += part
    assert most_in_a_day(log) <= 500
    assert writes.total == (40 * 2 * 30,)
    assert len(writes.hours) <= 25


def test_what_is_a_day_old_counts_no_more() -> None:
    writes = Writes().plus([7, 1], START_S)
    assert [writes.recent(0, START_S + h * HOUR_S) for h in (0, 24, 25)] == [7, 7, 0]
    later = writes.plus([0, 2], START_S + 30 * HOUR_S)
    assert (later.total, len(later.hours)) == ((7, 3), 1)


def test_a_clock_that_was_set_back_does_not_hide_what_was_written() -> None:
    writes = Writes().plus([7], START_S).plus([5], START_S - 90 * DAY_S)
    assert writes.recent(0, START_S - 90 * DAY_S) == 12
    assert writes.recent(0, START_S - 88 * DAY_S) == 0  # and it does not stay for ever


def test_the_drive_that_is_written_most_decides() -> None:
    writes = Writes().plus([0, 90], START_S)
    common = {"last_begin_s": START_S, "now_s": START_S}
    due_s = 25 * HOUR_S - START_S % HOUR_S  # when what was written is a day old
    assert writes.pause_s([60, 10], 200, **common) == 0
    assert writes.pause_s([60, 11], 200, **common) == pytest.approx(due_s * 11 / 110)
    assert writes.pause_s([60, 0], 100, **common) == pytest.approx(due_s * 60 / 100)
    assert writes.pause_s([60, 11], 100, **common) == pytest.approx(due_s)


def test_a_step_above_the_limit_is_refused_with_numbers() -> None:
    check_daily_limit((5, 10), 10)
    check_daily_limit((5, 10), None)
    check_daily_limit((), 10)
    with pytest.raises(PolicyError, match=r"max_writes_per_day of 9 bytes .* 1500000 bytes.* 2MB"):
        check_daily_limit((5, 1_500_000), 9)


def drive(**changes: object) -> DriveWear:
    fields = {
        "written_nbytes": 58 * GB, "step_nbytes": 1_400_000_000, "nbytes_per_day": 5.0 * TB,
        "used_nbytes": 58 * GB, "rated_nbytes": 600 * TB, "rated_by": "the label states",
    }  # fmt: skip
    return DriveWear(**{**fields, **changes})


def test_the_report_is_a_sentence() -> None:
    report = WearReport((drive(),))
    assert str(report) == (
        "wrote 58 GB, 1.4 GB a step; at this pace 5.0 TB a day, 120 days of the 600 TB that the "
        "label states"
    )
    assert report.short() == "drive 120 days"
    used = WearReport((drive(used_nbytes=100 * TB + 58 * GB),))
    assert str(used).endswith("100 days of the 600 TB that the label states (of which 100 TB were "
                              "written before)")  # fmt: skip


def test_the_worst_of_several_drives_is_shown() -> None:
    report = WearReport((drive(), drive(rated_nbytes=300 * TB), drive(nbytes_per_day=0.0)))
    assert report.worst is report.drives[1]
    assert str(report).startswith("wrote 174 GB to 3 drives; to the most worn, 1.4 GB a step")
    assert report.short() == "drive 60 days"


def test_what_is_not_known_is_not_said() -> None:
    assert WearReport(()).short() == "" and str(WearReport(())) == "nothing was written"
    unrated = WearReport((drive(rated_nbytes=None), drive(rated_nbytes=None, nbytes_per_day=6e12)))
    assert unrated.short() == "drive 6.0 TB/day"
    assert str(unrated).endswith("at this pace 6.0 TB a day")
    first = WearReport((drive(nbytes_per_day=0.0),))
    assert first.short() == "" and str(first) == "wrote 58 GB"


def test_days_at_the_edges() -> None:
    assert drive(used_nbytes=700 * TB).days_left == 0.0
    assert drive(nbytes_per_day=0.0).days_left == math.inf
    assert WearReport((drive(nbytes_per_day=1.0),)).short() == "drive over 100 years"
    assert WearReport((drive(used_nbytes=595 * TB),)).short() == "drive 1.0 days"


def test_the_plan_says_how_long_the_drives_last() -> None:
    assert plan_lines((12 * GB,), (600 * TB,), None) == [
        "endurance: 600 TB last 50,000 steps of 12 GB"
    ]
    assert plan_lines((12 * GB, 10 * GB), (), 100 * GB) == [
        "to each of 2 drives at most 12 GB a step",
        "at most 8 steps in 24 hours, by max_writes_per_day",
    ]
    assert plan_lines((12, 12), (600, 300), None)[1].startswith("endurance: 300 B last 25 steps")
    assert plan_lines((0, 0), (600, 300), 7) == plan_lines((), (), None) == []


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.4e9, "1.4 GB"), (58e9, "58 GB"),
     (600e12, "600 TB"), (2.5e15, "2.5 PB")],
)  # fmt: skip
def test_sizes_are_as_on_the_label(nbytes: float, text: str) -> None:
    assert decimal_nbytes(nbytes) == text


# What the policy says


def nvme_policy(**keys: object) -> NvmePolicy:
    tree = {"tiers": {"cpu": {"budget": "4GiB"}, "nvme": {"paths": ["/a", "/b"], **keys}}}
    nvme = load_policy(load_policy(tree)).tiers.nvme  # what is read can be read again
    assert nvme is not None
    return nvme


@pytest.mark.parametrize(
    ("value", "rated"),
    [("600TB", (600 * TB,) * 2), (600, (600, 600)), (["1TB", "2TB"], (TB, 2 * TB)),
     (["1TB"], (TB, TB)), (None, ())],
)  # fmt: skip
def test_one_endurance_is_that_of_every_drive(value: object, rated: tuple[int, ...]) -> None:
    assert nvme_policy(endurance=value).rated_nbytes == rated


def test_a_limit_is_a_size_or_nothing() -> None:
    assert nvme_policy().max_writes_per_day is None
    assert nvme_policy(max_writes_per_day="2TB").max_writes_per_day == 2 * TB


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("endurance", 0, "0 is not a size above 0, or a list of sizes"),
        ("endurance", "long", "'long' is not a size"),
        ("endurance", [], r"\[\] is not a size above 0, or a list"),
        ("endurance", [600, 0], r"\[600, 0\] is not a size above 0"),
        ("endurance", [1, 2, 3], r"\['1B', '2B', '3B'\]: 3 sizes for 2 paths"),
        ("max_writes_per_day", 0, "0 is not accepted"),
        ("max_writes_per_day", [1], r"\[1\] is not a size"),
    ],
)
def test_bad_values_are_named(key: str, value: object, words: str) -> None:
    with pytest.raises(PolicyError, match=rf"tiers\.nvme\.{key}: {words}.*; accepted: a size"):
        nvme_policy(**{key: value})
