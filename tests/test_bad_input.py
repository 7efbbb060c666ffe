"""Bad input gives one clear error, before anything is lost: the model stays as it was and no file
stays behind.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import Recipe, assert_same, bits, make_policy, run_plain, train
from refusals import refused, works
from torch import Tensor, nn
from zoo import VOCAB, ZOO

import offload

LLAMA = ZOO["llama"]
pytestmark = pytest.mark.usefixtures("nothing_left")


# Policy


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tiers__cpu__bugdet": 1}, r"tiers\.cpu\.bugdet.*budget"),
        ({"tiers__cpu__budget": "lots"}, r"tiers\.cpu\.budget"),
        ({"tiers__cpu__budget": -1}, r"tiers\.cpu\.budget"),
        ({"state__format": "fp8"}, r"state\.format.*exact"),
        ({"optimizer__tile_numel": 1000}, r"optimizer\.tile_numel"),
        ({"tiers__gpu__device": "tpu"}, r"tiers\.gpu\.device"),
        ({"tiers__gpu__device": "cuda:99"}, r"cuda:99"),
        ({"tiers__nvme__paths": []}, r"tiers\.nvme\.paths"),
    ],
)
def test_wrong_key_or_value(changes: dict[str, Any], match: str, nvme_dir: Path) -> None:
    refused(make_policy(nvme_dir, **changes), offload.PolicyError, match)


def test_missing_policy_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.yaml", offload.PolicyError, r"none\.yaml")


def test_yaml_file_works(tmp_path: Path, nvme_dir: Path) -> None:
    path = tmp_path / "tiers.yaml"
    path.write_text(
        "tiers:\n  gpu: {device: cpu}\n  cpu: {budget: 64MiB}\n"
        f"  nvme: {{paths: [{nvme_dir}]}}\n"
    )
    works(path)
    works(str(path))


# Budgets


def suggestion(error: Exception) -> str:
    found = re.search(r"at least (\d+(?:\.\d+)?[KMGT]?i?B?)", str(error))
    assert found, str(error)
    return found[1]


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(640, 640) for _ in range(8)))


@pytest.mark.parametrize("nvme", [True, False])
@pytest.mark.parametrize("device", ["cpu", "standin"])
@pytest.mark.parametrize(
    ("update", "tile_numel"), [("deferred", 4096), ("deferred", 1 << 20), ("eager", 65536)]
)
def test_budget_too_small_says_what_would_do(
    nvme: bool, device: str, update: str, tile_numel: int, nvme_dir: Path
) -> None:
    """The refusal has the numbers, and the setting it names works: with clipping and accumulation
    too.
    """

    def policy(budget: str) -> dict[str, Any]:
        made = make_policy(nvme_dir, tiers__gpu__device=device)
        made["optimizer"] = {"update": update, "tile_numel": tile_numel}
        made["tiers"]["cpu"] = {"budget": budget}
        made["tiers"]["nvme"] = made["tiers"]["nvme"] if nvme else None
        return made

    error = refused(policy("100KiB"), offload.BudgetError, r"100KiB", wide())
    fits = suggestion(error)
    model = wide()
    with offload.offload(model, policy(fits)) as engine:
        optimizer = offload.AdamW(model.parameters())
        for _ in range(2):
            for _ in range(2 if update == "deferred" and nvme else 1):
                model(torch.ones(2, 640, dtype=torch.bfloat16)).float().square().mean().backward()
            if update != "eager":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        assert engine.memory().slab_nbytes <= offload.load_policy(policy(fits)).tiers.cpu.budget
    one_less = offload.policy.parse_nbytes(fits) - 1
    refused(policy(str(one_less)), offload.BudgetError, "at least", wide())


def test_accumulation_that_does_not_fit_says_what_would_do(nvme_dir: Path) -> None:
    """RAM for all but the second half of fp32 accumulation: refused at the second backward()."""

    def policy(budget: int) -> dict[str, Any]:
        tiers = {"gpu": {"device": "cpu"}, "cpu": {"budget": budget}}
        return {"tiers": tiers, "optimizer": {"tile_numel": 4096}}

    def accumulate(budget: int) -> None:
        model = wide()
        with offload.offload(model, policy(budget)):
            for _ in range(2):
                model(torch.ones(2, 640, dtype=torch.bfloat16)).float().square().mean().backward()

    error = refused(policy(1), offload.BudgetError, "at least", wide())
    fits = offload.policy.parse_nbytes(suggestion(error))
    with pytest.raises(offload.BudgetError, match="accumulation") as caught:
        accumulate(fits)
    found = re.search(r"needs (\d+) bytes more", str(caught.value))
    assert found, str(caught.value)
    accumulate(fits + int(found[1]))


def test_nvme_budget_too_small(nvme_dir: Path) -> None:
    error = refused(
        make_policy(nvme_dir, tiers__nvme__budget="16KiB"), offload.BudgetError, r"nvme\.budget"
    )
    fits = suggestion(error)
    works(
        make_policy(
            nvme_dir, tiers__nvme__budget=int(fits.removesuffix("B")) if fits.isdigit() else fits
        )
    )


# Numbers


def poison_loss(loss: Tensor) -> Tensor:
    return loss * float("nan")


def test_nan_loss_names_a_parameter(nvme_dir: Path) -> None:
    """A NaN loss is an error that names where it was seen, before any weight is touched."""
    model = LLAMA.make_model()
    with offload.offload(model, make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(model.parameters(), lr=1e-3)
        before = {name: bits(engine.state(name)["weight"]) for name, _ in model.named_parameters()}
        with pytest.raises(offload.NumericsError, match=r"NaN|nan|not finite") as caught:
            poison_loss(LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert re.search(r"model\.|lm_head", str(caught.value)), str(caught.value)
        after = {name: bits(engine.state(name)["weight"]) for name, _ in model.named_parameters()}
    assert before == after


def test_nan_step_can_be_skipped(nvme_dir: Path) -> None:
    """After NumericsError the user may zero_grad and go on, as if that batch had not been."""
    model = LLAMA.make_model()
    with offload.offload(model, make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        with pytest.raises(offload.NumericsError):
            poison_loss(LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16))).backward()
            optimizer.step()
        optimizer.zero_grad()
        got = train(engine, LLAMA, Recipe(steps=1), "exact").record
    assert_same(got, run_plain(LLAMA, Recipe(steps=1), "exact").record)


@pytest.mark.usefixtures("tiny_units")
def test_absent_weight_outside_forward(nvme_dir: Path) -> None:
    """Code that reads an absent weight gets an error that names the parameter and gathered."""
    model = LLAMA.make_model()
    name = "model.layers.1.mlp.up_proj.weight"
    refusal = pytest.raises(offload.NumericsError, match=rf"{re.escape(name)}[\s\S]*gathered")
    with offload.offload(model, make_policy(nvme_dir)), refusal:
        optimizer = offload.AdamW(model.parameters(), lr=1e-3)
        loss = LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16))
        penalty = model.get_parameter(name).float().square().sum()
        (loss + penalty).backward()
        optimizer.step()


@pytest.mark.usefixtures("tiny_units")
def test_absent_weight_in_an_l1_penalty(nvme_dir: Path) -> None:
    """The gradient of |NaN| is 0, so this is not seen in the gradients, only where it is read."""
    model = LLAMA.make_model()
    with offload.offload(model, make_policy(nvme_dir)):
        optimizer = offload.AdamW(model.parameters(), lr=1e-3)
        with pytest.raises(offload.NumericsError, match="gathered"):
            loss = LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16))
            (loss + model.get_parameter("lm_head.weight").float().abs().sum()).backward()
            optimizer.step()


# Models


def test_unknown_dtype(nvme_dir: Path) -> None:
    """float64 would lose bits: refused by name. So is a trainable complex parameter."""
    for dtype in (torch.float64, torch.complex64):
        model = LLAMA.make_model()
        model.model.norm.weight = nn.Parameter(torch.ones(32, dtype=dtype))
        refused(
            make_policy(nvme_dir),
            offload.OffloadError,
            r"model\.norm\.weight.*(float64|complex64)",
            model,
        )


def test_frozen_integer_parameter(nvme_dir: Path) -> None:
    """A frozen int8 parameter stays as it is or is refused by name; it is never converted."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.register_parameter(
        "scales", nn.Parameter(torch.arange(8, dtype=torch.int8), requires_grad=False)
    )
    try:
        with offload.offload(model, make_policy(nvme_dir)):
            assert model.scales.dtype is torch.int8
            assert model.scales.tolist() == list(range(8))
    except offload.OffloadError as error:
        assert re.search(r"scales.*int8", str(error)), str(error)
    assert model.scales.tolist() == list(range(8))


