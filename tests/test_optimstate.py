"""Moving in and out of plain torch: moments, step counts, param groups and masters, by raw bits."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import twins
from parity import make_policy, small_units
from torch import Tensor, nn

import offload
from offload import windows
from offload.errors import StateError
from offload.formats import FORMATS, Plane
from offload.moments import pack, planes_of, unpack

PLACEMENTS: dict[str, dict[str, Any]] = {
    "nvme": {},
    "ram": {"tiers__nvme": None, "tiers__cpu": {"budget": "256MiB"}},
    "mixed": {"tiers__cpu__pin": "auto"},
    "two paths": {},
    "no checksums": {"tiers__nvme__checksum": False},
    "durable": {"durability": "step"},
    "eager": {"optimizer__update": "eager"},
    "device": {"tiers__gpu__device": "standin"},
}
HYPER = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window is a tile, so that chunks have several of them."""
    monkeypatch.setattr(windows, "WINDOW_NUMEL", 1)


class Net(nn.Module):
    """Blocks, a small tensor, and an odd size that only offload's own bits can hold."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 32)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x))


def make_net() -> Net:
    torch.manual_seed(7)
    return Net()


@functools.cache
def mixed_budget(format: str) -> int:
    """A cpu budget that pins about half of the state."""
    with small_units(1024):
        plan = offload.plan_for(make_net(), make_policy(Path("/nowhere"), format=format))
    return plan.slab_nbytes + plan.state_nbytes // 2


def policy_for(directory: Path, placement: str = "nvme", **changes: Any) -> dict[str, Any]:
    policy = make_policy(directory, **{"format": "fp32", **PLACEMENTS[placement], **changes})
    if placement == "mixed":
        policy["tiers"]["cpu"]["budget"] = mixed_budget(policy["state"]["format"])
    if placement == "two paths":
        for name in "ab":
            (directory / name).mkdir(exist_ok=True)
        policy["tiers"]["nvme"]["paths"] = [str(directory / name) for name in "ab"]
    return policy


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 96, generator=generator).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: range, dtype: Any = torch.float32) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step, dtype)).float().square().mean().backward()
        optimizer.step()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, in another order than the model's."""
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return [{"params": vectors, "weight_decay": 0.0, "lr": 0.02}, {"params": matrices}]


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_state(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert set(got["state"]) == set(want["state"])
    for index, entry in want["state"].items():
        assert set(got["state"][index]) == set(entry), index
        for key, value in entry.items():
            assert raw(torch.as_tensor(got["state"][index][key])) == raw(torch.as_tensor(value)), (
                index, key,
            )  # fmt: skip


MAKERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, offload.AdamW, HYPER),
    "sgd": (
        torch.optim.SGD, offload.SGD,
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    ),
}  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_in_and_out_of_the_tiers_is_as_if_never_moved(
    kind: str, placement: str, nvme_dir: Path
) -> None:
    """Plain torch, the tiers, plain torch again: every bit is that of plain torch throughout. All
    sizes are whole vectors, so the documented contract is equality.
    """
    theirs, ours, hyper = MAKERS[kind]
    stayed, moved = make_net(), make_net()
    reference = theirs(groups_of(stayed), fused=True, **hyper)
    before = theirs(groups_of(moved), fused=True, **hyper)
    train(stayed, reference, range(9))
    train(moved, before, range(3))
    with (
        small_units(1024),
        offload.offload(moved, policy_for(nvme_dir, placement, optimizer__kind=kind)) as engine,
    ):
        optimizer = ours(groups_of(moved), lr=99.0)
        optimizer.load_state_dict(before.state_dict())
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, hyper["lr"]]
        train(moved, optimizer, range(3, 6))
        object.__setattr__(engine.plan, "cpu_budget_nbytes", 2**30)  # room for all of it in RAM
        full = optimizer.full_state_dict()
        streamed = dict(optimizer.stream_state())
        assert list(streamed) == [
            engine_name(engine, p) for g in optimizer.param_groups for p in g["params"]
        ]
    after = theirs(groups_of(moved), lr=77.0, fused=True)
    after.load_state_dict(full)
    train(moved, after, range(6, 9))
    for (name, p), q in zip(moved.named_parameters(), stayed.parameters(), strict=True):
        assert raw(p) == raw(q), name
    assert_same_state(after.state_dict(), reference.state_dict())


