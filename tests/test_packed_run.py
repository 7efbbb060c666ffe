"""Packing in whole runs: the same bits as without, fewer bytes, and every reader understands it."""

import errno
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import Record, assert_same, make_policy, record_rest, record_state
from test_traffic import measure, on_a_drive
from torch import nn

import offload
from offload import offline, opening
from offload.calibrate import DriveProfile
from offload.errors import PolicyError, StateError, StorageError
from offload.formats import FORMATS, Plane
from offload.manifest import encode
from offload.runfiles import read_manifest, read_tables, write_durably
from offload.swapfile import CHECKSUM_NAMES, MANIFEST_NAME, SWAP_NAME

WIDTH, DEPTH, TILE_NUMEL = 384, 3, 65536
DEFAULTS = {
    "optimizer__tile_numel": TILE_NUMEL,
    "tiers__cpu__pin": False,
    "tiers__cpu__budget": "256MiB",
}
PLAIN = {"tiers__nvme__pack": False}
FORMAT_NAMES = ("fp32", "exact", "bf16", "int8")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
    return nn.ModuleDict({"layers": layers})


def policy_of(folder: Path, *, num_paths: int = 1, **changes: Any) -> dict[str, Any]:
    changes = DEFAULTS | changes
    changes["tiers__nvme__paths"] = [str(folder / f"drive{i}") for i in range(num_paths)]
    return make_policy(folder, **changes)


def train(engine: Any, optimizer: Any, num_steps: int, first: int = 0) -> None:
    dtype = engine.plan.fmt.weight_dtype
    for step in range(first, num_steps):
        torch.manual_seed(step + 1)
        x = torch.randn(4, WIDTH).to(dtype)
        for layer in engine.model["layers"]:
            x = torch.tanh(layer(x))
        x.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(engine: Any) -> Record:
    engine.flush()
    record: Record = {}
    record_state(record, engine)
    record_rest(record, engine.model)
    return record


def stored_nbytes(engine: Any) -> int:
    """Bytes of what can be packed, as it lies on the drives."""
    fmt, store = engine._engine.plan.fmt, engine._engine.store
    return sum(
        int(store.table(chunk.extents[plane].newest).lengths.sum())
        for chunk in engine._engine.chunks
        for plane in chunk.extents
        if fmt.packed_item_nbytes(plane)
    )


def run(
    folder: Path, *, kind: Any = offload.AdamW, num_steps: int = 3, **changes: Any
) -> tuple[Record, int]:
    """State after some steps, and the bytes that what can be packed takes on the drives."""
    with offload.offload(make_model(), policy_of(folder, **changes)) as engine:
        optimizer = kind(engine.model.parameters(), lr=1e-2)
        train(engine, optimizer, num_steps)
        return state_of(engine), stored_nbytes(engine)


