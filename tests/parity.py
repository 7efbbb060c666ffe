"""Run a zoo model through the tiers, or through plain torch, and record raw bits of everything that
must agree.

A Record maps a key such as `loss[2.0]` or `exp_avg[model.norm.weight]` to a hash of the raw bytes.
Two runs agree when their records do; `assert_same` names the first keys that differ, in the order
in which they were recorded, so the first difference is the cause and the rest its consequences.
"""

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import twins
from chaos import chaos, small_units
from torch import Tensor, nn
from zoo import ZOO, Batch, ZooModel

import offload

Record = dict[str, str]

FORMATS = ("fp32", "exact")
COMPUTE_DTYPE = {name: torch.bfloat16 for name in twins.DTYPES} | {"fp32": torch.float32}
STATE_PLANES = twins.PLANE_NAMES[:6]
TILE_NUMEL = 4096
VECTOR_NUMEL = 16  # fp32 elements that torch's widest fused kernel takes at once


def bits(tensor: Tensor | None) -> str:
    """Hash of the raw bytes of a tensor of any dtype; `none` for an absent one."""
    if tensor is None:
        return "none"
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Recipe:
    """What is trained, apart from where the bytes live."""

    steps: int = 5
    accumulation: int = 1
    clip: float | None = None
    groups: bool = False
    scheduler: bool = False
    freeze: tuple[str, ...] = ()  # prefixes of parameter names
    seed: int = 0


@dataclass(frozen=True)
class Variant:
    """Where the bytes live and which code moves them. Never changes a number."""

    name: str
    placement: str = "nvme"  # ram | nvme | mixed | oneslot
    io: str = "auto"
    update: str = "auto"
    device: str = "cpu"
    activations: str = "recompute"
    micro_batch: int | str = "auto"
    tile_numel: int = TILE_NUMEL
    chaos: bool = False
    num_paths: int = 1
    small_numel: int = 1024  # tensors outside of blocks below this stay in RAM


@dataclass
class Result:
    """The record of a run, and the few plain numbers that a reference needs."""

    record: Record
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


# Policies


def make_policy(
    directory: Path, *, format: str = "exact", cpu_budget: int | str = "64MiB", **changes: Any
) -> dict[str, Any]:
    """A policy as the YAML would give it; `changes` are dotted keys with `__` for the dot."""
    policy: dict[str, Any] = {
        "tiers": {
            "gpu": {"device": "cpu"},
            "cpu": {"budget": cpu_budget, "pin": False, "weight_slots": 2, "grad_slots": 2},
            "nvme": {"paths": [str(directory)]},
        },
        "state": {"format": format},
        "optimizer": {"tile_numel": TILE_NUMEL},
        "durability": "off",
    }
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        node = policy
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return policy


def variant_policy(
    variant: Variant, format: str, directory: Path, entry: ZooModel
) -> dict[str, Any]:
    """The policy of a variant for one model."""
    paths = [directory / f"drive{index}" for index in range(variant.num_paths)]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    policy = make_policy(
        directory,
        format=format,
        tiers__gpu__device=variant.device,
        tiers__nvme__paths=[str(path) for path in paths],
        tiers__nvme__io=variant.io,
        optimizer__update=variant.update,
        optimizer__tile_numel=variant.tile_numel,
        activations__policy=variant.activations,
        activations__micro_batch=variant.micro_batch,
    )
    cpu = policy["tiers"]["cpu"]
    if variant.placement == "ram":
        policy["tiers"]["nvme"] = None
        policy["tiers"]["cpu"] = {"budget": "256MiB"}
    elif variant.placement == "mixed":
        cpu["pin"] = "auto"
        cpu["budget"] = mixed_budget(entry.name, format, variant.device)
    elif variant.placement == "oneslot":
        cpu["weight_slots"] = 1
        cpu["grad_slots"] = 1
    elif variant.placement != "nvme":
        raise ValueError(variant.placement)
    return policy


