"""SCALE: what the paper says, in memory, and on offloaded state with the twins' bits."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import twins
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
from test_adafactor import SHAPES, home_of
from test_formats import ISAS, copy_of, differing, native_update
from torch import nn
from twins_factored import ScaledOp, factor_sums
from update_rig import random_planes
from zoo import ZOO

import offload
from offload.errors import PolicyError, StateError
from offload.formats import Plane, state_format
from offload.optim import matrix_in_plan
from offload.scale import PlainScale

LLAMA = ZOO["llama"]
LAST = "lm_head.weight"
FORMATS = ("fp32", "exact", "int8")
VARIANTS = (
    Variant("RAM", placement="ram"),
    Variant("NVMe, larger tiles", tile_numel=3 * 65536),
    Variant("NVMe, eager, threads", update="eager", io="threads"),
    Variant("one slot each", placement="oneslot", num_paths=2, chaos=True),
    Variant("another device", device="standin", chaos=True),
)


# --- the paper, in memory -----------------------------------------------------------------------


def test_scale_follows_the_paper() -> None:
    """Every output's weights get a step of norm lr; of an embedding every feature; the last layer's
    direction is an average of gradients.
    """
    model = LLAMA.make_model()
    optimizer = PlainScale(model.named_parameters(), lr=0.5, momentum=0.75)
    mean = torch.zeros_like(model.lm_head.weight)
    for step in range(3):
        optimizer.zero_grad()
        LLAMA.loss(model, LLAMA.make_batch(step, torch.float32)).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        mean = 0.75 * mean + 0.25 * model.lm_head.weight.grad
        want = -0.5 * mean / mean.norm(dim=1, keepdim=True)
        torch.testing.assert_close(moved[LAST], want, atol=1e-6, rtol=1e-4)
        matrix = "model.layers.0.mlp.up_proj.weight"
        grad = model.get_parameter(matrix).grad
        want = -0.5 * grad / grad.norm(dim=1, keepdim=True)
        torch.testing.assert_close(moved[matrix], want, atol=1e-6, rtol=1e-4)
        norms = moved["model.embed_tokens.weight"].norm(dim=0)
        torch.testing.assert_close(norms, torch.full_like(norms, 0.5))
    assert len(optimizer.state[model.get_parameter(matrix)]) == 0


def test_scale_steps_vectors_as_adamw_does() -> None:
    hyper = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    vectors = [torch.linspace(-1, 1, 50).requires_grad_() for _ in range(2)]
    ours = PlainScale([vectors[0]], last=None, **hyper)
    theirs = torch.optim.AdamW([vectors[1]], **hyper)
    for step in range(4):
        for vector, optimizer in zip(vectors, (ours, theirs), strict=True):
            vector.grad = torch.sin(torch.arange(50.0) * (step + 1))
            optimizer.step()
    torch.testing.assert_close(vectors[0], vectors[1])


def test_scale_says_what_it_needs() -> None:
    params = list(LLAMA.make_model().named_parameters())
    with pytest.raises(ValueError, match=r"no parameter is named 'lm_head.weight'"):
        PlainScale([p for _, p in params])
    with pytest.raises(ValueError, match="no parameter is named 'other'"):
        PlainScale(params, last="other")
    with pytest.raises(ValueError, match="SCALE: momentum is 1"):
        PlainScale(params, momentum=1.0)
    rms, norm = (PlainScale([torch.ones(4, 9)], lr=0.5, last=None, rms=x) for x in (True, False))
    for optimizer, step in ((rms, 0.5), (norm, 0.5 / 3)):
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.full((4, 9), 7.0)
        optimizer.step()
        torch.testing.assert_close(p, torch.full((4, 9), 1 - step))


# --- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("hyper", [{}, {"is_direct": True}, {"maximize": True, "grad_scale": 0.3}])
@pytest.mark.parametrize("format", twins.DTYPES)
def test_every_step_has_the_twins_bits(isa: str, format: str, hyper: dict[str, Any]) -> None:
    for shape in SHAPES:
        rng = np.random.default_rng(math.prod(shape))
        native = copy_of(random_planes(format, 64 + math.prod(shape), rng))
        native = {name: plane for name, plane in native.items() if "exp_avg" not in name}
        twin = copy_of(native)
        rows, cols = (
            (10.0 ** rng.uniform(-6, 0, size)).astype(np.float32)
            for size in ((shape[0], shape[1]), (shape[0], shape[2]))
        )
        rows[0, 0] = 0  # a row without a gradient stays as it is
        op = ScaledOp(begin=64, end=native["weight"].size, rows=rows, cols=cols, **hyper)
        native_update(format, native, [op], isa)
        op.apply_to(format, twin)
        assert not differing(native, twin), shape


# --- the whole engine ---------------------------------------------------------------------------


class Twin(PlainAdamW):
    """SCALE in any format: numpy for what runs in tiles, PlainScale for the last layer."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, format: str, *, hyper: Mapping[str, Any]
    ) -> None:
        self.hyper = {"last": LAST, "rms": False, **hyper}
        self.in_torch: dict[str, Any] = {}
        self.moments: dict[str, list[np.ndarray]] = {}
        super().__init__(model, recipe, format)
        for planes in self.state.values():
            for name in [name for name in planes if name.startswith("exp_avg")]:
                del planes[name]

    def split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        planes = {
            name: np.zeros(values.size, twins.DTYPES[self.format][name])
            for name in ("weight", "residue", "grad", "grad_lo")
            if name in twins.DTYPES[self.format]
        }
        twins.store_master(self.format, planes, values)
        return planes

    def _update(self, name: str, group: dict[str, Any], grad: np.ndarray, scale: float) -> None:
        planes, shape = self.state[name], tuple(self.model.get_parameter(name).shape)
        if name == self.hyper["last"]:
            self._in_torch(name, shape, group, grad, scale)
            return
        if self.format == "fp32":
            planes["grad"][:] = grad
        else:
            planes["grad"][:], planes["grad_lo"][:] = twins.split_fp32(grad)
        rows, cols = self._factors(name, shape, grad, scale)
        op = ScaledOp(
            end=grad.size, step=self.num_steps[name], grad_scale=scale, rows=rows, cols=cols,
            is_direct=len(shape) < 2, lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
        )  # fmt: skip
        op.apply_to(self.format, planes)

    def _factors(
        self, name: str, shape: tuple[int, ...], grad: np.ndarray, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        one = np.ones((1, 1), np.float32)
        if len(shape) < 2:
            return self._adam(name, grad, scale).reshape(1, -1), one
        num_rows, num_cols = shape[0], math.prod(shape[1:])
        rows, cols = factor_sums(grad, num_rows, num_cols)
        if "embed" in name and len(shape) == 2:
            count = num_rows if self.hyper["rms"] else 1
            squares = (cols * (scale * scale) / count).astype(np.float32)
            return one.repeat(num_rows, axis=1), squares.reshape(1, -1)
        count = num_cols if self.hyper["rms"] else 1
        squares = (rows * (scale * scale) / count).astype(np.float32)
        return squares.reshape(1, -1), one.repeat(num_cols, axis=1)

    def _adam(self, name: str, grad: np.ndarray, scale: float) -> np.ndarray:
        zeros = [np.zeros(grad.size, np.float32) for _ in range(2)]
        mean, square = self.moments.setdefault(name, zeros)
        step, g = self.num_steps[name], grad.astype(np.float64) * scale
        mean[:] = mean.astype(np.float64) * 0.9 + g * (1 - 0.9)
        square[:] = square.astype(np.float64) * 0.999 + np.square(g) * (1 - 0.999)
        root = np.sqrt(square.astype(np.float64) / (1 - 0.999**step)) + 1e-8
        return (mean.astype(np.float64) / (1 - 0.9**step) / root).astype(np.float32)

    def _in_torch(
        self, name: str, shape: tuple[int, ...], group: dict[str, Any], grad: np.ndarray,
        scale: float,
    ) -> None:  # fmt: skip
        if name not in self.in_torch:
            leaf = torch.zeros(shape)
            self.in_torch[name] = leaf, PlainScale([(name, leaf)], **self.hyper)
        leaf, optimizer = self.in_torch[name]
        leaf.copy_(torch.from_numpy(twins.load_master(self.format, self.state[name])).view(shape))
        leaf.grad = torch.from_numpy(grad.copy()).view(shape) * scale
        optimizer.param_groups[0] |= {k: float(group[k]) for k in ("lr", "weight_decay")}
        optimizer.step()
        twins.store_master(self.format, self.state[name], leaf.numpy().reshape(-1))


def run_with(
    recipe: Recipe, format: str, variant: Variant, directory: Path, **hyper: Any
) -> tuple[Record, list[float]]:
    """Train through the tiers; also the norms."""
    model = prepare(LLAMA.make_model(), recipe, format)
    with small_units(variant.small_numel):
        policy = variant_policy(variant, format, directory, LLAMA)
        policy["optimizer"] |= {"kind": "scale", "options": {"last": hyper.get("last", LAST)}}
        if variant.placement != "ram":  # the last layer's planes pass through memory whole
            policy["tiers"]["cpu"] |= {"budget": "64MiB"}
            policy["tiers"]["cpu"] |= {"budget": smallest(policy)}
        with offload.offload(model, policy) as engine:
            assert engine.plan.uses_nvme == (variant.placement != "ram")
            make = functools.partial(offload.SCALE, **hyper)
            eager = variant.update == "eager"
            result = train(engine, LLAMA, recipe, format, grads=not eager, make=make)
    return result.record, result.norms


def smallest(policy: dict[str, Any]) -> int:
    """The smallest budget that the planner takes, and half of the state on top."""
    with pytest.raises(offload.BudgetError, match="at least") as refused:
        offload.plan_for(LLAMA.make_model(), {**policy, "tiers": {**policy["tiers"], "cpu": {
            **policy["tiers"]["cpu"], "budget": "64KiB"}}})  # fmt: skip
    return int(str(refused.value).split("at least ")[1].split("MiB")[0]) << 20


def of_the_twin(key: str) -> bool:
    return not key.startswith(("factors.", "torch_state.", "norm["))


@pytest.mark.parametrize("format", FORMATS)
def test_training_has_the_twins_bits_wherever_the_bytes_live(format: str, nvme_dir: Path) -> None:
    recipe = Recipe(steps=3)
    base, _ = run_with(recipe, format, Variant("NVMe"), nvme_dir / "base")
    make = functools.partial(Twin, hyper={})
    assert_same(base, run_plain(LLAMA, recipe, format, make=make).record, only=of_the_twin)
    for variant in VARIANTS:
        got, _ = run_with(recipe, format, variant, home_of(variant, nvme_dir))
        assert_same(got, base, only=without_grads)


def test_clipping_accumulation_and_roots_of_means_without_momentum(nvme_dir: Path) -> None:
    recipe = Recipe(steps=3, accumulation=3, clip=0.1)
    hyper = {"last": None, "rms": True}
    base, norms = run_with(recipe, "exact", Variant("NVMe"), nvme_dir / "base", **hyper)
    make = functools.partial(Twin, hyper=hyper)
    plain = run_plain(LLAMA, recipe, "exact", norms=norms, make=make).record
    assert_same(base, plain, only=of_the_twin)
    for variant in VARIANTS[0], *VARIANTS[3:]:
        got, _ = run_with(recipe, "exact", variant, home_of(variant, nvme_dir), **hyper)
        assert_same(got, base)


@pytest.mark.parametrize("format", ["exact", "int8"])
def test_a_committed_run_goes_on_with_the_same_bits(format: str, nvme_dir: Path) -> None:
    policy = make_policy(nvme_dir, format=format, optimizer__kind="scale", durability="step")

    def run(until: int, weights: str | None) -> list[str]:
        with offload.offload(LLAMA.make_model(), policy, weights=weights) as engine:
            optimizer = offload.SCALE(engine.model.parameters(), lr=1e-2)
            for step in range(engine.run.num_steps, until):
                one_step(engine, optimizer, LLAMA, step, format)
            engine.flush()
            return [
                f"{name} {key} {tensor.flatten().contiguous().view(torch.uint8).tolist()}"
                for name, _ in engine.model.named_parameters()
                for key, tensor in sorted(engine.state(name).items())
            ]

    run(2, None)
    in_pieces = run(4, "resume")
    policy["tiers"]["nvme"]["paths"] = [str(nvme_dir / "other")]
    assert in_pieces == run(4, None)


def test_it_agrees_with_plain_torch_up_to_rounding(nvme_dir: Path) -> None:
    plain, tiered = LLAMA.make_model(), LLAMA.make_model()
    theirs = PlainScale(plain.named_parameters(), lr=1e-2)
    policy = make_policy(nvme_dir, format="fp32", optimizer__kind="scale")
    with offload.offload(tiered, policy) as engine:
        ours = offload.SCALE(engine.model.parameters(), lr=1e-2)
        for step in range(3):
            theirs.zero_grad()
            LLAMA.loss(plain, LLAMA.make_batch(step, torch.float32)).backward()
            theirs.step()
            one_step(engine, ours, LLAMA, step, "fp32")
        for name, p in plain.named_parameters():
            torch.testing.assert_close(engine.master(name), p.detach(), atol=2e-5, rtol=1e-4)


def test_what_it_costs_is_in_the_plan(nvme_dir: Path) -> None:
    policy = make_policy(nvme_dir, optimizer__kind="scale")
    with offload.offload(LLAMA.make_model(), policy) as engine:
        plan = engine.plan
        for spec in plan.specs:
            planes = spec.state_planes(plan.fmt)
            has_last = any(p.name == LAST for p in spec.params)
            assert (Plane.TORCH_STATE in planes) == has_last
            assert (Plane.FACTORS in planes) == (
                not has_last and any(len(p.shape) < 2 for p in spec.params)
            )
            assert (spec.index, Plane.FACTORS) in plan.pinned or Plane.FACTORS not in planes
        assert "torch allocates in the step of one parameter and sums over rows" in str(plan)
        assert plan.traffic()[1] < 6 * sum(spec.numel for spec in plan.specs)
    assert state_format("exact", "scale").state_itemsize == 4
    assert state_format("int8", "scale").state_itemsize == 3


def test_other_layouts_and_bad_arguments_are_refused(nvme_dir: Path) -> None:
    for options, message in (
        ({"last": "head"}, "no parameter of that name. Set last"),
        ({"momentun": 0.5}, "SCALE has no momentun; it has last, momentum"),
        ({"last": [LAST]}, "last is .* it must be a parameter's name"),
        ({"last": "model.norm.weight"}, "which is a vector. Set last to the matrix"),
        ({"embedding": 3}, "embedding is 3; it must be a part of a name"),
        ({"embedding": ""}, "embedding is ''; it must be a part of a name"),
        ({"rms": "nope"}, "rms is 'nope'; it must be true or false"),
        ({"momentum": 7}, r"momentum is 7; it must be in \[0, 1\)"),
        ({"momentum": True}, "momentum is True; it must be in"),
    ):
        policy = make_policy(nvme_dir, optimizer__kind="scale", optimizer__options=options)
        with pytest.raises(PolicyError, match=message):
            offload.offload(LLAMA.make_model(), policy)
    with pytest.raises(PolicyError, match="bf16 would be exact"):
        offload.load_policy(make_policy(nvme_dir, optimizer__kind="scale", format="bf16"))
    with offload.offload(
        LLAMA.make_model(), make_policy(nvme_dir, optimizer__kind="scale")
    ) as engine:
        params = list(engine.model.parameters())
        for hyper, error, message in (
            ({"lr": -1.0}, ValueError, "SCALE: lr is -1.0"),
            ({"betas": (0.9, 1.0)}, ValueError, "SCALE: beta2 is 1.0"),
            ({"betas": (0.9,)}, ValueError, "betas is .* it must be two numbers"),
            ({"last": None}, StateError, "has a momentum for lm_head.weight"),
            ({"momentum": 0.0}, StateError, "has a momentum for lm_head.weight"),
        ):
            with pytest.raises(error, match=message):
                offload.SCALE(params, **hyper)
    policy = make_policy(nvme_dir, optimizer__kind="scale", optimizer__options={"last": None})
    with offload.offload(LLAMA.make_model(), policy) as engine:
        with pytest.raises(StateError, match="no momentum for lm_head.weight"):
            offload.SCALE(engine.model.parameters())
        one_step(engine, offload.SCALE(engine.model.parameters(), last=None), LLAMA, 0)


def in_groups(engine: Any, **override: Any) -> list[dict[str, Any]]:
    """The last layer in a group of its own, all other parameters in another."""
    named = dict(engine.model.named_parameters())
    head = named.pop(LAST)
    return [{"params": [head], **override}, {"params": list(named.values())}]


def masters(engine: Any) -> list[torch.Tensor]:
    return [engine.master(name) for name, _ in engine.model.named_parameters()]


BAD_GROUPS: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"momentum": 0.0}, StateError, "the plan has a momentum for lm_head.weight"),
    ({"last": None}, StateError, "the plan has a momentum for lm_head.weight"),
    ({"betas": (0.9, 1.0)}, ValueError, "SCALE: beta2 is 1.0"),
    ({"betas": (0.9,)}, ValueError, "must be two numbers"),
    ({"lr": -1.0}, ValueError, "SCALE: lr is -1.0"),
    ({"rms": "no"}, ValueError, "SCALE: rms is 'no'"),
)


