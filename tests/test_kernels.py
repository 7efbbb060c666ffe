"""Native kernels against their numpy twins and torch's fused AdamW: raw bits, never decimals."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
import twins
from twins import AdamWOp

from offload import _native

ISAS = _native.supported_isas()
SIZES = (0, 1, 2, 15, 16, 17, 31, 33, 255, 4096, 65535, 65536, 65537, 65536 * 2 + 21)
# Zeros, denormals, ties of bf16 rounding, values that round up to Inf, Inf, and NaNs of many looks.
EDGES = np.array(
    [0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF, 0x00800000, 0x3F800000]
    + [0x3F808000, 0x3F818000, 0x3F817FFF, 0x3F818001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF]
    + [0x7F800000, 0x7F800001, 0x7F807FFF, 0x7F808000, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000]
    + [0x7FFFFFFF],
    dtype=np.uint32,
)
EDGES = np.concatenate([EDGES, EDGES | np.uint32(0x80000000)])
EDGES_NO_NAN = EDGES[(EDGES & np.uint32(0x7FFFFFFF)) <= 0x7F800000]
CAPABILITY = torch.backends.cpu.get_cpu_capability()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def address(array: npt.NDArray | None) -> int:
    return 0 if array is None else array.ctypes.data


def same_bits(a: npt.NDArray, b: npt.NDArray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def same_but_nan(a: twins.F32, b: twins.F32) -> bool:
    """Equal bits, except that one NaN is as good as another."""
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def random_fp32(rng: np.random.Generator, numel: int) -> twins.F32:
    """Finite values of all magnitudes that training sees, and some far beyond."""
    return (rng.standard_normal(numel) * 10.0 ** rng.uniform(-12, 4, numel)).astype(np.float32)


def unaligned(array: npt.NDArray) -> npt.NDArray:
    """A copy that begins one element past an allocation: parameters lie anywhere in a chunk."""
    copy = np.empty(array.size + 1, array.dtype)[1:]
    copy[:] = array
    return copy


def native_split(master: twins.F32, isa: str) -> tuple[twins.U16, twins.U16]:
    weight, residue = np.empty(master.size, np.uint16), np.empty(master.size, np.uint16)
    _native.split_fp32(address(master), address(weight), address(residue), master.size, 2, isa)
    return weight, residue


def native_join(weight: twins.U16, residue: twins.U16 | None, isa: str) -> twins.F32:
    master = np.empty(weight.size, np.float32)
    _native.join_fp32(address(weight), address(residue), address(master), weight.size, 2, isa)
    return master


def check_split(patterns: npt.NDArray[np.uint32], isa: str) -> None:
    master = patterns.view(np.float32)
    weight, residue = native_split(master, isa)
    twin_weight, twin_residue = twins.split_fp32(master)
    assert same_bits(weight, twin_weight)
    assert same_bits(residue, twin_residue)
    assert same_bits(native_join(weight, residue, isa).view(np.uint32), patterns)
    assert same_bits(twins.join_fp32(weight, residue).view(np.uint32), patterns)


def test_auto_is_the_widest_and_unknown_names_are_refused():
    assert _native.isa() == ISAS[0]
    assert ISAS[-1] == "portable"
    with pytest.raises(ValueError, match="supported_isas"):
        _native.sum_squares(0, 0, 0, 0, "mmx")


@pytest.mark.parametrize("numel", SIZES)
def test_split_and_join_round_trip_random_patterns(isa: str, numel: int):
    rng = np.random.default_rng(numel)
    check_split(rng.integers(0, 2**32, numel, dtype=np.uint32), isa)


def test_split_and_join_round_trip_around_every_bf16_and_edges(isa: str):
    highs = np.arange(65536, dtype=np.uint32) << np.uint32(16)
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    check_split(np.concatenate([(highs[:, None] | lows).reshape(-1), EDGES]), isa)


@pytest.mark.slow
def test_split_and_join_are_inverse_on_all_patterns(isa: str):
    patterns = np.arange(1 << 20, dtype=np.uint32)
    weight, residue = (np.empty(patterns.size, np.uint16) for _ in range(2))
    joined = np.empty(patterns.size, np.uint32)
    for begin in range(0, 1 << 32, patterns.size):
        halves = address(weight), address(residue)
        _native.split_fp32(address(patterns), *halves, patterns.size, 2, isa)
        _native.join_fp32(*halves, address(joined), patterns.size, 2, isa)
        assert np.array_equal(joined, patterns), hex(begin)
        patterns += np.uint32(patterns.size)  # wraps after the last round


def test_what_a_weight_shows_of_its_master():
    """The promises of [Note: residue] in kernels.h, for everything that is not a plain number."""
    master = twins.from_bits(
        [0x3F808000, 0x7F7F8000, 0x7F800000, 0x7FC00000, 0xFFC00000]
        + [0x7F800001, 0x7FFF8000, 0xFFFF8000, 0xFFFFFFFF]
    )
    weight, residue = native_split(master, "auto")
    shown = [0x3F81, 0x7F80, 0x7F80, 0x7FC0, 0xFFC0, 0x7F80, 0x8000, 0x0000, 0x0000]
    assert weight.tolist() == shown
    assert same_bits(native_join(weight, residue, "auto"), master)


def test_join_without_a_residue_is_the_bf16_itself(isa: str):
    weight = np.arange(65536, dtype=np.uint16)
    expected = weight.astype(np.uint32) << np.uint32(16)
    assert same_bits(native_join(weight, None, isa).view(np.uint32), expected)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("form", ["bf16", "bf16 with low halves", "fp32"])
def test_sum_squares(isa: str, numel: int, form: str):
    values = unaligned(random_fp32(np.random.default_rng(numel), numel))
    if form == "fp32":
        assert _native.sum_squares(address(values), 0, numel, 1, isa) == twins.sum_squares(values)
        return
    high, low = twins.split_fp32(values)
    low = low if form == "bf16 with low halves" else None
    native = _native.sum_squares(address(high), address(low), numel, 0, isa)
    assert native == twins.sum_squares(twins.join_fp32(high, low))


def land_both(
    dst: npt.NDArray, dst_lo: twins.U16 | None, src: npt.NDArray, mode: int, isa: str
) -> None:
    """Land on copies with the native code and the twin; all planes and the sum must agree."""
    planes = [None if plane is None else unaligned(plane) for plane in (dst, dst_lo)]
    kind = 1 if dst.dtype == np.float32 else 0
    native = _native.grad_land(
        address(planes[0]), address(planes[1]), address(src), src.size, kind, mode, isa
    )
    with np.errstate(all="ignore"):
        twin = twins.grad_land(dst, dst_lo, src, mode)
    assert native == twin or (np.isnan(native) and np.isnan(twin))
    assert same_bits(planes[0], dst)
    assert dst_lo is None or same_bits(planes[1], dst_lo)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("mode", [twins.SET, twins.ACCUMULATE_FP32, twins.ACCUMULATE_IN_DTYPE])
def test_grad_land_fp32(isa: str, numel: int, mode: int):
    rng = np.random.default_rng(numel)
    land_both(random_fp32(rng, numel), None, unaligned(random_fp32(rng, numel)), mode, isa)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize(
    ("mode", "with_low"),
    [
        (twins.SET, False),
        (twins.SET, True),
        (twins.ACCUMULATE_FP32, True),
        (twins.ACCUMULATE_IN_DTYPE, False),
        (twins.ACCUMULATE_IN_DTYPE, True),
    ],
)
def test_grad_land_bf16(isa: str, numel: int, mode: int, with_low: bool):
    rng = np.random.default_rng(numel)
    high, low = twins.split_fp32(random_fp32(rng, numel))
    src = unaligned(twins.split_fp32(random_fp32(rng, numel))[0])
    land_both(high, low if with_low else None, src, mode, isa)


@pytest.mark.parametrize("mode", [twins.SET, twins.ACCUMULATE_FP32, twins.ACCUMULATE_IN_DTYPE])
def test_grad_land_of_edges(isa: str, mode: int):
    dst, src = (x.reshape(-1) for x in np.meshgrid(EDGES_NO_NAN, EDGES_NO_NAN))
    land_both(dst.view(np.float32).copy(), None, src.view(np.float32).copy(), mode, isa)
    high, low = twins.split_fp32(dst.view(np.float32).copy())
    land_both(high, low, twins.round_bf16(src.view(np.float32).copy()), mode, isa)


def test_accumulating_in_bf16_adds_as_torch_does(isa: str):
    patterns = np.arange(65536, dtype=np.uint16)
    rng = np.random.default_rng(0)
    near = (patterns ^ rng.integers(0, 0x8200, patterns.size).astype(np.uint16)) & np.uint16(0xFFFF)
    for src in (rng.permutation(patterns), near):
        dst = patterns.copy()
        _native.grad_land(
            address(dst), 0, address(src), dst.size, 0, twins.ACCUMULATE_IN_DTYPE, isa
        )
        total = torch.from_numpy(patterns.copy()).view(torch.bfloat16)
        total += torch.from_numpy(src).view(torch.bfloat16)
        is_number = ~torch.isnan(total).numpy()
        assert same_bits(dst[is_number], total.view(torch.uint16).numpy()[is_number])
        assert set(dst[~is_number].tolist()) <= {0x7FC0}


def test_grad_land_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="needs dst_lo"):
        _native.grad_land(1, 0, 1, 16, 0, twins.ACCUMULATE_FP32)
    with pytest.raises(ValueError, match="no low half"):
        _native.grad_land(1, 1, 1, 16, 1, twins.SET)
    with pytest.raises(ValueError, match="mode"):
        _native.grad_land(1, 0, 1, 16, 0, 3)


# --- AdamW --------------------------------------------------------------------------------------

HYPER = {
    "default": {},
    "no decay": {"weight_decay": 0.0},
    "lerp from grad": {"beta1": 0.3, "beta2": 0.4},
    "beta1 is 0.5": {"beta1": 0.5, "beta2": 0.99},
    "no betas": {"beta1": 0.0, "beta2": 0.0},
    "maximize": {"maximize": True, "lr": 0.1, "eps": 1e-6},
    "clipped": {"grad_scale": 0.1234567890123},
    "clipped, maximize": {"grad_scale": 3e-5, "maximize": True},
    "decay near 1": {"lr": 0.1, "weight_decay": 10.0},
    "no eps": {"eps": 0.0, "step": 3},
    "late": {"step": 123456, "lr": 3e-6, "beta2": 0.95},
}


class State:
    """Random planes of both formats around one fp32 master and one fp32 gradient."""

    def __init__(self, numel: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.weight = random_fp32(rng, numel)
        self.grad = random_fp32(rng, numel)
        # Moments of the gradient's size, as training has them, and some of any size.
        near = (self.grad * rng.uniform(-2, 2, numel)).astype(np.float32)
        self.exp_avg = np.where(rng.random(numel) < 0.7, near, random_fp32(rng, numel))
        near = (self.grad * self.grad * rng.uniform(0, 2, numel)).astype(np.float32)
        self.exp_avg_sq = np.where(rng.random(numel) < 0.7, near, abs(random_fp32(rng, numel)))

    def copy_fp32(self) -> list[twins.F32]:
        planes = (self.weight, self.exp_avg, self.exp_avg_sq, self.grad)
        return [unaligned(plane) for plane in planes]

    def copy_exact(self) -> list[npt.NDArray]:
        """weight, residue, exp_avg, exp_avg_sq, grad, grad_lo"""
        planes = (*twins.split_fp32(self.weight), self.exp_avg, self.exp_avg_sq)
        return [unaligned(plane) for plane in (*planes, *twins.split_fp32(self.grad))]


def native_fp32(planes: list[twins.F32], ops: list[AdamWOp], isa: str = "auto") -> None:
    weight, exp_avg, exp_avg_sq, grad = (address(plane) for plane in planes)
    addresses = (weight, 0, exp_avg, exp_avg_sq, 0, 0, grad, 0)
    _native.apply_ops(0, planes[0].size, addresses, twins.pack_ops(ops), isa)


def native_exact(planes: list[npt.NDArray | None], ops: list[AdamWOp], isa: str = "auto") -> None:
    addresses = [address(plane) for plane in planes]
    addresses = (*addresses[:4], 0, 0, *addresses[4:])
    _native.apply_ops(1, planes[0].size, addresses, twins.pack_ops(ops), isa)


@pytest.mark.parametrize("hyper", HYPER.values(), ids=HYPER.keys())
@pytest.mark.parametrize("numel", [1, 15, 16, 4097, 40000])
def test_adamw_fp32_has_the_twins_bits(isa: str, hyper: dict[str, float], numel: int):
    state = State(numel, seed=numel)
    native, twin = state.copy_fp32(), state.copy_fp32()
    op = AdamWOp(end=numel, **hyper)
    native_fp32(native, [op], isa)
    twins.adamw_fp32(*twin, op)
    assert all(map(same_bits, native, twin))


@pytest.mark.parametrize("hyper", HYPER.values(), ids=HYPER.keys())
@pytest.mark.parametrize("with_low", [False, True])
def test_adamw_exact_has_the_twins_bits(isa: str, hyper: dict[str, float], with_low: bool):
    state = State(4099, seed=1)
    native, twin = state.copy_exact(), state.copy_exact()
    if not with_low:
        native[5] = twin[5] = None
    op = AdamWOp(end=4099, **hyper)
    native_exact(native, [op], isa)
    twins.adamw_exact(*twin, op)
    assert all(a is b or same_bits(a, b) for a, b in zip(native, twin, strict=True))


def test_exact_follows_fp32_on_the_master_for_many_steps(isa: str):
    state = State(5000, seed=2)
    fp32, exact = state.copy_fp32(), state.copy_exact()
    rng = np.random.default_rng(3)
    for step in range(1, 31):
        fp32[3][:] = random_fp32(rng, 5000)
        exact[4][:], exact[5][:] = twins.split_fp32(fp32[3])
        ops = [AdamWOp(end=2500, step=step), AdamWOp(begin=2500, end=5000, step=step, lr=0.01)]
        native_fp32(fp32, ops, isa)
        native_exact(exact, ops, isa)
        assert same_bits(twins.join_fp32(exact[0], exact[1]), fp32[0]), step
        assert same_bits(exact[2], fp32[1]) and same_bits(exact[3], fp32[2]), step


def test_elements_outside_every_op_keep_their_bits(isa: str):
    state = State(1000, seed=4)
    native, twin = state.copy_fp32(), state.copy_fp32()
    ops = [AdamWOp(begin=3, end=50), AdamWOp(begin=50, end=51, step=9), AdamWOp(begin=700, end=999)]
    native_fp32(native, ops, isa)
    for op in ops:
        twins.adamw_fp32(*twin, op)
    assert all(map(same_bits, native, twin))


def test_adamw_of_edges_is_the_same_in_every_isa():
    """Denormals, Inf and zeros keep equal bits; a NaN stays a NaN, whichever it is."""
    finite = EDGES_NO_NAN[::2]
    grids = np.meshgrid(finite, finite, finite, finite)
    edges = [grid.reshape(-1).view(np.float32) for grid in grids]
    op = AdamWOp(end=edges[0].size, step=7)
    twin = [edge.copy() for edge in edges]
    twins.adamw_fp32(*twin, op)
    for isa in ISAS:
        native = [edge.copy() for edge in edges]
        native_fp32(native, [op], isa)
        assert all(map(same_but_nan, native, twin)), isa


@pytest.mark.parametrize(
    "ops",
    [[AdamWOp(end=17)], [AdamWOp(end=8), AdamWOp(begin=7, end=9)], [AdamWOp(begin=3, end=3)]],
)
def test_ops_out_of_range_or_order_are_refused(ops: list[AdamWOp]):
    with pytest.raises(ValueError, match="op "):
        native_fp32(State(16, seed=0).copy_fp32(), ops)


def test_malformed_ops_are_refused():
    planes = State(16, seed=0).copy_fp32()
    with pytest.raises(ValueError, match="step"):
        native_fp32(planes, [AdamWOp(end=16, step=0)])
    with pytest.raises(ValueError, match="in the middle of a record"):
        _native.apply_ops(0, 16, (1, 0, 1, 1, 0, 0, 1, 0), b"x" * 87)
    with pytest.raises(ValueError, match="plane residue is missing"):
        _native.apply_ops(1, 16, (1, 0, 1, 1, 0, 0, 1, 0), AdamWOp(end=16).pack())


# --- torch.optim.AdamW(fused=True) --------------------------------------------------------------

needs_fma = pytest.mark.skipif(
    not CAPABILITY.startswith("AVX"), reason="torch runs its code without FMA here"
)


def torch_step(planes: list[twins.F32], op: AdamWOp) -> list[twins.F32]:
    """What torch's fused kernel makes of (weight, exp_avg, exp_avg_sq, grad); copies."""
    weight, exp_avg, exp_avg_sq, grad = (torch.from_numpy(plane.copy()) for plane in planes)
    torch._fused_adamw_(
        [weight], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(float(op.step))],
        lr=op.lr, beta1=op.beta1, beta2=op.beta2, weight_decay=op.weight_decay, eps=op.eps,
        amsgrad=False, maximize=op.maximize,
    )  # fmt: skip
    return [tensor.numpy() for tensor in (weight, exp_avg, exp_avg_sq)]


