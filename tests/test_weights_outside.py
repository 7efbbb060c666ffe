"""Weights read and written outside of forward: state_dict, gathered, export."""

from pathlib import Path

import pytest
import torch
from parity import (
    COMPUTE_DTYPE,
    FORMATS,
    Recipe,
    assert_same,
    bits,
    make_policy,
    master,
    run_plain,
    train,
)
from steps import one_step, rounded
from torch import nn
from zoo import ZOO

import offload

LLAMA = ZOO["llama"]
pytestmark = pytest.mark.usefixtures("tiny_units")


def test_parameters_keep_their_looks(nvme_dir: Path) -> None:
    """Identity, shape, requires_grad and counts survive, although the weights are elsewhere."""
    model = LLAMA.make_model()
    before = {name: (id(p), p.shape, p.requires_grad) for name, p in model.named_parameters()}
    numel = model.num_parameters()
    with offload.offload(model, make_policy(nvme_dir)):
        assert {n: (id(p), p.shape, p.requires_grad) for n, p in model.named_parameters()} == before
        assert model.num_parameters() == numel
        assert all(p.is_leaf and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_inside_gives_real_tensors(format: str, nvme_dir: Path) -> None:
    plain = rounded(ZOO["qwen3"].make_model(), format)
    with offload.offload(ZOO["qwen3"].make_model(), make_policy(nvme_dir, format=format)) as engine:
        inside = engine.model.state_dict()
        want = plain.state_dict()
        assert list(inside) == list(want)
        assert {k: bits(v) for k, v in inside.items()} == {k: bits(v) for k, v in want.items()}


def test_state_dict_that_does_not_fit_names_export(nvme_dir: Path) -> None:
    """Where the weights do not fit the RAM budget, state_dict refuses and names engine.export."""
    wide = nn.Sequential(*(nn.Linear(512, 512) for _ in range(12)))  # 6 MiB of bf16
    refusal = pytest.raises(offload.OffloadError, match=r"engine\.export")
    with offload.offload(wide, make_policy(nvme_dir, cpu_budget="4MiB")) as engine, refusal:
        engine.model.state_dict()


def test_gathered_reads(nvme_dir: Path) -> None:
    plain = rounded(LLAMA.make_model())
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        layer, same = engine.model.model.layers[1], plain.model.layers[1]
        with engine.gathered(layer):
            for p, want in zip(layer.parameters(), same.parameters(), strict=True):
                assert bits(p) == bits(want)
        embedding = engine.model.model.embed_tokens.weight
        with engine.gathered([embedding]):
            assert bits(embedding) == bits(plain.model.embed_tokens.weight)
        assert embedding.isnan().all()


def test_gathered_sees_pending_updates(nvme_dir: Path) -> None:
    """Weights read right after step() are the updated ones."""
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3, weight_decay=0.1)
        one_step(engine, optimizer, LLAMA, 0)
        name = "model.layers.2.mlp.up_proj.weight"
        with engine.gathered(engine.model.model.layers[2]):
            got = bits(engine.model.get_parameter(name))
    assert got == run_plain(LLAMA, Recipe(steps=1), "exact").record[f"weight[{name}]"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("budget", ["64MiB", "mixed"])
def test_gathered_writes(format: str, budget: str, nvme_dir: Path) -> None:
    """Weights written inside gathered are what training continues from, as an edit before training
    is.
    """
    name = "model.layers.1.self_attn.q_proj.weight"
    values = torch.linspace(-0.1, 0.1, 32 * 32).view(32, 32)
    edited = LLAMA.make_model()
    with torch.no_grad():
        edited.get_parameter(name).copy_(values.to(COMPUTE_DTYPE[format]))
    want = run_plain(LLAMA, Recipe(steps=2), format, model=edited).record
    pin = {"tiers__cpu__pin": "auto"} if budget == "mixed" else {}
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir, format=format, **pin)) as engine:
        with engine.gathered(engine.model.model.layers[1]), torch.no_grad():
            engine.model.get_parameter(name).copy_(values)
        got = train(engine, LLAMA, Recipe(steps=2), format).record
    assert_same(got, want)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "t5"])
def test_export_loads_in_transformers(
    name: str, format: str, nvme_dir: Path, tmp_path: Path
) -> None:
    """The exported folder holds the compute weights bit for bit; dtype=float32 the masters."""
    entry = ZOO[name]
    with offload.offload(entry.make_model(), make_policy(nvme_dir, format=format)) as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-3)
        one_step(engine, optimizer, entry, 1, format)
        engine.export(tmp_path / "native")
        engine.export(tmp_path / "masters", dtype=torch.float32)
        planes = {n: engine.state(n) for n, _ in engine.model.named_parameters()}
        loss = one_step(engine, optimizer, entry, 2, format)  # training goes on after an export
        assert loss.isfinite()
    loaded = type(engine.model).from_pretrained(tmp_path / "native", dtype="auto")
    masters = type(engine.model).from_pretrained(tmp_path / "masters", dtype=torch.float32)
    assert loaded.dtype is COMPUTE_DTYPE[format]
    for n, p in loaded.named_parameters():
        assert bits(p) == bits(planes[n]["weight"]), n
        assert bits(masters.get_parameter(n)) == bits(master(planes[n])), n