@functools.cache
def mixed_budget(name: str, format: str, device: str) -> int:
    """A cpu budget (bytes) that pins about half of the state of a zoo model beside the smallest
    pools.
    """
    smallest, state = plan_sizes(name, format, device)
    return smallest + state // 2


def plan_sizes(name: str, format: str, device: str) -> tuple[int, int]:
    """(bytes of the slab with nothing pinned, bytes of state) of a zoo model."""
    with tempfile.TemporaryDirectory() as directory:
        policy = make_policy(Path(directory), format=format, tiers__gpu__device=device)
        with offload.offload(ZOO[name].make_model(), policy) as engine:
            return engine.plan.slab_nbytes, engine.plan.state_nbytes


# Training


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Either all parameters with one setting, or matrices and vectors with different ones."""
    if not recipe.groups:
        return [{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.1}]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "lr": 1e-3, "weight_decay": 0.1},
        {"params": vectors, "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6},
    ]


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe) -> Any:
    if not recipe.scheduler:
        return None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)


def micro_steps(
    entry: ZooModel, recipe: Recipe, dtype: torch.dtype
) -> Iterator[tuple[int, int, Batch]]:
    """Yield (step, micro step, batch), torch's generator seeded for its dropout."""
    for step in range(recipe.steps):
        for micro in range(recipe.accumulation):
            seed = 1000 * recipe.seed + 10 * step + micro
            batch = entry.make_batch(seed, dtype)
            torch.manual_seed(seed)
            yield step, micro, batch


def record_grads(record: Record, grads: Iterable[tuple[str, Tensor | None]]) -> None:
    for name, grad in grads:
        record[f"grad[{name}]"] = bits(None if grad is None else grad.float())


def record_rest(record: Record, model: nn.Module) -> None:
    """Buffers (batch norm's statistics) and torch's generator, which the engine must leave as plain
    torch does.
    """
    for name, buffer in model.named_buffers():
        record[f"buffer[{name}]"] = bits(buffer)
    record["rng"] = bits(torch.get_rng_state())


def train(
    engine: Any, entry: ZooModel, recipe: Recipe, format: str, *, grads: bool = True,
    make: Callable[..., torch.optim.Optimizer] | None = None,
) -> Result:  # fmt: skip
    """The user's loop, inside the context. `grads` reads the first step's gradients (not with eager
    updates), `make` makes another optimizer than AdamW.
    """
    model, result = engine.model, Result({})
    optimizer = (make or offload.AdamW)(param_groups(model, recipe))
    scheduler = make_scheduler(optimizer, recipe)
    for step, micro, batch in micro_steps(entry, recipe, COMPUTE_DTYPE[format]):
        loss = entry.loss(model, batch)
        (loss / recipe.accumulation).backward()
        result.record[f"loss[{step}.{micro}]"] = bits(loss)
        result.losses.append(loss.item())
        if micro + 1 < recipe.accumulation:
            continue
        if step == 0 and grads:
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            record_grads(result.record, ((name, landed_grad(engine, name)) for name in names))
        if recipe.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            result.record[f"norm[{step}]"] = bits(norm)
            result.norms.append(norm.item())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    engine.flush()
    record_state(result.record, engine)
    record_rest(result.record, model)
    return result


def landed_grad(engine: Any, name: str) -> Tensor | None:
    """The gradient of a parameter, or None where none has landed."""
    try:
        return engine.grad(name)
    except offload.StateError:
        return None


def record_state(record: Record, engine: Any) -> None:
    """The final planes of every parameter; of a frozen one its weights."""
    for name, p in engine.model.named_parameters():
        for plane, tensor in engine.state(name).items():
            if p.requires_grad or plane == "weight":
                record[f"{plane}[{name}]"] = bits(tensor)


def master(planes: dict[str, Tensor]) -> Tensor:
    """The master in engine.state(): upper = weight - (residue >= 0x8000), or 24 bits of it."""
    if "residue" not in planes:
        return planes["weight"].float()
    weight = planes["weight"].contiguous().view(torch.int16).int()
    if planes["residue"].dtype is torch.int8:
        return ((weight << 16) + (planes["residue"].int() << 8)).view(torch.float32)
    residue = planes["residue"].contiguous().view(torch.int16).int() & 0xFFFF
    upper = (weight - (residue >= 0x8000).int()) & 0xFFFF
    return ((upper << 16) | residue).view(torch.float32)