@needs_fma
@pytest.mark.parametrize("hyper", HYPER.values(), ids=HYPER.keys())
def test_adamw_follows_torch_fused_bit_for_bit(hyper: dict[str, float]):
    hyper = {name: value for name, value in hyper.items() if name != "grad_scale"}
    for seed, numel in itertools.product(range(4), (16, 4096, 16 * 3001)):
        native = State(numel, seed).copy_fp32()
        op = AdamWOp(end=numel, **hyper)
        expected = torch_step(native, op)
        native_fp32(native, [op])
        assert all(map(same_bits, native[:3], expected))


@needs_fma
def test_adamw_follows_torch_on_edges():
    grids = np.meshgrid(*[EDGES[::3]] * 4)
    native = [grid.reshape(-1)[: grids[0].size // 16 * 16].view(np.float32) for grid in grids]
    native = [plane.copy() for plane in native]
    op = AdamWOp(end=native[0].size, step=7)
    expected = torch_step(native, op)
    native_fp32(native, [op])
    assert all(map(same_but_nan, native[:3], expected))


@needs_fma
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_training_follows_torch_optimizer_bit_for_bit(weight_decay: float, maximize: bool):
    """Forty steps of the public optimizer with a changing learning rate, from zero moments."""
    rng = np.random.default_rng(5)
    numel = 48 * 1001
    parameter = torch.nn.Parameter(torch.from_numpy(random_fp32(rng, numel)))
    native = [parameter.detach().numpy().copy(), *(np.zeros(numel, np.float32) for _ in range(3))]
    optimizer = torch.optim.AdamW(
        [parameter], weight_decay=weight_decay, fused=True, maximize=maximize
    )
    for step in range(1, 41):
        lr = 1e-3 / step
        optimizer.param_groups[0]["lr"] = lr
        native[3][:] = rng.standard_normal(numel) * 10.0 ** rng.uniform(-6, 0)
        parameter.grad = torch.from_numpy(native[3].copy())
        optimizer.step()
        op = AdamWOp(end=numel, step=step, lr=lr, weight_decay=weight_decay, maximize=maximize)
        native_fp32(native, [op])
        assert same_bits(native[0], parameter.detach().numpy()), step


def ulps_apart(a: twins.F32, b: twins.F32) -> npt.NDArray[np.int64]:
    """Number of floats between a and b, which have no NaN."""
    ordered = []
    for values in (a, b):
        as_int = values.view(np.int32).astype(np.int64)
        ordered.append(np.where(as_int < 0, -(as_int & 0x7FFFFFFF), as_int))
    return abs(ordered[0] - ordered[1])


@needs_fma
@pytest.mark.parametrize("numel", [1, 2, 7, 15, 17, 31, 1003])
def test_torch_tail_is_within_one_ulp(numel: int):
    """torch adds the elements beyond its last full vector in double precision, so they may differ.

    exp_avg has equal bits and exp_avg_sq is within one ulp. The update of the weight is within
    three ulps of itself: at most one of the weight's, unless the update is as large as the weight.
    """
    num_full = numel // 16 * 16
    for seed in range(200):
        native = State(numel, seed).copy_fp32()
        before = native[0].copy()
        op = AdamWOp(end=numel, step=1 + seed)
        expected = torch_step(native, op)
        native_fp32(native, [op])
        for mine, theirs in zip(native[:3], expected, strict=True):
            assert same_bits(mine[:num_full], theirs[:num_full])
        assert same_bits(native[1], expected[1])
        assert ulps_apart(native[2], expected[2]).max() <= 1
        update = native[0] - before
        limit = np.spacing(abs(expected[0])) + 3 * np.spacing(abs(update))
        assert np.all(abs(native[0] - expected[0]) <= limit)
        is_small = abs(update) < abs(expected[0]) / 8
        assert np.all(ulps_apart(native[0], expected[0])[is_small] <= 1)
