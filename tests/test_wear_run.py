"""Wear of real runs: every byte is booked to its drive, and the daily limit is kept by waiting."""

import contextlib
import logging
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import small_units
from drives import loop_drive
from parity import make_policy
from steps import one_step
from test_wear import most_in_a_day
from torch import nn
from zoo import ZOO

import offload
from offload import smart
from offload.runfiles import read_manifest
from offload.wear import DAY_S, WEAR_LIMIT, add

LLAMA = ZOO["llama"]
MIB = 1 << 20


def striped(folder: Path, num_paths: int, **changes: Any) -> dict[str, Any]:
    paths = [str(folder / f"drive{i}") for i in range(num_paths)]
    return make_policy(folder, tiers__nvme__paths=paths, **changes)


def wide(depth: int = 4, width: int = 384) -> nn.Module:
    """Blocks whose planes do not divide evenly by three drives."""
    return nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))}
    )


def train_wide(engine: Any, optimizer: Any, used: int = 4) -> None:
    """A step with gradients for the first `used` layers."""
    x = torch.ones(1, engine.model["layers"][0].in_features, dtype=torch.bfloat16)
    for layer in list(engine.model["layers"])[:used]:
        x = torch.tanh(layer(x))
    x.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def written_now(engine: Any) -> tuple[int, ...]:
    """Finish everything, and return what has been written by drive since the last step."""
    engine.flush()
    stats = engine._engine.stats.roll()
    assert sum(stats.written_by_drive) == stats.nbytes["nvme write"]
    return stats.written_by_drive


# Where bytes go


@pytest.mark.parametrize("num_paths", [1, 2, 3])
@pytest.mark.parametrize("update", ["eager", "deferred"])
def test_each_drive_gets_what_the_plan_says(nvme_dir: Path, num_paths: int, update: str) -> None:
    policy = striped(
        nvme_dir, num_paths, optimizer__update=update, optimizer__tile_numel=65536,
        tiers__cpu__grad_slots=1, tiers__nvme__pack=False,
    )  # fmt: skip
    with small_units(1024), offload.offload(wide(), policy) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        for _ in range(3):
            train_wide(engine, optimizer)
        written_now(engine)
        train_wide(engine, optimizer)
        step = engine.stats().written_by_drive
        rest = written_now(engine)
        planned = engine.plan.written_by_drive()
        assert sum(planned) == engine.plan.traffic()[1]
        assert num_paths < 3 or len(set(planned)) > 1  # not just a third each
    got = add(step, rest)
    if update == "eager":
        assert got == planned
    else:  # the last gradient finds a slot free, and is not spilled
        assert all(0.9 * p <= n <= p for n, p in zip(got, planned, strict=True))


