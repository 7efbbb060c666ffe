"""The user's plain PyTorch loop inside the context: everything a loop may do behaves as in plain
torch.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    COMPUTE_DTYPE,
    PlainAdamW,
    Recipe,
    accumulate,
    assert_same,
    bits,
    make_policy,
    prepare,
    record_state,
    run_plain,
    train,
)
from steps import one_step, rounded
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as clip_imported_before
from zoo import ZOO

import offload

LLAMA = ZOO["llama"]
pytestmark = pytest.mark.usefixtures("tiny_units")


def tokens(seed: int = 7, length: int = 6) -> Tensor:
    return LLAMA.make_batch(seed, torch.float32)["input_ids"][:1, :length]


# Modes and order


@pytest.mark.parametrize("name", ["gpt2", "convnet"])
def test_eval_between_steps_changes_nothing(name: str, nvme_dir: Path) -> None:
    """An evaluation after each step equals plain torch's, and leaves the training as it was."""
    entry, format = ZOO[name], "exact"
    plain = prepare(entry.make_model(), Recipe(), format)
    reference = PlainAdamW(plain, Recipe(), format)
    model = prepare(entry.make_model(), Recipe(), format)
    with offload.offload(model, make_policy(nvme_dir, format=format)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3, weight_decay=0.1)
        for seed in range(3):
            batch = entry.make_batch(seed, COMPUTE_DTYPE[format])
            torch.manual_seed(seed)
            want = entry.loss(plain, batch)
            want.backward()
            total: dict[str, Tensor | None] = {}
            accumulate(total, plain)
            reference.step(total, 1.0)
            got = one_step(engine, optimizer, entry, seed, format)
            assert bits(got) == bits(want), seed
            for model in (plain, engine.model):
                model.eval()
            with torch.no_grad():
                assert bits(entry.loss(engine.model, batch)) == bits(entry.loss(plain, batch)), seed
            for model in (plain, engine.model):
                model.train()


def test_forward_without_backward(nvme_dir: Path) -> None:
    """A training forward whose loss is dropped leaves no trace in the next step."""
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        LLAMA.loss(engine.model, LLAMA.make_batch(99, torch.bfloat16))
        dropped = train(engine, LLAMA, Recipe(steps=2), "exact").record
    assert_same(dropped, run_plain(LLAMA, Recipe(steps=2), "exact").record)


@pytest.mark.parametrize("name", ["llama", "gpt2", "shared_layer"])
def test_two_graphs_at_once(name: str, nvme_dir: Path) -> None:
    """Two forwards before one backward of the sum: both graphs are alive at the same time."""
    entry = ZOO[name]

    def summed(model: nn.Module) -> Tensor:
        torch.manual_seed(3)
        losses = [entry.loss(model, entry.make_batch(seed, torch.float32)) for seed in (1, 2)]
        return losses[0] + losses[1]

    plain = entry.make_model()
    want = summed(plain)
    want.backward()
    with offload.offload(entry.make_model(), make_policy(nvme_dir, format="fp32")) as engine:
        got = summed(engine.model)
        got.backward()
        assert bits(got) == bits(want)
        for param_name, p in plain.named_parameters():
            torch.testing.assert_close(engine.grad(param_name), p.grad, rtol=1e-5, atol=1e-7)


def test_backwards_in_another_order(nvme_dir: Path) -> None:
    """loss1 and loss2 computed first, then backward of loss2 before loss1: gradients add up as in
    torch.
    """
    plain = rounded(LLAMA.make_model(), "fp32")
    batches = [LLAMA.make_batch(seed, torch.float32) for seed in (1, 2)]
    for loss in [LLAMA.loss(plain, batch) for batch in batches][::-1]:
        loss.backward()
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir, format="fp32")) as engine:
        for loss in [LLAMA.loss(engine.model, batch) for batch in batches][::-1]:
            loss.backward()
        for name, p in plain.named_parameters():
            assert bits(engine.grad(name)) == bits(p.grad), name


