"""A chunk: legal moves only, parameters laid out apart, and absent weights that are NaN."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import bits
from rig import spec_of
from torch import nn

from offload.chunk import Chunk, make_spec
from offload.errors import StateError
from offload.formats import FORMATS, Plane
from offload.slots import Region, SlotPool
from offload.tier import TRANSITIONS, Residency

SHAPES = (torch.Size((3, 5)), torch.Size((1,)), torch.Size((130,)))


def make_chunk(
    dtype: torch.dtype = torch.float32, shapes: tuple[torch.Size, ...] = SHAPES
) -> Chunk:
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    rows = [(f"p{index}", shape, True) for index, shape in enumerate(shapes)]
    chunk = Chunk(make_spec(0, "block", rows, is_block=True), params)
    chunk.make_placeholders(dtype, torch.device("cpu"))
    return chunk


# Residency


@pytest.mark.parametrize(
    ("here", "there"), list(itertools.product(Residency, repeat=2)), ids=lambda r: r.value
)
def test_every_pair_of_states_moves_or_raises(here: Residency, there: Residency) -> None:
    chunk = make_chunk()
    chunk.residency = here
    if (here, there) in TRANSITIONS:
        chunk.to(there)
        assert chunk.residency is there
    else:
        with pytest.raises(StateError, match=f"chunk block: {here.value} -> {there.value}"):
            chunk.to(there)
        assert chunk.residency is here


def test_the_table_has_no_trap() -> None:
    """Nothing moves to itself, everything can be reached from rest, and comes to rest again."""
    reach = {state: {there for here, there in TRANSITIONS if here is state} for state in Residency}
    for _ in Residency:
        for state in Residency:
            reach[state] |= {further for there in reach[state] for further in reach[there]}
    assert all(here is not there for here, there in TRANSITIONS)
    assert reach[Residency.NVME] == set(Residency)
    assert all(Residency.NVME in reach[state] for state in Residency)


def test_what_is_in_flight_never_jumps() -> None:
    """Bytes on their way end at their goal or where they started, those on the device below it;
    only resting weights are updated.
    """
    ends = {
        Residency.READING: {Residency.CPU, Residency.NVME},
        Residency.UPLOADING: {Residency.GPU, Residency.CPU},
        Residency.UPDATING: {Residency.CPU, Residency.NVME},
        Residency.GPU: {Residency.CPU, Residency.NVME},  # with a host copy, and without
    }
    for state, allowed in ends.items():
        assert {there for here, there in TRANSITIONS if here is state} == allowed
    starts = {here for here, there in TRANSITIONS if there is Residency.UPDATING}
    assert starts == {Residency.CPU, Residency.NVME}


@pytest.mark.parametrize("pinned", [False, True])
def test_a_pinned_chunk_rests_in_ram(pinned: bool) -> None:
    chunk, region = make_chunk(), Region("r", 0, 0, torch.empty(0, dtype=torch.uint8))
    slot = SlotPool("pool", [region]).acquire("block")
    assert chunk.resting is Residency.NVME and chunk.host_weight() is None
    chunk.slot = slot
    assert chunk.host_weight() is region and not chunk.weight_pinned
    if pinned:
        chunk.pinned[Plane.WEIGHT] = plane = Region("p", 0, 0, region.tensor)
        assert chunk.resting is Residency.CPU and chunk.host_weight() is plane


# Layout

Shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(torch.Size), max_size=6)


@given(Shapes)
def test_parameters_lie_apart_and_aligned(shapes: list[torch.Size]) -> None:
    rows = [(f"p{index}", shape, index % 2 == 0) for index, shape in enumerate(shapes)]
    spec = make_spec(4, "block", rows, is_block=True)
    end = 0
    for param, (name, shape, trainable) in zip(spec.params, rows, strict=True):
        assert (param.name, param.shape, param.trainable) == (name, tuple(shape), trainable)
        assert param.numel == shape.numel() and param.offset % 64 == 0
        assert param.offset >= end
        end = param.offset + param.numel
    assert end <= spec.numel and spec.numel % 4096 == 0 and spec.numel >= 4096
    assert spec.numel - end < 4096 + 64
    assert spec.num_params == sum(shape.numel() for shape in shapes)


@pytest.mark.parametrize(("format", "nbytes"), [("exact", 2 + 2 + 4 + 4), ("fp32", 12)])
def test_bytes_of_the_planes(format: str, nbytes: int) -> None:
    fmt, spec = FORMATS[format], spec_of(0, 5000)
    planes = spec.state_planes(fmt)
    assert planes[0] is Plane.WEIGHT and spec.trainable
    assert sum(spec.nbytes(plane, fmt) for plane in planes) == 8192 * nbytes
    frozen = spec_of(0, 5000, trainable=False)
    assert frozen.state_planes(fmt) == (Plane.WEIGHT,) and not frozen.trainable


# Binding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_parameters_show_the_plane(dtype: torch.dtype) -> None:
    chunk = make_chunk(dtype)
    before = list(chunk.params)
    plane = torch.arange(chunk.spec.numel, dtype=torch.float32).to(dtype)
    chunk.bind(plane)
    for param, spec in zip(chunk.params, chunk.spec.params, strict=True):
        assert param.shape == torch.Size(spec.shape) and param.is_leaf and param.requires_grad
        assert bits(param) == bits(plane[spec.offset : spec.offset + spec.numel])
    plane.fill_(7)
    assert all(bool((param == 7).all()) for param in chunk.params)
    assert all(now is then for now, then in zip(chunk.params, before, strict=True))


def test_a_parameter_has_a_version_counter_of_its_own() -> None:
    """Autograd would refuse to go backward if writing into the slot changed their versions."""
    chunk = make_chunk()
    plane = torch.zeros(chunk.spec.numel)
    chunk.bind(plane)
    weight = chunk.params[0]
    loss = (torch.ones(5, requires_grad=True) * weight).sum()
    version = weight._version
    plane.add_(1.0)
    assert weight._version == version
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unbound_parameters_are_nan_in_their_own_shape(dtype: torch.dtype) -> None:
    chunk = make_chunk(dtype)
    chunk.bind(torch.zeros(chunk.spec.numel, dtype=dtype))
    chunk.unbind()
    for position, (param, shape) in enumerate(zip(chunk.params, SHAPES, strict=True)):
        assert (param.shape, param.dtype, param.requires_grad) == (shape, dtype, True)
        assert bool(param.isnan().all()) and param.untyped_storage().nbytes() == dtype.itemsize
        assert chunk.placeholder_addresses()[param.data_ptr()] == f"p{position}"
    chunk.check_unbound()


def test_a_scalar_parameter() -> None:
    """Such as CLIP's logit_scale."""
    chunk = make_chunk(shapes=(torch.Size(()),))
    chunk.bind(torch.full((chunk.spec.numel,), 3.0))
    assert chunk.params[0].shape == () and chunk.params[0].item() == 3.0
    chunk.unbind()
    assert chunk.params[0].shape == () and bool(chunk.params[0].isnan())


def test_data_moved_by_somebody_else_is_noticed() -> None:
    chunk = make_chunk()
    chunk.unbind()
    chunk.params[2].data = torch.zeros(130)
    with pytest.raises(StateError, match="parameter p2 was changed outside"):
        chunk.check_unbound()
