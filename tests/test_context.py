"""Entering and leaving: an ordinary model comes back, and nothing else stays, whatever happens
inside.
"""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from parity import (
    FORMATS,
    Recipe,
    assert_same,
    bits,
    make_policy,
    master,
    prepare,
    run_plain,
    train,
)
from torch import nn
from zoo import ZOO

import offload

LLAMA = ZOO["llama"]
pytestmark = pytest.mark.usefixtures("nothing_left", "tiny_units")


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "t5", "convnet", "shared_block"])
def test_leaving_gives_an_ordinary_model(
    name: str, format: str, dtype: torch.dtype, nvme_dir: Path
) -> None:
    """Real weights in the dtype they came in: masters for fp32, the weight plane for bf16. Forward,
    backward and a plain AdamW work on them.
    """
    entry = ZOO[name]
    model = prepare(entry.make_model().to(dtype), Recipe(), format)
    with offload.offload(model, make_policy(nvme_dir, format=format)) as engine:
        optimizer = offload.AdamW(model.parameters(), lr=1e-3)
        compute = torch.float32 if format == "fp32" else torch.bfloat16
        entry.loss(model, entry.make_batch(1, compute)).backward()
        optimizer.step()
        planes = {n: engine.state(n) for n, _ in model.named_parameters()}
        optimizer.zero_grad()
    for n, p in model.named_parameters():
        assert p.dtype is dtype and p.grad is None
        same = planes[n]["weight"].dtype is dtype
        want = planes[n]["weight"] if same else master(planes[n]).to(dtype)
        assert bits(p) == bits(want), n
    model.to(dtype)  # batch norm's statistics too
    loss = entry.loss(model, entry.make_batch(9, dtype))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
    torch.optim.AdamW(model.parameters()).step()
    assert leftovers(nvme_dir) == []


def test_ties_survive(nvme_dir: Path) -> None:
    model = ZOO["qwen3"].make_model()
    with offload.offload(model, make_policy(nvme_dir)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert bits(model.lm_head.weight) == bits(model.model.embed_tokens.weight)


class Deliberate(Exception):
    """Raised by the tests' own code."""


def raise_deliberately(*args: object) -> None:
    raise Deliberate


@pytest.mark.parametrize("when", ["body", "after_step", "forward", "backward", "between"])
def test_exceptions_leave_nothing_behind(when: str, nvme_dir: Path) -> None:
    """No hang, no thread, no open file, no lock; the same model and folder work again at once."""
    model = LLAMA.make_model()
    handle = None
    with pytest.raises(Deliberate), offload.offload(model, make_policy(nvme_dir)) as engine:
        optimizer = offload.AdamW(model.parameters(), lr=1e-3)
        if when == "forward":
            handle = model.model.layers[2].mlp.register_forward_hook(raise_deliberately)
        loss = LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16))
        if when == "backward":
            loss.register_hook(raise_deliberately)
        if when == "between":
            raise_deliberately()
        loss.backward()
        if when == "after_step":
            optimizer.step()
        raise_deliberately()
    if handle is not None:
        handle.remove()
    assert leftovers(nvme_dir) == []
    assert engine.model is model
    fresh = LLAMA.make_model()
    with offload.offload(fresh, make_policy(nvme_dir)) as again:
        got = train(again, LLAMA, Recipe(steps=1), "exact").record
    assert_same(got, run_plain(LLAMA, Recipe(steps=1), "exact").record)


def test_error_deep_in_backward(nvme_dir: Path) -> None:
    """An exception inside a block's recompute reaches the caller of backward()."""
    model = LLAMA.make_model()
    calls = []

    def second_time(module: nn.Module, args: object, output: object) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise Deliberate

    handle = model.model.layers[1].mlp.register_forward_hook(second_time)
    policy = make_policy(nvme_dir, activations__policy="recompute")
    with pytest.raises(Deliberate), offload.offload(model, policy):
        LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16)).backward()
    handle.remove()
    assert len(calls) == 2


def test_weights_after_an_exception(nvme_dir: Path) -> None:
    """After an error in the user's code the model still comes back with the weights of the last
    step.
    """
    model = LLAMA.make_model()
    with pytest.raises(Deliberate), offload.offload(model, make_policy(nvme_dir)) as engine:
        train(engine, LLAMA, Recipe(steps=2), "exact")
        raise Deliberate
    want = run_plain(LLAMA, Recipe(steps=2), "exact").record
    with offload.offload(model, make_policy(nvme_dir)) as engine:
        for name, _ in model.named_parameters():
            planes = engine.state(name)
            assert bits(planes["weight"]) == want[f"weight[{name}]"], name
            assert bits(planes["residue"]) == want[f"residue[{name}]"], name


def test_second_context_on_the_same_model(nvme_dir: Path) -> None:
    """A model that came back can be offloaded again; its masters then start from its weights."""
    model = LLAMA.make_model()
    with offload.offload(model, make_policy(nvme_dir, format="fp32")) as engine:
        train(engine, LLAMA, Recipe(steps=1), "fp32")
    between = {name: bits(p) for name, p in model.named_parameters()}
    with offload.offload(model, make_policy(nvme_dir, format="fp32")) as engine:
        for name, _ in model.named_parameters():
            assert bits(engine.state(name)["weight"]) == between[name]
        assert train(engine, LLAMA, Recipe(steps=1), "fp32").losses[0] > 0


def test_close_is_idempotent_and_final(nvme_dir: Path) -> None:
    """close() twice is one close; a closed engine refuses work and says so."""
    model = LLAMA.make_model()
    engine = offload.offload(model, make_policy(nvme_dir))
    optimizer = offload.AdamW(model.parameters(), lr=1e-3)
    LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16)).backward()
    engine.close()
    engine.close()
    for call in (engine.flush, optimizer.step, lambda: engine.export("nowhere")):
        with pytest.raises(offload.StateError):
            call()


