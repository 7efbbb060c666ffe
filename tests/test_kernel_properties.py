"""Properties of the update kernels over drawn sizes, values and hyperparameters."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import twins
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import GROUP, AdamWOp, LionOp, Op, SGDOp
from update_rig import random_planes

from offload import _native

needs_fma = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="torch runs its code without FMA here",
)
VECTOR_NUMEL = 16  # torch treats what is beyond its last full vector in another precision
Betas = st.floats(0.0, 0.9999)
Common = {
    "lr": st.one_of(st.just(0.0), st.floats(1e-12, 10.0)),
    "weight_decay": st.one_of(st.sampled_from([0.0, 1e-60]), st.floats(1e-8, 1.0)),
    "step": st.one_of(st.integers(1, 3), st.integers(1, 10**7)),
    "maximize": st.booleans(),
}
AdamWHyper = st.fixed_dictionaries(
    {**Common, "beta1": Betas, "beta2": Betas, "eps": st.sampled_from([0.0, 1e-16, 1e-8, 1e-2])}
)
SGDHyper = st.fixed_dictionaries(
    {**Common, "momentum": st.one_of(st.sampled_from([0.0, 1e-60]), Betas), "dampening": Betas}
)


@dataclasses.dataclass(frozen=True)
class Values:
    """How random planes look: numbers of `spread` decades around 10**center, a share of zeros."""

    seed: int
    center: float
    spread: float
    zero_share: float
    fresh: bool  # moments are zero, as before the first step

    def draw(self, numel: int) -> twins.Planes:
        rng = np.random.default_rng(self.seed)

        def values(center: float) -> twins.F32:
            exponents = center + self.spread * rng.uniform(-1, 1, numel)
            with np.errstate(over="ignore"):
                drawn = (rng.standard_normal(numel) * 10.0**exponents).astype(np.float32)
            drawn[rng.random(numel) < self.zero_share] = 0.0
            return drawn

        planes = {name: values(self.center) for name in ("weight", "exp_avg", "grad")}
        planes["exp_avg_sq"] = abs(values(2 * self.center))
        if self.fresh:
            planes["exp_avg"][:] = planes["exp_avg_sq"][:] = 0.0
        return planes


ValuesDrawn = st.builds(
    Values,
    seed=st.integers(0, 2**32 - 1),
    center=st.floats(-44, 38),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    zero_share=st.sampled_from([0.0, 0.3, 1.0]),
    fresh=st.booleans(),
)
Vectors = st.integers(1, 200).map(lambda count: count * VECTOR_NUMEL)


def native_update(format: str, planes: twins.Planes, ops: list[Op]) -> None:
    addresses = tuple(planes[n].ctypes.data if n in planes else 0 for n in twins.PLANE_NAMES)
    numel = planes["weight"].size
    _native.apply_ops(twins.CODES[format], numel, addresses, twins.pack_ops(ops))


def assert_same_but_nan(planes: twins.Planes, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        a, b = planes[name], tensor.numpy()
        same = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
        assert same.all(), (name, a[~same][:3], b[~same][:3])


@needs_fma
@settings(deadline=None, max_examples=300)
@given(Vectors, ValuesDrawn, AdamWHyper)
def test_adamw_follows_torch_fused_whatever_the_numbers(
    numel: int, values: Values, hyper: dict[str, Any]
) -> None:
    planes = values.draw(numel)
    theirs = {name: torch.from_numpy(plane.copy()) for name, plane in planes.items()}
    torch._fused_adamw_(
        [theirs["weight"]], [theirs.pop("grad")], [theirs["exp_avg"]], [theirs["exp_avg_sq"]], [],
        [torch.tensor(float(hyper["step"]))], lr=hyper["lr"], beta1=hyper["beta1"],
        beta2=hyper["beta2"], weight_decay=hyper["weight_decay"], eps=hyper["eps"], amsgrad=False,
        maximize=hyper["maximize"],
    )  # fmt: skip
    native_update("fp32", planes, [AdamWOp(end=numel, **hyper)])
    assert_same_but_nan(planes, theirs)


@needs_fma
@settings(deadline=None, max_examples=300)
@given(Vectors, ValuesDrawn, SGDHyper, st.booleans())
def test_sgd_follows_torch_fused_whatever_the_numbers(
    numel: int, values: Values, hyper: dict[str, Any], nesterov: bool
) -> None:
    planes = values.draw(numel)
    del planes["exp_avg_sq"]
    theirs = {name: torch.from_numpy(plane.copy()) for name, plane in planes.items()}
    momentum = [theirs["exp_avg"]] if hyper["momentum"] else []
    torch._fused_sgd_(
        [theirs["weight"]], [theirs.pop("grad")], momentum, lr=hyper["lr"],
        weight_decay=hyper["weight_decay"], momentum=hyper["momentum"],
        dampening=hyper["dampening"], nesterov=nesterov, maximize=hyper["maximize"],
        is_first_step=hyper["step"] == 1,
    )  # fmt: skip
    native_update("fp32", planes, [SGDOp(end=numel, nesterov=nesterov, **hyper)])
    assert_same_but_nan(planes, theirs)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(tuple(twins.DTYPES)),
    st.sampled_from([AdamWOp, SGDOp, LionOp]),
    st.integers(1, 3000),
    st.lists(st.integers(0, 100), max_size=5),
    st.integers(0, 2**64 - 1),
)
def test_a_range_may_be_cut_anywhere_between_groups(
    format: str, make: type[Op], numel: int, cuts: list[int], seed: int
) -> None:
    """One op, or several that follow each other with the same hyperparameters: the same bits."""
    whole = random_planes(format, numel, np.random.default_rng(numel))
    parts = {name: plane.copy() for name, plane in whole.items()}
    native_update(format, whole, [make(end=numel, step=2, seed=seed)])
    borders = sorted({0, numel, *(GROUP * cut for cut in cuts if GROUP * cut < numel)})
    pieces = itertools.pairwise(borders)
    ops = [make(begin=begin, end=end, step=2, seed=seed) for begin, end in pieces]
    native_update(format, parts, ops)
    for name, plane in whole.items():
        assert plane.tobytes() == parts[name].tobytes(), name
