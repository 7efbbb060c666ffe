"""How weights move in: from RAM, from initialisers, from safetensors; all or nothing, by bits."""

import ctypes
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ENDED, run_forked
from parity import FORMATS, Variant, bits, make_policy, master, variant_policy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from zoo import HIDDEN, ZOO, ConvNet, LinearListMLP, SharedLayerMLP

import offload
from offload import machine, materialise
from offload.engine import Engine
from offload.errors import OffloadError, StateError, StorageError
from offload.inflight import InFlight
from offload.io import WRITE
from offload.transfer import StandinDevice

pytestmark = pytest.mark.usefixtures("tiny_units")
LLAMA = ZOO["llama"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLACEMENTS = ("ram", "nvme", "mixed", "oneslot")


def policy_of(directory: Path, placement: str = "nvme", format: str = "exact") -> dict[str, Any]:
    return variant_policy(Variant(placement, placement=placement), format, directory, LLAMA)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def compute_bits(engine: Any) -> dict[str, str]:
    """Hashes of all weights that compute sees."""
    return {n: bits(engine.state(n)["weight"]) for n, _ in engine.model.named_parameters()}


def rounded(tensor: Tensor, format: str) -> Tensor:
    """The weight that compute sees: ties away from zero, not to even as torch rounds."""
    if format == "fp32":
        return tensor.float()
    shifted = (tensor.float().view(torch.int32) + 0x8000) >> 16
    return shifted.to(torch.int16).view(torch.bfloat16)


# From RAM


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_in_ram_arrive_without_loss(
    placement: str, format: str, dtype: torch.dtype, nvme_dir: Path
) -> None:
    """The master equals the value it came with, the weight is its rounding, moments are zero."""
    model = LLAMA.make_model().to(dtype)
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    params = dict(model.named_parameters())
    with offload.offload(model, policy_of(nvme_dir, placement, format)) as engine:
        for name, value in want.items():
            planes = engine.state(name)
            assert bits(master(planes)) == bits(value.float()), name
            assert bits(planes["weight"]) == bits(rounded(value, format)), name
            assert not planes["exp_avg"].any() and not planes["exp_avg_sq"].any(), name
        assert all(param is params[name] for name, param in model.named_parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_untouched_model_leaves_as_it_came(dtype: torch.dtype, nvme_dir: Path) -> None:
    model = LLAMA.make_model().to(dtype)
    want = {name: bits(p) for name, p in model.named_parameters()}
    with offload.offload(model, policy_of(nvme_dir)):
        pass
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {name: bits(p) for name, p in model.named_parameters()} == want


def test_memory_of_the_model_goes_as_it_moves_in(
    nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk: the storages of a filled chunk are gone before the next one begins."""
    model = LLAMA.make_model()
    storages = {id(p): StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    filled: list[int] = []
    fill_chunk = materialise.fill_chunk

    def watch(engine: Engine, chunk: Any, source: Any) -> None:
        gone = [c for c in engine.chunks if all(storages[id(p)].expired() for p in c.params)]
        assert [c.spec.index for c in gone] == filled
        fill_chunk(engine, chunk, source)
        filled.append(chunk.spec.index)

    monkeypatch.setattr(materialise, "fill_chunk", watch)
    with offload.offload(model, policy_of(nvme_dir)) as engine:
        assert filled == list(range(len(engine.plan.specs))) and len(filled) > 4
        assert all(storage.expired() for storage in storages.values())


# Memory beside the slab

NUM_ROWS, ROW_NUMEL = 1 << 17, 128
ONCE_NBYTES = NUM_ROWS * ROW_NUMEL * 4  # 64 MiB


def beside_slab_nbytes(num_rows: int, dtype: torch.dtype, source: str, folder: Path) -> int:
    """How far this process grew beyond its slab until a model of one embedding had moved in."""
    before = machine.rss()
    with torch.device("cpu" if source == "ram" else "meta"):
        model = nn.ModuleDict({"table": nn.Embedding(num_rows, ROW_NUMEL, dtype=dtype)})
    policy = {"tiers": {"gpu": {"device": "cpu"}, "cpu": {"budget": "1GiB"}}}
    weights = {"ram": None, "init": "init", "folder": folder}[source]
    engine = offload.offload(model, policy, weights=weights)
    grown = machine.peak_rss() - before - engine.memory().slab_nbytes
    engine.close(give_back=False)
    return grown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", ["ram", "init", "folder"])
def test_a_large_parameter_is_in_ram_once_beside_the_slab(
    source: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As fp32, and without a copy to convert from. Only bf16 values come beside it, in half of it.

    In a forked child, whose peak begins at what it has; a small model first loads what is lazy.
    """
    for folder, num_rows in (("small", 8), ("large", NUM_ROWS)):
        (tmp_path / folder).mkdir()
        if source == "folder":
            table = {"table.weight": torch.zeros(num_rows, ROW_NUMEL, dtype=dtype)}
            save_file(table, tmp_path / folder / "model.safetensors")

    def measure() -> int:
        beside_slab_nbytes(8, dtype, source, tmp_path / "small")
        return beside_slab_nbytes(NUM_ROWS, dtype, source, tmp_path / "large")

    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what is allocated must not fill holes that are resident
    ended = run_forked(measure)
    assert ended.code == ENDED, ended
    beside = 0.5 if dtype is torch.bfloat16 and source != "init" else 0.0
    assert 0.9 + beside < int(ended.said) / ONCE_NBYTES < 1.4 + beside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_master_is_a_copy_only_where_it_has_to_be(dtype: torch.dtype) -> None:
    values = torch.arange(-30.0, 30.0).view(3, 4, 5).to(dtype)
    for given in (values, values[:, 1:], values.transpose(0, 2), values[0, 0, 0], values[:0]):
        taken = materialise.as_master(nn.Parameter(given))
        assert taken.is_contiguous() and taken.dtype is torch.float32 and not taken.requires_grad
        assert taken.shape == given.shape and torch.equal(taken, given.float())
        reads_in_place = dtype is torch.float32 and given.is_contiguous()
        assert (taken.data_ptr() == given.data_ptr()) == reads_in_place or given.numel() == 0


@pytest.mark.parametrize("format", FORMATS)
def test_moving_in_only_reads_the_values(format: str, nvme_dir: Path) -> None:
    """fp32 values are read where they lie; somebody else may hold them as well."""
    model = LLAMA.make_model()
    held = {name: p.detach() for name, p in model.named_parameters()}
    want = {name: bits(value) for name, value in held.items()}
    with offload.offload(model, policy_of(nvme_dir, format=format)):
        assert {name: bits(value) for name, value in held.items()} == want


# A failure on the way in


class Deliberate(Exception):
    """Raised by the tests in the middle of a move."""


def failing_write(number: int, error: str) -> Callable[..., None]:
    """An InFlight.start_plane whose number-th write fails: as the drive's error, or from
    outside.
    """
    start_plane, counts = InFlight.start_plane, []

    def start(
        self: InFlight, op: int, extent: Any, address: int, chunk: Any, finish: Any, *rest: Any
    ) -> None:
        def broken(result: int, fd: int, offset: int) -> None:
            finish(-5, self._store.segments(extent)[0][0], 4096)

        counts.append(op == WRITE)
        fails = op == WRITE and sum(counts) == number
        if fails and error == "exception":
            raise Deliberate
        if fails and error == "interrupt":
            raise KeyboardInterrupt
        start_plane(self, op, extent, address, chunk, broken if fails else finish, *rest)

    return start


RAISED = {"eio": StorageError, "exception": Deliberate, "interrupt": KeyboardInterrupt}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("error", RAISED)
@pytest.mark.parametrize("number", [1, 7])
@pytest.mark.parametrize("placement", ["nvme", "oneslot"])
def test_a_failed_move_loses_no_weight(
    placement: str, number: int, error: str, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is as it was before, and can be offloaded by a second try."""
    model = LLAMA.make_model()
    want = {name: bits(p) for name, p in model.named_parameters()}
    policy = policy_of(nvme_dir, placement)
    monkeypatch.setattr(InFlight, "start_plane", failing_write(number, error))
    with pytest.raises(RAISED[error]):
        offload.offload(model, policy)
    monkeypatch.undo()
    assert {name: bits(p) for name, p in model.named_parameters()} == want
    assert [path for path in nvme_dir.rglob("*") if path.is_file()] == []
    with offload.offload(model, policy) as engine:
        assert {n: bits(master(engine.state(n))) for n in want} == want


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("where", ["_attach", "_materialise"])
def test_a_failure_beside_the_move_loses_no_weight(
    where: str, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LLAMA.make_model()
    want = {name: bits(p) for name, p in model.named_parameters()}

    def fail(self: Any, *args: Any) -> None:
        raise Deliberate

    monkeypatch.setattr(offload.Session, where, fail)
    with pytest.raises(Deliberate):
        offload.offload(model, policy_of(nvme_dir))
    assert {name: bits(p) for name, p in model.named_parameters()} == want


# Initialisers


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_initialised_weights_do_not_depend_on_the_placement(placement: str, nvme_dir: Path) -> None:
    """Hugging Face's own initialisation: norms are ones, matrices have the config's deviation."""
    records = []
    for where in ("ram", placement):
        model = on_meta(LLAMA.build)
        names = [id(p) for p in model.parameters()]
        torch.manual_seed(5)
        policy = policy_of(nvme_dir, where, "fp32")
        with offload.offload(model, policy, weights="init") as engine:
            assert [id(p) for p in model.parameters()] == names
            records.append(compute_bits(engine))
            for name, p in model.named_parameters():
                weight = engine.state(name)["weight"]
                assert not p.is_meta and weight.isfinite().all()
                if "norm" in name:
                    assert (weight == 1).all()
                else:
                    assert 0.015 < weight.std().item() < 0.025, name
            batch = LLAMA.make_batch(1, torch.float32)
            assert LLAMA.loss(model, batch).isfinite()
    assert records[0] == records[1]
    assert len(set(records[0].values())) > 20


def test_buffers_on_meta_come_back(nvme_dir: Path) -> None:
    """Rotary frequencies are those of a model that was built in RAM."""
    want = {name: bits(buffer) for name, buffer in LLAMA.make_model().named_buffers()}
    model = on_meta(LLAMA.build)
    with offload.offload(model, policy_of(nvme_dir), weights="init"):
        assert {name: bits(buffer) for name, buffer in model.named_buffers()} == want and want


@pytest.mark.parametrize(
    "build",
    [
        ConvNet,
        LinearListMLP,
        SharedLayerMLP,
        ZOO["bert"].build,
    ],
)
def test_every_parameter_is_initialised_once(
    build: Callable[[], nn.Module], nvme_dir: Path
) -> None:
    """Also where the weight of a module is large and its bias is among the little tensors."""
    torch.manual_seed(3)
    plain = build()
    torch.manual_seed(3)
    model = on_meta(build)
    with offload.offload(model, policy_of(nvme_dir, format="fp32"), weights="init") as engine:
        for name, p in plain.named_parameters():
            weight = engine.state(name)["weight"]
            assert weight.shape == p.shape and weight.isfinite().all(), name
            spread, want = weight.double().std(correction=0), p.double().std(correction=0)
            assert torch.isclose(spread, want, rtol=0.5, atol=1e-3), name


def test_a_module_that_cannot_initialise_itself_is_named(nvme_dir: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 4))

    model = on_meta(lambda: nn.ModuleDict({"bare": Bare()}))
    with pytest.raises(StateError, match=r"module bare \(Bare\) .* no reset_parameters"):
        offload.offload(model, policy_of(nvme_dir), weights="init")


def test_an_initialiser_that_changes_a_shape_is_named(nvme_dir: Path) -> None:
    class Growing(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight.data = torch.zeros(64, 2 * self.weight.shape[1])  # also when it is built

    model = on_meta(lambda: nn.ModuleDict({"grows": Growing(64, 64)}))
    with pytest.raises(StateError, match=r"grows.weight .* shape \(64, 256\), .* \(64, 128\)"):
        offload.offload(model, policy_of(nvme_dir), weights="init")


def test_initialised_values_go_one_by_one(nvme_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a chunk at a time: each is gone before the next one is stored."""
    store, seen = materialise._store, []

    def watch(param: Any, master: Tensor, *planes: Any) -> None:
        assert all(values.expired() for values in seen), param.name
        seen.append(StorageWeakRef(master.untyped_storage()))
        store(param, master, *planes)

    monkeypatch.setattr(materialise, "_store", watch)
    with offload.offload(on_meta(LLAMA.build), policy_of(nvme_dir), weights="init") as engine:
        chunks = [chunk for chunk in engine._engine.chunks if len(chunk.params) > 4]
        assert len(chunks) > 2 and len(seen) == len(list(engine.model.parameters()))


# Safetensors


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One Llama as one file, and as several shards with an index."""
    folders = {}
    for kind, size in (("single", "1GB"), ("sharded", "40KB")):
        folders[kind] = tmp_path_factory.mktemp(kind)
        LLAMA.make_model().save_pretrained(folders[kind], max_shard_size=size)
    assert (folders["single"] / "model.safetensors").exists()
    assert len(list(folders["sharded"].glob("model-*.safetensors"))) > 3
    return folders


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("placement", ["ram", "nvme", "oneslot"])
def test_weights_from_a_folder(
    placement: str, format: str, kind: str, checkpoints: dict[str, Path], nvme_dir: Path
) -> None:
    want = dict(LLAMA.make_model().named_parameters())
    model = on_meta(LLAMA.build)
    policy = policy_of(nvme_dir, placement, format)
    with offload.offload(model, policy, weights=checkpoints[kind]) as engine:
        for name, p in want.items():
            assert bits(master(engine.state(name))) == bits(p), name
    for name, p in model.named_parameters():  # it leaves as an ordinary model
        assert not p.is_meta and p.shape == want[name].shape and p.isfinite().all()


def test_load_pretrained(checkpoints: dict[str, Path], nvme_dir: Path) -> None:
    """The same loss as the model in RAM; also on a device of its own."""
    batch = LLAMA.make_batch(1, torch.float32)
    want = bits(LLAMA.loss(LLAMA.make_model(), batch))
    for device in ("cpu", "standin"):
        policy = make_policy(nvme_dir, format="fp32", tiers__gpu__device=device)
        with offload.load_pretrained(checkpoints["sharded"], policy) as engine:
            assert bits(LLAMA.loss(engine.model, batch)) == want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checkpoint_may_have_any_float_dtype(
    dtype: torch.dtype, tmp_path: Path, nvme_dir: Path
) -> None:
    saved = LLAMA.make_model().to(dtype)
    saved.save_pretrained(tmp_path)
    model = on_meta(LLAMA.build)
    with offload.offload(model, policy_of(nvme_dir), weights=tmp_path) as engine:
        for name, p in saved.named_parameters():
            assert bits(master(engine.state(name))) == bits(p.float()), name


def test_tied_weights_are_read_under_the_name_they_have(tmp_path: Path, nvme_dir: Path) -> None:
    saved = ZOO["qwen3"].make_model()
    saved.save_pretrained(tmp_path)
    model = on_meta(ZOO["qwen3"].build)
    model.tie_weights()
    with offload.offload(model, policy_of(nvme_dir), weights=tmp_path) as engine:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        planes = engine.state("model.embed_tokens.weight")
        assert bits(master(planes)) == bits(saved.model.embed_tokens.weight)


def test_a_folder_of_the_base_model_fits_the_whole_one(tmp_path: Path, nvme_dir: Path) -> None:
    """GPT-2 saved without its head has no `transformer.` before its names; the head is tied."""
    saved = ZOO["gpt2"].make_model()
    saved.transformer.save_pretrained(tmp_path)
    model = on_meta(ZOO["gpt2"].build)
    with offload.offload(model, policy_of(nvme_dir), weights=tmp_path) as engine:
        for name, p in saved.named_parameters():
            assert bits(master(engine.state(name))) == bits(p), name


def broken(folder: Path, scratch: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a single-file checkpoint whose tensors were changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, scratch / "model.safetensors")
    return scratch


NAME = "model.layers.2.mlp.up_proj.weight"


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[NAME]


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = tensors[NAME][:, 1:].contiguous()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, f"no tensor for parameter {NAME}"),
        (reshape, rf"{NAME} has shape \(64, {HIDDEN - 1}\)"),
    ],
)
def test_wrong_checkpoints_are_named(
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    nvme_dir: Path,
) -> None:
    """And a second try with a right one works on the same model."""
    model = on_meta(LLAMA.build)
    folder = broken(checkpoints["single"], tmp_path, change)
    with pytest.raises(StateError, match=message):
        offload.offload(model, policy_of(nvme_dir), weights=folder)
    with offload.offload(model, policy_of(nvme_dir), weights=checkpoints["single"]) as engine:
        want = dict(LLAMA.make_model().named_parameters())
        assert bits(master(engine.state(NAME))) == bits(want[NAME])


def test_a_folder_without_weights_or_with_a_missing_shard(
    checkpoints: dict[str, Path], tmp_path: Path, nvme_dir: Path
) -> None:
    with pytest.raises(StateError, match="holds no model.safetensors"):
        offload.offload(on_meta(LLAMA.build), policy_of(nvme_dir), weights=tmp_path)
    index = checkpoints["sharded"] / "model.safetensors.index.json"
    (tmp_path / index.name).write_text(index.read_text())
    missing = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    with pytest.raises((OffloadError, FileNotFoundError), match="|".join(missing)):
        offload.offload(on_meta(LLAMA.build), policy_of(nvme_dir), weights=tmp_path)


# On a device of its own


@pytest.mark.parametrize("source", ["ram", "init", "folder"])
def test_weights_reach_a_slow_device(
    source: str, checkpoints: dict[str, Path], nvme_dir: Path
) -> None:
    dice = random.Random(2)
    model = LLAMA.make_model() if source == "ram" else on_meta(LLAMA.build)
    weights = {"ram": None, "init": "init", "folder": checkpoints["single"]}[source]
    device = StandinDevice(delay=lambda: dice.random() * 1e-3)
    policy = offload.load_policy(policy_of(nvme_dir, "oneslot", "fp32"))
    torch.manual_seed(4)
    with offload.Session(model, policy, weights, device=device, poison=True) as engine:
        seen = {}
        for index, chunk in enumerate(engine._engine.chunks):
            engine._engine.enter(index, record=False)
            seen |= {
                spec.name: bits(param)
                for spec, param in zip(chunk.spec.params, chunk.params, strict=True)
            }
            engine._engine.leave(index)
        assert seen == compute_bits(engine)