def test_user_checkpointing_on_top(nvme_dir: Path) -> None:
    """A model whose own gradient checkpointing is on gives the same numbers."""
    model = LLAMA.make_model()
    model.gradient_checkpointing_enable()
    with offload.offload(model, make_policy(nvme_dir)) as engine:
        got = train(engine, LLAMA, Recipe(steps=2), "exact").record
    assert_same(got, run_plain(LLAMA, Recipe(steps=2), "exact").record)


def test_autocast(nvme_dir: Path) -> None:
    """fp32 weights under torch.autocast, entered around the forward only."""

    def loss_of(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return LLAMA.loss(model, LLAMA.make_batch(1, torch.float32))

    plain = LLAMA.make_model()
    want = loss_of(plain)
    want.backward()
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir, format="fp32")) as engine:
        got = loss_of(engine.model)
        got.backward()
        assert bits(got) == bits(want)
        for name, p in plain.named_parameters():
            assert bits(engine.grad(name)) == bits(p.grad), name


def test_hidden_states_and_user_hooks(nvme_dir: Path) -> None:
    """output_hidden_states and a user's hook on a block see what they see in plain torch."""

    def look(model: nn.Module) -> list[str]:
        seen: list[str] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(bits(output[0] if isinstance(output, tuple) else output))

        handle = model.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            states = model(input_ids=tokens(), output_hidden_states=True).hidden_states
        handle.remove()
        return seen + [bits(state) for state in states]

    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        assert look(engine.model) == look(rounded(LLAMA.make_model()))


@pytest.mark.parametrize("use_cache", [False, True])
def test_generate(use_cache: bool, nvme_dir: Path) -> None:
    """generate() in eval mode gives plain torch's tokens, also between two training steps."""
    arguments = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    want = LLAMA.make_model().eval().generate(tokens(), **arguments)
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir, format="fp32")) as engine:
        engine.model.eval()
        assert engine.model.generate(tokens(), **arguments).tolist() == want.tolist()
        engine.model.train()
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        one_step(engine, optimizer, LLAMA, 1, "fp32")
        engine.model.eval()
        after = engine.model.generate(tokens(), **arguments)
    assert engine.model.generate(tokens(), **arguments).tolist() == after.tolist()


# Gradients and steps


def zero_by_optimizer(engine: Any, optimizer: Any) -> None:
    optimizer.zero_grad()


def zero_by_model(engine: Any, optimizer: Any) -> None:
    engine.model.zero_grad()


@pytest.mark.parametrize("zero", [zero_by_optimizer, zero_by_model])
def test_zero_grad_forgets(zero: Callable[[Any, Any], None], nvme_dir: Path) -> None:
    """What zero_grad clears has no part in the step: the run equals one that never saw that
    backward.
    """
    recipe = Recipe(steps=1)
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3, weight_decay=0.1)
        LLAMA.loss(engine.model, LLAMA.make_batch(55, torch.bfloat16)).backward()
        zero(engine, optimizer)
        got = train(engine, LLAMA, recipe, "exact").record
    assert_same(got, run_plain(LLAMA, recipe, "exact").record)


def test_step_without_gradients_is_no_step(nvme_dir: Path) -> None:
    """torch skips parameters without a gradient: no decay, no step count."""
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3, weight_decay=0.1)
        optimizer.step()
        optimizer.step()
        got = train(engine, LLAMA, Recipe(steps=2), "exact").record
    assert_same(got, run_plain(LLAMA, Recipe(steps=2), "exact").record)


def test_gradients_that_step_has_taken_are_gone(nvme_dir: Path) -> None:
    """Without zero_grad() torch would reuse them: a second step() or backward() is refused."""
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        LLAMA.loss(engine.model, LLAMA.make_batch(0, torch.bfloat16)).backward()
        optimizer.step()
        with pytest.raises(offload.StateError, match="zero_grad"):
            optimizer.step()
        with pytest.raises(offload.StateError, match="zero_grad"):
            LLAMA.loss(engine.model, LLAMA.make_batch(1, torch.bfloat16)).backward()