@pytest.mark.parametrize(("override", "error", "message"), BAD_GROUPS)
@pytest.mark.parametrize("update", ["eager", "deferred"])
def test_what_a_group_overrides_is_refused_before_anything_changes(
    update: str, override: dict[str, Any], error: type[Exception], message: str, nvme_dir: Path
) -> None:
    """When the optimizer is made, and at the step for which a group has been changed."""
    policy = make_policy(nvme_dir, optimizer__kind="scale", optimizer__update=update)
    with offload.offload(LLAMA.make_model(), policy) as engine:
        with pytest.raises(error, match=message):
            offload.SCALE(in_groups(engine, **override), lr=1e-3)
        optimizer = offload.SCALE(in_groups(engine), lr=1e-3)
        one_step(engine, optimizer, LLAMA, 0)
        before = masters(engine)
        good = dict(optimizer.param_groups[0])
        optimizer.param_groups[0] |= override
        with pytest.raises(error, match=message):
            one_step(engine, optimizer, LLAMA, 1)
        optimizer.param_groups[0] |= good
        optimizer.zero_grad()
        assert all(map(torch.equal, before, masters(engine)))
        one_step(engine, optimizer, LLAMA, 1)
        assert not any(map(torch.equal, before, masters(engine)))


def test_a_step_refuses_a_group_that_changed_behind_backward(nvme_dir: Path) -> None:
    policy = make_policy(nvme_dir, optimizer__kind="scale", optimizer__update="deferred")
    with offload.offload(LLAMA.make_model(), policy) as engine:
        optimizer = offload.SCALE(in_groups(engine), lr=1e-3)
        LLAMA.loss(engine.model, LLAMA.make_batch(0, torch.bfloat16)).backward()
        optimizer.param_groups[1]["betas"] = (0.9, 1.0)
        with pytest.raises(ValueError, match="beta2 is 1.0"):
            optimizer.step()
        optimizer.param_groups[1]["betas"] = (0.9, 0.99)
        optimizer.step()
        engine.flush()