def run(entry: ZooModel, recipe: Recipe, format: str, variant: Variant, directory: Path) -> Result:
    """Train one zoo model through the tiers."""
    model = prepare(entry.make_model(), recipe, format)
    eager = variant.update == "eager"
    with small_units(variant.small_numel), chaos(variant.chaos):
        policy = variant_policy(variant, format, directory, entry)
        with offload.offload(model, policy) as engine:
            return train(engine, entry, recipe, format, grads=not eager)


def prepare(model: nn.Module, recipe: Recipe, format: str) -> nn.Module:
    """What the user does before offloading: freeze, and give batch norm statistics in the compute
    dtype, without which torch's batch_norm refuses bf16 weights.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_mean.to(COMPUTE_DTYPE[format])
            module.running_var = module.running_var.to(COMPUTE_DTYPE[format])
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(recipe.freeze) if recipe.freeze else True)
    return model


# References


class PlainAdamW:
    """AdamW on fp32 masters by the numpy twins: the contract's reference for both formats."""

    def __init__(self, model: nn.Module, recipe: Recipe, format: str) -> None:
        self.format = format
        self.model = model
        self.optimizer = torch.optim.AdamW(
            param_groups(model, recipe)
        )  # only holds the hyperparameters
        self.scheduler = make_scheduler(self.optimizer, recipe)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.state: dict[str, dict[str, np.ndarray]] = {}
        self.num_steps: dict[str, int] = {}
        for name, p in model.named_parameters():
            master = p.detach().float().numpy().reshape(-1).copy()
            zeros = np.zeros_like(master)
            self.state[name] = {"exp_avg": zeros, "exp_avg_sq": zeros.copy(), **self.split(master)}
            self.num_steps[name] = 0
            p.data = self.compute_weight(name, p)

    def split(self, master: np.ndarray) -> dict[str, np.ndarray]:
        """The planes that hold an fp32 master in this format."""
        if self.format == "fp32":
            return {"weight": master}
        weight, residue = twins.split_fp32(master)
        return {"weight": weight, "residue": residue}

    def compute_weight(self, name: str, p: Tensor) -> Tensor:
        weight = self.state[name]["weight"]
        tensor = torch.from_numpy(weight.copy())
        return (tensor if self.format == "fp32" else tensor.view(torch.bfloat16)).view(p.shape)

    def step(self, grads: dict[str, Tensor | None], scale: float) -> None:
        """One AdamW step; parameters without a gradient are skipped as torch skips them."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                name = self.names[id(p)]
                grad = grads.get(name)
                if grad is None:
                    continue
                self.num_steps[name] += 1
                self._update(name, group, grad.reshape(-1).numpy(), scale)
                p.data = self.compute_weight(name, p)
        if self.scheduler is not None:
            self.optimizer.step()  # without gradients: for the scheduler only
            self.scheduler.step()

    def _update(self, name: str, group: dict[str, Any], grad: np.ndarray, scale: float) -> None:
        state = self.state[name]
        op = twins.AdamWOp(
            end=grad.size,
            step=self.num_steps[name],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=scale,
        )
        moments = (state["exp_avg"], state["exp_avg_sq"])
        if self.format == "fp32":
            twins.adamw_fp32(state["weight"], *moments, grad, op)
        else:
            halves = twins.split_fp32(grad)
            twins.adamw_exact(state["weight"], state["residue"], *moments, *halves, op)


def accumulate(total: dict[str, Tensor | None], model: nn.Module) -> None:
    """Add this backward's gradients in fp32 and clear them."""
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.detach().float()
            before = total.get(name)
            total[name] = grad.clone() if before is None else before + grad
            p.grad = None
        elif p.requires_grad:
            total.setdefault(name, None)


