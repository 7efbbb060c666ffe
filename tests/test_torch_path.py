"""Optimizers of torch on offloaded state: the bits of the same class on fp32 masters in memory,
wherever the planes lie.
"""

import errno
from pathlib import Path

import pytest
import torch
from chaos import small_units
from parity import (
    Recipe,
    Record,
    Variant,
    assert_same,
    make_policy,
    record_rest,
    record_state,
    without_grads,
)
from steps import one_step
from torch import Tensor, nn
from torch_rig import (
    ADAFACTOR,
    CASES,
    CENTERED,
    FORMATS,
    IN_RAM,
    LLAMA,
    MIXED,
    NADAM,
    OTHERS,
    RECIPE,
    STATE,
    Case,
    check,
    policy_of,
    run_tiers,
)

import offload
from offload.errors import StateError
from offload.formats import Plane
from offload.swapfile import SWAP_NAME

SLOW = pytest.mark.slow


def test_training_has_torchs_bits_wherever_the_planes_lie(nvme_dir: Path) -> None:
    check(CENTERED, "exact", nvme_dir, MIXED, recipe=RECIPE)


def test_in_fp32_too(nvme_dir: Path) -> None:
    check(ADAFACTOR, "fp32", nvme_dir, recipe=RECIPE)


def test_int8_rounds_the_master_and_nothing_else(nvme_dir: Path) -> None:
    check(NADAM, "int8", nvme_dir, IN_RAM, MIXED, recipe=RECIPE)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_every_optimizer_every_way(case: Case, format: str, nvme_dir: Path) -> None:
    recipe = Recipe(steps=4, accumulation=2, clip=0.5, scheduler=True)
    chaos = Variant("oneslot", placement="oneslot", num_paths=2, chaos=True)
    threads = Variant("threads", io="threads", update="deferred")
    check(case, format, nvme_dir, IN_RAM, MIXED, chaos, threads, recipe=recipe)


@pytest.mark.parametrize(
    ("update", "device", "format"),
    [("eager", "standin", "exact")]
    + [
        pytest.param(*row, marks=SLOW)
        for row in (
            ("deferred", "standin", "exact"),
            ("eager", "cpu", "exact"),
            ("eager", "standin", "int8"),
            ("deferred", "standin", "int8"),
            ("eager", "cpu", "int8"),
        )
    ],
)
def test_eager_deferred_and_a_device_change_nothing(
    update: str, device: str, format: str, nvme_dir: Path
) -> None:
    base, _, _ = run_tiers(NADAM, format, Variant("NVMe"), nvme_dir / "base")
    variant = Variant("other", update=update, device=device, chaos=True)
    got, _, _ = run_tiers(NADAM, format, variant, nvme_dir / "other")
    assert_same(got, base, only=without_grads)


@pytest.mark.parametrize(
    ("case", "format"),
    [(CENTERED, "exact"), pytest.param(CENTERED, "int8", marks=SLOW)],
)
def test_clipping_accumulation_groups_and_what_is_frozen(
    case: Case, format: str, nvme_dir: Path
) -> None:
    """Rates that change, two groups with their own, a frozen block, micro-batches added in fp32."""
    recipe = Recipe(
        steps=4, accumulation=2, clip=0.5, groups=True, scheduler=True,
        freeze=("model.layers.1", "model.layers.2.self_attn"),
    )  # fmt: skip
    check(case, format, nvme_dir, recipe=recipe)


