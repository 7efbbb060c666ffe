"""Late copies and completions, few slots, poison and micro-batches change no bit."""

import dataclasses
import errno
import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    COMPUTE_DTYPE,
    FORMATS,
    PlainAdamW,
    Recipe,
    Record,
    Result,
    Variant,
    assert_same,
    bits,
    chaos,
    first_step,
    prepare,
    run_plain,
    train,
    variant_policy,
    without_grads,
)
from torch import Tensor, nn
from zoo import ZOO, Batch, ResidualMLP, ZooModel

import offload
from offload.tier import DeviceEvent
from offload.transfer import Device, HostDevice, StandinDevice, StandinEvent

pytestmark = pytest.mark.usefixtures("nothing_left", "tiny_units")
PLAIN = Recipe(steps=2, groups=True)
RICH = Recipe(steps=2, accumulation=3, clip=0.05, groups=True)


def late_standin(seed: int, longest_s: float = 1e-3) -> Device:
    """A device on which every copy begins late, by a random time."""
    dice = random.Random(seed)
    return StandinDevice(delay=lambda: dice.random() * longest_s)


def run_on(
    entry: ZooModel,
    recipe: Recipe,
    format: str,
    directory: Path,
    device: Device | None,
    **variant: Any,
) -> Record:
    """Train through the tiers on a device, with poisoned slots."""
    chosen = Variant("chaos", **variant)
    policy = offload.load_policy(variant_policy(chosen, format, directory, entry))
    model = prepare(entry.make_model(), recipe, format)
    with offload.Session(model, policy, device=device, poison=True) as engine:
        return train(engine, entry, recipe, format, grads=chosen.update != "eager").record


@functools.cache
def plain(name: str, recipe: Recipe, format: str) -> Result:
    return run_plain(ZOO[name], recipe, format)


@pytest.mark.parametrize(
    ("name", "format", "placement", "update"),
    [
        ("llama", "exact", "nvme", "eager"),
        ("llama", "exact", "oneslot", "deferred"),
        ("llama", "exact", "ram", "deferred"),
        ("mixtral", "exact", "mixed", "eager"),
        ("shared_layer", "fp32", "oneslot", "eager"),
        ("t5", "fp32", "mixed", "deferred"),
        ("gpt2", "exact", "oneslot", "deferred"),
    ],
)
def test_late_copies_and_poison(
    name: str, format: str, placement: str, update: str, nvme_dir: Path
) -> None:
    device = late_standin(seed=len(name + placement))
    got = run_on(ZOO[name], PLAIN, format, nvme_dir, device, placement=placement, update=update)
    keep = without_grads if update == "eager" else lambda key: True
    assert_same(got, plain(name, PLAIN, format).record, only=keep)


@pytest.mark.parametrize("where", ["cpu", "standin"])
@pytest.mark.parametrize("format", FORMATS)
def test_one_slot_of_each_kind(where: str, format: str, nvme_dir: Path) -> None:
    """Host, gradients and device, with accumulation and clipping."""
    device = HostDevice() if where == "cpu" else late_standin(1)
    got = run_on(ZOO["llama"], RICH, format, nvme_dir, device, placement="oneslot")
    ram = run_on(ZOO["llama"], RICH, format, nvme_dir, HostDevice(), placement="ram")
    assert_same(got, ram)


@pytest.mark.parametrize("seed", range(3))
def test_everything_late_at_once(seed: int, nvme_dir: Path) -> None:
    """Completions of the drive and the update worker too, in random order."""
    with chaos(True, seed):
        got = run_on(ZOO["branch"], PLAIN, "exact", nvme_dir, StandinDevice(), placement="oneslot")
    assert_same(got, plain("branch", PLAIN, "exact").record)


# The chaos shows what it should


class Impatient(StandinDevice):
    """Says that a copy is done before it is: a missing wait."""

    def __init__(self, direction: str) -> None:
        super().__init__(delay=lambda: 5e-3)
        self._direction = direction

    def h2d(self, target: Tensor, source: Tensor, after: DeviceEvent | None) -> DeviceEvent:
        event = super().h2d(target, source, after)
        return done() if self._direction == "h2d" else event

    def d2h(self, target: Tensor, source: Tensor) -> DeviceEvent:
        event = super().d2h(target, source)
        return done() if self._direction == "d2h" else event


