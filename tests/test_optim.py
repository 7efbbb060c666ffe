"""Optimizers and lossy formats through the whole engine: the same bits wherever the bytes live."""

import functools
from collections.abc import Callable, Mapping
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
    master,
    prepare,
    run_plain,
    small_units,
    train,
    variant_policy,
    without_grads,
)
from steps import one_step
from torch import nn
from zoo import ZOO

import offload
from offload.errors import PolicyError, StateError

LLAMA = ZOO["llama"]
RECIPE = Recipe(steps=3)
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": offload.AdamW,
    "sgd": functools.partial(offload.SGD, momentum=0.9, nesterov=True),
    "lion": offload.Lion,
}
VARIANTS = (
    Variant("RAM", placement="ram"),
    Variant("NVMe, larger tiles", tile_numel=3 * 65536),
    Variant("NVMe, eager, threads", update="eager", io="threads"),
    Variant("mixed, one slot each", placement="oneslot", num_paths=2, chaos=True),
)


def run_with(
    format: str, kind: str, variant: Variant, directory: Path
) -> tuple[Record, dict[str, tuple[int, int]]]:
    """Train through the tiers; also where every parameter lies: (chunk, element)."""
    model = prepare(LLAMA.make_model(), RECIPE, format)
    with small_units(variant.small_numel):
        policy = variant_policy(variant, format, directory, LLAMA)
        policy["optimizer"]["kind"] = kind
        with offload.offload(model, policy) as engine:
            eager = variant.update == "eager"
            result = train(engine, LLAMA, RECIPE, format, grads=not eager, make=MAKERS[kind])
            places = {p.name: (s.index, p.offset) for s in engine.plan.specs for p in s.params}
    return result.record, places


