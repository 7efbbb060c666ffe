"""Adafactor's factored second moment: sums, rule and whole steps, with the twins' bits."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import twins
import twins_factored
from parity import (
    PlainAdamW,
    Recipe,
    Record,
    Variant,
    assert_same,
    make_policy,
    prepare,
    run_plain,
    small_units,
    train,
    variant_policy,
    without_grads,
)
from steps import one_step
from test_formats import ISAS, copy_of, differing, native_update
from torch import nn
from twins_factored import FactoredMoment, FactoredOp
from update_rig import random_planes
from zoo import ZOO, ZooModel

import offload
from offload import _native
from offload.errors import BudgetError, StateError
from offload.factors import matrix_of, num_sums
from offload.formats import Plane, gradient_sums, state_format

LLAMA = ZOO["llama"]
RECIPE = Recipe(steps=3)
SHAPES = ((1, 1, 1), (1, 40, 1), (1, 3, 5), (2, 7, 16), (3, 4, 33), (1, 2, 100), (5, 1, 17))
HYPER: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.0, "grad_scale": 0.3, "beta1": 0.0},
    {"maximize": True, "eps": 1e-3, "step": 7, "beta1": 0.99},
)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the kernels --------------------------------------------------------------------------------


def native_sums(
    high: np.ndarray, low: np.ndarray | None, rows: int, cols: int, isa: str
) -> tuple[np.ndarray, np.ndarray]:
    sums = np.full(high.size // cols, np.nan), np.full(high.size // rows, np.nan)
    addresses = high.ctypes.data, 0 if low is None else low.ctypes.data
    kind = int(high.dtype == np.float32)
    out = sums[0].ctypes.data, sums[1].ctypes.data
    _native.factor_sums(*addresses, kind, rows, cols, high.size, *out, isa)
    return sums


@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 70001)])
def test_sums_by_row_and_column_have_the_twins_bits(isa: str, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(math.prod(shape))
    values = rng.standard_normal(math.prod(shape)) * 10.0 ** rng.uniform(-6, 3, math.prod(shape))
    grad = values.astype(np.float32)
    for high, low in ((grad, None), twins.split_fp32(grad), (twins.round_bf16(grad), None)):
        held = grad if high.dtype == np.float32 else twins.join_fp32(high, low)
        for native, twin in zip(
            native_sums(high, low, *shape[1:], isa),
            twins_factored.factor_sums(held, *shape[1:]),
            strict=True,
        ):
            assert native.tobytes() == twin.tobytes()


@pytest.mark.parametrize("is_vector", [True, False])
def test_sums_are_on_the_host_whatever_torchs_default_device_is(is_vector: bool) -> None:
    """Native code writes to their addresses."""
    grad = torch.arange(12.0)
    want = gradient_sums(grad, None, (3, 4), is_vector=is_vector)
    with torch.device("meta"):
        got = gradient_sums(grad, None, (3, 4), is_vector=is_vector)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.device.type == "cpu" and torch.equal(ours, theirs)


@pytest.mark.parametrize("hyper", HYPER)
@pytest.mark.parametrize("format", twins.DTYPES)
def test_every_step_has_the_twins_bits(isa: str, format: str, hyper: dict[str, Any]) -> None:
    for shape in SHAPES:
        rng = np.random.default_rng(math.prod(shape))
        native = copy_of(random_planes(format, 64 + math.prod(shape), rng))
        for name in ("exp_avg_sq", "exp_avg_sq_scale"):
            native.pop(name, None)
        twin = copy_of(native)
        rows, cols = (
            (10.0 ** rng.uniform(-6, 0, size)).astype(np.float32)
            for size in ((shape[0], shape[1]), (shape[0], shape[2]))
        )
        rows[0, 0] = 0  # a row that never had a gradient
        op = FactoredOp(begin=64, end=native["weight"].size, rows=rows, cols=cols, seed=3, **hyper)
        native_update(format, native, [op], isa)
        twins.update(format, twin, op)
        assert not differing(native, twin), shape


def test_ops_that_do_not_fit_their_factors_are_refused() -> None:
    planes = (1, 0, 1, 0, 0, 0, 1, 0)
    ones = functools.partial(np.ones, dtype=np.float32)
    whole = FactoredOp(end=12, rows=ones((1, 3)), cols=ones((1, 4))).pack()
    with pytest.raises(ValueError, match="in the middle of factors"):
        _native.apply_ops(0, 12, planes, whole[:-1])
    with pytest.raises(ValueError, match="in the middle of a record"):
        _native.apply_ops(0, 12, planes, whole[:95])
    for rows, cols in ((5, 4), (0, 4), (2**63, 4)):
        shape = np.array([rows, cols], np.uint64).tobytes()
        with pytest.raises(ValueError, match="whole matrices"):
            _native.apply_ops(0, 12, planes, whole[:88] + shape + whole[104:])
        with pytest.raises(ValueError, match="whole matrices"):
            _native.factor_sums(1, 0, 1, rows, cols, 12, 1, 1)


# --- the whole engine ---------------------------------------------------------------------------


class Twin(PlainAdamW):
    """Adafactor in any format by the numpy twins, parameter by parameter."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, format: str, *, places: Mapping[str, Any]
    ) -> None:
        self.places = places
        self.moments = {n: FactoredMoment(p.shape) for n, p in model.named_parameters()}
        super().__init__(model, recipe, format)
        for planes in self.state.values():
            del planes["exp_avg_sq"]
            planes.pop("exp_avg_sq_scale", None)

    def split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        planes = {
            name: np.zeros(twins.items_of(name, 0, values.size).stop, dtype)
            for name, dtype in twins.DTYPES[self.format].items()
        }
        twins.store_master(self.format, planes, values)
        return planes

    def _update(self, name: str, group: dict[str, Any], grad: np.ndarray, scale: float) -> None:
        planes, (chunk, offset) = self.state[name], self.places[name]
        step = self.num_steps[name]
        rows, cols = self.moments[name].move(grad, scale, step, -0.8)
        op = FactoredOp(
            end=grad.size, step=step, grad_scale=scale, seed=chunk, rows=rows, cols=cols,
            lr=float(group["lr"]), weight_decay=float(group["weight_decay"]),
        )  # fmt: skip
        if self.format == "fp32":
            planes["grad"][:] = grad
        else:
            planes["grad"][:], planes["grad_lo"][:] = twins.split_fp32(grad)
        twins.update(self.format, planes, op, origin=offset)