def test_hyperparameters_are_read_at_step(nvme_dir: Path) -> None:
    """Changing param_groups after step() does not reach the update that step() promised."""

    def result(late_lr: float) -> dict[str, str]:
        record: dict[str, str] = {}
        with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
            optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
            one_step(engine, optimizer, LLAMA, 1)
            optimizer.param_groups[0]["lr"] = late_lr
            engine.flush()
            record_state(record, engine)
        return record

    assert_same(result(1.0), result(1e-3))


def test_closure(nvme_dir: Path) -> None:
    """optimizer.step(closure) calls it once with gradients on, and returns its loss."""
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3, weight_decay=0.1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = LLAMA.loss(engine.model, LLAMA.make_batch(0, torch.bfloat16))
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        record: dict[str, str] = {}
        engine.flush()
        record_state(record, engine)
    want = run_plain(LLAMA, Recipe(steps=1), "exact").record
    assert bits(loss) == want["loss[0.0]"]
    assert_same(record, want, only=lambda key: "avg[" in key or key.startswith("weight["))


def test_clip_imported_before_the_context(nvme_dir: Path) -> None:
    """`from torch.nn.utils import clip_grad_norm_` at import time is routed like the attribute."""

    def result(clip: Callable[..., Tensor], directory: Path) -> tuple[str, dict[str, str]]:
        record: dict[str, str] = {}
        with offload.offload(LLAMA.make_model(), make_policy(directory)) as engine:
            optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
            LLAMA.loss(engine.model, LLAMA.make_batch(1, torch.bfloat16)).backward()
            norm = clip(engine.model.parameters(), 0.01)
            optimizer.step()
            engine.flush()
            record_state(record, engine)
        return bits(norm), record

    routed = result(lambda *args: torch.nn.utils.clip_grad_norm_(*args), nvme_dir / "routed")
    imported = result(clip_imported_before, nvme_dir / "imported")
    assert routed[0] == imported[0]
    assert_same(imported[1], routed[1])
    plain = rounded(LLAMA.make_model())
    LLAMA.loss(plain, LLAMA.make_batch(1, torch.bfloat16)).backward()
    squares = sum(p.grad.double().square().sum() for p in plain.parameters())
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir / "engine")) as engine:
        LLAMA.loss(engine.model, LLAMA.make_batch(1, torch.bfloat16)).backward()
        norm = engine.clip_grad_norm_(engine.model.parameters(), 1.0)
    torch.testing.assert_close(norm.double().cpu(), squares.sqrt(), rtol=1e-6, atol=0)


def test_clip_leaves_other_models_alone(nvme_dir: Path) -> None:
    """Inside the context, clipping an ordinary model is torch's own function."""
    other = nn.Linear(4, 4)
    other(torch.ones(2, 4)).sum().backward()
    want = copy.deepcopy(other)
    for p, source in zip(want.parameters(), other.parameters(), strict=True):
        p.grad = source.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(want.parameters(), 0.1)
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)):
        inside = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    assert bits(norm) == bits(inside)
    for p, source in zip(want.parameters(), other.parameters(), strict=True):
        assert bits(p.grad) == bits(source.grad)


def test_clipping_a_part_is_right_or_refused(nvme_dir: Path) -> None:
    """The norm of some parameters is not the norm of all: right or refused, never wrong."""
    plain = rounded(LLAMA.make_model())
    LLAMA.loss(plain, LLAMA.make_batch(1, torch.bfloat16)).backward()
    want = torch.nn.utils.clip_grad_norm_(plain.model.layers[0].parameters(), 1e-3)
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        LLAMA.loss(engine.model, LLAMA.make_batch(1, torch.bfloat16)).backward()
        part = engine.model.model.layers[0].parameters()
        try:
            got = torch.nn.utils.clip_grad_norm_(part, 1e-3)
        except offload.OffloadError:
            return
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=0)