def clip_scale(norm: float, clip: float) -> float:
    """The factor that torch.nn.utils.clip_grad_norm_ multiplies gradients by."""
    return float(torch.clamp(clip / (torch.tensor(norm) + 1e-6), max=1.0))


def run_plain(
    entry: ZooModel,
    recipe: Recipe,
    format: str,
    *,
    norms: list[float] | None = None,
    model: nn.Module | None = None,
    make: Callable[[nn.Module, Recipe, str], "PlainAdamW"] | None = None,
) -> Result:
    """Train one zoo model in plain torch, all in memory, checkpointing off.

    `norms` are the total norms to clip by, from the run under test: their own last bit depends on
    the order of a sum.
    """
    model = prepare(entry.make_model(), recipe, format) if model is None else model
    optimizer = (make or PlainAdamW)(model, recipe, format)
    result, total = Result({}), {}
    for step, micro, batch in micro_steps(entry, recipe, COMPUTE_DTYPE[format]):
        loss = entry.loss(model, batch)
        (loss / recipe.accumulation).backward()
        result.record[f"loss[{step}.{micro}]"] = bits(loss)
        result.losses.append(loss.item())
        accumulate(total, model)
        if micro + 1 < recipe.accumulation:
            continue
        if step == 0:
            record_grads(result.record, total.items())
        scale = 1.0
        if recipe.clip is not None:
            squares = (g.double().square().sum().item() for g in total.values() if g is not None)
            result.norms.append(sum(squares) ** 0.5)
            scale = clip_scale((norms or result.norms)[step], recipe.clip)
        optimizer.step(total, scale)
        total = {}
    for name, p in model.named_parameters():
        planes = (
            optimizer.state[name]
            if p.requires_grad
            else {"weight": optimizer.state[name]["weight"]}
        )
        for plane in STATE_PLANES:
            if plane in planes:
                result.record[f"{plane}[{name}]"] = bits(torch.from_numpy(planes[plane]))
    record_rest(result.record, model)
    return result


# Comparison


def run_torch_adamw(entry: ZooModel, recipe: Recipe) -> tuple[Result, bool]:
    """Train in fp32 with torch.optim.AdamW(fused=True); also whether no parameter has a tail."""
    model = prepare(entry.make_model(), recipe, "fp32")
    optimizer = torch.optim.AdamW(param_groups(model, recipe), fused=True)
    result = Result({})
    for step, micro, batch in micro_steps(entry, recipe, torch.float32):
        loss = entry.loss(model, batch)
        loss.backward()
        result.record[f"loss[{step}.{micro}]"] = bits(loss)
        result.losses.append(loss.item())
        if step == 0:
            record_grads(result.record, ((name, p.grad) for name, p in model.named_parameters()))
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        planes = {"weight": p, **optimizer.state[p]}
        for plane in ("weight", "exp_avg", "exp_avg_sq"):
            result.record[f"{plane}[{name}]"] = bits(planes[plane])
    record_rest(result.record, model)
    whole = all(p.numel() % VECTOR_NUMEL == 0 for p in model.parameters())
    return result, whole


def assert_same(
    got: Record, want: Record, *, only: Callable[[str], bool] = lambda key: True
) -> None:
    """Fail with the first differing keys unless both records hold the same keys and bits."""
    got = {key: value for key, value in got.items() if only(key)}
    want = {key: value for key, value in want.items() if only(key)}
    assert want, "nothing to compare"
    missing = sorted(set(want) ^ set(got))
    assert not missing, f"keys in only one record: {missing[:10]}"
    differ = [key for key in want if got[key] != want[key]]
    assert not differ, f"{len(differ)} of {len(want)} differ, first: {differ[:12]}"


def first_step(key: str) -> bool:
    """Losses of the first step and its gradients."""
    return key.startswith(("loss[0.", "grad["))


def without_grads(key: str) -> bool:
    return not key.startswith("grad[")


def entry_of(name: str) -> ZooModel:
    return ZOO[name]
