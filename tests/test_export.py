"""What export writes, transformers loads: the same bits, in one shard or many, tied or not."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import FORMATS, bits, make_policy, master
from torch import nn
from zoo import ZOO, ConvNet

import offload
from offload import export, session

pytestmark = pytest.mark.usefixtures("tiny_units")
LLAMA = ZOO["llama"]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of at most 40 KB, so that tiny models have several."""
    function = functools.partial(export.export_model, shard_nbytes=40_000)
    monkeypatch.setattr(session, "export_model", function)


def train_a_little(engine: Any, name: str, num_steps: int = 2) -> None:
    entry = ZOO[name]
    dtype = torch.float32 if engine.plan.fmt.name == "fp32" else torch.bfloat16
    optimizer = offload.AdamW(engine.model.parameters(), lr=1e-2)
    for step in range(num_steps):
        entry.loss(engine.model, entry.make_batch(step, dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()


def reload(model: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load with transformers, which must find every tensor and no other."""
    loaded, info = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded


def check_round_trip(
    name: str, format: str, dtype: torch.dtype | None, out: Path, nvme_dir: Path
) -> list[str]:
    """Train, export while updates are pending, load, compare all weights; return the files."""
    compute = torch.float32 if format == "fp32" else torch.bfloat16
    with offload.offload(ZOO[name].make_model(), make_policy(nvme_dir, format=format)) as engine:
        train_a_little(engine, name)
        names = [n for n, _ in engine.model.named_parameters()]
        pending = bits(engine.state(names[0])["weight"])  # finishes the update of one chunk
        assert engine.export(out, dtype=dtype) == out
        loaded = reload(engine.model, out, dtype or compute)
        got = dict(loaded.named_parameters())
        assert set(got) == set(names)
        assert pending == bits(engine.state(names[0])["weight"])
        for n, p in got.items():
            planes = engine.state(n)
            want = planes["weight"] if dtype in (None, compute) else master(planes).to(dtype)
            assert p.dtype is want.dtype and bits(p) == bits(want), n
        for n, buffer in loaded.named_buffers():
            assert bits(buffer) == bits(engine.model.get_buffer(n)), n
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_llama_round_trip(
    format: str, dtype: torch.dtype | None, tmp_path: Path, nvme_dir: Path
) -> None:
    files = check_round_trip("llama", format, dtype, tmp_path / "out", nvme_dir)
    assert files == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "t5", "bert", "mixtral"])
def test_other_families(name: str, tmp_path: Path, nvme_dir: Path) -> None:
    """Tied heads, buffers, experts: their exact masters come back."""
    check_round_trip(name, "exact", torch.float32, tmp_path / "out", nvme_dir)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_several_shards(name: str, tmp_path: Path, nvme_dir: Path) -> None:
    out = tmp_path / "out"
    files = check_round_trip(name, "exact", torch.float32, out, nvme_dir)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert [name for name in files if name.endswith(".safetensors")] == shards and len(shards) > 3
    sizes = [(out / shard).stat().st_size for shard in shards]
    assert max(sizes) < 40_000 + 4096
    assert index["metadata"]["total_size"] < sum(sizes)


def test_tied_weights_are_written_once(tmp_path: Path, nvme_dir: Path) -> None:
    from safetensors import safe_open

    with offload.offload(ZOO["qwen3"].make_model(), make_policy(nvme_dir)) as engine:
        engine.export(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_training_goes_on_as_if_nothing_was_written(tmp_path: Path, nvme_dir: Path) -> None:
    def train(with_export: bool) -> dict[str, str]:
        with offload.offload(LLAMA.make_model(), make_policy(nvme_dir)) as engine:
            for _ in range(2):
                train_a_little(engine, "llama")
                if with_export:
                    engine.export(tmp_path / "out")
            return {n: bits(engine.state(n)["weight"]) for n, _ in engine.model.named_parameters()}

    assert train(True) == train(False)


def test_frozen_weights_are_written_too(tmp_path: Path, nvme_dir: Path) -> None:
    model = LLAMA.make_model()
    model.model.layers[0].requires_grad_(False)
    with offload.offload(model, make_policy(nvme_dir)) as engine:
        engine.export(tmp_path / "out", dtype=torch.float32)
        loaded = dict(reload(model, tmp_path / "out", torch.float32).named_parameters())
        for name, p in model.named_parameters():
            planes = engine.state(name)
            want = master(planes) if p.requires_grad else planes["weight"].float()
            assert bits(loaded[name]) == bits(want), name


def test_plain_modules_are_written_with_their_buffers(tmp_path: Path, nvme_dir: Path) -> None:
    """Batch norm's statistics persist; what a module marks as not persistent stays out."""
    from safetensors.torch import load_file

    model = ConvNet()
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    model.stem[1].running_mean.fill_(0.5)
    with offload.offload(model, make_policy(nvme_dir, format="fp32")) as engine:
        engine.export(tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert set(state) == set(model.state_dict()) and "scratch" not in state
    fresh = ConvNet()
    fresh.load_state_dict(state)
    for name, tensor in model.state_dict().items():
        assert bits(fresh.state_dict()[name]) == bits(tensor), name


# Into a folder that holds something


def shift(amount: float) -> nn.Module:
    model = LLAMA.make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount)
    return model


def export_to(out: Path, model: nn.Module, nvme_dir: Path) -> None:
    with offload.offload(model, make_policy(nvme_dir, format="fp32")) as engine:
        engine.export(out)


@pytest.mark.parametrize("sizes", [(40_000, 1 << 30), (40_000, 90_000), (90_000, 40_000)])
def test_the_newer_export_wins(
    sizes: tuple[int, int], tmp_path: Path, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overwrite(sizes, tmp_path / "out", nvme_dir, monkeypatch)


def test_shards_win_over_an_earlier_single_file(
    tmp_path: Path, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overwrite((1 << 30, 40_000), tmp_path / "out", nvme_dir, monkeypatch)


def overwrite(
    sizes: tuple[int, int], out: Path, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Export twice with these shard sizes: what loads is the second."""
    for amount, nbytes in enumerate(sizes):
        function = functools.partial(export.export_model, shard_nbytes=nbytes)
        monkeypatch.setattr(session, "export_model", function)
        export_to(out, shift(amount), nvme_dir)
    want = shift(len(sizes) - 1)
    loaded = reload(want, out, torch.float32)
    for (name, p), q in zip(want.named_parameters(), loaded.parameters(), strict=True):
        assert bits(p) == bits(q), name


def test_no_shard_of_an_earlier_export_stays(
    tmp_path: Path, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    overwrite((40_000, 90_000), out, nvme_dir, monkeypatch)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name for path in out.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())


def test_a_failed_export_leaves_the_earlier_one_whole(
    tmp_path: Path, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the weights breaks in the middle: what was there still loads."""
    out = tmp_path / "out"
    export_to(out, shift(0), nvme_dir)
    break_reading(monkeypatch, num_reads=3)
    with pytest.raises(RuntimeError, match="deliberate"):
        export_to(out, shift(1), nvme_dir)
    want = shift(0)
    loaded = reload(want, out, torch.float32)
    pairs = zip(want.parameters(), loaded.parameters(), strict=True)
    assert all(bits(p) == bits(q) for p, q in pairs)


@pytest.mark.usefixtures("small_shards")
def test_a_failed_export_leaves_no_temporary_files(
    tmp_path: Path, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_reading(monkeypatch, num_reads=4)
    with pytest.raises(RuntimeError, match="deliberate"):
        export_to(tmp_path / "out", shift(1), nvme_dir)
    assert list((tmp_path / "out").iterdir()) == []


def break_reading(monkeypatch: pytest.MonkeyPatch, num_reads: int) -> None:
    """Make the session's reader fail after so many chunks."""
    function: Callable[..., Path] = session.export_model

    def broken(model: nn.Module, chunks: Any, read: Any, folder: Path) -> Path:
        count = iter(range(num_reads))

        def read_some(chunk: Any) -> Any:
            if next(count, None) is None:
                raise RuntimeError("deliberate")
            return read(chunk)

        return function(model, chunks, read_some, folder)

    monkeypatch.setattr(session, "export_model", broken)
