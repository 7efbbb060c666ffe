"""What step() says of itself, steps that are skipped, and loss scaling: by raw bits."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import make_policy, small_units
from test_optimstate import batch, make_net, raw
from torch import Tensor, nn
from torch.amp import GradScaler

import offload
from offload.errors import NumericsError, PolicyError, StateError

RAM = {"tiers__nvme": None, "tiers__cpu": {"budget": "256MiB"}}
SKIP = {"optimizer__nonfinite": "skip"}


def policy_for(directory: Path, **changes: Any) -> dict[str, Any]:
    return make_policy(directory, **{"format": "fp32", **changes})


def backward(model: nn.Module, step: int, factor: float = 1.0) -> Tensor:
    loss = model(batch(step)).square().mean() * factor
    loss.backward()
    return loss


def plain_norm(model: nn.Module) -> float:
    squares = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
    return float(squares**0.5)


def planes_of(engine: Any) -> dict[str, bytes]:
    return {
        f"{name}.{plane}": raw(tensor)
        for name, _ in engine.model.named_parameters()
        for plane, tensor in engine.state(name).items()
    }


# ---- the result ----


@pytest.mark.parametrize("update", ["deferred", "eager"])
def test_step_returns_the_norm_of_what_landed(update: str, nvme_dir: Path) -> None:
    model, plain = make_net(), make_net()
    backward(plain, 0)
    with offload.offload(model, policy_for(nvme_dir, optimizer__update=update)):
        optimizer = offload.AdamW(model.parameters())
        assert optimizer.last_step is None
        assert optimizer.step() == offload.StepResult(norm=None)
        backward(model, 0)
        result = optimizer.step()
        assert result == optimizer.last_step and not result.skipped and result.reason == ""
        assert result.norm == pytest.approx(plain_norm(plain), rel=1e-6)
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.norm = 0.0


def test_the_norm_is_that_before_clipping_and_has_clip_grad_norms_bits(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir)) as engine:
        optimizer = offload.AdamW(model.parameters())
        backward(model, 0)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        again = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert float(norm) > 1e-3
        assert float(again) == pytest.approx(1e-3, rel=1e-4)  # clipped once already
        assert engine.clipping.scales[(0, 0)] == pytest.approx(1e-3 / float(norm), rel=1e-3)
        assert optimizer.step().norm == float(norm)


def test_with_a_closure_step_returns_its_loss(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir)):
        optimizer = offload.AdamW(model.parameters())
        loss = optimizer.step(lambda: backward(model, 0))
        assert loss.shape == () and loss.requires_grad
        assert optimizer.last_step is not None and optimizer.last_step.norm is not None


@pytest.mark.parametrize("changes", [{}, RAM, {"optimizer__update": "eager"}])
def test_norms_are_the_same_bits_wherever_the_bytes_live(
    changes: dict[str, Any], nvme_dir: Path
) -> None:
    def norms(directory: Path, **changes: Any) -> list[float]:
        model = make_net()
        with small_units(1024), offload.offload(model, policy_for(directory, **changes)):
            optimizer = offload.AdamW(model.parameters(), lr=1e-2)
            found = []
            for step in range(3):
                backward(model, step)
                found.append(optimizer.step().norm)
                optimizer.zero_grad()
            return found

    assert norms(nvme_dir / "a", **changes) == norms(nvme_dir / "b")


# ---- skipping ----


def train_around(
    directory: Path, bad: Callable[[nn.Module], object] | None, **changes: Any
) -> tuple[list[float], dict[str, bytes], list[int], int]:
    """Four steps; before the third, if `bad` says so, one that is not finite."""
    model = make_net()
    with small_units(1024), offload.offload(model, policy_for(directory, **changes)) as engine:
        optimizer = offload.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(4):
            if step == 2 and bad is not None:
                before = planes_of(engine), optimizer.state_dict(), engine.run.num_steps
                bad(model)
                result = optimizer.step()
                assert result.skipped and "is not finite" in result.reason
                assert result.norm is not None and not result.norm < float("inf")
                assert result == optimizer.last_step
                after = planes_of(engine), optimizer.state_dict(), engine.run.num_steps
                assert after == before
                optimizer.zero_grad()
            losses.append(backward(model, step).item())
            assert not optimizer.step().skipped
            optimizer.zero_grad()
        counts = optimizer.state_dict()["num_steps"]
        return losses, planes_of(engine), counts, engine.run.num_steps


PLACES: dict[str, dict[str, Any]] = {
    "nvme": {},
    "ram": RAM,
    "durable": {"durability": "step"},
    "auto": {"optimizer__update": "auto"},
    "device": {"tiers__gpu__device": "standin"},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_skipped_step_is_as_if_it_had_not_been(place: str, nvme_dir: Path) -> None:
    changes = {**PLACES[place], **SKIP}
    if place == "durable":
        changes["tiers__cpu__pin"] = "auto"
    got = train_around(nvme_dir / "a", lambda m: backward(m, 9, float("inf")), **changes)
    assert got == train_around(nvme_dir / "b", None, **changes)


def test_a_single_gradient_that_is_not_finite_skips_them_all(nvme_dir: Path) -> None:
    def one_inf(model: nn.Module) -> None:
        loss = model(batch(9)).square().mean()
        handle = model.blocks[1].bias.register_hook(lambda grad: grad / 0)
        loss.backward()
        handle.remove()

    got = train_around(nvme_dir / "a", one_inf, **SKIP)
    assert got == train_around(nvme_dir / "b", None, **SKIP)


def test_skipping_does_not_take_a_second_step_for_the_gradients(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir, **SKIP)):
        optimizer = offload.AdamW(model.parameters())
        backward(model, 0, float("nan"))
        assert optimizer.step().skipped
        with pytest.raises(StateError, match="step\\(\\) twice"):
            optimizer.step()


def test_without_skip_a_bad_gradient_is_an_error_and_changes_nothing(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir, optimizer__update="deferred")) as engine:
        optimizer = offload.AdamW(model.parameters())
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
        before = planes_of(engine)
        backward(model, 1, float("inf"))
        with pytest.raises(NumericsError):
            optimizer.step()
        assert planes_of(engine) == before and set(optimizer.state_dict()["num_steps"]) == {1}


def test_skip_and_eager_exclude_each_other(
    nvme_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PolicyError, match="optimizer.nonfinite: 'skip' is too late for eager"):
        offload.load_policy(policy_for(nvme_dir, optimizer__update="eager", **SKIP))
    model = make_net()
    with (
        caplog.at_level(logging.INFO, "offload"),
        offload.offload(model, policy_for(nvme_dir, **SKIP)) as engine,
    ):
        optimizer = offload.AdamW(model.parameters())
        backward(model, 0)
        optimizer.step()
        assert not engine.gradients.eager
    assert "updates are deferred: optimizer.nonfinite: skip" in caplog.text


# ---- GradScaler ----


def make_scaler() -> GradScaler:
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


def scaled_run(
    model: nn.Module, optimizer: Any, *, unscale: bool, norms: list[float] | None = None
) -> list[float]:
    """Six steps, of which the fourth overflows; clipped by our own norms where `unscale`."""
    scaler, found, scales = make_scaler(), [], []
    for step in range(6):
        optimizer.zero_grad()
        factor = 1e36 if step == 3 else 1.0
        scaler.scale(model(batch(step)).square().mean() * factor).backward()
        if unscale:
            scaler.unscale_(optimizer)
            params = list(model.parameters())
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            if norms is None:
                norm = torch.nn.utils.clip_grad_norm_(params, 0.01)
            else:
                norm = torch.tensor(norms[step])
                torch.nn.utils.clip_grads_with_norm_(params, 0.01, norm)
            found.append(float(norm))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0]
    return found


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("changes", [{}, RAM, {"tiers__gpu__device": "standin"}])
def test_grad_scaler_trains_as_in_plain_torch(
    changes: dict[str, Any], unscale: bool, nvme_dir: Path
) -> None:
    """Scales are powers of two, so unscaling rounds nothing; the step that overflows is skipped."""
    model, plain = make_net(), make_net()
    with small_units(1024), offload.offload(model, policy_for(nvme_dir, **changes)) as engine:
        optimizer = offload.AdamW(model.parameters(), lr=1e-2)
        norms = scaled_run(model, optimizer, unscale=unscale)
        assert not engine.gradients.eager
        assert set(optimizer.state_dict()["num_steps"]) == {5}
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    scaled_run(plain, theirs, unscale=unscale, norms=norms)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert raw(p) == raw(q), name


def test_a_scaled_loss_is_refused_where_updates_are_eager(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir, optimizer__update="eager")) as engine:
        offload.AdamW(model.parameters())
        before = planes_of(engine)
        with pytest.raises(StateError, match="GradScaler: optimizer.update eager .* bf16"):
            make_scaler().scale(model(batch(0)).square().mean())
        assert planes_of(engine) == before
        loss = model(batch(0)).square().mean()
        assert GradScaler("cpu", enabled=False).scale(loss) is loss


def test_auto_goes_back_to_deferred_for_a_scaled_loss(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir)) as engine:
        optimizer = offload.AdamW(model.parameters())
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
        assert engine.gradients.eager
        scaler = make_scaler()
        scaler.scale(model(batch(1)).square().mean()).backward()
        scaler.step(optimizer)
        assert set(optimizer.state_dict()["num_steps"]) == {2}


def test_unscaling_without_gradients_is_torchs_own_error(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir)):
        optimizer, scaler = offload.AdamW(model.parameters()), make_scaler()
        scaler.scale(torch.zeros(()))
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.step(optimizer)


def test_a_foreign_optimizer_is_refused_by_unscaling_too(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir)):
        foreign, scaler = torch.optim.SGD(model.parameters(), lr=0.1), make_scaler()
        scaler.scale(model(batch(0)).square().mean()).backward()
        with pytest.raises(StateError, match="would train nothing"):
            scaler.unscale_(foreign)


def test_a_plain_model_beside_an_offloaded_one_is_scaled_by_torch(nvme_dir: Path) -> None:
    alone, beside = make_net(), make_net()
    scaled_run(alone, torch.optim.AdamW(alone.parameters(), fused=True), unscale=False)
    with offload.offload(make_net(), policy_for(nvme_dir)):
        scaled_run(beside, torch.optim.AdamW(beside.parameters(), fused=True), unscale=False)
    for p, q in zip(alone.parameters(), beside.parameters(), strict=True):
        assert raw(p) == raw(q)
    assert "offload" not in GradScaler.scale.__module__


# ---- fp16 ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, RAM])
def test_autocast_trains_as_in_plain_torch(
    dtype: torch.dtype, changes: dict[str, Any], nvme_dir: Path
) -> None:
    """fp32 weights that autocast casts: with a scaler where the dtype needs one."""

    def run(model: nn.Module, optimizer: Any) -> list[bytes]:
        scaler, losses = GradScaler("cpu", enabled=dtype is torch.float16), []
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = model(batch(step)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(raw(loss))
        return losses

    model, plain = make_net(), make_net()
    with small_units(1024), offload.offload(model, policy_for(nvme_dir, **changes)):
        got = run(model, offload.AdamW(model.parameters(), lr=1e-2))
    want = run(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True))
    assert got == want
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert raw(p) == raw(q[1]), name


@pytest.mark.parametrize("format", ["exact", "fp32"])
def test_a_model_in_fp16_is_kept_in_full_and_computes_in_the_formats_dtype(
    format: str, nvme_dir: Path
) -> None:
    model = make_net().half()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with offload.offload(model, policy_for(nvme_dir, format=format)) as engine:
        compute = engine.plan.fmt.weight_dtype
        assert {p.dtype for p in model.parameters()} == {compute}
        for name, half in before.items():
            assert raw(engine.master(name)) == raw(half.float())
        with pytest.raises(RuntimeError, match="dtype"):
            model(batch(0, torch.float16))
        assert model(batch(0, compute)).isfinite().all()
    for name, p in model.named_parameters():
        assert p.dtype is torch.float16 and raw(p) == raw(before[name])
