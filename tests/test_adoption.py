"""A run that cannot be gone on with is refused before anything has changed: a manifest that lies, a
file that is gone, a checkpoint taken for a run.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import snapshot
from test_durability import NUM_STEPS, policy_of, record_of, start, train
from test_ends import ENTRY, begin, check_resumes, want

import offload
from offload import manifest
from offload.errors import StateError
from offload.runfiles import read_manifest
from offload.swapfile import CHECKSUM_NAMES, MANIFEST_NAME, SWAP_NAME

__all__ = ["want"]  # the fixture
pytestmark = pytest.mark.usefixtures("nothing_left", "tiny_units")


def without_checksums(folder: Path) -> None:
    (folder / CHECKSUM_NAMES[read_manifest(folder).checksums.slot]).unlink()


def pipe_as_checksums(folder: Path) -> None:
    without_checksums(folder)
    os.mkfifo(folder / CHECKSUM_NAMES[read_manifest(folder).checksums.slot])


def lie(**changes: Any) -> Callable[[Path], None]:
    def tell(folder: Path) -> None:
        record = read_manifest(folder).model_copy(update=changes)
        (folder / MANIFEST_NAME).write_bytes(manifest.encode(record))

    return tell


def write_tree(folder: Path, tree: dict[str, Any]) -> None:
    """A manifest with a right checksum, whatever it says."""
    body = json.dumps(tree).encode()
    head = b"offload-manifest %d %08x %d\n" % (manifest.VERSION, zlib.crc32(body), len(body))
    (folder / MANIFEST_NAME).write_bytes(head + body)


def many_pieces(folder: Path) -> None:
    """More blocks than the checksum table was planned for."""
    record = read_manifest(folder)
    tree = record.model_dump(mode="json")
    for chunk in tree["chunks"]:
        for plane in chunk["planes"].values():
            plane["extents"] = [
                [[f, at, 4096] for f, o, n in pieces for at in range(o, o + n, 4096)]
                for pieces in plane["extents"]
            ]
    write_tree(folder, tree)


def fewer_planes(folder: Path) -> None:
    tree = read_manifest(folder).model_dump(mode="json")
    for chunk in tree["chunks"]:
        chunk["planes"].pop("exp_avg", None)
    write_tree(folder, tree)


def one_extent(folder: Path) -> None:
    tree = read_manifest(folder).model_dump(mode="json")
    for chunk in tree["chunks"]:
        for plane in chunk["planes"].values():
            plane["extents"], plane["committed"] = [plane["extents"][plane["committed"]]], 0
    write_tree(folder, tree)


BUFFER = manifest.pack_tensor(torch.zeros(3))
LIES = {
    "checksums gone": without_checksums,
    "checksums a pipe": pipe_as_checksums,
    "random state": lie(rng={"cpu": "AAAA"}),
    "random state no base64": lie(rng={"cpu": "*"}),
    "unknown buffer": lie(buffers={"nobody": BUFFER}),
    "many pieces": many_pieces,
    "fewer planes": fewer_planes,
    "one extent": one_extent,
    "swap file gone": lambda folder: (folder / SWAP_NAME).unlink(),
}


@pytest.fixture
def committed(nvme_dir: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    folder = nvme_dir / "run"
    policy = policy_of(folder, ENTRY, "mixed")
    with begin(policy) as engine:
        train(engine, ENTRY, until=2)
    yield policy, folder


@pytest.mark.parametrize("what", LIES)
def test_a_run_that_cannot_be_adopted_leaves_nothing_open(
    what: str, committed: tuple[dict[str, Any], Path], want: dict[str, str]
) -> None:
    """Refused with a reason; the model is what it was, the files too, and mended they go on."""
    policy, folder = committed
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    LIES[what](folder)
    told = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    model = ENTRY.make_model()
    weights, random = snapshot(model), torch.get_rng_state()
    with pytest.raises(offload.OffloadError):
        offload.offload(model, policy, weights="resume")
    assert snapshot(model) == weights and torch.equal(random, torch.get_rng_state())
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == told
    for path in folder.iterdir():
        path.unlink()
    for name, content in before.items():
        (folder / name).write_bytes(content)
    check_resumes(policy, 2, want)


def test_a_checkpoint_is_not_trained_in(nvme_dir: Path, want: dict[str, str]) -> None:
    """Its planes have one extent: the first step would write over the only copy."""
    saved = nvme_dir / "saved"
    with begin(policy_of(nvme_dir / "run", ENTRY, "nvme")) as engine:
        train(engine, ENTRY, until=2)
        engine.checkpoint(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(StateError, match="is a checkpoint.*Pass its folder as weights="):
        start(ENTRY, policy_of(saved, ENTRY, "nvme"), "resume")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    with start(ENTRY, policy_of(nvme_dir / "other", ENTRY, "nvme"), str(saved)) as engine:
        train(engine, ENTRY, until=NUM_STEPS)
        assert record_of(engine) == want
