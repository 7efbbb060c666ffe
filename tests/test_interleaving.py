"""Whatever comes between two steps sees the finished update, and leaves nothing behind.

A walk is a list of actions. One engine takes it as it comes; its twin finishes every update right
after its step. What both see is compared by raw bits, and the end with a run that only stepped.
"""

import contextlib
import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from parity import bits, make_policy, small_units
from torch import Tensor, nn

import offload
from offload.torchstate import optimizer_class

WIDTH = 40
STEPS = ("step", "clipped step", "two backwards")
LOOKS = (
    "eval", "export", "state_dict", "full state", "stream", "flush", "gathered", "master",
    "commit", "checkpoint", "memory", "failed step",
)  # fmt: skip
ACTIONS = (*STEPS, *LOOKS, "leave and resume")
POLICIES: dict[str, dict[str, Any]] = {
    "deferred": {"optimizer__update": "deferred"},
    "one slot, stand-in device": {
        "optimizer__update": "deferred", "tiers__cpu__weight_slots": 1, "tiers__cpu__grad_slots": 1,
        "tiers__gpu__device": "standin",
    },
    "weights pinned": {"optimizer__update": "deferred", "tiers__cpu__pin": "auto"},
    "torch": {
        "optimizer__update": "deferred", "optimizer__kind": "torch", "optimizer__name": "NAdam",
    },
    "torch, int8, one slot": {
        "optimizer__update": "deferred", "optimizer__kind": "torch", "optimizer__name": "Adafactor",
        "format": "int8", "tiers__cpu__weight_slots": 1, "tiers__cpu__grad_slots": 1,
    },
    "adafactor, one slot": {
        "optimizer__update": "deferred", "optimizer__kind": "adafactor", "format": "bf16",
        "tiers__cpu__weight_slots": 1, "tiers__cpu__grad_slots": 1,
    },
    "scale, int8": {
        "optimizer__update": "deferred", "optimizer__kind": "scale", "format": "int8",
        "optimizer__options": {"last": "out.weight"},
    },
}  # fmt: skip


class Net(nn.Module):
    """Three blocks, a small tensor, a large module outside of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.out(x)


def make_net() -> Net:
    torch.manual_seed(3)
    return Net()


def batch(seed: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()


def digest(tensors: dict[str, Tensor]) -> str:
    text = repr({name: bits(tensor) for name, tensor in sorted(tensors.items())})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest_state(state: dict[str, Any]) -> str:
    rows = {f"{i}.{key}": value for i, row in state["state"].items() for key, value in row.items()}
    return digest(rows) + repr(state["num_steps"])


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Around all walks of a test: they overlap, and what they changed would be put back wrongly."""
    with small_units(256):
        yield


class Walk:
    """One run that takes actions. `is_twin` flushes after every step and observes afterwards."""

    def __init__(self, folder: Path, changes: dict[str, Any], *, is_twin: bool) -> None:
        self.folder = folder
        self.is_twin = is_twin
        (folder / "nvme").mkdir(parents=True)
        self.policy = make_policy(folder / "nvme", **{"durability": "step", **changes})
        if changes.get("tiers__cpu__pin") == "auto":
            self.policy["tiers"]["cpu"]["budget"] = half_pinned(folder / "nvme", changes)
        self.num_steps = 0
        self.num_looks = 0
        self.stack = contextlib.ExitStack()
        self._open(None)

    def _open(self, weights: str | None) -> None:
        session = offload.offload(make_net(), self.policy, weights=weights)
        self.engine = self.stack.enter_context(session)
        object.__setattr__(session.plan, "cpu_budget_nbytes", 2**30)  # room for state dicts
        params, policy = self.engine.model.parameters(), session.policy.optimizer
        if policy.kind == "torch":
            cls = optimizer_class(str(policy.name))
            self.optimizer: Any = offload.Torch(cls, params, lr=1e-2)
        else:
            kinds = {"adamw": offload.AdamW, "adafactor": offload.Adafactor, "scale": offload.SCALE}
            self.optimizer = kinds[policy.kind](params, lr=1e-2, **policy.options)

    def act(self, action: str) -> str:
        """Take one action; return what was seen."""
        if action in STEPS:
            return self._step(action)
        if action == "leave and resume":
            self.stack.close()
            self._open("resume")
            return repr(self.engine.recovered)
        self.num_looks += 1
        return str(getattr(self, "_" + action.replace(" ", "_"))())

    def _backward(self, seed: int) -> str:
        loss = self.engine.model(batch(seed)).float().square().mean()
        loss.backward()
        return bits(loss)

    def _step(self, action: str) -> str:
        self.num_steps += 1
        seen = self._backward(self.num_steps)
        if action == "two backwards":
            seen += self._backward(1000 + self.num_steps)
        if action == "clipped step":
            norm = torch.nn.utils.clip_grad_norm_(self.engine.model.parameters(), 0.05)
            seen += bits(norm)
        seen += repr(self.optimizer.step())
        self.optimizer.zero_grad()
        if self.is_twin:
            self.engine.flush()
        return seen

    def _eval(self) -> str:
        self.engine.model.eval()
        with torch.no_grad():
            seen = bits(self.engine.model(batch(77)))
        self.engine.model.train()
        return seen

    def _export(self) -> str:
        from safetensors.torch import load_file

        folder = self.folder / f"export{self.num_looks}"
        self.engine.export(folder, dtype=torch.float32)
        seen = digest({k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()})
        shutil.rmtree(folder)
        return seen

    def _state_dict(self) -> str:
        return digest(self.engine.model.state_dict()) + repr(self.optimizer.state_dict())

    def _full_state(self) -> str:
        if self.optimizer.moments is None:
            return self._stream()
        return digest_state(self.optimizer.full_state_dict())

    def _stream(self) -> str:
        if self.optimizer.moments is None:  # it stays in the tiers
            return digest(planes_of(self.engine))
        rows = self.optimizer.stream_state()
        return digest({f"{name}.{key}": t for name, row in rows for key, t in row.items()})

    def _flush(self) -> None:
        self.engine.flush()

    def _gathered(self) -> str:
        with self.engine.gathered(self.engine.model.blocks[1]):
            return bits(self.engine.model.blocks[1].weight)

    def _master(self) -> str:
        return bits(self.engine.master("blocks.2.weight"))

    def _commit(self) -> None:
        self.engine.commit()

    def _checkpoint(self) -> str:
        """What a fresh model restores from it."""
        folder = self.folder / f"checkpoint{self.num_looks}"
        self.engine.checkpoint(folder)
        policy = {**self.policy, "durability": "off"}
        policy["tiers"] = {**policy["tiers"], "nvme": None, "cpu": {"budget": "64MiB"}}
        with offload.offload(make_net(), policy, weights=str(folder)) as other:
            seen = digest(planes_of(other)) + repr(other.recovered)
        shutil.rmtree(folder)
        return seen

    def _memory(self) -> None:
        self.engine.memory()
        self.engine.stats()

    def _failed_step(self) -> str:
        """A step with a NaN, refused."""
        (self.engine.model(batch(5)).float().square().mean() * float("nan")).backward()
        with pytest.raises(offload.NumericsError) as error:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return str(error.value)

    def end(self) -> str:
        self.engine.flush()
        seen = digest(planes_of(self.engine)) + repr(self.optimizer.state_dict())
        self.stack.close()
        return seen + repr(self.engine.run.num_steps)


