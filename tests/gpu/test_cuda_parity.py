"""On a GPU too, placement changes no bit, and the first step is plain torch's on that GPU."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    COMPUTE_DTYPE,
    FORMATS,
    PlainAdamW,
    Recipe,
    Variant,
    assert_same,
    bits,
    first_step,
    prepare,
    record_grads,
    run,
    without_grads,
)
from torch import nn
from zoo import ZOO, Batch, ZooModel

import offload

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits only with it
DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("tiny_units", "repeatable"),
]
MODELS = ("llama", "qwen3", "gpt2", "t5", "convnet", "shared_layer", "linear_list")
RICH = Recipe(steps=3, groups=True, scheduler=True)
CLIPPED = Recipe(steps=2, accumulation=3, clip=0.05, groups=True)
RAM = Variant("ram", placement="ram", device=DEVICE)
OTHERS = (
    Variant("nvme", device=DEVICE, num_paths=2),
    Variant("mixed", placement="mixed", device=DEVICE),
    Variant("oneslot", placement="oneslot", io="threads", device=DEVICE),
    Variant("eager", update="eager", device=DEVICE),
    Variant("oneslot-chaos", placement="oneslot", device=DEVICE, chaos=True),
)


@pytest.fixture
def repeatable() -> Iterator[None]:
    """Kernels that give the same bits every time; where torch has none, it warns."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def to_gpu(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def on_gpu(name: str) -> ZooModel:
    """A zoo model whose batches lie on the GPU. The engine moves the model itself."""
    entry = ZOO[name]

    def batch(seed: int, dtype: torch.dtype) -> Batch:
        return {key: to_gpu(value) for key, value in entry.batch(seed, dtype).items()}

    return dataclasses.replace(entry, batch=batch)


def plain_first_step(entry: ZooModel, format: str) -> dict[str, str]:
    """Loss and gradients of one step in plain torch on the GPU, all in its memory."""
    model: nn.Module = prepare(entry.make_model(), Recipe(), format)
    PlainAdamW(model, Recipe(), format)  # gives it the format's compute weights
    model.to(DEVICE)
    batch = entry.make_batch(0, COMPUTE_DTYPE[format])
    torch.manual_seed(0)
    loss = entry.loss(model, batch)
    loss.backward()
    record = {"loss[0.0]": bits(loss)}
    record_grads(record, ((name, p.grad) for name, p in model.named_parameters()))
    return record


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_the_first_step_is_plain_torchs(name: str, format: str, nvme_dir: Path) -> None:
    entry = on_gpu(name)
    want = plain_first_step(entry, format)
    if want != plain_first_step(entry, format):
        pytest.skip("torch itself does not repeat its bits here")
    variant = Variant("nvme", device=DEVICE)
    got = run(entry, Recipe(steps=1), format, variant, nvme_dir)
    assert_same(got.record, want, only=first_step)


@pytest.mark.parametrize("variant", OTHERS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_placements_agree(name: str, format: str, variant: Variant, nvme_dir: Path) -> None:
    entry = on_gpu(name)
    want = run(entry, RICH, format, RAM, nvme_dir / "ram")
    got = run(entry, RICH, format, variant, nvme_dir / "other")
    keep = without_grads if variant.update == "eager" else lambda key: True
    assert_same(got.record, want.record, only=keep)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("micro_batch", ["auto", 1])
def test_accumulation_clipping_and_micro_batches_agree(
    micro_batch: int | str, format: str, nvme_dir: Path
) -> None:
    records = []
    for placement in ("ram", "oneslot"):
        variant = Variant(placement, placement=placement, device=DEVICE, micro_batch=micro_batch)
        directory = nvme_dir / placement
        records.append(run(on_gpu("llama"), CLIPPED, format, variant, directory).record)
    assert_same(records[1], records[0])


def test_leaving_gives_a_model_on_the_cpu(nvme_dir: Path) -> None:
    """Weights and buffers, as documented; its device memory is given back."""
    entry = on_gpu("llama")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = entry.make_model()
    with offload.offload(
        model, {"tiers": {"gpu": {"device": DEVICE}, "cpu": {"budget": "64MiB"}}}
    ) as engine:
        entry.loss(model, entry.make_batch(1, torch.bfloat16)).backward()
        assert engine.memory().gpu_nbytes > 0
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {b.device.type for b in model.buffers()} <= {"cpu"}
    assert entry.loss(model, ZOO["llama"].make_batch(1, torch.float32)).isfinite()
    del engine
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