def engine_name(engine: Any, param: Tensor) -> str:
    return next(name for name, p in engine.model.named_parameters() if p is param)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["adamw", "sgd", "lion"])
def test_a_full_state_dict_comes_back_as_it_left(
    kind: str, format: str, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into fresh tiers of the same format: the same bits. Only int8 packs anew: within 1.6 % of the
    largest of a group, which is a step of its codes.
    """
    monkeypatch.setattr(windows, "WINDOW_NUMEL", 1 << 20)
    make = {"adamw": offload.AdamW, "sgd": offload.SGD, "lion": offload.Lion}[kind]
    hyper: dict[str, Any] = {"momentum": 0.9} if kind == "sgd" else {}
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    policy = policy_for(nvme_dir, optimizer__kind=kind, format=format)
    with small_units(1024), offload.offload(make_net(), policy) as engine:
        optimizer = make(engine.model.parameters(), lr=1e-3, **hyper)
        train(engine.model, optimizer, range(3), dtype)
        full = optimizer.full_state_dict()
    with small_units(1024), offload.offload(make_net(), policy) as engine:
        optimizer = make(engine.model.parameters(), lr=1e-3, **hyper)
        optimizer.load_state_dict(copy.deepcopy(full))
        assert optimizer.state_dict()["num_steps"] == full["num_steps"]
        again = optimizer.full_state_dict()
    if format != "int8":
        assert_same_state(again, full)
    for index, entry in full["state"].items():
        for want, got in ((entry[key], again["state"][index][key]) for key in entry):
            rows = nn.functional.pad(torch.stack([want, got]).view(2, -1), (0, -want.numel() % 32))
            groups = rows.view(2, -1, 32)
            largest = groups[0].abs().amax(dim=1, keepdim=True)
            assert bool(((groups[0] - groups[1]).abs() <= 0.016 * largest).all())


@pytest.mark.parametrize("numel", [1, 31, 32, 64, 100, 4096])
@pytest.mark.parametrize("moment", [Plane.EXP_AVG, Plane.EXP_AVG_SQ])
def test_moments_pack_to_int8_as_the_kernels_twin_does(moment: Plane, numel: int) -> None:
    rng = np.random.default_rng(numel)
    values = (rng.standard_normal(numel) * 10.0 ** rng.integers(-30, 30, numel)).astype(np.float32)
    values[rng.random(numel) < 0.2] = 0.0
    if moment is Plane.EXP_AVG_SQ:
        values = np.abs(values)
    values[::97] = np.float32(np.inf)
    fmt = FORMATS["int8"]
    part = {
        name: np.zeros(twins.items_of(name, 0, numel).stop, dtype)
        for name, dtype in twins.DTYPES["int8"].items()
    }
    store = twins.store_exp_avg if moment is Plane.EXP_AVG else twins.store_exp_avg_sq
    store("int8", part, values, np.zeros(numel, np.uint32))
    packed = pack(moment, torch.from_numpy(values), fmt)
    for plane in planes_of(moment, fmt):
        assert raw(packed[plane]) == part[plane.value].tobytes(), plane
    found = twins.load_moments("int8", part, values)[moment is Plane.EXP_AVG_SQ]
    assert raw(unpack(moment, packed, numel)) == found.astype(np.float32).tobytes()


def test_bf16_moments_are_rounded_to_nearest_on_the_way_in(nvme_dir: Path) -> None:
    model = make_net()
    plain = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, plain, range(2))
    saved = plain.state_dict()
    with offload.offload(model, policy_for(nvme_dir, format="bf16")):
        optimizer = offload.AdamW(model.parameters())
        optimizer.load_state_dict(saved)
        for index, (_, state) in enumerate(optimizer.stream_state()):
            for key in ("exp_avg", "exp_avg_sq"):
                want = saved["state"][index][key].bfloat16().float()
                assert raw(state[key]) == raw(want)
            assert float(state["step"]) == 2.0


# ---- state_dict, which is small ----


def test_a_small_state_dict_restores_groups_and_checks_counts(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir)) as engine:
        optimizer = offload.AdamW(model.parameters(), **HYPER)
        train(model, optimizer, range(2))
        saved = optimizer.state_dict()
        assert saved["state"] == {} and set(saved["num_steps"]) == {2}
        planes = {n: engine.state(n) for n, _ in model.named_parameters()}
        optimizer.param_groups[0].update(lr=5.0, betas=(0.5, 0.5))
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.01
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
        for name, before in planes.items():
            after = engine.state(name)
            assert all(raw(after[plane]) == raw(before[plane]) for plane in before)
        train(model, optimizer, range(1))
        with pytest.raises(StateError, match="has taken 3 steps here and 2 in the state_dict"):
            optimizer.load_state_dict(saved)


def test_what_ram_cannot_hold_is_refused_with_the_numbers_and_streams(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir)) as engine:
        optimizer = offload.AdamW(model.parameters())
        assert list(optimizer.stream_state()) == []
        assert optimizer.full_state_dict()["state"] == {}
        train(model, optimizer, range(1))
        room = engine.plan.slab_nbytes + 1024
        object.__setattr__(engine.plan, "cpu_budget_nbytes", room)
        numel = sum(p.numel() for p in model.parameters())
        with pytest.raises(StateError, match=r"full_state_dict\(\) needs .* leaves 1KiB") as error:
            optimizer.full_state_dict()
        assert offload.policy.format_nbytes(8 * numel) in str(error.value)
        assert len(list(optimizer.stream_state())) == len(list(model.parameters()))


def test_a_stream_that_a_step_interrupts_says_so(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir)):
        optimizer = offload.AdamW(model.parameters())
        train(model, optimizer, range(1))
        stream = optimizer.stream_state()
        next(stream)
        train(model, optimizer, range(1))
        with pytest.raises(StateError, match="a step was taken while"):
            next(stream)


# ---- what is refused, with nothing changed ----


def spoil(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    """Set, or with None delete, what lies at a path of a state_dict."""

    def change(state: dict[str, Any]) -> None:
        node: Any = state
        for key in path[:-1]:
            node = node[key]
        if value is None:
            del node[path[-1]]
        else:
            node[path[-1]] = value

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "amsgrad": (spoil(("param_groups", 0, "amsgrad"), True), "amsgrad=True"),
    "a third moment": (
        spoil(("state", 3, "max_exp_avg_sq"), torch.zeros(96)),
        r"blocks\.1\.bias has 'max_exp_avg_sq'",
    ),
    "a moment is missing": (spoil(("state", 3, "exp_avg"), None), r"blocks\.1\.bias has no tensor"),
    "step is missing": (spoil(("state", 3, "step"), None), r"blocks\.1\.bias has no 'step'"),
    "another shape": (
        spoil(("state", 2, "exp_avg_sq"), torch.zeros(96, 95)),
        r"blocks\.1\.weight has exp_avg_sq of shape \(96, 95\), not \(96, 96\)",
    ),
    "integers": (spoil(("state", 2, "exp_avg"), torch.zeros(96, 96, dtype=torch.int64)), "floats"),
    "half a step": (spoil(("state", 2, "step"), torch.tensor(1.5)), "step 1.5"),
    "no step": (spoil(("state", 2, "step"), torch.tensor(float("nan"))), "step nan"),
    "L2 instead of decay": (
        spoil(("param_groups", 0, "decoupled_weight_decay"), False),
        r"torch\.optim\.Adam with a weight_decay of 0\.1",
    ),
    "no betas": (spoil(("param_groups", 0, "betas"), None), "no 'betas': it is of another"),
    "another number": (
        spoil(("param_groups", 0, "params"), [0, 1]), r"groups of \[2\] parameters",
    ),
    "somebody else": (spoil(("state", 99), {"step": 1.0}), "parameter 99, which none"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_the_tiers_cannot_keep_is_refused_before_anything_changes(
    what: str, nvme_dir: Path
) -> None:
    change, message = BAD[what]
    model = make_net()
    plain = torch.optim.AdamW(model.parameters(), fused=True, **HYPER)
    train(model, plain, range(2))
    saved = copy.deepcopy(plain.state_dict())
    change(saved)
    with offload.offload(model, policy_for(nvme_dir)) as engine:
        optimizer = offload.AdamW(model.parameters(), lr=3.0)
        train(model, optimizer, range(1))
        before = {n: engine.state(n) for n, _ in model.named_parameters()}
        with pytest.raises(StateError, match=message):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 3.0
        assert set(optimizer.state_dict()["num_steps"]) == {1}
        for name, planes in before.items():
            after = engine.state(name)
            assert all(raw(after[plane]) == raw(planes[plane]) for plane in planes), name
        train(model, optimizer, range(1))  # and it goes on


def test_loading_in_the_middle_of_a_step_is_refused(nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir, optimizer__update="eager")):
        optimizer = offload.AdamW(model.parameters())
        train(model, optimizer, range(1))
        full = optimizer.full_state_dict()
        optimizer.zero_grad()
        model(batch(0)).square().mean().backward()  # eager updates have been given out
        with pytest.raises(StateError, match=r"load_state_dict\(\) between backward\(\) and step"):
            optimizer.load_state_dict(full)
        optimizer.step()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_parameters_of_others_keep_their_moments(placement: str, nvme_dir: Path) -> None:
    """An optimizer of half the parameters: the rest of their chunks' planes stays."""
    model = make_net()
    with small_units(1024), offload.offload(model, policy_for(nvme_dir, placement)) as engine:
        train(model, offload.AdamW(model.parameters()), range(1))
        before = {n: engine.state(n) for n, _ in model.named_parameters()}
        optimizer = offload.AdamW([b.bias for b in model.blocks])
        state = {i: {"step": 4.0, "exp_avg": torch.full((96,), float(i)),
                     "exp_avg_sq": torch.full((96,), 0.5)} for i in range(3)}  # fmt: skip
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        for name, planes in before.items():
            after = engine.state(name)
            if name.startswith("blocks") and name.endswith("bias"):
                assert raw(after["exp_avg"]) == raw(torch.full((96,), float(name.split(".")[1])))
            else:
                assert raw(after["exp_avg"]) == raw(planes["exp_avg"]), name
            assert raw(after["weight"]) == raw(planes["weight"])


def test_a_parameter_without_state_starts_anew_as_in_torch(nvme_dir: Path) -> None:
    model, twin = make_net(), make_net()
    plain = torch.optim.AdamW(twin.parameters(), fused=True, **HYPER)
    train(twin, plain, range(2))
    saved = copy.deepcopy(plain.state_dict())
    del saved["state"][2]
    with offload.offload(model, policy_for(nvme_dir)) as engine:
        optimizer = offload.AdamW(model.parameters())
        train(model, optimizer, range(1))  # so that there is something to forget
        for name, p in twin.named_parameters():
            engine.set_master(name, p.detach())
        optimizer.load_state_dict(saved)
        train(model, optimizer, range(2, 4))
        full = optimizer.full_state_dict()
    plain = torch.optim.AdamW(twin.parameters(), fused=True)
    plain.load_state_dict(saved)
    train(twin, plain, range(2, 4))
    assert_same_state(full, plain.state_dict())
    assert [float(full["state"][i]["step"]) for i in (1, 2, 3)] == [4.0, 2.0, 4.0]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert raw(p) == raw(q)


def test_a_committed_load_is_what_a_resumed_run_has(nvme_dir: Path) -> None:
    policy = policy_for(nvme_dir, "durable")
    model = make_net()
    plain = torch.optim.AdamW(model.parameters(), fused=True, **HYPER)
    train(model, plain, range(3))
    saved = copy.deepcopy(plain.state_dict())
    with offload.offload(model, policy) as engine:
        optimizer = offload.AdamW(model.parameters())
        train(model, optimizer, range(2))
        optimizer.load_state_dict(saved)
        engine.commit()
        want = {n: engine.state(n) for n, _ in model.named_parameters()}
    with offload.offload(make_net(), policy, weights="resume") as engine:
        optimizer = offload.AdamW(engine.model.parameters())
        assert_same_state(optimizer.full_state_dict(), saved)
        for name, planes in want.items():
            got = engine.state(name)
            assert all(raw(got[plane]) == raw(planes[plane]) for plane in planes)


# ---- masters ----


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("format", FORMATS)
def test_masters_are_read_and_written_in_fp32(format: str, placement: str, nvme_dir: Path) -> None:
    model, dtype = make_net(), torch.float32 if format == "fp32" else torch.bfloat16
    if placement in ("two paths", "no checksums") and format in ("bf16", "int8"):
        pytest.skip("the planes of the master are those of exact")
    with (
        small_units(1024),
        offload.offload(model, policy_for(nvme_dir, placement, format=format)) as engine,
    ):
        optimizer = offload.AdamW(model.parameters(), lr=1e-3)
        train(model, optimizer, range(2), dtype)
        masters = {n: engine.master(n) for n, _ in model.named_parameters()}
        moments = {n: engine.state(n)["exp_avg"] for n in masters}
        new = torch.randn(96, 96)
        engine.set_master("blocks.1.weight", new)
        engine.set_master("norm.bias", new[0])
        engine.set_master("blocks.2.bias", new[1])  # in the last of its chunk's windows only
        if format == "int8":
            new = ((new.view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)
        assert raw(engine.master("blocks.1.weight")) == raw(new)
        assert raw(engine.master("norm.bias")) == raw(new[0])
        assert raw(engine.master("blocks.2.bias")) == raw(new[1])
        for name, master in masters.items():
            assert raw(engine.state(name)["exp_avg"]) == raw(moments[name])
            if name not in ("blocks.1.weight", "norm.bias", "blocks.2.bias"):
                assert raw(engine.master(name)) == raw(master), name
        plain = make_net()
        for name, p in plain.named_parameters():
            p.data = engine.state(name)["weight"]
        assert raw(model(batch(5, dtype))) == raw(plain(batch(5, dtype)))
        train(model, optimizer, range(1), dtype)
        with pytest.raises(StateError, match="cannot be a tensor of shape"):
            engine.set_master("norm.bias", new)
        with pytest.raises(StateError, match="cannot be a tensor of shape"):
            engine.set_master("norm.bias", new[0].double())
        with (
            engine.gathered(model.blocks[0]),
            pytest.raises(StateError, match="is gathered"),
        ):
            engine.set_master("blocks.0.bias", new[0])


@pytest.mark.parametrize("device", ["cpu", "standin"])
@pytest.mark.parametrize("write", [False, True])
def test_small_tensors_stay_bound_behind_gathered(device: str, write: bool, nvme_dir: Path) -> None:
    model = make_net()
    with offload.offload(model, policy_for(nvme_dir, tiers__gpu__device=device)) as engine:
        optimizer = offload.AdamW(model.parameters())
        train(model, optimizer, range(1))
        with engine.gathered(model.norm), torch.no_grad():
            assert not model.norm.weight.isnan().any()
            if write:
                model.norm.weight[:] = 0.5
        plain = make_net()
        for name, p in plain.named_parameters():
            p.data = engine.master(name)
        assert raw(model(batch(5))) == raw(plain(batch(5)))
        assert bool((engine.master("norm.weight") == 0.5).all()) is write
        train(model, optimizer, range(1))