def planes_of(engine: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{plane}": tensor
        for name, _ in engine.model.named_parameters()
        for plane, tensor in engine.state(name).items()
    }


def half_pinned(directory: Path, changes: dict[str, Any]) -> int:
    policy = make_policy(directory, durability="step", **{**changes, "tiers__cpu__pin": False})
    plan = offload.plan_for(make_net(), policy)
    return plan.slab_nbytes + plan.state_nbytes // 2


def seen_alone(folder: Path, changes: dict[str, Any], actions: list[str], last: str) -> str:
    """What the twin sees with `last` behind the steps among `actions`, having looked at nothing."""
    twin = Walk(folder, changes, is_twin=True)
    try:
        for action in actions:
            if action in STEPS:
                twin.act(action)
        return twin.end() if last == "end" else twin.act(last)
    finally:
        twin.stack.close()


def check(actions: list[str], changes: dict[str, Any], folder: Path) -> None:
    """Every look of a walk against a twin that has no pending updates, and its end against one that
    took the steps alone.
    """
    walk = Walk(folder / "walk", changes, is_twin=False)
    twin = Walk(folder / "twin", changes, is_twin=True)
    try:
        for index, action in enumerate(actions):
            if action == "leave and resume" and not walk.num_steps:
                continue  # nothing is committed yet
            got = walk.act(action)
            assert got == twin.act(action), (index, action, actions)
        assert walk.end() == seen_alone(folder / "alone", changes, actions, "end"), actions
    finally:
        walk.stack.close()
        twin.stack.close()


walks = st.lists(st.sampled_from(ACTIONS), min_size=2, max_size=7)


@pytest.mark.parametrize("look", [*LOOKS, "leave and resume"])
def test_every_look_sees_the_update_of_the_step_before_it(look: str, tmp_path: Path) -> None:
    """One by one, on steps alone: nothing else can have finished the update for it."""
    actions, changes = ["step", "clipped step"], dict(POLICIES["deferred"])
    if look not in ("commit", "leave and resume"):
        changes["durability"] = "off"  # a commit would finish updates too
    walk = Walk(tmp_path / "walk", changes, is_twin=False)
    try:
        for action in actions:
            walk.act(action)
        assert walk.act(look) == seen_alone(tmp_path / "twin", changes, actions, look)
        assert walk.end() == seen_alone(tmp_path / "end", changes, actions, "end")
    finally:
        walk.stack.close()


@pytest.mark.parametrize("policy", ["torch", "adafactor, one slot", "scale, int8"])
def test_other_optimizers_updates_are_finished_too(policy: str, tmp_path: Path) -> None:
    actions = ["step", "two backwards", "eval", "failed step", "leave and resume", "clipped step"]
    check([*actions, "checkpoint", "full state"], POLICIES[policy], tmp_path)


@settings(
    max_examples=4, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(actions=walks)
@example(actions=["step", "checkpoint", "step", "leave and resume", "eval", "step", "full state"])
@example(actions=["step", "two backwards", "failed step", "gathered", "clipped step", "export"])
def test_any_interleaving_sees_finished_updates(actions: list[str], tmp_path: Path) -> None:
    check(actions, POLICIES["deferred"], tmp_path / str(len(list(tmp_path.iterdir()))))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_long_walks_in_every_placement(policy: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    actions = [rng.choice(STEPS if rng.random() < 0.4 else ACTIONS) for _ in range(25)]
    check(actions, POLICIES[policy], tmp_path)
