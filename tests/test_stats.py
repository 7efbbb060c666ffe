"""What a step cost: counters go to the step they fall in, and shares sum to one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig import Rig, make_rig

from offload.formats import Plane
from offload.stats import COMPUTE, UPDATE, StatsCounter, StepStats
from offload.tier import Link

Seconds = st.floats(0, 1e6)


def test_roll_gives_the_step_and_starts_the_next() -> None:
    counter = StatsCounter()
    assert counter.last.wall_s == 0.0 and counter.last.nbytes == {}
    counter.moved(Link.READ, 100, 0.5)
    counter.moved(Link.READ, 11, 0.25)
    counter.moved(Link.H2D, 7, 0.125)
    counter.stalled(UPDATE, 0.5)
    counter.stalled(UPDATE, 1.0)
    counter.updated(0.75)
    counter.updated(0.25)
    first = counter.roll()
    assert first is counter.last
    assert first.nbytes == {"nvme read": 111, "nvme write": 0, "h2d": 7, "d2h": 0}
    assert first.busy_s == {"nvme read": 0.75, "nvme write": 0.0, "h2d": 0.125, "d2h": 0.0}
    assert first.stall_s == {UPDATE: 1.5}
    assert (first.num_updates, first.update_kernel_s) == (2, 1.0)
    counter.moved(Link.READ, 1, 0.0)
    second = counter.roll()
    assert second.nbytes["nvme read"] == 1 and second.stall_s == {}
    assert (second.num_updates, second.update_kernel_s) == (0, 0.0)
    assert first.nbytes["nvme read"] == 111 and 0.0 <= second.wall_s <= 3600.0


def make_stats(wall_s: float, stall_s: dict[str, float]) -> StepStats:
    return StepStats(
        wall_s=wall_s, nbytes={}, busy_s={}, stall_s=stall_s, num_updates=0, update_kernel_s=0.0
    )


@given(Seconds, st.dictionaries(st.sampled_from([UPDATE, *(x.value for x in Link)]), Seconds))
def test_shares_sum_to_one(compute_s: float, stall_s: dict[str, float]) -> None:
    """Wherever stalls fit in the wall time; a cause that cost nothing is left out."""
    wall_s = compute_s + sum(stall_s.values())
    shares = make_stats(wall_s, stall_s).shares()
    assert next(iter(shares)) == COMPUTE
    assert set(shares) - {COMPUTE} == {name for name, s in stall_s.items() if s > 0}
    if wall_s > 1e-6:
        assert sum(shares.values()) == pytest.approx(1.0)
        assert shares[COMPUTE] == pytest.approx(compute_s / wall_s, abs=1e-9)


def test_a_step_without_time_has_shares() -> None:
    assert make_stats(0.0, {}).shares() == {COMPUTE: 1.0}


def update_all(rig: Rig) -> None:
    """One deferred step over all chunks, finished, in the order of the chunks."""
    for index in range(len(rig.chunks)):
        rig.land_all(index, seed=index)
    rig.engine.set_updates({index: rig.ops(index) for index in range(len(rig.chunks))})
    rig.engine.flush()


@pytest.mark.parametrize("format", ["exact", "fp32"])
def test_a_step_moves_every_plane_once(format: str, nvme_dir: Path) -> None:
    """All on NVMe, every gradient spilled: state in and out, gradients out and in."""
    changes = {"tiers__cpu__grad_slots": 1, "tiers__cpu__weight_slots": 1}
    changes["tiers__nvme__pack"] = False
    with make_rig(nvme_dir, num_chunks=4, format=format, **changes) as rig:
        rig.engine.end_step()
        update_all(rig)
        rig.engine.end_step()
        fmt = rig.engine.plan.fmt
        state = sum(c.spec.nbytes(p, fmt) for c in rig.chunks for p in fmt.state_planes)
        grads = sum(c.spec.nbytes(Plane.GRAD, fmt) for c in rig.chunks)
        stats = rig.engine.stats.last
        assert stats.nbytes == {
            "nvme read": state + grads, "nvme write": state + grads, "h2d": 0, "d2h": 0,
        }  # fmt: skip
        assert stats.num_updates == 4