def test_model_without_parameters(nvme_dir: Path) -> None:
    refused(make_policy(nvme_dir), offload.OffloadError, "parameter", nn.ReLU())


def test_meta_model_without_weights(nvme_dir: Path) -> None:
    with torch.device("meta"):
        model = LLAMA.build()
    with pytest.raises(offload.OffloadError, match=r"weights"):
        offload.offload(model, make_policy(nvme_dir))


def test_meta_model_with_missing_folder(nvme_dir: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LLAMA.build()
    with pytest.raises(offload.OffloadError, match=r"nowhere"):
        offload.offload(model, make_policy(nvme_dir), weights=tmp_path / "nowhere")


def test_folder_of_another_model(nvme_dir: Path, tmp_path: Path) -> None:
    """A folder that lacks a tensor, or has another shape of it, is refused by its name."""
    LLAMA.make_model().save_pretrained(tmp_path / "llama")
    with torch.device("meta"):
        other = ZOO["opt"].build()
    with pytest.raises(offload.OffloadError, match=r"decoder\.|model\."):
        offload.offload(other, make_policy(nvme_dir), weights=tmp_path / "llama")
    with torch.device("meta"):
        model = LLAMA.build()
        model.lm_head = nn.Linear(32, VOCAB + 1, bias=False)
    with pytest.raises(offload.OffloadError, match=r"lm_head\.weight"):
        offload.offload(model, make_policy(nvme_dir), weights=tmp_path / "llama")


def half_zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.usefixtures("tiny_units")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.to(torch.float64),
        lambda model: setattr(model.lm_head.weight, "data", half_zeros(VOCAB, 32)),
        lambda model: setattr(model.model.norm.weight, "data", half_zeros(32)),
        lambda model: setattr(model, "lm_head", nn.Linear(32, VOCAB, bias=False)),
        lambda model: model.model.layers.append(nn.Linear(2, 2)),
        lambda model: model.resize_token_embeddings(VOCAB + 8),
    ],
    ids=["half", "to", "data", "small_data", "replaced", "appended", "resized"],
)
def test_module_changed_after_wrapping(change: Any, nvme_dir: Path) -> None:
    """A structural or dtype change inside the context is an error, never silently untrained
    weights.
    """
    model = LLAMA.make_model()
    with pytest.raises(offload.OffloadError), offload.offload(model, make_policy(nvme_dir)):
        optimizer = offload.AdamW(model.parameters(), lr=1e-3)
        change(model)
        LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16)).backward()
        optimizer.step()