def test_only_touched_tiles_are_counted(nvme_dir: Path) -> None:
    """A chunk whose parameters do not all have a gradient: counted as the worker counts."""
    with small_units(1024), offload.offload(LLAMA.make_model(), striped(nvme_dir, 2)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        for param in engine.model.model.layers[1].mlp.parameters():
            param.requires_grad_(False)
        one_step(engine, optimizer, LLAMA, 1)
        assert sum(written_now(engine)) > 0


def test_a_run_in_ram_has_no_drives(nvme_dir: Path) -> None:
    policy = make_policy(nvme_dir, tiers__nvme=None, tiers__cpu={"budget": "256MiB"})
    with offload.offload(LLAMA.make_model(), policy) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        one_step(engine, optimizer, LLAMA, 1)
        assert engine.stats().written_by_drive == ()
        assert engine.run.wear.report().short() == ""


def sectors_written(point: Path) -> int:
    """Bytes that the block layer has written to the drive of a mount point."""
    fields = (Path("/sys/block") / smart.disk_of(point) / "stat").read_text().split()
    return int(fields[6]) * 512


@pytest.mark.root
def test_real_drives_are_written_what_is_booked_to_them(tmp_path: Path) -> None:
    """Three loop devices, with planes that they do not share evenly."""
    with contextlib.ExitStack() as stack:
        points = [tmp_path / f"drive{i}" for i in range(3)]
        for point in points:
            stack.enter_context(loop_drive(tmp_path / f"{point.name}.img", point))
        assert {smart.disk_of(point)[:4] for point in points} == {"loop"}
        policy = striped(tmp_path, 3, optimizer__tile_numel=65536)
        with small_units(1024), offload.offload(wide(), policy) as engine:
            optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
            for _ in range(2):
                train_wide(engine, optimizer)
            written_now(engine)
            before = [sectors_written(point) for point in points]
            booked: tuple[int, ...] = ()
            for _ in range(4):
                train_wide(engine, optimizer)
                booked = add(booked, engine.stats().written_by_drive)
            booked = add(booked, written_now(engine))
            real = [sectors_written(p) - n for p, n in zip(points, before, strict=True)]
    assert max(booked) > 1.1 * min(booked)
    for got, want in zip(real, booked, strict=True):
        assert 0 <= got - want <= MIB // 4  # and the file system's own


# The daily limit


class Clock:
    """What `offload.meter` takes for the module time."""

    def __init__(self) -> None:
        self.now_s, self.slept_s = 1_760_000_000.0, 0.0

    def time(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """A long one is cut short by no more than a real one would be."""
        self.now_s += max(seconds, 600.0)
        self.slept_s += max(seconds, 600.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    names = types.SimpleNamespace(time=clock.time, sleep=clock.sleep)
    monkeypatch.setattr("offload.meter.time", names)
    yield clock


def step_nbytes(folder: Path, **changes: Any) -> int:
    with (
        small_units(1024),
        offload.offload(LLAMA.make_model(), make_policy(folder, **changes)) as e,
    ):
        return max(e.plan.written_by_drive(at_most=True))


def test_steps_wait_for_the_limit(
    nvme_dir: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 5 * step_nbytes(nvme_dir)
    policy = make_policy(nvme_dir, tiers__nvme__max_writes_per_day=limit)
    log, stalled_s = [], 0.0
    with small_units(1024), offload.offload(LLAMA.make_model(), policy) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        for step in range(12):
            clock.now_s += 60
            before_s = clock.now_s
            one_step(engine, optimizer, LLAMA, step)
            log.append((before_s, engine.stats().written_by_drive[0]))
            stalled_s += engine.stats().stall_s.get(WEAR_LIMIT, 0.0)
        assert engine._engine.stats.roll().stall_s[WEAR_LIMIT] + stalled_s == clock.slept_s
    assert most_in_a_day(log) <= limit
    assert clock.slept_s > 1.2 * DAY_S
    said = [line for line in caplog.messages if "max_writes_per_day" in line]
    assert len(said) == 1


def test_without_a_limit_nothing_waits(nvme_dir: Path, clock: Clock) -> None:
    with small_units(1024), offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        for step in range(3):
            one_step(engine, optimizer, LLAMA, step)
    assert clock.slept_s == 0


@pytest.mark.parametrize("update", ["eager", "deferred"])
@pytest.mark.parametrize("durability", ["step", "every 2 steps"])
def test_a_resumed_run_remembers_what_it_wrote(
    nvme_dir: Path, clock: Clock, durability: str, update: str
) -> None:
    """Started again after every two steps: the limit holds over all of them."""
    folder = nvme_dir / "run"
    changes = {"durability": durability, "optimizer__update": update, "tiers__nvme__pack": False}
    limit = 6 * step_nbytes(nvme_dir / "plan", **changes)
    policy = make_policy(folder, tiers__nvme__max_writes_per_day=limit, **changes)
    log, weights = [], None
    for _ in range(6):
        with small_units(1024), offload.offload(LLAMA.make_model(), policy, weights=weights) as e:
            optimizer = offload.AdamW(e.model.parameters(), lr=1e-3)
            earlier = e.run.wear.writes.total
            for step in range(2):
                before_s = clock.now_s  # a step waits at its end
                one_step(e, optimizer, LLAMA, step)
                log.append((before_s, e.stats().written_by_drive[0]))
            log.append((clock.now_s, written_now(e)[0]))
            assert sum(e.run.wear.writes.total) > sum(earlier)
        weights = "resume"
        kept = read_manifest(folder).wear
        assert sum(nbytes for _, (nbytes,) in kept.hours) <= sum(kept.total)
    real = sum(nbytes for _, nbytes in log)
    # The manifest of each process's last commit is not in the count: 8 % of a step here.
    assert 0.96 * real <= sum(kept.total) <= real
    assert most_in_a_day(log) <= limit * 1.04
    assert clock.slept_s > DAY_S


def test_a_checkpoint_does_not_bring_the_wear_of_other_drives(nvme_dir: Path) -> None:
    with small_units(1024):
        with offload.offload(LLAMA.make_model(), make_policy(nvme_dir / "a")) as engine:
            optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
            one_step(engine, optimizer, LLAMA, 1)
            engine.checkpoint(nvme_dir / "kept")
        policy = make_policy(nvme_dir / "b")
        with offload.offload(LLAMA.make_model(), policy, weights=nvme_dir / "kept") as engine:
            assert engine.run.wear.writes.total == ()


def test_a_limit_below_one_step_is_refused(nvme_dir: Path) -> None:
    limit = step_nbytes(nvme_dir) - 1
    policy = make_policy(nvme_dir, tiers__nvme__max_writes_per_day=limit)
    refusal = pytest.raises(offload.PolicyError, match=f"max_writes_per_day of {limit} bytes")
    with small_units(1024), refusal as error:
        offload.offload(LLAMA.make_model(), policy)
    assert f"{limit + 1} bytes" in str(error.value)
    assert not list(nvme_dir.glob("*.swap"))


def test_hurry_ends_the_waiting(nvme_dir: Path, clock: Clock) -> None:
    limit = 3 * step_nbytes(nvme_dir)
    policy = make_policy(nvme_dir, tiers__nvme__max_writes_per_day=limit)
    with small_units(1024), offload.offload(LLAMA.make_model(), policy) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        engine.run.wear.hurry()
        for step in range(5):
            one_step(engine, optimizer, LLAMA, step)
    assert clock.slept_s == 0
    with small_units(1024), offload.offload(LLAMA.make_model(), policy) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        for step in range(5):
            one_step(engine, optimizer, LLAMA, step)
    assert clock.slept_s > 0


def test_moving_in_counts_too(nvme_dir: Path, clock: Clock) -> None:
    """Where it took the whole day's limit, the first step waits a day, and only once."""
    nbytes = step_nbytes(nvme_dir)
    policy = make_policy(nvme_dir, tiers__nvme__max_writes_per_day=nbytes)
    with small_units(1024), offload.offload(LLAMA.make_model(), policy) as engine:
        assert 24 * 3600 <= clock.slept_s <= 26 * 3600
        assert sum(engine.run.wear.writes.total) > 0
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        one_step(engine, optimizer, LLAMA, 1)
        assert engine._engine.chunks and not engine._engine._flight  # nothing waits with it
        assert clock.slept_s <= 52 * 3600


# What is said


def test_the_report_follows_the_clock_and_the_rating(nvme_dir: Path, clock: Clock) -> None:
    policy = striped(nvme_dir, 2, tiers__nvme__endurance=["1GB", "2GB"])
    with small_units(1024), offload.offload(LLAMA.make_model(), policy) as engine:
        assert "endurance: 1.0 GB last" in str(engine.plan)
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        for step in range(5):
            clock.now_s += 864
            one_step(engine, optimizer, LLAMA, step)
        report = engine.run.wear.report()
        total = engine.run.wear.writes.total
    for drive, rated, written in zip(report.drives, (10**9, 2 * 10**9), total, strict=True):
        assert (drive.written_nbytes, drive.rated_nbytes) == (written, rated)
        assert drive.nbytes_per_day == pytest.approx(100 * drive.step_nbytes, rel=1e-4)
        left = (rated - drive.used_nbytes) / drive.nbytes_per_day
        assert drive.days_left == pytest.approx(left)
    assert report.worst is report.drives[0]
    assert "that tiers.nvme.endurance states" in str(report)


def test_a_drive_that_knows_its_wear_is_believed(
    nvme_dir: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = smart.SmartLog(written_nbytes=30 * 10**12, percentage_used=10)
    reading = smart.SmartReading(log, "nvme0n1")
    monkeypatch.setattr("offload.meter.read_smart", lambda path: reading)
    with small_units(1024), offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        for step in range(3):
            clock.now_s += 1
            one_step(engine, optimizer, LLAMA, step)
        (drive,) = engine.run.wear.report().drives
        assert drive.rated_nbytes == 300 * 10**12
        assert drive.used_nbytes == 30 * 10**12 + drive.written_nbytes
        text = str(engine.run.wear.report())
    assert text.endswith("of the 300 TB that its SMART log implies (of which 30 TB were written "
                         "before)")  # fmt: skip


def test_a_policy_of_another_number_of_drives_is_refused(nvme_dir: Path) -> None:
    with pytest.raises(offload.PolicyError, match="3 sizes for 2 paths"):
        offload.load_policy(striped(nvme_dir, 2, tiers__nvme__endurance=["1TB"] * 3))


def test_quiet_runs_log_nothing(nvme_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A drive that cannot be asked is no news."""
    with caplog.at_level(logging.INFO), small_units(1024):
        offload.offload(LLAMA.make_model(), make_policy(nvme_dir)).close()
    assert not [line for line in caplog.messages if "SMART" in line or "wear" in line]