def test_clipping_two_models_together_is_right_or_refused(nvme_dir: Path) -> None:
    """Parameters outside the engine count in the norm as those inside do."""
    other = nn.Linear(4, 4)
    other(torch.ones(2, 4)).sum().backward()
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        LLAMA.loss(engine.model, LLAMA.make_batch(1, torch.bfloat16)).backward()
        inside = engine.clip_grad_norm_(engine.model.parameters(), 1e9).item()
        outside = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()]).item()
        try:
            params = [*engine.model.parameters(), *other.parameters()]
            got = torch.nn.utils.clip_grad_norm_(params, 1e9)
        except offload.OffloadError:
            return
        assert got.item() == pytest.approx((inside**2 + outside**2) ** 0.5, rel=1e-5)


def test_grads_do_not_stay_on_parameters(nvme_dir: Path) -> None:
    """Gradients leave as they land; engine.grad reads them, and says where there is none."""
    model = LLAMA.make_model()
    model.model.norm.weight.requires_grad_(False)
    with offload.offload(model, make_policy(nvme_dir)) as engine:
        with pytest.raises(offload.StateError, match="no gradient"):
            engine.grad("model.layers.0.mlp.up_proj.weight")
        LLAMA.loss(model, LLAMA.make_batch(1, torch.bfloat16)).backward()
        assert all(p.grad is None for p in model.parameters())
        grad = engine.grad("model.layers.0.mlp.up_proj.weight")
        assert grad.shape == model.model.layers[0].mlp.up_proj.weight.shape
        with pytest.raises(offload.OffloadError, match=r"model\.norm\.weight"):
            engine.grad("model.norm.weight")
        with pytest.raises(offload.OffloadError, match=r"no\.such"):
            engine.grad("no.such")


# Reports


def test_memory_sums_to_the_byte(nvme_dir: Path) -> None:
    """The items of the report are the slab, and the slab is inside the budget."""
    for index, changes in enumerate(
        ({}, {"tiers__cpu__pin": "auto"}, {"tiers__nvme": None, "tiers__cpu__pin": "auto"})
    ):
        policy = make_policy(nvme_dir / str(index), **changes)
        with offload.offload(LLAMA.make_model(), policy) as engine:
            report = engine.memory()
            assert sum(report.arenas.values()) == report.slab_nbytes
            assert all(nbytes >= 0 for nbytes in report.arenas.values())
            assert report.slab_nbytes <= 64 << 20
            assert str(report)


def test_stats_count_the_step(nvme_dir: Path) -> None:
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        for seed in range(3):
            one_step(engine, optimizer, LLAMA, seed)
        stats = engine.stats()
        read, written = engine.plan.traffic()
    assert stats.wall_s > 0
    assert sum(stats.shares().values()) == pytest.approx(1.0)
    assert stats.nbytes["nvme read"] == pytest.approx(read, rel=0.5)
    assert stats.nbytes["nvme write"] == pytest.approx(written, rel=0.5)


def test_trace_is_json(nvme_dir: Path, tmp_path: Path) -> None:
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        one_step(engine, optimizer, LLAMA, 1)
        engine.flush()
        engine.trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event.get("cat") for event in trace["traceEvents"]}
    assert {"nvme read", "update"} <= names


def test_plan_is_printable(nvme_dir: Path) -> None:
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        assert "NVMe" in str(engine.plan)


def test_optimizer_is_a_torch_optimizer(nvme_dir: Path) -> None:
    """state_dict() is metadata only, so that wrappers may call it freely."""
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3, betas=(0.8, 0.9))
        assert isinstance(optimizer, torch.optim.Optimizer)
        one_step(engine, optimizer, LLAMA, 1)
        state = optimizer.state_dict()
        assert state["param_groups"][0]["betas"] == (0.8, 0.9)
        assert len(json.dumps(state, default=str)) < 100_000