def test_a_parameter_without_a_gradient_is_left_alone(nvme_dir: Path) -> None:
    """Every other step uses one of two layers of a block; state begins when a gradient does."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a if x.shape[0] == 2 else self.b)(x).tanh()

    torch.manual_seed(0)
    plain = nn.Sequential(*(Block() for _ in range(3)))
    tiered = nn.Sequential(*(Block() for _ in range(3)))
    tiered.load_state_dict(plain.state_dict())
    batches = [torch.randn(2 if step in (1, 3) else 3, 64) for step in range(4)]
    case = Case("NAdam", {"decoupled_weight_decay": True})
    theirs = torch.optim.NAdam(plain.parameters(), foreach=False, weight_decay=0.1, **case.options)
    policy = case.policy(make_policy(nvme_dir, format="fp32"))
    with small_units(1024), offload.offload(tiered, policy) as engine:
        ours = case.make(tiered.parameters(), weight_decay=0.1)
        for batch in batches:
            for model, optimizer in ((plain, theirs), (tiered, ours)):
                optimizer.zero_grad()
                model(batch).square().sum().backward()
                optimizer.step()
        for name, p in plain.named_parameters():
            state = engine.state(name)
            assert torch.equal(state["weight"], p), name
            for key, value in theirs.state[p].items():
                assert torch.equal(state[STATE + key], value), (name, key)


@pytest.mark.parametrize(
    ("case", "placement", "format"),
    [(NADAM, "mixed", "exact"), (NADAM, "mixed", "int8")]
    + [
        pytest.param(case, placement, format, marks=SLOW)
        for case, placement in ((NADAM, "nvme"), (NADAM, "ram"), (ADAFACTOR, "nvme"))
        for format in ("exact", "int8")
    ],
)
def test_a_run_in_pieces_is_the_run(
    case: Case, placement: str, format: str, nvme_dir: Path
) -> None:
    """State and its scalars are committed with the weights, and come back with them."""
    variant = Variant("run", placement=placement)

    def run(folder: Path, until: int, weights: str | None, durability: str) -> Record:
        policy = policy_of(case, format, variant, folder)
        policy["tiers"]["nvme"] = policy["tiers"]["nvme"] or {"paths": [str(folder / "drive")]}
        policy["durability"] = durability
        record: Record = {}
        with offload.offload(LLAMA.make_model(), policy, weights=weights) as engine:
            optimizer = case.make(engine.model.parameters(), lr=1e-2)
            for step in range(engine.run.num_steps, until):
                one_step(engine, optimizer, LLAMA, step)
            engine.flush()
            record_state(record, engine)
            record_rest(record, engine.model)
        return record

    with small_units(1024):
        want = run(nvme_dir / "plain", 5, None, "off")
        run(nvme_dir / "run", 2, None, "step")
        run(nvme_dir / "run", 3, "resume", "step")
        assert_same(run(nvme_dir / "run", 5, "resume", "step"), want)


def test_a_checkpoint_restores_the_state(nvme_dir: Path, tmp_path: Path) -> None:
    case, records = CENTERED, []
    policy = case.policy(make_policy(nvme_dir / "a", durability="step"))
    other = case.policy(make_policy(nvme_dir / "b"))
    other["tiers"]["cpu"] = {"budget": "256MiB"}
    with small_units(1024):
        with offload.offload(LLAMA.make_model(), policy) as engine:
            optimizer = case.make(engine.model.parameters(), lr=1e-2)
            one_step(engine, optimizer, LLAMA, 0)
            engine.checkpoint(tmp_path / "checkpoint").wait()
            one_step(engine, optimizer, LLAMA, 1)
            engine.flush()
            records.append({})
            record_state(records[-1], engine)
        with offload.offload(LLAMA.make_model(), other, weights=tmp_path / "checkpoint") as engine:
            one_step(engine, case.make(engine.model.parameters(), lr=1e-2), LLAMA, 1)
            engine.flush()
            records.append({})
            record_state(records[-1], engine)
    assert_same(records[1], records[0])


def test_another_optimizers_state_is_not_taken_for_this_ones(nvme_dir: Path) -> None:
    """RMSprop and Adagrad keep as much, under other names."""
    with small_units(1024):
        policy = Case("RMSprop").policy(make_policy(nvme_dir, durability="step"))
        with offload.offload(LLAMA.make_model(), policy) as engine:
            one_step(engine, Case("RMSprop").make(engine.model.parameters()), LLAMA, 0)
        for other, message in (
            (Case("Adagrad"), r"the optimizer keeps \[.*square_avg.*would keep \[.*sum"),
            (CENTERED, "the optimizer keeps"),
            (Case("SGD"), "see optimizer.kind"),
        ):
            with pytest.raises(StateError, match=message):
                policy = other.policy(make_policy(nvme_dir, durability="step"))
                offload.offload(LLAMA.make_model(), policy, weights="resume")


@pytest.mark.parametrize(
    ("case", "format", "update"),
    [
        (NADAM, "exact", "eager"),
        (NADAM, "exact", "deferred"),
        (ADAFACTOR, "exact", "eager"),
        (NADAM, "fp32", "eager"),
        (NADAM, "int8", "eager"),
    ],
)
def test_a_step_moves_what_the_plan_says(
    case: Case, format: str, update: str, nvme_dir: Path
) -> None:
    layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(24))
    policy = case.policy(make_policy(nvme_dir, format=format, optimizer__update=update))
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    moved = []
    with offload.offload(nn.ModuleDict({"layers": layers}), policy) as engine:
        optimizer = case.make(layers.parameters(), lr=1e-3)
        for _ in range(8):
            x = torch.ones(1, 64, dtype=dtype)
            for layer in layers:
                x = torch.tanh(layer(x))
            x.float().square().mean().backward()
            engine._engine.drain()  # who is still being spilled at step() is read once more later
            optimizer.step()
            optimizer.zero_grad()
            moved.append(engine.stats().nbytes)
        read, written = engine.plan.traffic()
    for link, nbytes in (("nvme read", read), ("nvme write", written)):
        mean = sum(step[link] for step in moved[4:]) / 4
        assert mean == pytest.approx(nbytes, rel=0.01), link
    assert engine.stats().num_updates == len(layers)


@pytest.mark.parametrize("case", [ADAFACTOR, CENTERED], ids=str)
def test_a_pending_step_does_not_see_the_forward_that_runs_it(case: Case, nvme_dir: Path) -> None:
    """Inference mode, autocast and a default device are the forward's, not the optimizer's."""

    def run(folder: Path, *, evaluates: bool) -> Record:
        record: Record = {}
        policy = case.policy(make_policy(folder, optimizer__update="deferred"))
        with offload.offload(LLAMA.make_model(), policy) as engine:
            optimizer = case.make(engine.model.parameters(), lr=1e-2)
            for step in range(2):
                one_step(engine, optimizer, LLAMA, step)
                if evaluates:
                    batch = LLAMA.make_batch(9, torch.bfloat16)
                    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                        LLAMA.loss(engine.model, batch)
            engine.flush()
            record_state(record, engine)
        return record

    with small_units(1024):
        want = run(nvme_dir / "plain", evaluates=False)
        assert_same(run(nvme_dir / "other", evaluates=True), want)


def test_a_broken_block_of_the_state_is_not_used(nvme_dir: Path) -> None:
    """The read that finds it stops the engine, and no plane of the chunk has been written."""
    policy = NADAM.policy(make_policy(nvme_dir, optimizer__update="deferred"))
    with small_units(1024):
        engine = offload.offload(LLAMA.make_model(), policy)
        with pytest.raises(offload.StorageError, match="updating") as error, engine:
            optimizer = NADAM.make(engine.model.parameters())
            one_step(engine, optimizer, LLAMA, 0)
            engine.flush()
            chunk = next(c for c in engine._engine.chunks if c.spec.is_block)
            _, offset, _ = chunk.extents[Plane.TORCH_STATE].newest.pieces[0]
            with (nvme_dir / SWAP_NAME).open("r+b") as file:
                file.seek(offset)
                file.write(b"\xff" * 4096)
            one_step(engine, optimizer, LLAMA, 1)
            engine.flush()
        assert error.value.errno == errno.EBADMSG
        with pytest.raises(StateError, match="closed"):
            engine.flush()
