"""How a model is cut: every parameter in one chunk, and every module knows which it needs."""

from collections import Counter

import pytest
import torch
from parity import small_units
from torch import Tensor, nn
from zoo import ZOO, ResidualMLP

from offload import partition as module
from offload.blocks import find_blocks
from offload.errors import PolicyError, StateError
from offload.partition import SMALL_NUMEL, Partition, partition

NUM_BLOCKS = {
    "llama": 4,
    "qwen3": 3,
    "gpt2": 3,
    "opt": 3,
    "mixtral": 3,
    "t5": 6,
    "bert": 3,
    "convnet": 4,
    "shared_layer": 3,
    "shared_block": 1,  # the block that stands in the list twice is none
    "branch": 4,
    "linear_list": 4,
}


def homes(parts: Partition) -> dict[int, int]:
    """Parameter id -> chunk index."""
    return {id(p): i for i, row in enumerate(parts.params) for p in row}


@pytest.mark.parametrize("small_numel", [0, 1024, SMALL_NUMEL])
@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_in_one_chunk(name: str, small_numel: int) -> None:
    model = ZOO[name].make_model()
    names: dict[int, list[str]] = {}
    for alias, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(alias)
    with small_units(small_numel):
        parts = partition(model)
    assert [spec.index for spec in parts.specs] == list(range(len(parts.specs)))
    counts = Counter(id(p) for row in parts.params for p in row)
    assert set(counts) == set(names) and set(counts.values()) == {1}
    for spec, row in zip(parts.specs, parts.params, strict=True):
        for param_spec, param in zip(spec.params, row, strict=True):
            assert param_spec.name in names[id(param)]
            assert param_spec.shape == tuple(param.shape)
            assert param_spec.trainable == param.requires_grad
        outside = not spec.is_block
        if outside:
            assert spec.is_small == all(p.numel() < small_numel for p in row)
    assert [spec.index for spec in parts.specs if spec.is_small] in ([], [len(parts.specs) - 1])


@pytest.mark.parametrize("name", ZOO)
def test_every_module_knows_where_its_weights_are(name: str) -> None:
    """A module outside of blocks needs the chunks of its own parameters, a block its own one."""
    model = ZOO[name].make_model()
    with small_units(1024):
        parts = partition(model)
    home = homes(parts)
    inside = {id(m) for block, _ in parts.blocks for m in block.modules()}
    owners = {id(m): indices for m, indices in parts.owners}
    for child in model.modules():
        own = {home[id(p)] for p in child.parameters(recurse=False)}
        if own and id(child) not in inside:
            assert set(owners[id(child)]) == own
            assert list(owners[id(child)]) == sorted(own)
    for block, index in parts.blocks:
        assert {home[id(p)] for p in block.parameters()} == {index}
        assert parts.specs[index].is_block
    assert not inside & set(owners)


@pytest.mark.parametrize("name", ZOO)
def test_blocks_are_found(name: str) -> None:
    model = ZOO[name].make_model()
    blocks = find_blocks(model)
    assert len(blocks) == NUM_BLOCKS[name]
    assert all(model.get_submodule(path) is block for path, block in blocks)
    for _, block in blocks:
        assert not any(other is not block and other in list(block.modules()) for _, other in blocks)


def test_the_root_may_be_the_list() -> None:
    model = nn.Sequential(*(ResidualMLP() for _ in range(3)))
    assert [path for path, _ in find_blocks(model)] == ["0", "1", "2"]
    assert len(partition(model).specs) == 3


@pytest.mark.parametrize(
    "children",
    [
        [nn.Linear(8, 8)],
        [nn.Linear(8, 8), nn.ReLU()],
        [nn.Linear(8, 8), nn.Bilinear(8, 8, 8)],
        [nn.ReLU(), nn.ReLU()],
    ],
    ids=["one", "no weights", "two classes", "none with weights"],
)
def test_what_is_not_repeated_is_no_block(children: list[nn.Module]) -> None:
    assert find_blocks(nn.ModuleDict({"a": nn.Sequential(*children)})) == []


def test_only_outermost_lists_are_blocks() -> None:
    """A mixture of experts inside a block does not cut the block."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    model = nn.ModuleDict({"layers": nn.ModuleList(Outer() for _ in range(2))})
    assert [path for path, _ in find_blocks(model)] == ["layers.0", "layers.1"]


def test_a_block_that_shares_weights_outside_is_none() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.head = nn.Linear(8, 8)
            self.head.weight = self.blocks[1].weight

    model = Tied()
    assert [path for path, _ in find_blocks(model)] == ["blocks.0", "blocks.2"]
    parts = partition(model)
    assert sum(len(row) for row in parts.params) == 2 * 3 + 1


def test_tied_weights_count_once() -> None:
    model = ZOO["qwen3"].make_model()
    with small_units(1024):
        parts = partition(model)
    head = dict(model.named_modules())["lm_head"]
    (indices,) = [rows for owner, rows in parts.owners if owner is head]
    assert [parts.specs[i].name for i in indices] == ["model.embed_tokens"]


def test_little_tensors_share_one_chunk() -> None:
    """Of one module, what is large has its own chunk; what is little joins the others."""
    model = nn.ModuleDict({"a": nn.Linear(300, 300), "b": nn.Linear(300, 2), "c": nn.LayerNorm(9)})
    parts = partition(model)
    assert [spec.name for spec in parts.specs] == ["a", "small tensors"]
    assert [p.name for p in parts.specs[0].params] == ["a.weight"]
    assert {p.name for p in parts.specs[1].params} == {
        "a.bias", "b.weight", "b.bias", "c.weight", "c.bias",
    }  # fmt: skip
    assert dict(zip("abc", (rows for _, rows in parts.owners), strict=True)) == {
        "a": (0, 1), "b": (1,), "c": (1,),
    }  # fmt: skip


def test_attention_owns_the_weights_that_it_reads() -> None:
    """torch's attention hands out_proj.weight to a function and never calls out_proj."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4)

    model = Net()
    with small_units(1024):
        parts = partition(model)
    assert [owner for owner, _ in parts.owners] == [model.attention]
    assert len(parts.params[0]) + len(parts.params[1]) == len(list(model.parameters()))


def test_frozen_parameters_are_marked() -> None:
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    specs = partition(model).specs
    assert [spec.trainable for spec in specs] == [False, True]
    assert [p.trainable for p in specs[1].params] == [True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64])
def test_dtypes_that_would_lose_bits_are_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4)
    model.extra = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    with pytest.raises(PolicyError, match=rf"parameter extra is {dtype}"):
        partition(model)


def test_models_that_cannot_be_cut() -> None:
    with pytest.raises(StateError, match="no parameters"):
        partition(nn.ReLU())
    with pytest.raises(StateError, match="lazy; run one forward"):
        partition(nn.Sequential(nn.LazyLinear(4)))
    block = nn.Linear(4, 4)
    block.register_parameter("none", nn.Parameter(torch.zeros(0, 4)))
    with pytest.raises(StateError, match=r"parameter 1.none has no elements .*\(0, 4\)"):
        partition(nn.Sequential(nn.Linear(4, 4), block))


def test_the_limit_of_little_is_in_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL_NUMEL", 64)
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(9, 7, bias=False)})
    weights: list[Tensor] = [model["a"].weight, model["b"].weight]
    assert [weight.numel() for weight in weights] == [64, 63]
    assert [spec.is_small for spec in partition(model).specs] == [False, True]