def test_backward_after_close(nvme_dir: Path) -> None:
    """A loss that outlives its engine gives an error, not wrong gradients and not a hang."""
    model = LLAMA.make_model()
    with offload.offload(model, make_policy(nvme_dir)):
        loss = LLAMA.loss(model, LLAMA.make_batch(0, torch.bfloat16))
    with pytest.raises((offload.OffloadError, RuntimeError)):
        loss.backward()


def test_memory_is_given_back(nvme_dir: Path) -> None:
    """The engine and its slab are collected once the context is left."""
    model = LLAMA.make_model()
    with offload.offload(model, make_policy(nvme_dir)) as engine:
        train(engine, LLAMA, Recipe(steps=1), "exact")
    reference = weakref.ref(engine)
    del engine
    gc.collect()
    assert reference() is None


def test_patches_are_undone(nvme_dir: Path) -> None:
    """What is routed inside the context is torch's own again outside."""
    model = LLAMA.make_model()
    before = (torch.nn.utils.clip_grad_norm_, type(model).state_dict, type(model).forward)
    instance = dict(vars(model))
    hooks = count_hooks(model)
    with offload.offload(model, make_policy(nvme_dir)) as engine:
        train(engine, LLAMA, Recipe(steps=1), "exact")
    assert (torch.nn.utils.clip_grad_norm_, type(model).state_dict, type(model).forward) == before
    assert set(vars(model)) == set(instance)
    assert count_hooks(model) == hooks
    assert not any("forward" in vars(module) for module in model.modules())
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    assert torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0) > 0


def count_hooks(model: nn.Module) -> int:
    """All hooks of all modules and parameters."""
    kinds = [key for key in vars(nn.Module()) if key.endswith("_hooks")]
    modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    post = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    return modules + post + sum(len(p._backward_hooks or ()) for p in model.parameters())


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from zoo import ZOO
from parity import make_policy
import offload
from pathlib import Path
entry = ZOO["branch"]
{body}
"""


def run_script(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.replace("{body}", body)
    command = [sys.executable, "-c", script, str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("ending", ["raise SystemExit(3)", "1 / 0"])
def test_interpreter_exit_without_close(ending: str, nvme_dir: Path) -> None:
    """A script that never leaves the context ends with its own exit code and no swap file."""
    body = (
        "engine = offload.offload(entry.make_model(), make_policy(Path(sys.argv[2])))\n"
        "optimizer = offload.AdamW(engine.model.parameters())\n"
        "entry.loss(engine.model, entry.make_batch(0, torch.bfloat16)).backward()\n"
        "optimizer.step()\n" + ending
    )
    done = run_script(body, str(nvme_dir))
    expected = {"raise SystemExit(3)": 3, "1 / 0": 1}[ending]
    assert done.returncode == expected, done.stderr
    assert leftovers(nvme_dir) == []


def test_killed_run_leaves_no_lock_in_the_way(nvme_dir: Path) -> None:
    """After kill -9 the next run on the same folder starts."""
    body = (
        "engine = offload.offload(entry.make_model(), make_policy(Path(sys.argv[2])))\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_script(body, str(nvme_dir)).returncode == -9
    with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
        assert train(engine, LLAMA, Recipe(steps=1), "exact").losses
    assert leftovers(nvme_dir) == []


@pytest.mark.parametrize("device", ["cpu", "standin"])
def test_a_model_that_gets_nothing_back_says_so(device: str, nvme_dir: Path) -> None:
    """Every parameter is NaN, those of the small chunk too, which was bound until the end: its
    memory has gone back, and would read as zeros.
    """
    model = LLAMA.make_model()
    engine = offload.offload(model, make_policy(nvme_dir, tiers__gpu__device=device))
    train(engine, LLAMA, Recipe(steps=1), "exact")
    engine.close(give_back=False)
    assert [n for n, p in model.named_parameters() if not p.isnan().all()] == []


def test_keyboard_interrupt(nvme_dir: Path) -> None:
    """Ctrl-C in the middle of training ends the process at once and cleans up."""
    body = (
        "import signal, threading, os\n"
        "with offload.offload(entry.make_model(), make_policy(Path(sys.argv[2]))) as engine:\n"
        "    optimizer = offload.AdamW(engine.model.parameters())\n"
        "    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "    for step in range(100000):\n"
        "        entry.loss(engine.model, entry.make_batch(step, torch.bfloat16)).backward()\n"
        "        optimizer.step(); optimizer.zero_grad()\n"
    )
    done = run_script(body, str(nvme_dir))
    assert "KeyboardInterrupt" in done.stderr, done.stderr
    assert done.returncode in (1, 130, -2)
    assert leftovers(nvme_dir) == []


@pytest.mark.parametrize("how", ["close", "error"])
def test_what_is_not_given_back_is_nan(how: str, nvme_dir: Path) -> None:
    """Parameters that were bound, such as the small chunk's, must not go on reading the slab."""
    model = LLAMA.make_model()
    engine = offload.offload(model, make_policy(nvme_dir))
    bound = [p for p in model.parameters() if not p.isnan().any()]
    assert bound  # the norms stay bound for the whole run
    if how == "close":
        engine.close(give_back=False)
    else:
        failure = OSError("a transfer failed")
        engine._engine._flight.failure = failure
        with pytest.raises(OSError), engine:
            raise failure
    assert all(bool(p.isnan().all()) for p in model.parameters())