def test_arguments_other_than_the_policys_are_refused(nvme_dir: Path) -> None:
    """They are the policy's word on the run, and nothing takes them from there by itself."""
    options = {"rms": True, "momentum": 0.8}
    policy = make_policy(nvme_dir, optimizer__kind="scale", optimizer__options=options)
    with offload.offload(LLAMA.make_model(), policy) as engine:
        params = list(engine.model.parameters())
        for hyper, message in (
            ({"momentum": 0.8}, "policy has rms: True, and offload.SCALE was given rms=False"),
            ({"rms": True}, "policy has momentum: 0.8, and offload.SCALE was given momentum=0.9"),
        ):
            with pytest.raises(StateError, match=message):
                offload.SCALE(params, **hyper)
        one_step(engine, offload.SCALE(params, **options), LLAMA, 0)


def test_a_momentum_of_0_is_none(nvme_dir: Path) -> None:
    policy = make_policy(nvme_dir, optimizer__kind="scale", optimizer__options={"momentum": 0})
    with offload.offload(LLAMA.make_model(), policy) as engine:
        params = list(engine.model.parameters())
        assert not any(e.name == "momentum_buffer" for s in engine.plan.specs for p in s.params
                       for e in p.state)  # fmt: skip
        one_step(engine, offload.SCALE(params, momentum=0), LLAMA, 0)
        one_step(engine, offload.SCALE(params, last=None), LLAMA, 1)


def test_a_frozen_last_layer_needs_no_momentum(nvme_dir: Path) -> None:
    model = LLAMA.make_model()
    model.lm_head.weight.requires_grad_(False)
    policy = make_policy(nvme_dir, optimizer__kind="scale")
    with small_units(1024), offload.offload(model, policy) as engine:
        spec = next(s for s in engine.plan.specs if any(p.name == LAST for p in s.params))
        assert not spec.trainable
        one_step(engine, offload.SCALE(engine.model.parameters()), LLAMA, 0)


def test_a_plan_of_another_optimizer_is_refused_by_its_name(nvme_dir: Path) -> None:
    with (
        offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine,
        pytest.raises(StateError, match="Set optimizer.kind: scale in the policy"),
    ):
        offload.SCALE(engine.model.parameters())
    spec = engine.plan.specs[0].params[0]
    with pytest.raises(StateError, match="the plan has no sums for"):
        matrix_in_plan(spec)