class PlainTwin(PlainAdamW):
    """Any optimizer in any format by the numpy twins, parameter by parameter."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        format: str,
        *,
        kind: str,
        places: Mapping[str, tuple[int, int]],
    ) -> None:
        self.kind, self.places = kind, places
        super().__init__(model, recipe, format)
        for planes in self.state.values() if kind != "adamw" else ():
            del planes["exp_avg_sq"]
            planes.pop("exp_avg_sq_scale", None)

    def split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """All planes, with zero moments."""
        planes = {
            name: np.zeros(twins.items_of(name, 0, values.size).stop, dtype)
            for name, dtype in twins.DTYPES[self.format].items()
        }
        twins.store_master(self.format, planes, values)
        return planes

    def _update(self, name: str, group: dict[str, Any], grad: np.ndarray, scale: float) -> None:
        planes = self.state[name]
        chunk, offset = self.places[name]
        common = {
            "end": grad.size, "step": self.num_steps[name], "grad_scale": scale, "seed": chunk,
            "lr": float(group["lr"]), "weight_decay": float(group["weight_decay"]),
        }  # fmt: skip
        makers: dict[str, Callable[..., twins.Op]] = {
            "adamw": twins.AdamWOp,
            "sgd": functools.partial(twins.SGDOp, momentum=0.9, nesterov=True),
            "lion": twins.LionOp,
        }
        if self.format == "fp32":
            planes["grad"][:] = grad
        else:
            planes["grad"][:], planes["grad_lo"][:] = twins.split_fp32(grad)
        twins.update(self.format, planes, makers[self.kind](**common), origin=offset)


@pytest.mark.parametrize(
    ("format", "kind"),
    [("bf16", "adamw"), ("int8", "adamw"), ("exact", "sgd"), ("exact", "lion"), ("fp32", "sgd")]
    + [("int8", "lion"), ("bf16", "sgd")],
)
def test_training_has_the_twins_bits_wherever_the_bytes_live(
    format: str, kind: str, nvme_dir: Path
) -> None:
    """Losses, gradients, weights and all planes, against plain torch and the twins."""
    base, places = run_with(format, kind, Variant("NVMe"), nvme_dir / "base")
    make = functools.partial(PlainTwin, kind=kind, places=places)
    plain = run_plain(LLAMA, RECIPE, format, make=make).record
    assert_same(base, plain)
    variants = (
        VARIANTS if (format, kind) in (("bf16", "adamw"), ("int8", "adamw")) else VARIANTS[:1]
    )
    for variant in variants:
        got, _ = run_with(format, kind, variant, nvme_dir / variant.name.replace(" ", ""))
        assert_same(got, base, only=without_grads)


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_what_is_exported_and_given_back_is_the_master(
    format: str, nvme_dir: Path, tmp_path: Path
) -> None:
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir, format=format)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-2)
        one_step(engine, optimizer, LLAMA, 1, format)
        engine.export(tmp_path, dtype=torch.float32)
        masters = {n: master(engine.state(n)) for n, _ in engine.model.named_parameters()}
        name = "model.layers.1.mlp.up_proj.weight"
        with engine.gathered(engine.model.model.layers[1]), torch.no_grad():
            engine.model.get_parameter(name)[0, :7] = 0.5
        edited = engine.state(name)
        assert torch.equal(master(edited)[0, :7], torch.full((7,), 0.5))
        assert torch.equal(master(edited)[1:], masters[name][1:])
        assert not edited["residue"].view(torch.uint8)[0, :7].any()
    loaded = type(engine.model).from_pretrained(tmp_path, dtype=torch.float32)
    for n, p in loaded.named_parameters():
        assert torch.equal(p, masters[n]), n


def test_int8_costs_the_bytes_that_the_plan_counts(nvme_dir: Path) -> None:
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir, format="int8")) as engine:
        plan = engine.plan
        assert "format int8 (5.125 B/param)" in str(plan)
        assert all(spec.numel % 65536 == 0 for spec in plan.specs)
        assert plan.tile_numel % 65536 == 0
        assert plan.state_nbytes == sum(spec.numel for spec in plan.specs) * 41 // 8
        planes = engine.state("model.layers.0.mlp.up_proj.weight")
        numel = planes["weight"].numel()
        assert planes["exp_avg_scale"].shape == planes["exp_avg_sq_scale"].shape == (numel // 32,)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_optimizer_of_another_kind_is_refused(kind: str, nvme_dir: Path) -> None:
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir, optimizer__kind=kind)) as engine:
        for other, make in MAKERS.items():
            if other != kind:
                with pytest.raises(StateError, match=f"Set optimizer.kind: {other} in the policy"):
                    make(engine.model.parameters())
        one_step(engine, MAKERS[kind](engine.model.parameters()), LLAMA, 1)


def test_an_unknown_kind_is_refused(nvme_dir: Path) -> None:
    with pytest.raises(PolicyError, match="optimizer.kind: 'adam'"):
        offload.load_policy(make_policy(nvme_dir, optimizer__kind="adam"))


@pytest.mark.parametrize(
    ("make", "hyper", "message"),
    [
        (offload.SGD, {"momentum": -1.0}, "SGD: momentum is -1.0"),
        (offload.SGD, {"nesterov": True}, "nesterov needs"),
        (offload.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs"),
        (offload.Lion, {"lr": -1.0}, "Lion: lr is -1.0"),
        (offload.Lion, {"betas": (0.9, 1.0)}, "Lion: betas are"),
        (offload.AdamW, {"eps": -1.0}, "AdamW: eps is -1.0"),
    ],
)
def test_impossible_hyperparameters_are_refused(
    make: type, hyper: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(1))], **hyper)


def test_sgd_in_fp32_trains_as_torch_does(nvme_dir: Path) -> None:
    """The public optimizers side by side; parameters whose size is no whole number of vectors may
    differ in torch's own tail, so the model has none.
    """
    hyper = {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    tiered = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    tiered.load_state_dict(plain.state_dict())
    theirs = torch.optim.SGD(plain.parameters(), fused=True, **hyper)
    policy = make_policy(nvme_dir, format="fp32", optimizer__kind="sgd")
    batches = torch.randn(5, 8, 64)
    with offload.offload(tiered, policy):
        ours = offload.SGD(tiered.parameters(), **hyper)
        for batch in batches:
            for model, optimizer in ((plain, theirs), (tiered, ours)):
                optimizer.zero_grad()
                model(batch).square().sum().backward()
                optimizer.step()
    for p, q in zip(plain.parameters(), tiered.parameters(), strict=True):
        assert torch.equal(p, q)


def make_adam(params: Any, **hyper: Any) -> Any:
    return offload.Torch(torch.optim.Adam, params, amsgrad=True, weight_decay=0.1, **hyper)


STAYS = {
    "adafactor": (offload.Adafactor, {"kind": "adafactor"}),
    "scale": (offload.SCALE, {"kind": "scale"}),
    "torch": (make_adam, {"kind": "torch", "name": "Adam", "options": {"amsgrad": True}}),
}


@pytest.mark.parametrize("kind", STAYS)
def test_groups_and_counts_come_back_where_the_state_stays(kind: str, nvme_dir: Path) -> None:
    make, section = STAYS[kind]
    policy = make_policy(nvme_dir)
    policy["optimizer"] |= section
    with offload.offload(LLAMA.make_model(), policy) as engine:
        params = list(engine.model.parameters())
        optimizer = make(params, lr=1e-2)
        fresh = optimizer.state_dict()
        optimizer.load_state_dict(fresh)
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        one_step(engine, optimizer, LLAMA, 0)
        optimizer.param_groups[0]["lr"] = 3e-3
        saved = optimizer.state_dict()
        again = make(params, lr=1e-4)
        again.load_state_dict(saved)
        assert again.state_dict() == saved and again.param_groups[0]["lr"] == 3e-3
        assert again.param_groups[0]["initial_lr"] == 1e-2
        one_step(engine, again, LLAMA, 1)
        for bad, message in (
            (saved, r"steps here and 1 in the state_dict.*a checkpoint\)\.$"),
            (fresh, "has taken 2 steps here and 0 in"),
            ({**again.state_dict(), "state": {0: {"step": 1}}}, "stays in the tiers"),
            (torch.optim.SGD(params).state_dict(), "it is of another optimizer"),
        ):
            before = repr(again.state_dict())
            with pytest.raises(StateError, match=message):
                again.load_state_dict(bad)
            assert repr(again.state_dict()) == before
        with pytest.raises(StateError, match="stays in the tiers"):
            again.full_state_dict()
        one_step(engine, again, LLAMA, 2)