def run_with(
    entry: ZooModel, recipe: Recipe, format: str, variant: Variant, directory: Path
) -> tuple[Record, dict[str, tuple[int, int]], list[float]]:
    """Train through the tiers; also where every parameter lies, and the norms."""
    model = prepare(entry.make_model(), recipe, format)
    with small_units(variant.small_numel):
        policy = variant_policy(variant, format, directory, entry)
        policy["optimizer"]["kind"] = "adafactor"
        with offload.offload(model, policy) as engine:
            eager = variant.update == "eager"
            result = train(engine, entry, recipe, format, grads=not eager, make=offload.Adafactor)
            places = {p.name: (s.index, p.offset) for s in engine.plan.specs for p in s.params}
    return result.record, places, result.norms


VARIANTS = (
    Variant("RAM", placement="ram"),
    Variant("NVMe, larger tiles", tile_numel=3 * 65536),
    Variant("NVMe, eager, threads", update="eager", io="threads"),
    Variant("mixed, one slot each", placement="oneslot", num_paths=2, chaos=True),
    Variant("another device", device="standin", placement="mixed", chaos=True),
)


def home_of(variant: Variant, directory: Path) -> Path:
    return directory / variant.name.replace(" ", "")


def of_the_twin(key: str) -> bool:
    """What the twin records: no means, and its norms are summed in another order."""
    return not key.startswith(("factors.", "norm["))


@pytest.mark.parametrize("format", twins.DTYPES)
def test_training_has_the_twins_bits_wherever_the_bytes_live(format: str, nvme_dir: Path) -> None:
    base, places, _ = run_with(LLAMA, RECIPE, format, Variant("NVMe"), nvme_dir / "base")
    assert sum(key.startswith("factors.") for key in base) > len(places)
    plain = run_plain(LLAMA, RECIPE, format, make=functools.partial(Twin, places=places)).record
    assert_same(base, plain, only=of_the_twin)
    for variant in VARIANTS:
        got, _, _ = run_with(LLAMA, RECIPE, format, variant, home_of(variant, nvme_dir))
        assert_same(got, base, only=without_grads)