def done() -> DeviceEvent:
    event = StandinEvent()
    event.set()
    return event


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_a_missing_wait_shows(direction: str, nvme_dir: Path) -> None:
    device = Impatient(direction)
    try:
        got = run_on(ZOO["llama"], Recipe(steps=1), "exact", nvme_dir, device, placement="oneslot")
    except (offload.NumericsError, offload.StorageError) as error:
        # Poison was used as a number, or a gradient went to the drive while it still arrived.
        assert getattr(error, "errno", errno.EBADMSG) == errno.EBADMSG, error
        return
    assert got != run_plain(ZOO["llama"], Recipe(steps=1), "exact").record


# Micro-batches inside a block: batch 3


def three_rows(entry: ZooModel) -> ZooModel:
    """The same model with batches of three samples."""

    def batch(seed: int, dtype: torch.dtype) -> Batch:
        parts = [entry.batch(seed + 7 * i, dtype) for i in range(2)]
        return {key: torch.cat([part[key] for part in parts])[:3] for key in parts[0]}

    return dataclasses.replace(entry, batch=batch)


@pytest.mark.parametrize(
    ("name", "format", "micro_batch"),
    [("opt", "exact", 2), ("llama", "fp32", 2), ("linear_list", "exact", 2), ("opt", "fp32", 1)],
)
def test_uneven_micro_batches_do_not_depend_on_the_placement(
    name: str, format: str, micro_batch: int, nvme_dir: Path
) -> None:
    """Three samples in pieces of two and one; OPT's attention mask is split with them."""
    entry, recipe = three_rows(ZOO[name]), Recipe(steps=1, accumulation=2, clip=0.1)
    devices: list[tuple[str, Device]] = [("ram", HostDevice()), ("oneslot", late_standin(2))]
    records = []
    for placement, device in devices:
        variant = {"placement": placement, "micro_batch": micro_batch}
        records.append(run_on(entry, recipe, format, nvme_dir, device, **variant))
    assert_same(records[1], records[0])


class Stack(nn.Module):
    """Blocks only, so that a piece's gradients can be had by running the piece alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualMLP(24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def piecewise_gradients(model: Stack, x: Tensor, slope: Tensor, size: int) -> list[Tensor]:
    """Run pieces of the batch one after the other, each forward and backward of its own, and add
    their gradients in fp32 in that order.
    """
    total: list[Tensor] = []
    for rows, row_slope in zip(x.split(size), slope.split(size), strict=True):
        model(rows).backward(row_slope)
        grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
        total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
        model.zero_grad()
    return total


@pytest.mark.parametrize("num_rows", [3, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_micro_batches_equal_separate_runs(
    format: str, size: int, num_rows: int, nvme_dir: Path
) -> None:
    """In both formats, by bits: outputs, and gradients summed in fp32 in the pieces' order."""
    torch.manual_seed(8)
    dtype = COMPUTE_DTYPE[format]
    x, slope = (torch.randn(num_rows, 24).to(dtype) for _ in range(2))
    torch.manual_seed(9)
    reference = Stack()
    PlainAdamW(reference, Recipe(), format)  # gives it the format's compute weights
    want = piecewise_gradients(reference, x, slope, size)
    torch.manual_seed(9)
    model = Stack()
    chosen = Variant("split", placement="oneslot", micro_batch=size)
    policy = offload.load_policy(variant_policy(chosen, format, nvme_dir, ZOO["llama"]))
    with offload.Session(model, policy, device=late_standin(3), poison=True) as engine:
        out = model(x)
        parts = torch.cat([reference(rows) for rows in x.split(size)])
        assert bits(out) == bits(parts)
        out.backward(slope)
        for (name, _), grad in zip(model.named_parameters(), want, strict=True):
            assert bits(engine.grad(name).float()) == bits(grad), name


def test_a_batch_within_the_size_is_not_split(nvme_dir: Path) -> None:
    """Its gradients are then those of plain torch, in autograd's own dtype."""
    entry, recipe = three_rows(ZOO["linear_list"]), Recipe(steps=1)
    got = run_on(entry, recipe, "exact", nvme_dir, HostDevice(), micro_batch=3)
    assert_same(got, run_plain(entry, recipe, "exact").record, only=first_step)