@pytest.fixture(params=[1, 3], ids=["one drive", "three drives"])
def num_paths(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


@pytest.mark.parametrize("update", ["eager", "deferred"])
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_packing_changes_no_bit(format: str, update: str, num_paths: int, nvme_dir: Path) -> None:
    changes = {"state__format": format, "optimizer__update": update, "num_paths": num_paths}
    plain, plain_nbytes = run(nvme_dir / "plain", tiers__nvme__pack=False, **changes)
    packed, packed_nbytes = run(nvme_dir / "packed", **changes)
    assert_same(packed, plain)
    assert packed_nbytes < 0.9 * plain_nbytes


@pytest.mark.parametrize("kind", [offload.SGD, offload.Lion, offload.Adafactor])
@pytest.mark.parametrize("io", ["uring", "threads"])
def test_other_optimizers(kind: Any, io: str, nvme_dir: Path) -> None:
    changes = {"optimizer__kind": kind.__name__.lower(), "kind": kind}
    plain, plain_nbytes = run(nvme_dir / "plain", tiers__nvme__pack=False, **changes)
    packed, packed_nbytes = run(nvme_dir / "packed", tiers__nvme__io=io, **changes)
    assert_same(packed, plain)
    assert packed_nbytes < 0.9 * plain_nbytes


@pytest.mark.parametrize("slots", [1, 2])
def test_weights_that_stay_in_their_slots(slots: int, nvme_dir: Path) -> None:
    """Packed weights of a slot leave through the tile; the slot keeps plain ones."""
    changes = {"tiers__cpu__weight_slots": slots, "tiers__cpu__grad_slots": 1}
    plain, _ = run(nvme_dir / "plain", tiers__nvme__pack=False, **changes)
    assert_same(run(nvme_dir / "packed", **changes)[0], plain)


def is_packed(folder: Path) -> bool:
    """Whether every plane of floats of the committed step is stored in fewer bytes."""
    manifest = read_manifest(folder)
    fmt = FORMATS[manifest.state_format]
    tables = read_tables(folder, manifest)
    numels = [chunk.numel for chunk in manifest.chunks]
    return all(
        table.lengths.sum() < fmt.nbytes(plane, numels[index])
        for (index, plane), table in tables.items()
        if fmt.packed_item_nbytes(plane)
    )


@pytest.mark.parametrize("format", ["exact", "bf16"])
def test_a_packed_run_goes_on(format: str, num_paths: int, nvme_dir: Path) -> None:
    changes = {"durability": "step", "state__format": format, "num_paths": num_paths}
    want, _ = run(nvme_dir / "whole", **changes)
    policy = policy_of(nvme_dir / "parts", **changes)
    with offload.offload(make_model(), policy) as engine:
        train(engine, offload.AdamW(engine.model.parameters(), lr=1e-2), 3)
    assert is_packed(nvme_dir / "parts" / "drive0")
    with offload.offload(make_model(), policy, weights="resume") as engine:
        assert engine.run.num_steps == 3
        assert_same(state_of(engine), want)


def test_what_is_pinned_may_change_between_starts(nvme_dir: Path) -> None:
    """A plane that rests in RAM is committed plain, and packed once updates write it again."""
    want, _ = run(nvme_dir / "whole", num_steps=4, durability="step")
    pinned = policy_of(nvme_dir / "parts", durability="step", tiers__cpu__pin="auto")
    moving = policy_of(nvme_dir / "parts", durability="step")
    weights = None
    for step, policy in enumerate((moving, pinned, moving, pinned)):
        with offload.offload(make_model(), policy, weights=weights) as engine:
            optimizer = offload.AdamW(engine.model.parameters(), lr=1e-2)
            train(engine, optimizer, step + 1, first=step)
            got = state_of(engine)
        weights = "resume"
    assert_same(got, want)


def test_a_checkpoint_is_copied_packed_and_read_anywhere(num_paths: int, nvme_dir: Path) -> None:
    """From a live run and from one at rest; into a run that packs, and into one that does not."""
    policy = policy_of(nvme_dir / "run", durability="step", num_paths=num_paths)
    with offload.offload(make_model(), policy) as engine:
        train(engine, offload.AdamW(engine.model.parameters(), lr=1e-2), 3)
        want = state_of(engine)
        engine.checkpoint(nvme_dir / "live").wait()
    folders = [nvme_dir / "run" / f"drive{i}" for i in range(num_paths)]
    offline.copy_run(folders, nvme_dir / "rested")
    offline.copy_run([nvme_dir / "live"], nvme_dir / "again")
    for name in ("live", "rested", "again"):
        assert is_packed(nvme_dir / name)
        for pack in (True, False):
            target = policy_of(nvme_dir / f"{name}-{pack}", tiers__nvme__pack=pack, num_paths=2)
            with offload.offload(make_model(), target, weights=nvme_dir / name) as engine:
                assert_same(state_of(engine), want)
    with offload.offload(make_model(), policy_of(nvme_dir / "plain", **PLAIN)) as engine:
        train(engine, offload.AdamW(engine.model.parameters(), lr=1e-2), 3)
        engine.checkpoint(nvme_dir / "kept").wait()
    assert not is_packed(nvme_dir / "kept")
    files = []
    for name in ("kept", "again"):
        offline.export_step([nvme_dir / name], nvme_dir / f"{name}-exported")
        (file,) = (nvme_dir / f"{name}-exported").glob("*.safetensors")
        files.append(file.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("plane", [Plane.WEIGHT, Plane.EXP_AVG_SQ])
@pytest.mark.parametrize("where", ["base", "mantissa"])
def test_a_flipped_bit_is_found(plane: Plane, where: str, nvme_dir: Path) -> None:
    """What is packed is verified by the checksum of what it stands for."""
    policy = policy_of(nvme_dir / "run", durability="step")
    with offload.offload(make_model(), policy) as engine:
        train(engine, offload.AdamW(engine.model.parameters(), lr=1e-2), 2)
    folder = nvme_dir / "run" / "drive0"
    manifest = read_manifest(folder)
    record = manifest.chunks[1].planes[plane.value]
    _, offset, _ = record.extents[record.committed][0]
    with (folder / SWAP_NAME).open("r+b") as file:
        file.seek(offset + (0 if where == "base" else 40))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with (
        pytest.raises(StorageError) as caught,
        offload.offload(make_model(), policy, weights="resume") as engine,
    ):
        train(engine, offload.AdamW(engine.model.parameters(), lr=1e-2), 1)
        engine.flush()
    assert caught.value.errno == errno.EBADMSG
    with pytest.raises(StorageError) as caught:
        offline.copy_run([folder], nvme_dir / "copy")
    assert caught.value.errno == errno.EBADMSG
    assert not (nvme_dir / "copy").exists() or not list((nvme_dir / "copy").glob("*.swap"))


def committed(folder: Path, **changes: Any) -> dict[str, Any]:
    policy = policy_of(folder, durability="step", **changes)
    with offload.offload(make_model(), policy) as engine:
        train(engine, offload.AdamW(engine.model.parameters(), lr=1e-2), 1)
    return policy


@pytest.mark.parametrize("changes", [{"tiers__nvme__pack": False}, {"tiers__cpu__budget": "64MiB"}])
def test_a_run_that_cannot_stay_packed_is_refused(changes: dict[str, Any], nvme_dir: Path) -> None:
    committed(nvme_dir)
    before = {p: p.read_bytes() for p in nvme_dir.rglob("*") if p.is_file()}
    policy = policy_of(nvme_dir, durability="step", **changes)
    with pytest.raises(StateError, match=f"runs of {TILE_NUMEL} .* Set tiers.nvme.pack: true"):
        offload.offload(make_model(), policy, weights="resume")
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("tile_numel", [TILE_NUMEL // 4, 4 * TILE_NUMEL])
def test_a_run_goes_on_in_the_tiles_that_it_is_packed_by(
    tile_numel: int, nvme_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the policy says now, and however fast the drive is found to be."""
    want, _ = run(nvme_dir / "whole", durability="step")
    committed(nvme_dir / "run")
    monkeypatch.setattr(opening, "PACK_ISA", "portable")
    policy = policy_of(nvme_dir / "run", durability="step", optimizer__tile_numel=tile_numel)
    with offload.offload(make_model(), policy, weights="resume") as engine:
        assert engine.plan.packs and engine.plan.tile_numel == TILE_NUMEL
        train(engine, offload.AdamW(engine.model.parameters(), lr=1e-2), 3, first=1)
        assert_same(state_of(engine), want)


def test_a_plain_run_goes_on_packed(nvme_dir: Path) -> None:
    want, _ = run(nvme_dir / "whole", durability="step")
    committed(nvme_dir / "run", tiers__nvme__pack=False)
    policy = policy_of(nvme_dir / "run", durability="step")
    with offload.offload(make_model(), policy, weights="resume") as engine:
        optimizer = offload.AdamW(engine.model.parameters(), lr=1e-2)
        train(engine, optimizer, 3, first=1)
        assert_same(state_of(engine), want)
    assert is_packed(nvme_dir / "run" / "drive0")


@pytest.mark.parametrize("length", [0, 65537, 2**32 - 1])
def test_hostile_lengths_are_refused(length: int, nvme_dir: Path) -> None:
    """A table whose own checksum is right, but that no packing leaves."""
    policy = committed(nvme_dir)
    folder = nvme_dir / "drive0"
    manifest = read_manifest(folder)
    record = manifest.checksums
    assert record is not None and record.run_numel == TILE_NUMEL
    path = folder / CHECKSUM_NAMES[record.slot]
    entries = np.frombuffer(path.read_bytes(), np.uint32).copy()
    entries[len(entries) // 2] = length
    path.write_bytes(entries.tobytes())
    changed = record.model_copy(update={"crc32": zlib.crc32(entries.tobytes())})
    write_durably(
        folder / MANIFEST_NAME, encode(manifest.model_copy(update={"checksums": changed}))
    )
    for look in (
        lambda: offload.offload(make_model(), policy, weights="resume"),
        lambda: offline.copy_run([folder], nvme_dir / "copy"),
    ):
        with pytest.raises(StorageError) as caught:
            look()
        assert caught.value.errno == errno.EBADMSG


def test_packing_needs_checksums(nvme_dir: Path) -> None:
    with pytest.raises(PolicyError, match="pack: true needs checksum: true"):
        offload.load_policy(
            policy_of(nvme_dir, tiers__nvme__pack=True, tiers__nvme__checksum=False)
        )
    policy = policy_of(nvme_dir, tiers__nvme__checksum=False)
    with offload.offload(make_model(), policy) as engine:
        assert not engine.plan.packs


@pytest.mark.parametrize(
    ("speeds", "num_devices", "isa", "want"),
    [
        ((), 1, "avx512", True),  # one drive that nobody has measured
        ((4.9e9,), 1, "avx512", True),
        ((5.1e9,), 1, "avx512", False),
        ((4.9e9,), 1, "avx2", False),
        ((2e9, 2e9), 2, "avx512", True),
        ((3e9, 3e9), 2, "avx512", False),
        ((3e9, 3e9), 1, "avx512", True),  # two folders of one drive
        ((), 1, "portable", False),
    ],
)
def test_packing_is_chosen_where_the_drives_are_slower(
    speeds: tuple[float, ...], num_devices: int, isa: str, want: bool, nvme_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(opening, "PACK_ISA", isa)
    profiles = tuple(
        DriveProfile(
            read_bandwidth=speed, write_bandwidth=speed, mixed_bandwidth=speed,
            block_nbytes=1 << 20, depth=8, backend="uring", is_direct=True, measured="2026-01-31",
        )
        for speed in speeds
    )  # fmt: skip
    drives = opening.Drives("uring", "", False, profiles, num_devices)
    for said, packs in ((None, want), (True, True), (False, False)):
        policy = offload.load_policy(policy_of(nvme_dir, tiers__nvme__pack=said))
        nvme = opening.settle(policy, drives, None).tiers.nvme
        assert nvme is not None and nvme.packs is packs
    unchecked = offload.load_policy(policy_of(nvme_dir, tiers__nvme__checksum=False))
    assert opening.settle(unchecked, drives, None) == unchecked


@pytest.mark.slow
def test_a_packed_step_moves_what_the_kernel_counts(nvme_dir: Path) -> None:
    """Less than the plan, which cannot know how well bits pack: by a tenth and more."""
    on_a_drive(nvme_dir)
    got = measure(nvme_dir, update="eager", pack=True)
    for moved, planned in zip((got["read"], got["written"]), got["traffic"], strict=True):
        assert 0.7 * planned < moved < 0.9 * planned