@pytest.mark.parametrize("name", ["mixtral", "convnet", "gpt2"])
def test_accumulated_and_clipped_gradients_of_experts_and_filters(
    name: str, nvme_dir: Path
) -> None:
    """Sums are of what has accumulated, spilled and come back, and are scaled by a clip."""
    recipe = Recipe(steps=3, accumulation=3, clip=0.1)
    entry, format = ZOO[name], "fp32" if name == "convnet" else "exact"
    base, places, norms = run_with(entry, recipe, format, Variant("NVMe"), nvme_dir / "base")
    make = functools.partial(Twin, places=places)
    plain = run_plain(entry, recipe, format, norms=norms, make=make).record
    assert_same(base, plain, only=of_the_twin)
    for variant in VARIANTS[0], *VARIANTS[3:]:
        got, _, _ = run_with(entry, recipe, format, variant, home_of(variant, nvme_dir))
        assert_same(got, base)


def test_the_second_moment_of_a_product_is_that_of_adam() -> None:
    """Where squares are rows times columns, nothing is lost: one step is the gradient's sign."""
    torch.manual_seed(0)
    rows, cols = torch.rand(6, 1) + 0.1, torch.rand(1, 9) + 0.1
    weight = torch.zeros(6, 9)
    model = nn.Sequential(nn.Linear(9, 6, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    policy = {"tiers": {"cpu": {"budget": "64MiB"}}, "state": {"format": "fp32"}}
    policy["optimizer"] = {"kind": "adafactor"}
    sign = torch.where(torch.rand(6, 9) < 0.5, -1.0, 1.0)
    with offload.offload(model, policy) as engine:
        optimizer = offload.Adafactor(engine.model.parameters(), lr=0.5, beta1=0.0)
        (engine.model[0](torch.eye(9)) * (rows * cols * sign).T).sum().backward()
        optimizer.step()
        got = engine.master("0.weight")
    assert torch.allclose(got, -0.5 * sign, rtol=1e-5)


@pytest.mark.parametrize("eps", [1e-30, 0.0])
@pytest.mark.parametrize("format", twins.DTYPES)
def test_an_eps_whose_square_is_no_fp32_number(format: str, eps: float) -> None:
    """Neither a row without a gradient nor the padding behind a tail is divided by 0; in int8 the
    padding's NaN would be the scale of all moments of its group.
    """
    model = nn.Sequential(nn.Embedding(6, 7), nn.Linear(7, 3))
    policy = {"tiers": {"cpu": {"budget": "64MiB"}}, "state": {"format": format}}
    policy["optimizer"] = {"kind": "adafactor"}
    with offload.offload(model, policy) as engine:
        names = [name for name, _ in engine.model.named_parameters()]
        before = {name: engine.master(name) for name in names}
        optimizer = offload.Adafactor(engine.model.parameters(), lr=0.1, eps=eps)
        for step in range(2):
            out = engine.model(torch.tensor([0, 2, 3, 5])).float() * torch.tensor([1.0, 0.0, 1.0])
            out.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                first = {name: engine.master(name) for name in names}
        after = {name: engine.master(name) for name in names}
        states = {name: engine.state(name) for name in names}
    for name in names:
        rows, still = ([0, 2, 3, 5], [1, 4]) if name == "0.weight" else ([0, 2], [1])
        assert torch.equal(after[name][still], before[name][still])
        for old, new in ((before, first), (first, after)):
            assert torch.isfinite(new[name]).all()
            assert (new[name][rows] != old[name][rows]).any()
        kept = states[name]
        assert all(torch.isfinite(tensor.double()).all() for tensor in kept.values())
        assert all(tensor.count_nonzero() for key, tensor in kept.items() if key != "residue")


@pytest.mark.parametrize("shape", [(4, 6), (24,)])
def test_means_that_overflow_make_no_giant_step(shape: tuple[int, ...]) -> None:
    """What fp32 cannot hold stands still for the step, and moves again when the mean is back."""
    weight = nn.Parameter(torch.zeros(shape))
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].register_parameter("other", weight)
    policy = {"tiers": {"cpu": {"budget": "64MiB"}}, "state": {"format": "fp32"}}
    policy["optimizer"] = {"kind": "adafactor"}
    large = torch.full(shape, 1e25)
    large.view(-1)[9] = 0.0
    moment = FactoredMoment(shape)
    with offload.offload(model, policy) as engine:
        optimizer = offload.Adafactor([weight], lr=1.0, beta1=0.0)
        want = np.zeros(weight.numel(), np.float32)
        for step, grad in enumerate((large, torch.ones(shape), torch.ones(shape)), start=1):
            (weight * grad).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            got, kept = engine.master("0.other"), engine.state("0.other")
            assert all(torch.isfinite(tensor.double()).all() for tensor in kept.values())
            rows, cols = moment.move(grad.numpy().reshape(-1), 1.0, step, -0.8)
            op = FactoredOp(end=want.size, step=step, lr=1.0, beta1=0.0, weight_decay=0.0,
                            rows=rows, cols=cols)  # fmt: skip
            want, *_ = op.apply(want, np.zeros_like(want), want, grad.numpy().reshape(-1))
            assert np.array_equal(got.numpy().reshape(-1), want)
            assert got.abs().max() < 4  # three steps of 1, up to rounding
            if step == 1:
                first = got
        assert not first.any()  # the step of Adam, whose moment is inf
        assert got.all()


def test_a_committed_run_goes_on_with_the_same_bits(nvme_dir: Path, tmp_path: Path) -> None:
    """The means are pinned, and are part of what a commit and a checkpoint write."""
    policy = make_policy(nvme_dir, optimizer__kind="adafactor", durability="step")

    def make(engine: Any) -> Any:
        return offload.Adafactor(engine.model.parameters(), lr=1e-2)

    def state(engine: Any) -> list[str]:
        names = [name for name, _ in engine.model.named_parameters()]
        return [
            str(tensor.flatten().view(torch.uint8).tolist())
            for name in names
            for tensor in engine.state(name).values()
        ]

    with offload.offload(LLAMA.make_model(), policy) as engine:
        optimizer = make(engine)
        for step in (1, 2):
            one_step(engine, optimizer, LLAMA, step)
        engine.checkpoint(tmp_path / "two")
        one_step(engine, optimizer, LLAMA, 3)
        want = state(engine)
    with offload.offload(LLAMA.make_model(), policy, weights="resume") as engine:
        assert state(engine) == want
    other = make_policy(nvme_dir / "other", optimizer__kind="adafactor")
    with offload.offload(LLAMA.make_model(), other, weights=tmp_path / "two") as engine:
        one_step(engine, make(engine), LLAMA, 3)
        assert state(engine) == want


def test_what_it_costs_is_in_the_plan(nvme_dir: Path) -> None:
    policy = make_policy(nvme_dir, optimizer__kind="adafactor")
    with offload.offload(LLAMA.make_model(), policy) as engine:
        plan = engine.plan
        params = [p for spec in plan.specs for p in spec.params]
        assert plan.beside_nbytes == 12 * sum(num_sums(p.shape, matrix_of(p.shape)) for p in params)
        assert "for sums over rows and columns of gradients" in str(plan)
        assert all((s.index, Plane.FACTORS) in plan.pinned for s in plan.specs if s.trainable)
        pinned = sum(s.nbytes(Plane.FACTORS, plan.fmt) for s in plan.specs)
        assert dict(plan.terms())["pinned factors"] == pinned
    assert state_format("exact", "adafactor").state_itemsize == 8
    assert state_format("int8", "adafactor").state_itemsize == 4.0625
    with pytest.raises(BudgetError, match="pinned factors"):
        offload.offload(LLAMA.make_model(), {**policy, "tiers": {"cpu": {"budget": "64KiB"}}})


def test_a_parameter_is_the_matrices_that_keep_the_least() -> None:
    assert matrix_of(()) == (1, 1)
    assert matrix_of((7,)) == (7, 1)
    assert matrix_of((3, 5)) == (3, 5)
    assert matrix_of((8, 14336, 4096)) == (14336, 4096)
    assert num_sums((8, 14336, 4096), (14336, 4096)) == 8 * (14336 + 4096)
    assert matrix_of((64, 32, 3, 3)) == (64, 288)
    assert num_sums((64, 32, 3, 3), (64, 288)) == 64 + 288


def test_bad_arguments_and_leaving_are_refused(nvme_dir: Path) -> None:
    with offload.offload(
        LLAMA.make_model(), make_policy(nvme_dir, optimizer__kind="adafactor")
    ) as engine:
        params = list(engine.model.parameters())
        for options, message in (
            ({"lr": -1.0}, "Adafactor: lr is -1.0"),
            ({"beta1": 1.0}, "Adafactor: beta1 is 1.0"),
            ({"beta2_decay": 0.1}, "Adafactor: beta2_decay is 0.1"),
        ):
            with pytest.raises(ValueError, match=message):
                offload.Adafactor(params, **options)
        with pytest.raises(StateError, match="Set optimizer.kind: adamw in the policy"):
            offload.AdamW(params)
        optimizer = offload.Adafactor(params)
        with pytest.raises(StateError, match="stays in the tiers"):
            optimizer.full_state_dict()