def test_load_state_dict_inside(nvme_dir: Path) -> None:
    """load_state_dict inside the context loads for real or refuses; never nothing happens."""
    donor = LLAMA.make_model()
    with torch.no_grad():
        for p in donor.parameters():
            p.mul_(0.5)
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir, format="fp32")) as engine:
        try:
            engine.model.load_state_dict(donor.state_dict())
        except offload.OffloadError as error:
            assert "gathered" in str(error)
            return
        for name, p in donor.named_parameters():
            assert bits(engine.state(name)["weight"]) == bits(p), name


# Optimizers


def test_optimizer_outside_a_context(nvme_dir: Path) -> None:
    with pytest.raises(offload.StateError, match=r"offload\.offload"):
        offload.AdamW(LLAMA.make_model().parameters())


def test_optimizer_on_foreign_parameters(nvme_dir: Path) -> None:
    refusal = pytest.raises(offload.OffloadError)
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)), refusal:
        offload.AdamW([nn.Parameter(torch.ones(4))])


@pytest.mark.parametrize(
    "arguments", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -1.0}]
)
def test_bad_hyperparameters(arguments: dict[str, Any], nvme_dir: Path) -> None:
    refusal = pytest.raises(ValueError, match="Invalid|must|out of range")
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine, refusal:
        offload.AdamW(engine.model.parameters(), **arguments)


def test_plain_torch_optimizer_is_refused(nvme_dir: Path) -> None:
    """A torch optimizer would find no gradients and train nothing: it must not do so silently."""
    model = LLAMA.make_model()
    refusal = pytest.raises(offload.OffloadError, match="AdamW")
    with offload.offload(model, make_policy(nvme_dir)), refusal:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16)).backward()
        optimizer.step()


def test_clipping_with_eager_updates(nvme_dir: Path) -> None:
    """Eager updates have begun before the norm is known: clipping is refused, with the setting to
    change.
    """
    model = LLAMA.make_model()
    with offload.offload(model, make_policy(nvme_dir, optimizer__update="eager")):
        offload.AdamW(model.parameters(), lr=1e-3)
        with pytest.raises(offload.OffloadError, match="deferred"):
            LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_accumulation_with_eager_updates(nvme_dir: Path) -> None:
    """A second backward before step() cannot be right with eager updates: refused, never half
    accumulated.
    """
    model = LLAMA.make_model()
    with offload.offload(model, make_policy(nvme_dir, optimizer__update="eager")):
        offload.AdamW(model.parameters(), lr=1e-3)
        with pytest.raises(offload.OffloadError, match="deferred"):
            for seed in range(2):
                LLAMA.loss(model, LLAMA.make_batch(seed, torch.bfloat16)).backward()


def test_other_norms_are_refused_or_right(nvme_dir: Path) -> None:
    """Only what the engine can do exactly is accepted by the routed clip_grad_norm_."""
    model = LLAMA.make_model()
    with offload.offload(model, make_policy(nvme_dir)):
        LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16)).backward()
        with pytest.raises(offload.OffloadError, match="norm_type"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=1.0)
        with pytest.raises(offload.OffloadError, match="clip_grad_value_"):
            torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)


def test_unknown_format_names_accepted_values(nvme_dir: Path) -> None:
    for format in ("int4", "fp8"):
        refused(make_policy(nvme_dir, format=format), offload.PolicyError, "accepted: exact")
