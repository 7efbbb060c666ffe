"""Gradients land, accumulate, wait and spill; by any route their bits are those of a plain sum."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import twins
from parity import FORMATS, bits
from rig import SHAPES, Rig, Twin, make_rig, places
from torch import Tensor

from offload.errors import BudgetError, NumericsError, StateError, StorageError
from offload.io import WRITE
from offload.transfer import Device, HostDevice, StandinDevice


def delayed_standin() -> Device:
    dice = random.Random(7)
    return StandinDevice(delay=lambda: dice.random() * 1e-3)


DEVICES: dict[str, Callable[[], Device]] = {"cpu": HostDevice, "standin": delayed_standin}
every_device = pytest.mark.parametrize("make_device", DEVICES.values(), ids=DEVICES)
every_format = pytest.mark.parametrize("format", FORMATS)


def norm_of(grads: list[Tensor]) -> float:
    """The 2-norm in the order that the engine promises."""
    return math.sqrt(sum(twins.sum_squares(g.float().numpy().reshape(-1)) for g in grads))


# How a gradient meets what is there


@every_device
@every_format
def test_the_first_gradient_is_kept_as_it_is(
    format: str, make_device: Callable[[], Device], nvme_dir: Path
) -> None:
    with make_rig(nvme_dir, format=format, device=make_device()) as rig:
        grads = [rig.grad(k, k) for k in range(len(SHAPES))]
        for position, grad in enumerate(grads):
            rig.gradients.land(1, position, grad, 1, split=False)
        for position, grad in enumerate(grads):
            landed = rig.gradients.grad(rig.chunks[1], position)
            assert landed.dtype is grad.dtype and landed.shape == grad.shape
            assert bits(landed) == bits(grad)
        assert rig.gradients.norm() == norm_of(grads)
        assert rig.gradients.norm({(1, 2)}) == norm_of(grads[2:])
        assert rig.gradients.contributors() == {(1, k) for k in range(len(SHAPES))}


@every_device
@every_format
@pytest.mark.parametrize("split", [False, True])
def test_later_backwards_and_micro_batches_add_up_in_fp32(
    split: bool, format: str, make_device: Callable[[], Device], nvme_dir: Path
) -> None:
    """Seven of them; the other parameters of the chunk are not touched by it."""
    with make_rig(nvme_dir, format=format, device=make_device()) as rig:
        alone = rig.grad(99, 1)
        rig.gradients.land(0, 1, alone, 1, split=False)
        grads = [rig.grad(seed, 0) for seed in range(7)]
        want = grads[0].float()
        for seed, grad in enumerate(grads):
            rig.gradients.land(0, 0, grad, 1 if split else seed, split=split)
            want = want + grad.float() if seed else want
        late = rig.grad(98, 2)  # the first of its parameter, into a plane that has a low half
        rig.gradients.land(0, 2, late, 9, split=False)
        assert bits(rig.gradients.grad(rig.chunks[0], 0)) == bits(want)
        assert bits(rig.gradients.grad(rig.chunks[0], 1).float()) == bits(alone.float())
        assert bits(rig.gradients.grad(rig.chunks[0], 2).float()) == bits(late.float())
        assert rig.gradients.norm() == norm_of([want, alone, late])


@every_device
@every_format
def test_a_second_use_in_one_backward_adds_as_autograd_does(
    format: str, make_device: Callable[[], Device], nvme_dir: Path
) -> None:
    with make_rig(nvme_dir, format=format, device=make_device()) as rig:
        first, second = rig.grad(1, 0), rig.grad(2, 0)
        for grad in (first, second):
            rig.gradients.land(0, 0, grad, 5, split=False)
        landed = rig.gradients.grad(rig.chunks[0], 0)
        assert landed.dtype is first.dtype and bits(landed) == bits(first + second)


@every_format
def test_two_uses_in_each_of_two_backwards(format: str, nvme_dir: Path) -> None:
    """A block that is called twice, with accumulation: the first backward's sum in the dtype of
    autograd, then every further use is added in fp32.
    """
    with make_rig(nvme_dir, format=format) as rig:
        grads = [[rig.grad(10 * task + use, 0) for use in range(2)] for task in range(2)]
        for task, uses in enumerate(grads):
            for grad in uses:
                rig.gradients.land(0, 0, grad, task, split=False)
        want = (grads[0][0] + grads[0][1]).float() + grads[1][0].float() + grads[1][1].float()
        assert bits(rig.gradients.grad(rig.chunks[0], 0)) == bits(want)


# Waiting: few slots, spills, and the way back


@every_device
@every_format
@pytest.mark.parametrize("grad_slots", [1, 2])
def test_gradients_in_any_order_through_few_slots(
    grad_slots: int, format: str, make_device: Callable[[], Device], nvme_dir: Path
) -> None:
    """Parameters of four chunks in a random order over three backwards, with chunks completed in
    between: gradients spill half done, come back and go on.
    """
    dice = random.Random(grad_slots)
    changes = {"tiers__cpu__grad_slots": grad_slots, "tiers__nvme__io": "threads"}
    with make_rig(nvme_dir, num_chunks=4, format=format, device=make_device(), **changes) as rig:
        want: dict[tuple[int, int], Tensor] = {}
        for task in range(3):
            order = [place for place in places(4) if dice.random() < 0.8]
            dice.shuffle(order)
            for index, position in order:
                grad = rig.grad(dice.randrange(1 << 30), position)
                rig.gradients.land(index, position, grad, task, split=False)
                before = want.get((index, position))
                value = grad.float()
                want[index, position] = value if before is None else before + value
                if dice.random() < 0.3:
                    rig.gradients.complete(dice.randrange(4))
        assert rig.gradients.norm() == norm_of([want[place] for place in sorted(want)])
        for (index, position), total in want.items():
            assert bits(rig.gradients.grad(rig.chunks[index], position).float()) == bits(total)


@every_format
def test_a_complete_gradient_makes_room(format: str, nvme_dir: Path) -> None:
    """It goes to the drive, and its slots are free again."""
    with make_rig(nvme_dir, format=format, tiers__cpu__grad_slots=1) as rig:
        free = rig.num_free()
        grads = rig.land_all(0, 1)
        rig.engine.drain()
        assert rig.chunks[0].gradient is not None and rig.chunks[0].gradient.spilled
        assert rig.num_free() == free
        assert bits(rig.gradients.grad(rig.chunks[0], 2)) == bits(grads[2])


@every_device
def test_dropped_gradients_leave_every_slot_free(
    make_device: Callable[[], Device], nvme_dir: Path
) -> None:
    with make_rig(nvme_dir, device=make_device(), tiers__cpu__grad_slots=2) as rig:
        free = rig.num_free()
        for seed, index in enumerate((0, 1, 2, 0, 1)):
            rig.land_all(index, seed, task=seed)
        rig.gradients.zero()
        rig.engine.drain()
        assert rig.num_free() == free and rig.gradients.landed() == []
        assert rig.gradients.norm() == 0.0 and rig.gradients.num_backwards == 0
        with pytest.raises(StateError, match=r"c0\.p1 has no gradient"):
            rig.gradients.grad(rig.chunks[0], 1)
        grad = rig.grad(50, 1)
        rig.gradients.land(0, 1, grad, 9, split=False)
        assert bits(rig.gradients.grad(rig.chunks[0], 1)) == bits(grad)


# Into updates


@every_device
@every_format
@pytest.mark.parametrize("weight_slots", [1, 3])
def test_updates_while_weights_come_and_go(
    weight_slots: int, format: str, make_device: Callable[[], Device], nvme_dir: Path
) -> None:
    """Updates are left pending on four chunks, some with spilled or accumulated gradients; then
    chunks are used in a random order, so that weights are evicted between an update's promise and
    its keeping. Every use sees the updated weights.
    """
    dice = random.Random(weight_slots)
    changes = {"tiers__cpu__weight_slots": weight_slots, "tiers__cpu__grad_slots": 1}
    with make_rig(nvme_dir, num_chunks=4, format=format, device=make_device(), **changes) as rig:
        reference = [Twin(row, format) for row in rig.masters]
        free = rig.num_free()[1]
        for step in range(1, 4):
            check_weights(rig, reference, [dice.randrange(4) for _ in range(3)])
            updates = {}
            for index in dice.sample(range(4), 3):
                grads = [g.float() for g in rig.land_all(index, dice.randrange(1 << 30), task=step)]
                if dice.random() < 0.5:
                    more = rig.land_all(index, dice.randrange(1 << 30), task=-step)
                    grads = [a + b.float() for a, b in zip(grads, more, strict=True)]
                reference[index].step(grads)
                updates[index] = rig.ops(index, reference[index].num_steps)
            rig.engine.set_updates(updates)
            rig.gradients.end_step()
            rig.gradients.zero()
            rig.engine.end_step()
            check_weights(rig, reference, [dice.randrange(4) for _ in range(4)])
        rig.engine.flush()
        check_weights(rig, reference, list(range(4)))
        assert rig.num_free()[1] == free


def check_weights(rig: Rig, reference: list[Twin], order: list[int]) -> None:
    for index in order:
        seen = [param.reshape(-1) for param in rig.bound(index)]
        want = reference[index].weights()
        assert [bits(s) for s in seen] == [bits(w) for w in want], index


@every_format
def test_eager_updates_are_those_of_the_twin(format: str, nvme_dir: Path) -> None:
    """A complete chunk is updated at once, and takes no second gradient before the step is over."""
    with make_rig(nvme_dir, format=format) as rig:
        reference = Twin(rig.masters[1], format)
        rig.gradients.eager = True
        rig.gradients.ops_of = lambda chunk: rig.ops(chunk.spec.index)
        grads = rig.land_all(1, 4)
        assert rig.gradients.anything_updated
        with pytest.raises(StateError, match="a second gradient for c1.p0"):
            rig.gradients.land(1, 0, rig.grad(0, 0), 2, split=False)
        with pytest.raises(StateError, match="eager has already applied"):
            rig.gradients.zero()
        assert rig.gradients.norm() == norm_of(grads)
        rig.gradients.end_step()
        reference.step([g.float() for g in grads])
        seen = [bits(param.reshape(-1)) for param in rig.bound(1)]
        assert seen == [bits(w) for w in reference.weights()]


# Refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_no_number_is_named(bad: float, nvme_dir: Path) -> None:
    with make_rig(nvme_dir) as rig:
        rig.land_all(0, 1)
        rig.gradients.check_finite(rig.gradients.landed())
        grad = rig.grad(2, 1)
        grad[37] = bad
        rig.gradients.land(2, 1, grad, 1, split=False)
        assert not math.isfinite(rig.gradients.norm())
        with pytest.raises(NumericsError, match=r"gradient of c2\.p1 is not finite"):
            rig.gradients.check_finite(rig.gradients.landed())


def test_large_gradients_are_finite(nvme_dir: Path) -> None:
    """Squares overflow fp32 long before the gradient does; the sum is fp64."""
    with make_rig(nvme_dir, format="fp32") as rig:
        rig.gradients.land(0, 1, torch.full(SHAPES[1], 3e38), 1, split=False)
        rig.gradients.check_finite(rig.gradients.landed())
        assert rig.gradients.norm() == pytest.approx(3e38 * 8)


def test_sparse_gradients_are_refused(nvme_dir: Path) -> None:
    with make_rig(nvme_dir) as rig:
        sparse = torch.eye(70, 71, dtype=torch.bfloat16).to_sparse()
        with pytest.raises(StateError, match=r"c0\.p0 has a sparse gradient"):
            rig.gradients.land(0, 0, sparse, 1, split=False)


def test_backward_after_step_needs_zero_grad(nvme_dir: Path) -> None:
    with make_rig(nvme_dir) as rig:
        rig.gradients.end_step()
        with pytest.raises(StateError, match="zero_grad"):
            rig.gradients.land(0, 1, rig.grad(1, 1), 1, split=False)
        rig.gradients.zero()
        rig.gradients.land(0, 1, rig.grad(1, 1), 1, split=False)


def ram_only(budget: int) -> dict[str, object]:
    return {"tiers__nvme": None, "tiers__cpu": {"budget": budget}}


def test_accumulation_that_does_not_fit_says_how_much_is_missing(nvme_dir: Path) -> None:
    """Everything in RAM, and no room for low halves: a budget larger by the named bytes works."""
    with make_rig(nvme_dir, **ram_only(1 << 30)) as rig:
        needed = rig.engine.plan.slab_nbytes
        (pool,) = rig.engine.plan.pools
        tight = needed - pool.slot_nbytes * pool.num_grad_slots // 2
    with make_rig(nvme_dir, **ram_only(tight)) as rig:
        rig.land_all(0, 1, task=1)
        rig.land_all(1, 2, task=1)
        rig.land_all(2, 3, task=1)
        with pytest.raises(BudgetError, match=r"needs \d+ bytes more") as refused:
            rig.land_all(0, 4, task=2)
    missing = int(str(refused.value).split("needs ")[1].split()[0])
    with make_rig(nvme_dir, **ram_only(tight + missing)) as rig:
        for index in range(3):
            rig.land_all(index, 1, task=1)
            rig.land_all(index, 2, task=2)


@every_format
def test_accumulation_on_a_device_with_everything_in_ram(format: str, nvme_dir: Path) -> None:
    with make_rig(nvme_dir, format=format, device=StandinDevice(), **ram_only(1 << 30)) as rig:
        for index in range(3):
            rig.land_all(index, 1, task=1)
        for index in range(3):
            rig.land_all(index, 2, task=2)
            want = rig.grad(1, 0).float() + rig.grad(2, 0).float()
            assert bits(rig.gradients.grad(rig.chunks[index], 0)) == bits(want)


def test_a_spill_that_fails_names_the_chunk(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient's write comes back as EIO."""
    with make_rig(nvme_dir, tiers__cpu__grad_slots=1) as rig:
        flight = rig.engine._flight
        start_io = flight.start_io

        def fail(op, link, chunk, segments, finish, priority):  # type: ignore[no-untyped-def]
            fd = segments[0][0]
            done = (lambda *_: finish(-5, fd, 8192)) if op == WRITE else finish
            start_io(op, link, chunk, segments, done, priority)

        monkeypatch.setattr(flight, "start_io", fail)
        rig.land_all(1, 1)
        with pytest.raises(StorageError, match=r"writing the gradient to .*chunk c1.*EIO"):
            while True:
                rig.engine.block("update")
        assert rig.engine.failed
