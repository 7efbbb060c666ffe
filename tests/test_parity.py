"""The numbers contract: placement, I/O, update mode and device never change a bit, and the bits are
plain torch's.

Every run through the tiers is compared with a reference in plain torch whose optimizer is the numpy
twin of AdamW: all losses, the first step's gradients, and after the last step all planes, the
buffers and torch's generator.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    COMPUTE_DTYPE,
    FORMATS,
    PlainAdamW,
    Recipe,
    Result,
    Variant,
    assert_same,
    bits,
    first_step,
    run,
    run_plain,
    run_torch_adamw,
    without_grads,
)
from torch import Tensor, nn
from zoo import ZOO

MODELS = tuple(ZOO)
PLAIN = Recipe()
RICH = Recipe(groups=True, scheduler=True)
CLIPPED = Recipe(accumulation=3, clip=0.05, groups=True, steps=3)

RAM = Variant("ram", placement="ram")
QUICK_VARIANTS = (
    RAM,
    Variant("nvme", io="uring", update="deferred", num_paths=2),
    Variant("mixed", placement="mixed", update="eager"),
    Variant("oneslot", placement="oneslot", io="threads", update="deferred"),
)
SLOW_VARIANTS = (
    Variant("nvme-eager", io="threads", update="eager"),
    Variant("oneslot-eager", placement="oneslot", update="eager"),
    Variant("mixed-deferred", placement="mixed", io="threads", update="deferred"),
    Variant("keep", activations="keep"),
    Variant("large-tiles", tile_numel=65536),
    Variant("ram-standin", placement="ram", device="standin", chaos=True),
    Variant("mixed-standin", placement="mixed", device="standin", chaos=True),
    Variant("oneslot-standin", placement="oneslot", device="standin", chaos=True),
)
STANDIN = Variant("standin-chaos", device="standin", chaos=True)
CHAOS = Variant("chaos", placement="oneslot", chaos=True)
STANDIN_MODELS = ("llama", "gpt2", "t5", "shared_layer", "convnet")
CHAOS_MODELS = ("mixtral", "branch", "shared_block")


@functools.cache
def reference(model: str, format: str, recipe: Recipe) -> Result:
    return run_plain(ZOO[model], recipe, format)


def check(model: str, format: str, recipe: Recipe, variant: Variant, directory: Path) -> None:
    """Run a variant and compare it with plain torch."""
    got = run(ZOO[model], recipe, format, variant, directory)
    want = reference(model, format, recipe)
    if recipe.clip is not None:
        # The sum behind a norm may be in another order than here, so its last bits are not
        # compared;
        # what follows from the norm is.
        torch.testing.assert_close(got.norms, want.norms, rtol=2e-3, atol=0)
        want = run_plain(ZOO[model], recipe, format, norms=got.norms)
    eager = variant.update == "eager"
    keep = without_grads if eager else lambda key: True
    assert_same(got.record, want.record, only=lambda key: keep(key) and not key.startswith("norm["))


@pytest.mark.parametrize("variant", QUICK_VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_placements_equal_plain_torch(
    model: str, format: str, variant: Variant, nvme_dir: Path
) -> None:
    check(model, format, RICH, variant, nvme_dir)


@pytest.mark.slow
@pytest.mark.parametrize("variant", SLOW_VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_more_placements_equal_plain_torch(
    model: str, format: str, variant: Variant, nvme_dir: Path
) -> None:
    check(model, format, RICH, variant, nvme_dir)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_accumulation_and_clipping_equal_plain_torch(
    model: str, format: str, nvme_dir: Path
) -> None:
    check(model, format, CLIPPED, Variant("nvme"), nvme_dir)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", STANDIN_MODELS)
def test_standin_device_under_chaos(model: str, format: str, nvme_dir: Path) -> None:
    check(model, format, RICH, STANDIN, nvme_dir)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", CHAOS_MODELS)
def test_chaos_with_one_slot(model: str, format: str, nvme_dir: Path) -> None:
    check(model, format, CLIPPED, CHAOS, nvme_dir)


CROSS = [
    (Recipe(accumulation=accumulation, clip=clip, groups=True), variant)
    for accumulation, clip in itertools.product((1, 3), (None, 0.05))
    for variant in (
        Variant(f"{placement}-{io}-{update}", placement=placement, io=io, update=update)
        for placement, io, update in itertools.product(
            ("ram", "nvme", "mixed", "oneslot"), ("uring", "threads"), ("deferred", "eager")
        )
    )
    if variant.update == "deferred" or (accumulation == 1 and clip is None)  # eager allows neither
    if not (variant.placement == "ram" and variant.io == "uring")  # no file, no queue
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "variant"),
    CROSS,
    ids=[f"a{r.accumulation}-{'clip' if r.clip else 'free'}-{v.name}" for r, v in CROSS],
)
@pytest.mark.parametrize("format", FORMATS)
def test_llama_cross_product(format: str, recipe: Recipe, variant: Variant, nvme_dir: Path) -> None:
    check("llama", format, recipe, variant, nvme_dir)


def test_norms_do_not_depend_on_the_placement(nvme_dir: Path) -> None:
    """The clipping norm itself is bit-identical, not only what follows from it."""
    variants = (
        RAM,
        Variant("nvme"),
        Variant("oneslot", placement="oneslot", io="threads"),
        STANDIN,
    )
    records = [
        run(ZOO["llama"], CLIPPED, "exact", variant, nvme_dir / variant.name).record
        for variant in variants
    ]
    assert any(key.startswith("norm[") for key in records[0])
    for record in records[1:]:
        assert_same(record, records[0])


@pytest.mark.parametrize("model", ["llama", "qwen3", "gpt2", "convnet"])
def test_fp32_follows_torch_adamw(model: str, nvme_dir: Path) -> None:
    """fp32 equals torch.optim.AdamW(fused=True) bit for bit where numel is a multiple of its vector
    length.

    Elsewhere torch itself rounds the tail of a tensor differently from its body (a scalar loop
    without FMA).
    """
    got = run(ZOO[model], PLAIN, "fp32", Variant("nvme"), nvme_dir)
    want, whole = run_torch_adamw(ZOO[model], PLAIN)
    assert_same(got.record, want.record, only=first_step)
    torch.testing.assert_close(got.losses, want.losses, rtol=1e-6, atol=0)
    if whole:  # no parameter has a tail
        assert_same(got.record, want.record)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", ["llama", "shared_layer", "linear_list"])
def test_micro_batches_do_not_depend_on_the_placement(
    model: str, format: str, micro_batch: int, nvme_dir: Path
) -> None:
    variants = [
        Variant("ram", placement="ram", micro_batch=micro_batch),
        Variant("oneslot", placement="oneslot", micro_batch=micro_batch, io="threads"),
        Variant("nvme", micro_batch=micro_batch, num_paths=2, update="eager"),
    ]
    records = [
        run(ZOO[model], Recipe(steps=3), format, variant, nvme_dir / variant.name).record
        for variant in variants
    ]
    for record in records[1:]:
        assert_same(record, records[0], only=without_grads)


def split_blocks(blocks: list[nn.Module], size: int) -> dict[int, list[dict[str, Tensor]]]:
    """Make blocks run in micro-batches, in plain torch: each on its own aliases of the weights, so
    that each micro-batch's gradients can be read apart. Returns the aliases by id of the block.
    """
    made: dict[int, list[dict[str, Tensor]]] = {id(block): [] for block in blocks}

    def split(block: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            block.forward = forward
            parts = []
            for rows in x.split(size):
                aliases = {n: p.detach().requires_grad_() for n, p in block.named_parameters()}
                made[id(block)].append(aliases)
                parts.append(torch.func.functional_call(block, aliases, (rows, *args), kwargs))
            block.forward = whole
            return torch.cat(parts)

        whole = run
        return run

    for block in blocks:
        block.forward = split(block, block.forward)
    return made


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", ["llama", "shared_layer", "linear_list"])
def test_micro_batches_equal_plain_torch(
    model: str, format: str, micro_batch: int, nvme_dir: Path
) -> None:
    """Loss and gradients of one step are those of plain torch running the same micro-batches."""
    entry = ZOO[model]
    plain = entry.make_model()
    PlainAdamW(plain, PLAIN, format)  # gives the model the format's compute weights
    blocks = list(next(m for m in plain.modules() if isinstance(m, nn.ModuleList)))
    made = split_blocks(blocks, micro_batch)
    batch = entry.make_batch(0, COMPUTE_DTYPE[format])
    loss = entry.loss(plain, batch)
    loss.backward()
    want = {"loss[0.0]": bits(loss)}
    for name, module in plain.named_modules():
        if module in blocks:
            for n, _ in module.named_parameters():
                grads = [aliases[n].grad.float() for aliases in made[id(module)]]
                want[f"grad[{name}.{n}]"] = bits(functools.reduce(torch.add, grads))
    for name, p in plain.named_parameters():
        if p.grad is not None:
            want[f"grad[{name}]"] = bits(p.grad.float())
    variant = Variant("nvme", micro_batch=micro_batch)
    got = run(entry, Recipe(steps=1), format, variant, nvme_dir)
    assert_same(got.record, want, only=first_step)


def test_freezing(nvme_dir: Path) -> None:
    """Frozen parameters keep their weights and have no optimizer state; the others train as in
    plain torch.
    """
    recipe = Recipe(
        freeze=("model.embed_tokens", "model.layers.0", "model.layers.2.mlp"), groups=True
    )
    for format in FORMATS:
        check("llama", format, recipe, Variant("nvme"), nvme_dir / format)
