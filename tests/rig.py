"""An engine without a model: chunks of parameters under a plan, for tests below the session."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import twins
from parity import make_policy, small_units
from torch import Tensor, nn

from offload import materialise
from offload.chunk import Chunk, ChunkSpec, make_spec
from offload.engine import Engine
from offload.formats import FORMATS
from offload.io import choose_backend
from offload.landing import Gradients
from offload.opening import make_store
from offload.plan import Plan, make_plan
from offload.policy import OffloadPolicy, load_policy
from offload.slots import Slab
from offload.timeline import Timeline
from offload.transfer import Device, HostDevice
from offload.update import AdamWOp, pack_ops

SHAPES = ((70, 71), (64,), (33, 5))  # of the parameters of every chunk: 5,199 elements
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def spec_of(index: int, *numels: int, trainable: bool = True, is_small: bool = False) -> ChunkSpec:
    """A chunk of vectors, for tests that only count bytes."""
    rows = [(f"c{index}.p{i}", torch.Size((n,)), trainable) for i, n in enumerate(numels)]
    return make_spec(index, f"c{index}", rows, is_block=not is_small, is_small=is_small)


@dataclass
class Rig:
    """The engine with what stands around it; `masters` are the fp32 values it was filled with."""

    engine: Engine
    gradients: Gradients
    masters: list[list[Tensor]]

    @property
    def chunks(self) -> list[Chunk]:
        return self.engine.chunks

    @property
    def is_exact(self) -> bool:
        return self.engine.plan.fmt.name == "exact"

    def grad(self, seed: int, position: int) -> Tensor:
        """A gradient as autograd would give it, in the format's dtype, on the compute device."""
        generator = torch.Generator().manual_seed(seed)
        dtype = self.engine.plan.fmt.weight_dtype
        return torch.randn(SHAPES[position], generator=generator).to(dtype)

    def land_all(self, index: int, seed: int, task: int = 1) -> list[Tensor]:
        """Land a gradient for every parameter of a chunk and let it wait; return them."""
        grads = [self.grad(seed + position, position) for position in range(len(SHAPES))]
        for position, grad in enumerate(grads):
            self.gradients.land(index, position, grad, task, split=False)
        self.gradients.complete(index)
        return grads

    def ops(self, index: int, step: int = 1) -> bytes:
        """The records of one AdamW step of a whole chunk."""
        return pack_ops(
            [
                AdamWOp(begin=p.offset, end=p.offset + p.numel, step=step, **HYPER)
                for p in self.chunks[index].spec.params
            ]
        )

    def bound(self, index: int) -> list[Tensor]:
        """Copies of a chunk's weights as compute sees them in one use."""
        self.engine.enter(index, record=True)
        seen = [param.detach().cpu().clone() for param in self.chunks[index].params]
        self.engine.leave(index)
        return seen

    def num_free(self) -> tuple[int, int]:
        """Free weight slots and gradient slots of the first chunk's class."""
        residence = self.engine.residence
        return residence._weight_pools[0].num_free, residence._grad_pools[0].num_free


def plan_rig(
    policy: OffloadPolicy, num_chunks: int, *, is_host: bool, num_gpu_slots: int | None
) -> Plan:
    """A plan for equal chunks, all in one size class."""
    rows = [
        [(f"c{i}.p{k}", torch.Size(shape), True) for k, shape in enumerate(SHAPES)]
        for i in range(num_chunks)
    ]
    specs = [make_spec(i, f"c{i}", row, is_block=True) for i, row in enumerate(rows)]
    with small_units(1024):
        plan = make_plan(specs, FORMATS[policy.state.format], policy, host_compute=is_host)
    if num_gpu_slots is None:
        return plan
    pools = tuple(replace(pool, num_gpu_slots=num_gpu_slots) for pool in plan.pools)
    return replace(plan, pools=pools)


@contextmanager
def make_rig(
    directory: Path,
    *,
    num_chunks: int = 3,
    format: str = "exact",
    device: Device | None = None,
    num_gpu_slots: int | None = None,
    **changes: Any,
) -> Iterator[Rig]:
    """An engine with filled chunks; freed slots are poisoned. `changes` go to the policy."""
    device = device or HostDevice()
    policy = load_policy(make_policy(directory, format=format, **changes))
    plan = plan_rig(policy, num_chunks, is_host=device.is_host, num_gpu_slots=num_gpu_slots)
    generator = torch.Generator().manual_seed(0)
    masters = [[torch.randn(s, generator=generator) for s in SHAPES] for _ in plan.specs]
    chunks = [
        Chunk(spec, [nn.Parameter(m.clone()) for m in row])
        for spec, row in zip(plan.specs, masters, strict=True)
    ]
    nvme = policy.tiers.nvme if plan.uses_nvme else None
    slab = Slab(plan.slab_nbytes)
    device.register(slab)
    engine = Engine(
        plan,
        chunks,
        slab=slab,
        store=make_store(plan, nvme.paths, slab) if nvme else None,
        backend=choose_backend(nvme.io)[0] if nvme else "threads",
        device=device,
        timeline=Timeline(10_000),
        poison=True,
    )
    try:
        materialise.from_memory(engine)
        yield Rig(engine, Gradients(engine, eager=False), masters)
    finally:
        engine.close()


class Twin:
    """One chunk's planes in numpy, updated by the twin of the native kernel."""

    def __init__(self, masters: Sequence[Tensor], format: str) -> None:
        self.format = format
        self.planes = [self._planes(m.numpy().reshape(-1).copy()) for m in masters]
        self.num_steps = 0

    def _planes(self, master: np.ndarray) -> list[np.ndarray]:
        weights = [master] if self.format == "fp32" else list(twins.split_fp32(master))
        return [*weights, np.zeros_like(master), np.zeros_like(master)]

    def step(self, grads: Sequence[Tensor]) -> None:
        """One AdamW step; `grads` in fp32."""
        self.num_steps += 1
        for planes, grad in zip(self.planes, grads, strict=True):
            flat = grad.float().numpy().reshape(-1)
            op = twins.AdamWOp(end=flat.size, step=self.num_steps, **HYPER)
            if self.format == "fp32":
                twins.adamw_fp32(*planes, flat, op)
            else:
                twins.adamw_exact(*planes, *twins.split_fp32(flat), op)

    def weights(self) -> list[Tensor]:
        """The weights that compute sees, flat."""
        rows = [torch.from_numpy(planes[0].copy()) for planes in self.planes]
        return rows if self.format == "fp32" else [row.view(torch.bfloat16) for row in rows]


def places(num_chunks: int) -> list[tuple[int, int]]:
    """(chunk, position) of every parameter."""
    return list(itertools.product(range(num_chunks), range(len(SHAPES))))
