"""State formats and optimizer rules in the native kernels: the twins' bits, and their promises."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import twins
from twins import GROUP, PLANE_NAMES, AdamWOp, LionOp, Op, SGDOp
from update_rig import random_planes

from offload import _native
from offload.formats import FORMATS, NATIVE_PLANE_ORDER, Plane, state_format

ISAS = _native.supported_isas()
NAMES = tuple(twins.DTYPES)
RULES: dict[str, tuple[type[Op], dict[str, Any]]] = {
    "adamw": (AdamWOp, {"step": 3}),
    "adamw, first, no decay": (AdamWOp, {"weight_decay": 0.0, "maximize": True}),
    "adamw, lerp from grad": (AdamWOp, {"beta1": 0.3, "step": 2**40}),
    "sgd": (SGDOp, {"momentum": 0.0, "weight_decay": 0.0}),
    "sgd, momentum": (SGDOp, {"step": 2, "dampening": 0.1, "lr": 0.03}),
    "sgd, first, maximize": (SGDOp, {"dampening": 0.5, "maximize": True, "grad_scale": 0.37}),
    "sgd, nesterov": (SGDOp, {"step": 7, "nesterov": True, "weight_decay": 0.3}),
    "lion": (LionOp, {"step": 9}),
    "lion, clipped": (LionOp, {"weight_decay": 0.0, "grad_scale": 0.011, "maximize": True}),
}
EDGES = twins.from_bits(
    [0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x2F800000, 0x3F800000, 0x3F80FFFF]
    + [0x5F000000, 0x7F7F7FFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x80000000, 0x80000001]
    + [0xBF808000, 0xFF7FFFFF, 0xFF800000]
)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def native_update(format: str, planes: twins.Planes, ops: list[Op], isa: str = "auto") -> None:
    """The same as twins.update for several ops, by the native kernels."""
    addresses = tuple(planes[n].ctypes.data if n in planes else 0 for n in PLANE_NAMES)
    numel = planes["weight"].size
    _native.apply_ops(twins.CODES[format], numel, addresses, twins.pack_ops(ops), isa)


def copy_of(planes: twins.Planes) -> twins.Planes:
    """Copies that begin one item past an allocation: parameters lie anywhere in a chunk."""
    copies = {}
    for name, plane in planes.items():
        copies[name] = np.empty(plane.size + 1, plane.dtype)[1:]
        copies[name][:] = plane
    return copies


def same(a: twins.Planes, b: twins.Planes) -> bool:
    return all(a[name].tobytes() == b[name].tobytes() for name in b)


def differing(a: twins.Planes, b: twins.Planes) -> list[str]:
    return [name for name in b if a[name].tobytes() != b[name].tobytes()]


def test_the_package_and_the_twins_mean_the_same_formats():
    assert tuple(FORMATS) == NAMES
    assert tuple(plane.value for plane in NATIVE_PLANE_ORDER) == PLANE_NAMES
    for name, fmt in FORMATS.items():
        assert fmt.native_code == twins.CODES[name]
        assert {p.value: d.itemsize for p, d in fmt.dtypes.items()} == {
            n: np.dtype(d).itemsize for n, d in twins.DTYPES[name].items()
        }


@pytest.mark.parametrize(
    ("name", "adamw", "others"),
    [("fp32", 12, 8), ("exact", 12, 8), ("bf16", 8, 6), ("int8", 5.125, 4.0625)],
)
def test_bytes_per_parameter(name: str, adamw: float, others: float):
    assert state_format(name).state_itemsize == adamw
    for kind in ("sgd", "lion"):
        fmt = state_format(name, kind)
        assert fmt.state_itemsize == others
        assert Plane.EXP_AVG_SQ not in fmt.state_planes


def test_a_tile_of_every_plane_is_whole_pages():
    """Without scales a byte per element is the narrowest plane."""
    for fmt in [*FORMATS.values(), *(state_format(name, "torch") for name in FORMATS)]:
        for plane in fmt.dtypes:
            assert fmt.nbytes(plane, fmt.numel_multiple) % 4096 == 0
    assert FORMATS["exact"].numel_multiple == 4096
    assert FORMATS["int8"].numel_multiple == 65536
    assert state_format("int8", "torch").numel_multiple == 4096


# --- every format, every rule, every instruction set --------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("format", NAMES)
def test_every_step_has_the_twins_bits(isa: str, format: str, rule: tuple[type[Op], dict]):
    make, hyper = rule
    for numel in (1, 15, 16, 31, 32, 33, 4097):
        rng = np.random.default_rng(numel)
        native = copy_of(random_planes(format, numel, rng, decades=(-9, 3)))
        twin = {name: plane.copy() for name, plane in native.items()}
        if make is not AdamWOp:
            for planes in (native, twin):
                planes.pop("exp_avg_sq")
                planes.pop("exp_avg_sq_scale", None)
        op = make(end=numel, seed=11, **hyper)
        native_update(format, native, [op], isa)
        twins.update(format, twin, op)
        assert not differing(native, twin), numel


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("make", [AdamWOp, SGDOp, LionOp])
def test_many_steps_on_ranges_with_holes(isa: str, format: str, make: type[Op]):
    numel = 2048 + 17
    rng = np.random.default_rng(1)
    native = random_planes(format, numel, rng)
    twin = copy_of(native)
    for step in range(1, 9):
        ops = [
            make(begin=0, end=801, step=step, seed=5),
            make(begin=832, end=833, step=step, lr=0.1, seed=5),
            make(begin=1024, end=numel, step=step + 3, weight_decay=0.5, seed=6),
        ]
        native_update(format, native, ops, isa)
        for op in ops:
            twins.update(format, twin, op)
        assert not differing(native, twin), step


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("make", [AdamWOp, SGDOp, LionOp])
def test_edges_give_the_same_numbers_in_every_isa(format: str, make: type[Op]):
    """Denormals, Inf and huge values keep equal bits; a NaN stays a NaN, whichever it is."""
    grids = [grid.reshape(-1).copy() for grid in np.meshgrid(EDGES, EDGES, abs(EDGES), EDGES)]
    numel = grids[0].size
    start = random_planes(format, numel, np.random.default_rng(0))
    words = np.zeros(numel, np.uint32)
    twins.store_master(format, start, grids[0])
    twins.store_exp_avg(format, start, grids[1], words)
    twins.store_exp_avg_sq(format, start, grids[2], words)
    if format == "fp32":
        start["grad"][:] = grids[3]
    else:
        start["grad"][:], start["grad_lo"][:] = twins.split_fp32(grids[3])
    results = []
    op = make(end=numel, step=7)
    for isa in ISAS:
        planes = copy_of(start)
        native_update(format, planes, [op], isa)
        master = twins.load_master(format, planes)
        moments = twins.load_moments(format, planes, master)
        results.append([np.where(np.isnan(x), np.float32(7), x) for x in (master, *moments)])
    twin = copy_of(start)
    twins.update(format, twin, op)
    master = twins.load_master(format, twin)
    moments = twins.load_moments(format, twin, master)
    results.append([np.where(np.isnan(x), np.float32(7), x) for x in (master, *moments)])
    for got in results[1:]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, results[0], strict=True))


# --- bf16: stochastic rounding ------------------------------------------------------------------


def rounded_moments(value: float, numel: int, seed: int, step: int) -> tuple[twins.F32, twins.F32]:
    """What exp_avg and exp_avg_sq of bf16 hold after a step that makes both `value`."""
    planes = {n: np.zeros(numel, d) for n, d in twins.DTYPES["bf16"].items()}
    grads = np.full(numel, value, np.float32)
    planes["grad"][:], planes["grad_lo"][:] = twins.split_fp32(grads)
    op = AdamWOp(end=numel, beta1=0.0, beta2=1 - 1 / value, seed=seed, step=step)
    native_update("bf16", planes, [op])
    return twins.join_fp32(planes["exp_avg"]), twins.join_fp32(planes["exp_avg_sq"])


def test_stochastic_rounding_is_right_in_the_mean_and_never_far():
    value, numel = np.float32(1.3001), 1 << 16
    for moment in rounded_moments(float(value), numel, seed=1, step=2):
        low, high = np.unique(moment)
        assert low < value < high and high - low == 2.0**-7
        share = float(np.mean(moment == high))
        expected = float((value - low) / (high - low))
        assert abs(share - expected) < 5 * (expected * (1 - expected) / numel) ** 0.5


def test_random_bits_differ_by_seed_step_element_and_plane():
    value, numel = 1.3001, 1 << 12
    first, first_sq = rounded_moments(value, numel, seed=1, step=2)
    again, _ = rounded_moments(value, numel, seed=1, step=2)
    assert np.array_equal(first, again)
    others = [rounded_moments(value, numel, seed, step)[0] for seed, step in ((2, 2), (1, 3))]
    others += [first_sq, np.roll(first, 1), np.roll(first, 16)]
    p = float(np.mean(first == first.max()))
    for other in others:
        agree = float(np.mean(first == other))
        assert abs(agree - (p * p + (1 - p) ** 2)) < 0.05


def test_values_that_fit_bf16_are_not_changed(isa: str):
    """A moment that a step keeps stays, however often: rounding adds no noise of its own."""
    planes = random_planes("bf16", 1000, np.random.default_rng(2))
    before = copy_of(planes)
    for step in range(2, 7):
        op = SGDOp(end=1000, step=step, lr=0.0, momentum=1.0, dampening=1.0, weight_decay=0.0)
        native_update("bf16", planes, [op], isa)
    assert same(planes, before)


# --- int8: 24-bit masters and groups ------------------------------------------------------------


def native_split24(master: twins.F32, isa: str) -> tuple[twins.U16, npt.NDArray[np.int8]]:
    weight, residue = np.empty(master.size, np.uint16), np.empty(master.size, np.int8)
    addresses = (master.ctypes.data, weight.ctypes.data, residue.ctypes.data)
    _native.split_fp32(*addresses, master.size, 1, isa)
    return weight, residue


def native_join24(weight: twins.U16, residue: npt.NDArray[np.int8], isa: str) -> twins.F32:
    master = np.empty(weight.size, np.float32)
    addresses = (weight.ctypes.data, residue.ctypes.data, master.ctypes.data)
    _native.join_fp32(*addresses, weight.size, 1, isa)
    return master


@pytest.mark.parametrize("numel", [0, 1, 17, 4096, 65537])
def test_split24_rounds_once_and_joins_to_what_it_rounded(isa: str, numel: int):
    patterns = np.random.default_rng(numel).integers(0, 2**32, numel, dtype=np.uint32)
    master = patterns.view(np.float32)
    weight, residue = native_split24(master, isa)
    twin_weight, twin_residue = twins.split_fp24(master)
    assert weight.tobytes() == twin_weight.tobytes()
    assert residue.tobytes() == twin_residue.tobytes()
    joined = native_join24(weight, residue, isa)
    assert joined.tobytes() == twins.join_fp24(weight, residue).tobytes()
    rounded = ((patterns.astype(np.uint64) + 0x80) >> 8 << 8).astype(np.uint32)
    assert np.array_equal(joined.view(np.uint32), rounded)


@pytest.mark.slow
def test_every_24_bit_master_survives(isa: str):
    """2**24 patterns is all of them: what a step does not change stays, for ever."""
    patterns = np.arange(1 << 24, dtype=np.uint32) << np.uint32(8)
    halves = native_split24(patterns.view(np.float32), isa)
    assert np.array_equal(native_join24(*halves, isa).view(np.uint32), patterns)


def decoded(planes: twins.Planes) -> tuple[twins.F32, twins.F32]:
    return twins.load_moments("int8", planes, twins.load_master("int8", planes))


def int8_planes(m: twins.F32, v: twins.F32) -> twins.Planes:
    """int8 planes with moments m and v: by the twin, which the kernel is compared with above."""
    numel = m.size
    planes = {
        n: np.zeros(twins.items_of(n, 0, numel).stop, d) for n, d in twins.DTYPES["int8"].items()
    }
    twins.store_exp_avg("int8", planes, m, np.zeros(numel, np.uint32))
    twins.store_exp_avg_sq("int8", planes, v, np.zeros(numel, np.uint32))
    return planes


def test_int8_moments_are_near_what_they_stand_for():
    """Within 1/127 of the largest of the group, near zero much nearer; a root within 1/255."""
    rng = np.random.default_rng(3)
    m = rng.standard_normal(32 * 1000).astype(np.float32)
    v = np.square(rng.standard_normal(m.size)).astype(np.float32)
    got_m, got_v = decoded(int8_planes(m, v))
    top = np.repeat(abs(m).reshape(-1, GROUP).max(axis=1), GROUP)
    assert np.all(abs(got_m - m) <= top * (1 / 127) * 1.02)
    small = abs(m) < top / 32
    assert np.all(abs(got_m - m)[small] <= (top * 0.0022)[small])
    root = np.sqrt(v)
    top = np.repeat(root.reshape(-1, GROUP).max(axis=1), GROUP)
    assert np.all(abs(np.sqrt(got_v) - root) <= top / 255 * 1.02)
    assert np.all(got_v > 0)


def test_int8_never_forgets_a_second_moment():
    v = np.full(64, 1e-20, np.float32)
    v[0] = v[32] = 1.0
    planes = int8_planes(np.zeros(64, np.float32), v)
    assert np.all(planes["exp_avg_sq"][1:32] == 1)
    v[1:32] = 0.0
    assert not int8_planes(np.zeros(64, np.float32), v)["exp_avg_sq"][1:32].any()


def test_int8_holds_every_magnitude():
    """From the smallest normal bf16 to half the largest: a scale in fp16 would lose both ends."""
    for exponent in range(-126, 127):
        m = np.full(32, 2.0**exponent, np.float32)
        got, _ = decoded(int8_planes(m, np.zeros(32, np.float32)))
        assert np.array_equal(got, m), exponent


def test_a_parameter_of_int8_does_not_depend_on_its_neighbours(isa: str):
    """Its last group ends in padding; what lies in the other groups may be anything."""
    rng = np.random.default_rng(4)
    alone = random_planes("int8", 100, rng)
    noise = random_planes("int8", 256, rng, decades=(5, 6))
    among = copy_of(noise)
    for name, plane in among.items():
        place = twins.items_of(name, 64, 164)
        plane[place] = alone[name]
    native_update("int8", alone, [AdamWOp(end=100, step=2)], isa)
    native_update("int8", among, [AdamWOp(begin=64, end=164, step=2)], isa)
    for name, plane in among.items():
        place = twins.items_of(name, 64, 164)
        assert plane[place].tobytes() == alone[name].tobytes(), name
        plane[place] = noise[name][place]
    assert same(among, noise)


def test_an_op_inside_a_group_is_refused():
    planes = random_planes("int8", 128, np.random.default_rng(5))
    with pytest.raises(ValueError, match="inside a group of 32"):
        native_update("int8", planes, [AdamWOp(begin=16, end=64)])


# --- rules beside torch -------------------------------------------------------------------------

SGD_HYPER: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"momentum": 0.87, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.5, "maximize": True},
)


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="torch runs its code without FMA here",
)
@pytest.mark.parametrize("hyper", SGD_HYPER, ids=str)
@pytest.mark.parametrize("which", ["fused", "foreach", "plain"])
def test_sgd_follows_torch_bit_for_bit(hyper: dict[str, Any], which: str):
    rng = np.random.default_rng(6)
    numel = 16 * 1001
    planes = random_planes("fp32", numel, rng)
    planes["exp_avg"][:] = 0
    parameter = torch.nn.Parameter(torch.from_numpy(planes["weight"].copy()))
    flags = {"fused": which == "fused", "foreach": which == "foreach"}
    optimizer = torch.optim.SGD([parameter], lr=0.01, **hyper, **flags)
    for step in range(1, 21):
        planes["grad"][:] = rng.standard_normal(numel) * 10.0 ** rng.uniform(-6, 1, numel)
        parameter.grad = torch.from_numpy(planes["grad"].copy())
        optimizer.step()
        ours = {"weight_decay": 0.0, "momentum": 0.0, **hyper}
        native_update("fp32", planes, [SGDOp(end=numel, step=step, lr=0.01, **ours)])
        assert planes["weight"].tobytes() == parameter.detach().numpy().tobytes(), step
    if "momentum" in hyper:
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert planes["exp_avg"].tobytes() == buffer.numpy().tobytes()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_follows_its_authors_code_in_torch(weight_decay: float):
    """google/lion-pytorch, line by line, on a whole number of vectors."""
    rng = np.random.default_rng(7)
    lr, beta1, beta2, numel = 3e-3, 0.9, 0.99, 16 * 501
    planes = random_planes("fp32", numel, rng)
    planes["exp_avg"][:] = 0
    p, exp_avg = torch.from_numpy(planes["weight"].copy()), torch.zeros(numel)
    for step in range(1, 21):
        planes["grad"][:] = rng.standard_normal(numel)
        planes["grad"][:3] = 0.0
        grad = torch.from_numpy(planes["grad"].copy())
        p.mul_(1 - lr * weight_decay)
        update = exp_avg.clone().mul_(beta1).add(grad, alpha=1 - beta1).sign_()
        p.add_(update, alpha=-lr)
        exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
        op = LionOp(end=numel, step=step, lr=lr, weight_decay=weight_decay)
        native_update("fp32", planes, [op])
        assert planes["exp_avg"].tobytes() == exp_avg.numpy().tobytes(), step
        assert planes["weight"].tobytes() == p.numpy().tobytes(), step


def test_lossy_formats_stay_near_the_exact_one():
    """300 steps down a quadratic: bf16 and int8 end where exact ends, to a few per cent."""
    ends = {}
    for format, (make, lr) in itertools.product(NAMES, ((AdamWOp, 0.01), (SGDOp, 0.05))):
        planes = random_planes(format, 4096, np.random.default_rng(8), decades=(0, 0))
        for name in planes:
            if name.startswith("exp_avg"):
                planes[name][:] = 0
        rng = np.random.default_rng(9)
        for step in range(1, 301):
            noise = rng.standard_normal(4096) * 0.1
            grad = (twins.load_master(format, planes) + noise).astype(np.float32)
            if format == "fp32":
                planes["grad"][:] = grad
            else:
                planes["grad"][:], planes["grad_lo"][:] = twins.split_fp32(grad)
            op = make(end=4096, step=step, lr=lr * (1 - step / 301), weight_decay=0.0)
            native_update(format, planes, [op])
        ends[format, make] = float(np.mean(np.square(twins.load_master(format, planes))))
    for (format, make), end in ends.items():
        assert end == pytest.approx(ends["exact", make], rel=0.05), (format, make)
